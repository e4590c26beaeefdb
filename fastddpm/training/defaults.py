"""Choose model and diffusion settings that suit the data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fastddpm.common.images import is_archive, list_pictures, look_at_pictures
from fastddpm.training.data import ArraySource

SIZES = (8, 16, 32, 64, 128)  # pixels a side to choose from
ATTENTION_AT = 16  # pixels a side, and below


@dataclass(frozen=True)
class DataLook:
    """The properties of data that decide the defaults.

    Attributes:
        images: their number, including broken ones.
        size: pixels a side for the U-Net: that of an `.npz`; for pictures the largest of `SIZES` that at least half of
            them reach.
        channels: 3 if any picture is coloured, else 1; for an `.npz` its own number.
        classes: the number of labels for the U-Net, from 0 to the largest that occurs; 0 for none.
    """

    images: int
    size: int | tuple[int, int]
    channels: int
    classes: int


def look_at(data: str | os.PathLike[str]) -> DataLook:
    """Inspect all pictures of a folder, or an `.npz`.

    Raises:
        FileNotFoundError, ValueError: no image can be read.
    """
    path = Path(data)
    if is_archive(path):
        source = ArraySource(path)
        channels, height, width = source.shape
        return DataLook(len(source), height if height == width else (height, width), channels, len(source.classes))
    listing = list_pictures(path)
    shapes = [look.shape for look in look_at_pictures(listing.root, listing.paths) if look is not None]
    if not shapes:
        raise ValueError(f"{path} holds no picture that can be read")
    side = median(min(height, width) for _, height, width in shapes)
    size = max([size for size in SIZES if size <= side], default=SIZES[0])
    return DataLook(len(listing.paths), size, max(channels for channels, *_ in shapes), len(listing.classes))


def default_model(look: DataLook, *, width: int | None = None) -> dict[str, Any]:
    """Return the keys of [model]: a U-Net for such data.

    Levels halve the image down to 4 to 7 pixels a side (8 to 15 for images of 64 pixels or more). The first level has
    `width` channels, the others twice as many. Levels of 16 pixels a side or fewer have attention. Small data sets get
    dropout, as in Ho et al. 2020 for CIFAR-10. With classes there is one more label, "none", for guidance.
    """
    sides = (look.size, look.size) if isinstance(look.size, int) else look.size
    least = 4 if min(sides) < 64 else 8
    levels = 1
    while min(sides) >= least * 2**levels and all(side % 2**levels == 0 for side in sides) and levels < 5:
        levels += 1
    width = width or (32 if min(sides) <= 16 else 64)
    attentive = [min(sides) // 2**level <= ATTENTION_AT and level > 0 for level in range(levels)]
    keys: dict[str, Any] = {
        "sample_size": look.size,
        "in_channels": look.channels,
        "out_channels": look.channels,
        "block_out_channels": [width] + [2 * width] * (levels - 1),
        "down_block_types": ["AttnDownBlock2D" if yes else "DownBlock2D" for yes in attentive],
        "up_block_types": ["AttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attentive)],
        "attention_head_dim": min(64, width),
        "norm_num_groups": next(groups for groups in (32, 16, 8, 4, 2, 1) if width % groups == 0),
        "dropout": 0.1 if look.images < 100_000 else 0.0,
    }
    if look.classes:
        keys |= {"num_class_embeds": look.classes + 1, "null_class": look.classes}
    return keys


def default_text_model(look: DataLook, text_width: int, *, width: int | None = None) -> dict[str, Any]:
    """Return the keys of [model]: diffusers' `UNet2DConditionModel` for such data, with texts of this width.

    Levels and widths are those of `default_model`; levels of 16 pixels a side or fewer read the text. The variance is
    learned, as in DeepFloyd IF, whose pipeline then samples the model.
    """
    keys = default_model(look, width=width)
    attentive = [kind.startswith("Attn") for kind in keys["down_block_types"]]
    attentive[-1] = True  # also where images are so large that no level is small
    widest = keys["block_out_channels"][-1]
    return keys | {
        "out_channels": 2 * look.channels,
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attentive],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attentive)],
        "attention_head_dim": max(1, widest // 32),  # diffusers means the number of heads
        "encoder_hid_dim_type": "text_proj",
        "encoder_hid_dim": text_width,
        "cross_attention_dim": widest,
    }


def default_diffusion(look: DataLook, *, texts: bool = False) -> dict[str, Any]:
    """Return the keys of [diffusion]: cosine schedule, stratified timesteps, and label dropout for guidance."""
    keys: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "timestep_sampling": "stratified"}
    if look.classes or texts:
        keys["label_dropout"] = 0.1
    if texts:
        keys |= {"variance_type": "learned_range", "loss": "hybrid"}
    return keys
