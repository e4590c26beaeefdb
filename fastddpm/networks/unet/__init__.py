"""The U-Net, with diffusers' parameter names and semantics."""
