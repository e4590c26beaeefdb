"""The `Unet`s of denoising_diffusion_pytorch, frozen: their properties (`blueprint`) and their layers (`lowering`)."""
