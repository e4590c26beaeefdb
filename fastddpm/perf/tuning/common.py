"""Measure the layers of well-known U-Nets on a GPU that has no tuned table."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from fastddpm_kernels import tuned
from fastddpm_kernels.tuned import Key

from fastddpm.networks.unet.config import UNetConfig
from fastddpm.networks.unet.model import UNet
from fastddpm.perf.tuning.search import Outcome, tune
from fastddpm.perf.tuning.shapes import WHOLE, whole_keys
from fastddpm.perf.tuning.store import save

CIFAR10 = UNetConfig(
    sample_size=32, block_out_channels=(128, 256, 256, 256), norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False,
    freq_shift=1, attention_head_dim=None,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
# Batches of DDPM's CIFAR-10 U-Net, and of Stable Diffusion 1.5: one picture with guidance.
BATCHES = {"cifar10": (1, 64), "stable-diffusion-1.5": (2,)}


def common_keys(dtype: torch.dtype = torch.float16) -> dict[Key, int]:
    """Return the shapes of whole layers of the published CIFAR-10 U-Net and, with diffusers, Stable Diffusion 1.5."""
    with torch.device("meta"):
        models: dict[str, tuple[Any, int]] = {"cifar10": (UNet(CIFAR10), 32)}
        with contextlib.suppress(ImportError):
            from diffusers import UNet2DConditionModel

            models["stable-diffusion-1.5"] = UNet2DConditionModel(sample_size=64, cross_attention_dim=768), 64
    keys: dict[Key, int] = {}
    for name, (unet, size) in models.items():
        for batch in BATCHES[name]:
            for key, calls in whole_keys(unet, (batch, size, size), dtype, WHOLE).items():
                keys[key] = keys.get(key, 0) + calls
    return keys


def measure_common(device: torch.device, seconds: float) -> list[Outcome] | None:
    """Measure `common_keys` and keep what wins in the user's table; None if the device has a table already."""
    if any(table.ignored is None for table in tuned.tables(device)):
        return None
    outcomes = tune(common_keys(), device, seconds)
    save(outcomes, device, tuned.user_path(device))
    return outcomes
