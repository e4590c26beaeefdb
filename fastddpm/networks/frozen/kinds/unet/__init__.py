"""fastddpm's own U-Net, frozen."""
