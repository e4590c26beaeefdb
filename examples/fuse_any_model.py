"""Fuse the norms of a network that this project does not own, shows what was fused, and samples from it.

python examples/fuse_any_model.py     (a latent text-to-image U-Net in small, with random weights; needs diffusers)
"""

import torch
from diffusers import UNet2DConditionModel

from fastddpm import NoiseSchedule, Sampler, fuse

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = UNet2DConditionModel(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
).to(device)
text = torch.randn(2, 7, 32, device=device)  # what a text encoder gives for two prompts

# Each pair of GroupNorm and SiLU is held against float64 on this example.
example = {"sample": torch.randn(2, 4, 16, 16, device=device), "timestep": 500, "encoder_hidden_states": text}
fused = fuse(model, example)
print(fused)


def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return fused.model(x, t, encoder_hidden_states=text).sample


sampler = Sampler(predict, NoiseSchedule.scaled_linear(1000), "ddim", 20, clip_sample=False, device=device)
print(sampler.sample(2, shape=(4, 16, 16), seed=0).shape)
