"""Read `.npz` and `.npy` files without executing anything in them or taking more memory than they state and hold."""

from __future__ import annotations

import errno
import io
import math
import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastddpm.common.images.pixels import check_size

SUFFIXES = (".npz", ".npy")


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is that of a `.npz` or `.npy` and not of a folder."""
    return Path(path).suffix.lower() in SUFFIXES and not Path(path).is_dir()


def read_npz(
    path: str | os.PathLike[str], names: Collection[str] = ("arr_0", "arr_1"), content: bytes | None = None
) -> dict[str, np.ndarray]:
    """Read the named arrays of a `.npz`, as far as it has them; an empty array stands for each other name.

    The array of a `.npy` is called arr_0.

    Args:
        path: of the file.
        names: of the arrays.
        content: of a `.npz`, if it has been read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read: it is damaged, encrypted, holds objects, or is larger than it can be.
    """
    path = Path(path)
    if content is None and not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    kind = path.suffix.lower() if path.suffix.lower() in SUFFIXES else ".npz"
    try:
        if kind == ".npy":
            with path.open("rb") as file:
                return {"arr_0": _read(file, path.stat().st_size, path.stat().st_size, str(path))}
        with zipfile.ZipFile(path if content is None else io.BytesIO(content)) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            return {
                name: _member(archive, info, f"{path}: {name}") if name in names else np.empty(0)
                for name, info in members.items()
            }
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # of a place in the file that a damaged one states
            raise
        reason = str(error)
    except Exception as error:  # a damaged file ends in errors of every kind
        reason = str(error).partition("\n")[0] or type(error).__name__
    raise ValueError(f"{path} is not a {kind} that can be read: {reason}")


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> np.ndarray:
    if info.flag_bits & 1:
        raise ValueError(f"{info.filename} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename} is compressed by method {info.compress_type}, must be stored or deflated")
    with archive.open(info) as file:
        return _read(file, info.file_size, info.compress_size, name)


def _read(file: IO[bytes], size: int, held: int, name: str) -> np.ndarray:
    """Read an array of `size` bytes, header included, that takes `held` bytes in the file."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of its format is not known")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded")
    count = math.prod(shape)
    if count < 0 or count * dtype.itemsize != size - file.tell():
        raise ValueError(f"it says that it has {dtype} {list(shape)[:8]}, but holds {size - file.tell()} bytes")
    check_size(count * dtype.itemsize, held, name)
    array = np.empty(count, dtype)
    view: Any = memoryview(array.view(np.uint8).data) if count and dtype.itemsize else b""
    done = 0
    while done < len(view):
        block = file.read(min(len(view) - done, 1 << 24))
        if not block:
            raise ValueError("it is cut off")
        view[done : done + len(block)] = block
        done += len(block)
    file.read(1)  # the end, where zipfile compares checksums
    return array.reshape(shape[::-1]).transpose() if fortran else array.reshape(shape)
