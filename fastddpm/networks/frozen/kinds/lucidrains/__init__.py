"""The `Unet`s of denoising_diffusion_pytorch, frozen: what they are (`blueprint`), and their layers (`lowering`)."""
