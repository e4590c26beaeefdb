"""Samples in [-1, 1] become uint8, PNG, GIF, npz or a folder of files, and picture files become samples."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastddpm.common.files import atomic_write

BACKGROUND, INK = (255, 255, 255), (40, 40, 40)
CELL_PIXELS = 48  # a sample is scaled up to about this size in a grid
GAP = 4
CAPTION_HEIGHT = 16
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # PIL's name of an image with that many channels


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


def strip(
    rows: Sequence[Sequence[Tensor | None]],
    *,
    row_captions: Sequence[str] | None = None,
    column_captions: Sequence[str] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """A table of pictures, such as the denoising of a few samples from left to right, with captions.

    Args:
        rows: images float [C, H, W] in [-1, 1], row by row; None leaves a cell empty. Smaller ones are scaled up to
            the size of the largest by whole pixels where that fits, and centred.
        row_captions: at the left of each row; column_captions: above each column.
        scale: how many pixels wide a pixel of the largest image is drawn; by default so that a cell is about 48 pixels
            or more.

    Raises:
        ValueError: there is no image, the rows are not of equal length, there is not one caption for each, or
            `scale` is not positive.
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
    """The denoising of the first samples, from left to right: x_t and below it, where given, the predicted x0.

    Args:
        x, x0: float [K, N, C, H, W], the states and the predictions at K moments.
        timesteps: K timesteps, written above the columns.
        columns: how many of the K moments are drawn, evenly spaced, the last one among them.
        rows: how many of the N samples are drawn.

    Raises:
        ValueError: there is no moment, or not one timestep for each, or `columns` or `rows` is not positive.
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
    """At most `wanted` different indices from 0 to count - 1, evenly spaced, the last one among them."""
    if wanted == 1:
        return [count - 1]
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def picture_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """The files below a folder that PIL could read, by their suffixes, folder by folder in order.

    What is hidden is left out, and so are links to a folder around them.
    """
    Image.init()
    suffixes = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    for place, folders, files in os.walk(folder, followlinks=True):
        around = Path(place).resolve()
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not around.is_relative_to(Path(place, name).resolve())
        )
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield Path(place, name)


def upright_shape(picture: Image.Image) -> tuple[int, int, int]:
    """(C, H, W) of a picture as `read_pixels` sees it, turned as its EXIF data says: C is 1 if it is grey, else 3."""
    grey = picture.mode in ("1", "L", "LA", "F") or picture.mode.startswith("I")
    sideways = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    height, width = (picture.width, picture.height) if sideways else (picture.height, picture.width)
    return 1 if grey else 3, height, width


def read_npz(path: str | os.PathLike[str], names: Collection[str]) -> dict[str, np.ndarray]:
    """The named arrays of a `.npz`, as far as it has them, and an empty one for each other name; executes nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array")
            return {name: file[name] if name in names else np.empty(0) for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a .npz that can be read: {str(error).splitlines()[0]}") from None


def load_image(
    path: str | os.PathLike[str], shape: tuple[int, int, int], *, invert: bool = False, average: bool = False
) -> Tensor:
    """Read a picture file as a sample; see `read_pixels` for how.

    Args:
        path: of a PNG, JPEG or any other file that PIL reads.
        shape: (C, H, W) of the sample; C is 1, 3 or 4.
        invert: exchange black and white, for ink on paper where the model knows light on dark.
        average: resize by the mean of each cell, as `torch.nn.functional.avg_pool2d`, instead of by Lanczos' kernel.

    Returns:
        float32 [C, H, W] in [-1, 1].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, or `shape` has another number of channels.
    """
    pixels = read_pixels(path, shape, average=average).astype(np.float32)
    values = torch.from_numpy(pixels) / 127.5 - 1
    if invert:
        values[:3] *= -1  # not the opacity
    return values


def read_pixels(path: str | os.PathLike[str], shape: tuple[int, int, int], *, average: bool = False) -> np.ndarray:
    """Read a picture file as uint8 [C, H, W].

    It is turned upright as its EXIF data says, cut to the middle part of the wanted aspect ratio, resized with
    anti-aliasing if its size is another, and converted to grey or colour; what is transparent becomes black. A file
    that `save_folder` wrote comes back to the rounding to 8 bits.

    Args and Raises: as `load_image`.
    """
    _check_channels(shape)
    try:
        with Image.open(path) as file:
            return fit_pixels(ImageOps.exif_transpose(file), shape, average=average)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture that can be read") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {error}") from None
    except (SyntaxError, OSError) as error:  # what PIL raises for broken files; with an errno it is the system's
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is not a picture that can be read: {error}") from None


def fit_pixels(picture: Image.Image, shape: tuple[int, int, int], *, average: bool = False) -> np.ndarray:
    """A picture cut, resized and converted to uint8 [C, H, W], as `read_pixels` says.

    Raises:
        ValueError: `shape` has another number of channels than 1, 3 or 4.
    """
    _check_channels(shape)
    channels, height, width = shape
    if picture.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off instead of scaling
        scaled = np.asarray(picture).astype(np.float64) / 257
        picture = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    elif channels != 4:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    picture = picture.convert(MODES[channels])
    if picture.size != (width, height):
        kernel = Image.Resampling.BOX if average else Image.Resampling.LANCZOS
        picture = ImageOps.fit(picture, (width, height), kernel)
    pixels = np.array(picture)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _check_channels(shape: tuple[int, int, int]) -> None:
    if shape[0] not in MODES:
        raise ValueError(f"shape has {shape[0]} channels, must have 1, 3 or 4 to be read from a picture")


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
