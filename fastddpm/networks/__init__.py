"""Networks: fastddpm's U-Net, U-Nets prepared for sampling, and any other model called in one way."""
