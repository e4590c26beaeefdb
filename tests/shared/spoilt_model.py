"""A model whose class 1 is not a number."""

from __future__ import annotations

import torch
from unets import TINY

from fastddpm import UNet


def spoilt_unet() -> UNet:
    """A U-Net for 8 x 8 pixels and three classes."""
    torch.manual_seed(0)
    unet = UNet(**TINY, num_class_embeds=3)
    unet.class_embedding.weight.data[1] = torch.nan
    return unet
