"""Write samples as PNG, GIF, `.npz` and folders of PNGs, each file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastddpm.common.files import atomic_write
from fastddpm.common.images.drawing import grid, to_pil
from fastddpm.common.images.pixels import CHANNELS, to_uint8


def check_drawable(channels: int, name: str = "samples") -> None:
    """Raise ValueError if samples of so many channels cannot be written as pictures; an `.npz` holds any."""
    if channels not in CHANNELS:
        raise ValueError(f"{name} have {channels} channels, must have 1, 3 or 4 to be drawn; an .npz holds any")


def save_picture(path: str | os.PathLike[str], picture: Image.Image) -> None:
    """Write a picture to a PNG file."""
    atomic_write(path, lambda temporary: picture.save(temporary, format="PNG"))


def save_grid(path: str | os.PathLike[str], images: Tensor, labels: Sequence[int] | None = None) -> None:
    """Write `grid(images, labels)` to a PNG file."""
    save_picture(path, grid(images, labels))


def save_npz(
    path: str | os.PathLike[str],
    images: Tensor,
    labels: Sequence[int] | Tensor | None = None,
    *,
    in_colour: bool = False,
) -> None:
    """Write `arr_0` uint8 [N, H, W, C] and, with labels, `arr_1` int64 [N].

    Args:
        path: of the file.
        images: float [N, C, H, W] in [-1, 1], or uint8.
        labels: one per image.
        in_colour: give grey images three equal channels, which the ADM evaluator and others need.
    """
    pixels = images.permute(0, 2, 3, 1).cpu().numpy() if images.dtype == torch.uint8 else to_uint8(images)
    if in_colour and pixels.shape[3] == 1:
        pixels = pixels.repeat(3, axis=3)
    arrays = [pixels]
    if labels is not None:
        arrays.append(np.asarray(labels, dtype=np.int64))

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, *arrays)

    atomic_write(path, write)


def save_folder(path: str | os.PathLike[str], images: Tensor, labels: Sequence[int] | None = None) -> None:
    """Write one PNG per image into the folder `path`: 00000.png, or 00000-class3.png with labels."""
    pictures = to_pil(images)
    digits = max(5, len(str(len(pictures) - 1)))
    for index, picture in enumerate(pictures):
        suffix = f"-class{labels[index]}" if labels is not None else ""
        name = Path(path) / f"{index:0{digits}d}{suffix}.png"
        atomic_write(name, lambda temporary, picture=picture: picture.save(temporary, format="PNG"))  # type: ignore[misc]


def save_gif(path: str | os.PathLike[str], frames: Sequence[Image.Image], *, seconds: float = 4.0) -> None:
    """Write an endless animation of about `seconds`, which rests on its last frame for a second."""
    if not frames:
        raise ValueError("frames is empty, must hold at least one picture")
    each = max(20, round(1000 * seconds / len(frames) / 10) * 10)
    durations = [each] * (len(frames) - 1) + [each + 1000]

    def write(temporary: Path) -> None:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=list(frames[1:]), duration=durations, loop=0
        )

    atomic_write(path, write)
