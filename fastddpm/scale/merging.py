"""Merge a folder of shards into one .npz, with the memory of one shard."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from fastddpm.common.files import atomic_write
from fastddpm.common.progress import progress_bar
from fastddpm.common.shards import ShardFolder
from fastddpm.scale.encoding import EPOCH


def merge(
    folder: str | os.PathLike[str], path: str | os.PathLike[str], *, in_colour: bool = True, progress: bool = True
) -> int:
    """Write all samples of a folder of shards into one .npz for evaluators, and return their number.

    arr_0 is uint8 [N, H, W, 3], also of grey images unless `in_colour` is False (float32 [N, ...] where samples are no
    images), and arr_1 int64 [N], the labels. Every shard is checked. Memory holds one at a time.

    Raises:
        FileNotFoundError, ValueError: `folder` has no whole set of shards; the message says what is missing.
        OSError: the file cannot be written.
    """
    shards = ShardFolder(Path(folder))
    count = shards.layout.num_samples
    repeat = in_colour and shards.dtype == "uint8" and shards.shape[-1] == 1  # the ADM evaluator needs three channels

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file, tempfile.TemporaryFile(dir=temporary.parent) as labels:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                shape = (count, *shards.shape[:2], 3) if repeat else (count, *shards.shape)
                with (
                    _member(archive, "arr_0", np.dtype(shards.dtype).str, shape) as member,
                    progress_bar(len(shards.layout), "merging", enabled=progress) as bar,
                ):
                    for samples in shards:
                        values = samples.values.repeat(3, axis=3) if repeat else samples.values
                        member.write(np.ascontiguousarray(values).data)
                        if samples.labels is not None:
                            labels.write(samples.labels.astype("<i8").tobytes())
                        bar()
                if shards.labelled:
                    labels.seek(0)
                    with _member(archive, "arr_1", "<i8", (count,)) as member:
                        shutil.copyfileobj(labels, member)
            file.flush()
            os.fsync(file.fileno())

    atomic_write(path, write)
    return count


@contextmanager
def _member(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """Begin an array in an .npz; yield the file for its numbers."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy", EPOCH), "w", force_zip64=True) as member:
        np.lib.format.write_array_header_2_0(member, {"descr": dtype, "fortran_order": False, "shape": shape})
        yield member
