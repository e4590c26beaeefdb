"""A model whose class 1 is not a number."""

from __future__ import annotations

import torch

from fastddpm import UNet


def spoilt_unet() -> UNet:
    """A U-Net for 8 x 8 pixels and three classes."""
    torch.manual_seed(0)
    unet = UNet(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4, num_class_embeds=3,
    )  # fmt: skip
    unet.class_embedding.weight.data[1] = torch.nan
    return unet
