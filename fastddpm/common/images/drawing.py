"""Draw samples as PIL images, grids and strips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastddpm.common.images.pixels import CHANNELS, check_memory, to_uint8

BACKGROUND, INK = (255, 255, 255), (40, 40, 40)
CELL_PIXELS = 48  # a sample is scaled up to about this size in a grid
GAP = 4
CAPTION_HEIGHT = 16
GIF_SIDE = 0xFFFF  # the most pixels of a side that the format can state


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return images float [N, C, H, W] in [-1, 1], of 1, 3 or 4 channels, as PIL images."""
    return [_pil(image) for image in to_uint8(images)]


def _pil(image: np.ndarray) -> Image.Image:
    if image.shape[2] not in CHANNELS:
        raise ValueError(f"images have {image.shape[2]} channels, must have 1, 3 or 4 to be drawn")
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def grid(
    images: Tensor, labels: Sequence[int] | None = None, *, columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """Draw many samples in one picture: cells with gaps, each scaled up by whole pixels, with its label.

    Args:
        images: float [N, C, H, W] in [-1, 1].
        labels: one per image. Where every row of the grid holds one class, rows are labelled at the left, else each
            cell is labelled above.
        columns: cells per row; by default 10, or as many as there are if that is less.
        scale: how many pixels wide a sample's pixel is drawn; by default so that a cell is about 48 pixels or more.

    Raises:
        ValueError: `labels` is not as long as `images`, or `columns` or `scale` is not positive.
    """
    height, width = images.shape[2:]
    cells = _Cells.of(len(images), (height, width), labels, columns, scale)
    canvas = Image.new("RGB", cells.canvas, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=CAPTION_HEIGHT - 2)
    size = (width * cells.scale, height * cells.scale)
    for index, image in enumerate(to_pil(images)):
        row, column = divmod(index, cells.columns)
        x, y = cells.left + GAP + column * cells.step_x, GAP + cells.above + row * cells.step_y
        canvas.paste(image.resize(size, Image.Resampling.NEAREST), (x, y))
        if labels is not None and cells.left and column == 0:
            draw.text((cells.left / 2, y + size[1] / 2), str(labels[index]), INK, font, anchor="mm")
        elif labels is not None and cells.above:
            draw.text((x + size[0] / 2, y - cells.above / 2), str(labels[index]), INK, font, anchor="mm")
    return canvas


def grid_size(
    count: int, size: Sequence[int], labels: Sequence[int] | None = None, *, columns: int | None = None
) -> tuple[int, int]:
    """Return (width, height) of the picture that `grid` draws of `count` images of (H, W)."""
    return _Cells.of(count, size, labels, columns, None).canvas


def check_canvas(width: int, height: int, kind: str) -> None:
    """Raise ValueError if a picture cannot be drawn in memory, or a `.gif` (which `kind` is then) cannot hold it."""
    told = f"a {kind} of all samples has {width} x {height} pixels"
    if kind == ".gif" and max(width, height) > GIF_SIDE:
        raise ValueError(f"{told}, may have at most {GIF_SIDE} a side; an .npz or a folder holds any number")
    check_memory(4 * width * height, told)


class _Cells(NamedTuple):
    """Where the cells of a grid lie.

    Attributes:
        columns, scale: as for `grid`.
        left, above: pixels for labels at the left of rows, or above each cell.
        step_x, step_y: from a cell to the next one.
        canvas: (width, height) of the picture.
    """

    columns: int
    scale: int
    left: int
    above: int
    step_x: int
    step_y: int
    canvas: tuple[int, int]

    @classmethod
    def of(
        cls, count: int, size: Sequence[int], labels: Sequence[int] | None, columns: int | None, scale: int | None
    ) -> _Cells:
        if labels is not None and len(labels) != count:
            raise ValueError(f"labels has {len(labels)} entries, must have one per image, {count}")
        columns = min(count, 10 if count >= 10 else count) if columns is None else columns
        height, width = size
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
        canvas = (left + columns * step_x + GAP, rows * step_y + GAP)
        return cls(columns, scale, left, above, step_x, step_y, canvas)


def strip(
    rows: Sequence[Sequence[Tensor | None]],
    *,
    row_captions: Sequence[str] | None = None,
    column_captions: Sequence[str] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Draw a table of pictures with captions, such as the denoising of a few samples from left to right.

    Args:
        rows: images float [C, H, W] in [-1, 1], row by row; None leaves a cell empty. Smaller ones are scaled up to
            the size of the largest by whole pixels where that fits, and centred.
        row_captions: at the left of each row; column_captions: above each column.
        scale: how many pixels wide a pixel of the largest image is drawn; by default so that a cell is about 48 pixels
            or more.

    Raises:
        ValueError: no image, rows of different lengths, another number of captions, or a `scale` below 1.
    """
    images = [image for row in rows for image in row if image is not None]
    if not images:
        raise ValueError("rows holds no image, must hold at least one")
    columns = len(rows[0])
    if any(len(row) != columns for row in rows):
        raise ValueError(f"rows have {sorted({len(row) for row in rows})} images, must have equally many")
    for name, captions, count in (("row", row_captions, len(rows)), ("column", column_captions, columns)):
        if captions is not None and len(captions) != count:
            raise ValueError(f"{name}_captions has {len(captions)} entries, must have one per {name}, {count}")
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    scale = max(1, -(-CELL_PIXELS // min(height, width))) if scale is None else scale
    if scale < 1:
        raise ValueError(f"scale is {scale}, must be positive")
    cell_x, cell_y = width * scale, height * scale

    font = ImageFont.load_default(size=CAPTION_HEIGHT - 4)
    left = 0 if row_captions is None else 2 * GAP + max(round(font.getlength(text)) for text in row_captions)
    widest = 0 if column_captions is None else max(round(font.getlength(text)) for text in column_captions)
    step_x, step_y = max(cell_x, widest) + GAP, cell_y + GAP
    above = 0 if column_captions is None else CAPTION_HEIGHT
    canvas = Image.new("RGB", (left + columns * step_x + GAP, above + len(rows) * step_y + GAP), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for column, text in enumerate(column_captions or ()):
        draw.text((left + GAP + column * step_x + (step_x - GAP) / 2, above / 2 + 1), text, INK, font, anchor="mm")
    for index, row in enumerate(rows):
        y = above + GAP + index * step_y
        if row_captions is not None:
            draw.text((left - GAP, y + cell_y / 2), row_captions[index], INK, font, anchor="rm")
        for column, image in enumerate(row):
            if image is None:
                continue
            factor = min(cell_x // image.shape[2], cell_y // image.shape[1])
            picture = to_pil(image[None])[0]
            picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
            x = left + GAP + column * step_x + (step_x - GAP - picture.width) // 2
            canvas.paste(picture, (x, y + (cell_y - picture.height) // 2))
    return canvas


def trajectory_strip(
    x: Tensor, x0: Tensor | None, timesteps: Sequence[int] | Tensor, *, columns: int = 10, rows: int = 4
) -> Image.Image:
    """Draw the denoising of the first samples from left to right: x_t and below it, if given, the predicted x0.

    Args:
        x, x0: float [K, N, C, H, W], the states and the predictions at K moments.
        timesteps: K timesteps, written above the columns.
        columns: how many of the K moments are drawn, evenly spaced, the last one among them.
        rows: how many of the N samples are drawn.

    Raises:
        ValueError: no moment, another number of timesteps, or `columns` or `rows` below 1.
    """
    moments = len(x)
    times = torch.as_tensor(timesteps).tolist()
    if moments == 0 or len(times) != moments:
        raise ValueError(f"timesteps has {len(times)} entries and x {moments}, must have equally many and at least one")
    if columns < 1 or rows < 1:
        raise ValueError(f"columns is {columns} and rows is {rows}, both must be positive")
    shown = evenly(moments, columns)
    table: list[list[Tensor]] = []
    captions: list[str] = []
    for sample in range(min(rows, x.shape[1])):
        for name, states in (("x", x), ("x0", x0)):
            if states is not None:
                table.append([states[k, sample] for k in shown])
                captions.append(name)
    return strip(table, row_captions=captions, column_captions=[f"t {times[k]}" for k in shown])


def evenly(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` different indices from 0 to count - 1, evenly spaced, the last one among them."""
    if wanted == 1:
        return [count - 1]
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})
