"""denoising_diffusion_pytorch's U-Nets, frozen."""
