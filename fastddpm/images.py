"""Samples in [-1, 1] become uint8, PNG, GIF, npz or a folder of files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastddpm._files import atomic_write

BACKGROUND, INK = (255, 255, 255), (40, 40, 40)
CELL_PIXELS = 48  # a sample is scaled up to about this size in a grid
GAP = 4
CAPTION_HEIGHT = 16


def to_uint8(images: Tensor) -> np.ndarray:
    """Images float [N, C, H, W] in [-1, 1] (clipped to it) as uint8 [N, H, W, C], rounded as diffusers rounds."""
    scaled = (images.detach().float() / 2 + 0.5).clamp(0, 1).mul(255).round()
    return scaled.permute(0, 2, 3, 1).to("cpu").numpy().astype(np.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images float [N, C, H, W] in [-1, 1] with 1, 3 or 4 channels as PIL images."""
    return [_pil(image) for image in to_uint8(images)]


def _pil(image: np.ndarray) -> Image.Image:
    if image.shape[2] not in (1, 3, 4):
        raise ValueError(f"images have {image.shape[2]} channels, must have 1, 3 or 4 to be drawn")
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def grid(
    images: Tensor, labels: Sequence[int] | None = None, *, columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """A picture of many samples: cells with gaps, each sample scaled up by whole pixels, with its label.

    Args:
        images: float [N, C, H, W] in [-1, 1].
        labels: one per image. Where every row of the grid holds one class, rows are labelled at the left, else each
            cell is labelled above.
        columns: cells per row; by default near a square, and 10 for 100.
        scale: how many pixels wide a sample's pixel is drawn; by default so that a cell is about 48 pixels or more.

    Raises:
        ValueError: `labels` is not as long as `images`, or `columns` or `scale` is not positive.
    """
    count = len(images)
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels has {len(labels)} entries, must have one per image, {count}")
    columns = min(count, 10 if count >= 10 else count) if columns is None else columns
    height, width = images.shape[2:]
    scale = max(1, -(-CELL_PIXELS // min(height, width))) if scale is None else scale
    if columns < 1 or scale < 1:
        raise ValueError(f"columns is {columns} and scale is {scale}, both must be positive")
    rows = -(-count // columns)
    by_row = labels is not None and all(
        len(set(labels[row * columns : (row + 1) * columns])) == 1 for row in range(rows)
    )
    left = 2 * CAPTION_HEIGHT if by_row else 0
    above = CAPTION_HEIGHT if labels is not None and not by_row else 0
    step_x, step_y = width * scale + GAP, height * scale + GAP + above
    canvas = Image.new("RGB", (left + columns * step_x + GAP, rows * step_y + GAP), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=CAPTION_HEIGHT - 2)
    for index, image in enumerate(to_pil(images)):
        row, column = divmod(index, columns)
        x, y = left + GAP + column * step_x, GAP + above + row * step_y
        canvas.paste(image.resize((width * scale, height * scale), Image.Resampling.NEAREST), (x, y))
        if labels is not None and by_row and column == 0:
            draw.text((left / 2, y + height * scale / 2), str(labels[index]), INK, font, anchor="mm")
        elif labels is not None and not by_row:
            draw.text((x + width * scale / 2, y - above / 2), str(labels[index]), INK, font, anchor="mm")
    return canvas


def save_grid(path: str | os.PathLike[str], images: Tensor, labels: Sequence[int] | None = None) -> None:
    """Writes `grid(images, labels)` to a PNG file."""
    picture = grid(images, labels)
    atomic_write(path, lambda temporary: picture.save(temporary, format="PNG"))


def save_npz(path: str | os.PathLike[str], images: Tensor, labels: Sequence[int] | None = None) -> None:
    """Writes `arr_0` uint8 [N, H, W, C] and, with labels, `arr_1` int64 [N], as FID evaluators read them."""
    arrays = [to_uint8(images)]
    if labels is not None:
        arrays.append(np.asarray(labels, dtype=np.int64))

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, *arrays)

    atomic_write(path, write)


def save_folder(path: str | os.PathLike[str], images: Tensor, labels: Sequence[int] | None = None) -> None:
    """Writes one PNG per image into the folder `path`: 00000.png, or 00000-class3.png with labels."""
    pictures = to_pil(images)
    digits = max(5, len(str(len(pictures) - 1)))
    for index, picture in enumerate(pictures):
        suffix = f"-class{labels[index]}" if labels is not None else ""
        name = Path(path) / f"{index:0{digits}d}{suffix}.png"
        atomic_write(name, lambda temporary, picture=picture: picture.save(temporary, format="PNG"))  # type: ignore[misc]


def save_gif(path: str | os.PathLike[str], frames: Sequence[Image.Image], *, seconds: float = 4.0) -> None:
    """Writes an endless animation of about `seconds`, which rests on its last frame for a second."""
    if not frames:
        raise ValueError("frames is empty, must hold at least one picture")
    each = max(20, round(1000 * seconds / len(frames) / 10) * 10)
    durations = [each] * (len(frames) - 1) + [each + 1000]

    def write(temporary: Path) -> None:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=list(frames[1:]), duration=durations, loop=0
        )

    atomic_write(path, write)
