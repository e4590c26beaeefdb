"""Fast, exact sampling from denoising diffusion models (DDPM)."""

__version__ = "0.1.0"
