"""diffusers' `UNet2DConditionModel`, frozen: Stable Diffusion, SDXL, DeepFloyd IF, unCLIP and their like."""
