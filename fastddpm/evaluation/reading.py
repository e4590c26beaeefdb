"""Images and reference statistics from tensors, `.npz` files and folders of pictures.

A `.npz` has the layout of the ADM evaluator (Dhariwal & Nichol 2021): `arr_0` uint8 [N, H, W, 3], `arr_1` integer
labels [N]. A file of reference statistics has `mu` [D] and `sigma` [D, D], as Heusel et al. 2017 (TTUR) wrote them; it
may have images as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastddpm.common.images import picture_files, read_npz, read_pixels, to_uint8, upright_shape
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
    """A set of images from whatever holds one.

    Args:
        source: an `ImageSet`; a float tensor [N, C, H, W] in [-1, 1]; a uint8 array or tensor [N, H, W, C] (channels
            last, as in files); the path of a `.npz`, of a folder of pictures, which may have subfolders, or of
            shards; or "digits".
        shape: (C, H, W) that pictures of a folder are to have: cut to the middle part of that aspect ratio, resized by
            Lanczos' kernel where their size is another, and made grey or coloured. None for that of the first one,
            which all others must have too.
        name: for errors and reports, of what is no file.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError, TypeError: it does not hold images, or not such as are wanted.
        ModuleNotFoundError: scikit-learn is missing, for "digits".
    """
    if isinstance(source, ImageSet):
        return source
    if isinstance(source, Tensor) and source.dtype.is_floating_point:
        if source.ndim != 4:
            raise ValueError(f"{name} has shape {list(source.shape)}, must have [N, C, H, W]")
        if not bool(source.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite, must have none")
        return of_array(to_uint8(source), name)
    if isinstance(source, Tensor | np.ndarray):
        return of_array(np.asarray(source), name)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"{name} is a {type(source).__name__}, must be images, or the path of a .npz or a folder")
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
    """What samples of `shape` (C, H, W) are compared with: as `open_images`, or a `.npz` with statistics.

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
    """Whether a path is that of ready images and not of a model: a `.npz`, a folder of pictures or of shards."""
    path = Path(path)
    if is_shard_folder(path):
        return True
    if path.suffix.lower() == ".npz":
        return True
    if not path.is_dir() or any(
        (path / name).exists() for name in ("model_index.json", "unet", "scheduler_config.json")
    ):
        return False
    return next(picture_files(path), None) is not None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` that are known here, and the names of the others."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; it must be a .npz, a folder of pictures or {DIGITS!r}")
    return read_npz(path, ("arr_0", "arr_1", "mu", "sigma"))


def _of_npz(arrays: dict[str, np.ndarray], path: Path) -> ImageSet:
    labels = arrays.get("arr_1")
    if labels is None:
        return of_array(arrays["arr_0"], str(path))
    if labels.shape != arrays["arr_0"].shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path} has arr_1 of {labels.dtype} {list(labels.shape)}, must be integer labels, one for each of the "
            f"{len(arrays['arr_0'])} images"
        )
    return of_array(arrays["arr_0"], str(path), torch.from_numpy(labels.astype(np.int64)))


def _of_folder(folder: Path, shape: tuple[int, int, int] | None) -> ImageSet:
    files = list(picture_files(folder))
    if not files:
        raise ValueError(f"{folder} holds no picture, must hold files such as .png or .jpg, also in subfolders")
    wanted = shape or _shape_of_first(files, folder)
    notes: list[str] = []

    def read(file: Path) -> tuple[Tensor, bool] | None:
        """The pixels and whether they had another size; None if the file is broken."""
        try:
            with Image.open(file) as picture:
                other = upright_shape(picture)[1:] != wanted[1:]
            return torch.from_numpy(read_pixels(file, wanted)), other
        except Exception as error:  # decoders raise anything for broken files
            if isinstance(error, OSError) and error.errno is not None:
                raise
            return None

    def pieces() -> Iterator[Tensor]:
        notes.clear()
        broken: list[str] = []
        resized = 0
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter's lock
            for start in range(0, len(files), READ_AT_ONCE):
                some = files[start : start + READ_AT_ONCE]
                results = list(zip(some, pool.map(read, some), strict=True))
                broken += [str(file.relative_to(folder)) for file, result in results if result is None]
                good = [(file, *result) for file, result in results if result is not None]
                for file, _, other in good:
                    if other and shape is None:
                        raise ValueError(f"{file} is not of {_size(wanted)} as the first is; all must be of one size")
                    resized += other
                if good:
                    yield torch.stack([pixels for _, pixels, _ in good])
        if broken:
            notes.append(f"{folder}: {len(broken)} files cannot be read and are left out: {_few(broken)}")
        if resized:
            notes.append(
                f"{folder}: {resized} of {len(files)} images were cut to the middle and resized to {_size(wanted)} by "
                "Lanczos' kernel, which shows in the figures"
            )

    return ImageSet(str(folder), len(files), wanted, pieces, notes=notes)


def _of_shards(folder: Path) -> ImageSet:
    """The images of a folder of shards, of which one is in memory at a time."""
    shards = ShardFolder(folder)
    if shards.dtype != "uint8":
        raise ValueError(f"{folder} has {shards.dtype} samples of {list(shards.shape)}, must be 8-bit images")
    height, width, channels = shards.shape

    def pieces() -> Iterator[Tensor]:
        for samples in shards:
            yield torch.from_numpy(samples.values).permute(0, 3, 1, 2)

    return ImageSet(str(folder), shards.layout.num_samples, (channels, height, width), pieces)


def _shape_of_first(files: list[Path], folder: Path) -> tuple[int, int, int]:
    for file in files:
        try:
            with Image.open(file) as picture:
                return upright_shape(picture)
        except Exception as error:  # decoders raise anything for broken files
            if isinstance(error, OSError) and error.errno is not None:
                raise
    raise ValueError(f"{folder} holds no picture that can be read, must hold some")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]} x {shape[2]}"


def _list(arrays: dict[str, np.ndarray]) -> str:
    return ", ".join(arrays) or "no arrays"
