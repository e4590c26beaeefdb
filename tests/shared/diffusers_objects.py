"""Small objects of diffusers, seeded, for the tests of what accelerates them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

# Both compute in float32, with different but equivalent formulas: a few units of rounding per step, which steps of
# large gain (x0 from epsilon at high noise) carry on. One level of an 8-bit image is 4e-3.
CLOSE = 1e-4
# The U-Net of diffusers' own fast tests.
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def unet(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**{**SMALL, **changes}).eval()


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ddpm(**settings: Any) -> Any:
    return quiet(DDPMPipeline(unet(), DDPMScheduler(**settings)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipeline: Any, **arguments: Any) -> Tensor:
    given = {"batch_size": 2, "generator": seeded(), "num_inference_steps": 9, "output_type": "pt", **arguments}
    images = pipeline(**given).images
    assert images.shape[0] == given["batch_size"]
    return images
