"""Read picture files and PIL images; convert size, orientation, colour, opacity, depth and animations."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastddpm.common.images.pixels import CHANNELS, from_uint8

# What Pillow may open. Other formats run programs (EPS starts Ghostscript) or hold no pictures.
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")
MOST_PIXELS = 1 << 26  # of one picture: 67 million, about a gigabyte while it is decoded
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # PIL's name of an image with that many channels
_GREY = ("1", "L", "LA", "La", "F")
_OPACITY = ("RGBA", "LA", "PA", "RGBa", "La")


class _Decoding:
    """Let threads decode pictures of at most `MOST_PIXELS` in all at a time, so that many large ones take turns."""

    def __init__(self) -> None:
        self._changed, self._pixels = threading.Condition(), 0

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Wait until so many pixels may be decoded, and count them while they are."""
        with self._changed:
            self._changed.wait_for(lambda: self._pixels + pixels <= MOST_PIXELS)
            self._pixels += pixels
        try:
            yield
        finally:
            with self._changed:
                self._pixels -= pixels
                self._changed.notify_all()


_decoding = _Decoding()


class _Unwarned:
    """Ignore Pillow's own warning of many pixels while pictures are opened, in any number of threads at a time.

    `warnings.catch_warnings` would put back the filters of other threads.
    """

    def __init__(self) -> None:
        self._lock, self._opening = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._opening += 1
            if self._opening == 1:
                warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds", Image.DecompressionBombWarning)
                self._filter = warnings.filters[0]

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._opening -= 1
            if self._opening == 0 and self._filter in warnings.filters:
                warnings.filters.remove(self._filter)  # type: ignore[attr-defined]


_unwarned = _Unwarned()


class Look(NamedTuple):
    """What a picture is, by its header.

    Attributes:
        shape: (C, H, W), turned upright: C is 1 if it is grey, else 3.
        animated: whether it has several frames. The first one is the picture.
    """

    shape: tuple[int, int, int]
    animated: bool


def formats() -> list[str]:
    """Return the names of `FORMATS` that this Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def suffixes() -> set[str]:
    """Return the suffixes of picture files, in lower case."""
    Image.init()
    return {suffix for suffix, kind in Image.EXTENSION.items() if kind in FORMATS}


@contextmanager
def open_picture(path: str | os.PathLike[str], content: bytes | None = None) -> Iterator[Image.Image]:
    """Open a picture of one of `FORMATS`; what fails inside, too, is told as an error of this file.

    Args:
        path: of the file.
        content: of the file, if it has been read.

    Raises:
        OSError: the system cannot read the file.
        ValueError: it is no picture, is broken, or has too many pixels; one line, which names it.
    """
    try:
        source = path if content is None else io.BytesIO(content)
        with _unwarned, Image.open(source, formats=formats()) as picture:
            check_pixels(picture.size)
            yield picture
        return
    except UnidentifiedImageError:
        reason = f"is not a picture that can be read: it is none of {', '.join(formats())}"
    except Image.DecompressionBombError:
        reason = f"has too many pixels, may have at most {MOST_PIXELS:,}"
    except OSError as error:
        if error.errno is not None:
            raise
        reason = f"is not a picture that can be read: {error}"
    except _Refused as error:
        reason = str(error)
    except Exception as error:  # decoders raise anything for broken files
        first = str(error).partition("\n")[0] or type(error).__name__
        reason = f"is not a picture that can be read: {first}"
    raise ValueError(f"{os.fspath(path)} {reason}")


class _Refused(ValueError):
    """A picture that is whole but is not taken."""


def check_pixels(size: tuple[int, int]) -> None:
    """Raise ValueError if a picture of (width, height) has more than `MOST_PIXELS`."""
    if size[0] * size[1] > MOST_PIXELS:
        raise _Refused(f"has {size[0]} x {size[1]} pixels, may have at most {MOST_PIXELS:,}")


def look(picture: Image.Image) -> Look:
    """Return what a picture is; its pixels are not decoded."""
    grey = picture.mode in _GREY or picture.mode.startswith("I")
    sideways = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    height, width = (picture.width, picture.height) if sideways else (picture.height, picture.width)
    return Look((1 if grey else 3, height, width), bool(getattr(picture, "is_animated", False)))


def load_image(
    path: str | os.PathLike[str], shape: tuple[int, int, int], *, invert: bool = False, average: bool = False
) -> Tensor:
    """Read a picture file as a sample, as `fit_pixels` says.

    Args:
        path: of a file of one of `FORMATS`.
        shape: (C, H, W) of the sample; C is 1, 3 or 4.
        invert: exchange black and white, for ink on paper where the model knows light on dark.
        average: resize by the mean of each cell, as `torch.nn.functional.avg_pool2d`, instead of by Lanczos' kernel.

    Returns:
        float32 [C, H, W] in [-1, 1].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture that is taken, or `shape` is none for pictures.
    """
    values = from_uint8(torch.from_numpy(read_pixels(path, shape, average=average)))
    if invert:
        values[:3] *= -1  # not the opacity
    return values


def read_pixels(path: str | os.PathLike[str], shape: tuple[int, int, int], *, average: bool = False) -> np.ndarray:
    """Read a picture file as uint8 [C, H, W], as `fit_pixels` says. Args and Raises: as `load_image`."""
    check_shape(shape)
    with open_picture(path) as picture, _decoding.of(picture.width * picture.height):
        return fit_pixels(picture, shape, average=average)


def fit_pixels(picture: Image.Image, shape: tuple[int, int, int], *, average: bool = False) -> np.ndarray:
    """Return a picture as uint8 [C, H, W]; one that `save_folder` wrote comes back as it was.

    It is turned upright as its EXIF data says; of an animation the first frame is taken; 16 bits are scaled to 8;
    colours become grey, or grey coloured, as C asks; what is transparent becomes black, unless C is 4; the middle part
    of the wanted aspect ratio is cut out, and resized with anti-aliasing if its size is another.

    Raises:
        ValueError: the picture has floating-point or 32-bit values, whose range it does not say, or too many pixels;
            or `shape` is none for pictures.
    """
    check_shape(shape)
    check_pixels(picture.size)
    channels, height, width = shape
    # Of these formats mode "I", 32 bits, holds 16; of others its range is not known.
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):
        kind = "floating-point" if picture.mode == "F" else "32-bit"
        raise _Refused(f"has {kind} values, must have 1, 8 or 16 bits a channel: their range is not known")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # which convert() would cut off instead of scaling
        wide = np.asarray(picture).astype(np.uint32)
        picture = Image.fromarray(((wide + 128) // 257).clip(0, 255).astype(np.uint8))
    elif channels != 4 and (picture.mode in _OPACITY or "transparency" in picture.info):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    if picture.mode != MODES[channels]:
        picture = picture.convert(MODES[channels])
    if picture.size != (width, height):
        kernel = Image.Resampling.BOX if average else Image.Resampling.LANCZOS
        picture = ImageOps.fit(picture, (width, height), kernel)
    pixels = np.array(picture)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def check_shape(shape: tuple[int, int, int], name: str = "shape has") -> None:
    """Raise ValueError if pictures are not to be made (C, H, W); `name` begins the message."""
    if shape[0] not in CHANNELS:
        raise ValueError(f"{name} {shape[0]} channels, must have 1, 3 or 4 to be read from pictures")
    if shape[1] * shape[2] > MOST_PIXELS:
        raise ValueError(f"{name} {shape[1]} x {shape[2]} pixels, may have at most {MOST_PIXELS:,}")
