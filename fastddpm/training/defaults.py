"""What to train, if nothing is said: chosen from what the data look like."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fastddpm.common.images import evenly, upright_shape
from fastddpm.training.data import ArraySource
from fastddpm.training.folder import list_pictures

SIZES = (8, 16, 32, 64, 128)  # pixels a side that are chosen by themselves
LOOKED_AT = 200  # pictures whose headers are read
ATTENTION_AT = 16  # pixels a side, and below


@dataclass(frozen=True)
class DataLook:
    """What data look like.

    Attributes:
        images: how many there are, broken ones among them.
        size: pixels a side that the U-Net should have: of an `.npz` its own, of pictures the largest of `SIZES` that
            half of them have at least.
        channels: 1 for grey pictures, else 3.
        classes: how many classes there are, 0 for none.
    """

    images: int
    size: int | tuple[int, int]
    channels: int
    classes: int


def look_at(data: str | os.PathLike[str]) -> DataLook:
    """Look at a folder of pictures or an `.npz`.

    Raises:
        FileNotFoundError, ValueError: there is nothing, or nothing that can be read.
    """
    from PIL import Image

    path = Path(data)
    if path.suffix.lower() == ".npz" and not path.is_dir():
        source = ArraySource(path)
        channels, height, width = source.shape
        return DataLook(len(source), height if height == width else (height, width), channels, len(source.classes))
    listing = list_pictures(path)
    sides: list[int] = []
    coloured = False
    for place in evenly(len(listing.paths), LOOKED_AT):
        try:
            with Image.open(listing.root / listing.paths[place]) as picture:
                channels, height, width = upright_shape(picture)
                sides.append(min(height, width))
                coloured |= channels == 3
        except Exception:  # found out, and told, when all are read
            continue
    if not sides:
        raise ValueError(f"{path} holds no picture that can be read")
    size = max([size for size in SIZES if size <= median(sides)], default=SIZES[0])
    return DataLook(len(listing.paths), size, 3 if coloured else 1, len(listing.classes))


def default_model(look: DataLook, *, width: int | None = None) -> dict[str, Any]:
    """Keys of [model]: a U-Net for such data.

    Levels halve the image down to 4 to 7 pixels a side (8 to 15 from 64 pixels on); the first is `width` channels wide,
    the others twice that; attention from 16 pixels a side on. Dropout where there are few images, as Ho et al. 2020 for
    CIFAR-10. With classes there is one more, which means "none", for guidance.
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


def default_diffusion(look: DataLook) -> dict[str, Any]:
    """Keys of [diffusion]: the cosine schedule, timesteps spread evenly over a batch, labels dropped for guidance."""
    keys: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "timestep_sampling": "stratified"}
    if look.classes:
        keys["label_dropout"] = 0.1
    return keys
