"""One .npz of a folder of shards, in the memory of a shard."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from fastddpm.common.files import atomic_write
from fastddpm.common.progress import progress_bar
from fastddpm.common.shards import ShardFolder
from fastddpm.scale.encoding import EPOCH, write_member


def merge(
    folder: str | os.PathLike[str], path: str | os.PathLike[str], *, in_colour: bool = True, progress: bool = True
) -> int:
    """Write all samples of a folder of shards into one .npz, as evaluators read it, and return how many they are.

    arr_0 is uint8 [N, H, W, 3], also of grey images unless `in_colour` is False (float32 [N, ...] where samples are no images) and arr_1 int64 [N], the labels. Every
    shard is checked. Memory holds one shard at a time.

    Raises:
        FileNotFoundError, ValueError: `folder` has no whole set of shards; the message says what is missing.
        OSError: the file cannot be written.
    """
    shards = ShardFolder(Path(folder))
    count = shards.layout.num_samples
    repeat = in_colour and shards.dtype == "uint8" and shards.shape[-1] == 1  # the ADM evaluator needs three channels

    def write(temporary: Path) -> None:
        labels: list[np.ndarray] = []
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                with archive.open(zipfile.ZipInfo("arr_0.npy", EPOCH), "w", force_zip64=True) as member:
                    shape = (count, *shards.shape[:2], 3) if repeat else (count, *shards.shape)
                    header = {"descr": np.dtype(shards.dtype).str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_2_0(member, header)
                    with progress_bar(len(shards.layout), "merging", enabled=progress) as bar:
                        for samples in shards:
                            values = samples.values.repeat(3, axis=3) if repeat else samples.values
                            member.write(np.ascontiguousarray(values).data)
                            if samples.labels is not None:
                                labels.append(samples.labels)
                            bar()
                if shards.labelled:
                    write_member(archive, "arr_1", np.concatenate(labels))
            file.flush()
            os.fsync(file.fileno())

    atomic_write(path, write)
    return count
