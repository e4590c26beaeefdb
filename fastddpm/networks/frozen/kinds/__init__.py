"""The kinds of U-Net that can be frozen, one folder per library."""
