"""MONAI's `DiffusionModelUNet` in two dimensions, frozen, with and without cross-attention."""
