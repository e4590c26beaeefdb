"""Read images and reference statistics from arrays, tensors, pictures, `.npz` files and folders.

A `.npz` has the layout of the ADM evaluator (Dhariwal & Nichol 2021): `arr_0` uint8 [N, H, W, 3], `arr_1` integer
labels [N]. A file of reference statistics has `mu` [D] and `sigma` [D, D], as Heusel et al. 2017 (TTUR) wrote them; it
may have images as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastddpm.common.images import (
    check_ids,
    fit_pixels,
    is_archive,
    list_pictures,
    look,
    look_at_pictures,
    picture_files,
    pixels_of_tensor,
    read_npz,
    read_pixels,
    to_uint8,
)
from fastddpm.common.shards import ShardFolder, is_shard_folder
from fastddpm.evaluation.frechet import Moments, moments_of_statistics, real_digits
from fastddpm.evaluation.image_sets import ImageSet, of_array

DIGITS = "digits"  # in place of a path: scikit-learn's handwritten digits
READ_AT_ONCE = 256  # pictures


@dataclass(frozen=True, eq=False)
class Reference:
    """What samples are compared with: images, statistics of features, or both."""

    images: ImageSet | None
    statistics: Moments | None
    name: str


def open_images(source: Any, *, shape: tuple[int, int, int] | None = None, name: str = "samples") -> ImageSet:
    """Return a set of images from whatever holds one, by the rules of `fastddpm.common.images`.

    Args:
        source: an `ImageSet`; a float tensor [N, C, H, W] in [-1, 1]; a uint8 array or tensor [N, H, W, C] (channels
            last, as in files) or [N, H, W]; a list of PIL images, of arrays uint8 [H, W, C] or of tensors; the path of
            a `.npz`, of a `.npy`, of a folder of pictures, which may have subfolders, or of shards; or "digits".
        shape: (C, H, W) that pictures are to be compared with: they are cut to the middle part of that aspect ratio
            and resized by Lanczos' kernel where their size is another, and keep their opacity if C is 4. None for the
            size of the first one, which all others must have too. Pictures are grey if all of them are.
        name: for errors and reports, of what is no file.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError, TypeError: it does not hold images, or not such as are wanted.
        ModuleNotFoundError: scikit-learn is missing, for "digits".
    """
    if isinstance(source, ImageSet):
        return source
    if isinstance(source, Tensor) and source.dtype.is_floating_point:
        return of_array(pixels_of_tensor(source, name), name)
    if isinstance(source, Tensor | np.ndarray):
        return of_array(source, name)
    if isinstance(source, Sequence) and not isinstance(source, str) and len(source):
        if all(isinstance(item, Image.Image) for item in source):
            return _of_pictures(source, shape, name)
        if all(isinstance(item, Tensor) and item.shape == source[0].shape for item in source):
            return open_images(torch.stack(list(source)), name=name)
        if all(isinstance(item, np.ndarray) and item.shape == source[0].shape for item in source):
            return of_array(np.stack(source), name)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"{name} is a {type(source).__name__}, must be images (a tensor, an array, a list of either or of PIL "
            "images) or the path of a .npz or a folder"
        )
    if source == DIGITS:
        images, labels = real_digits()
        return of_array(to_uint8(images), "scikit-learn's digits", labels)
    path = Path(source)
    if is_shard_folder(path):
        return _of_shards(path)
    if path.is_dir():
        return _of_folder(path, shape)
    arrays = _read_npz(path)
    if "arr_0" not in arrays:
        raise ValueError(f"{path} has {_list(arrays)}, must have arr_0, uint8 [N, H, W, C]")
    return _of_npz(arrays, path)


def open_reference(source: Any, shape: tuple[int, int, int], *, name: str = "real") -> Reference:
    """Return what samples of `shape` (C, H, W) are compared with: as `open_images`, or a `.npz` with statistics.

    Grey and coloured images are left as they are: see `image_sets.in_one_colour_space`.

    Raises:
        FileNotFoundError, ValueError, TypeError, ModuleNotFoundError: as `open_images`; images are of another size.
    """
    statistics, images = None, None
    if isinstance(source, str | os.PathLike) and source != DIGITS and not Path(source).is_dir():
        arrays = _read_npz(Path(source))
        if "mu" in arrays and "sigma" in arrays:
            statistics = moments_of_statistics(arrays["mu"], arrays["sigma"], str(source))
        elif "arr_0" not in arrays:
            raise ValueError(f"{source} has {_list(arrays)}, must have arr_0 (images), or mu and sigma (statistics)")
        if "arr_0" in arrays:
            images = _of_npz(arrays, Path(source))
    else:
        images = open_images(source, shape=shape, name=name)
    if images is not None and images.shape[1:] != shape[1:]:
        raise ValueError(
            f"{images.name} has images of {_size(images.shape)} but the samples are of {_size(shape)}; they must be of "
            "one size (pictures of a folder are resized)"
        )
    return Reference(images, statistics, str(source) if images is None else images.name)


def is_image_set(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is that of images, not of a model: a `.npz`, a `.npy`, a folder of pictures or shards."""
    path = Path(path)
    if is_archive(path) or is_shard_folder(path):
        return True
    if not path.is_dir() or any(
        (path / name).exists() for name in ("model_index.json", "unet", "scheduler_config.json")
    ):
        return False
    return next(picture_files(path), None) is not None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; it must be a .npz, a folder of pictures or {DIGITS!r}")
    return read_npz(path, ("arr_0", "arr_1", "mu", "sigma"))


def _of_npz(arrays: dict[str, np.ndarray], path: Path) -> ImageSet:
    images, labels = of_array(arrays["arr_0"], str(path)), arrays.get("arr_1")
    if labels is None:
        return images
    return of_array(arrays["arr_0"], str(path), check_ids(labels, images.count, f"{path}: arr_1"))


def _of_pictures(pictures: Sequence[Image.Image], shape: tuple[int, int, int] | None, name: str) -> ImageSet:
    names = [f"{name}[{place}]" for place in range(len(pictures))]
    wanted = _common_shape([look(picture).shape for picture in pictures], names, shape)
    pixels = []
    for place, picture in enumerate(pictures):
        try:
            pixels.append(fit_pixels(picture, wanted))
        except ValueError as error:
            raise ValueError(f"{name}[{place}] {error}") from None
    return ImageSet(name, len(pixels), wanted, lambda: iter((torch.from_numpy(np.stack(pixels)),)))


def _common_shape(
    shapes: Sequence[tuple[int, int, int]], names: Sequence[str], wanted: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    """Return (C, H, W) of pictures: coloured if one of them is, with opacity if wanted, and of one size."""
    channels = 4 if wanted is not None and wanted[0] == 4 else max(shape[0] for shape in shapes)
    if wanted is None:
        first = shapes[0]
        for shape, name in zip(shapes, names, strict=True):
            if shape[1:] != first[1:]:
                raise ValueError(f"{name} is not of {_size(first)} as the first is; all must be of one size")
        wanted = first
    return channels, *wanted[1:]


def _of_folder(folder: Path, shape: tuple[int, int, int] | None) -> ImageSet:
    listing = list_pictures(folder, classed=False)
    looks = dict(zip(listing.paths, look_at_pictures(folder, listing.paths), strict=True))
    known = {path: seen for path, seen in looks.items() if seen is not None}
    if not known:
        raise ValueError(f"{folder} holds no picture that can be read, must hold some")
    wanted = _common_shape([seen.shape for seen in known.values()], [str(folder / path) for path in known], shape)
    notes: list[str] = []

    def read(path: str) -> Tensor | None:
        if path not in known:
            return None
        try:
            return torch.from_numpy(read_pixels(folder / path, wanted))
        except ValueError:
            return None

    def pieces() -> Iterator[Tensor]:
        broken: list[str] = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter's lock
            for start in range(0, len(listing.paths), READ_AT_ONCE):
                some = listing.paths[start : start + READ_AT_ONCE]
                results = list(pool.map(read, some))
                broken += [path for path, pixels in zip(some, results, strict=True) if pixels is None]
                if good := [pixels for pixels in results if pixels is not None]:
                    yield torch.stack(good)
        notes[:] = listing.notes(broken)
        if animated := sum(seen.animated for seen in known.values()):
            notes.append(f"{folder}: {animated} files are animations, whose first frame is taken")
        if resized := sum(seen.shape[1:] != wanted[1:] for seen in known.values()):
            notes.append(
                f"{folder}: {resized} of {len(listing.paths)} images were cut to the middle and resized to "
                f"{_size(wanted)} by Lanczos' kernel, which shows in the figures"
            )

    return ImageSet(str(folder), len(listing.paths), wanted, pieces, notes=notes)


def _of_shards(folder: Path) -> ImageSet:
    """Return the images of a folder of shards, of which one is in memory at a time."""
    shards = ShardFolder(folder)
    if shards.dtype != "uint8":
        raise ValueError(f"{folder} has {shards.dtype} samples of {list(shards.shape)}, must be 8-bit images")
    height, width, channels = shards.shape

    def pieces() -> Iterator[Tensor]:
        for samples in shards:
            yield torch.from_numpy(samples.values).permute(0, 3, 1, 2)

    return ImageSet(str(folder), shards.layout.num_samples, (channels, height, width), pieces)


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]} x {shape[2]}"


def _list(arrays: dict[str, np.ndarray]) -> str:
    return ", ".join(arrays) or "no arrays"
