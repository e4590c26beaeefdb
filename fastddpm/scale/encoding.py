"""Encode samples as the files of a shard. The same samples give the same bytes; `common.shards` reads them."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile

import numpy as np
from PIL import Image

from fastddpm.common.shards import SUMS, TAR_HEAD, Layout, Samples

EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can state


def encode(layout: Layout, index: int, samples: Samples) -> dict[str, bytes]:
    """Return the files of a shard by their path in the folder; of several, the last one says that all are there."""
    name = layout.name(index)
    stamp = layout.stamp(index)
    if layout.format == "npz":
        return {name: _npz(samples, stamp)}
    if layout.format == "wds":
        return {name: _tar(layout, index, samples, stamp)}
    pictures = _pictures(layout, index, samples)
    sums = f"# {stamp.removesuffix(' sha256=')}\n"
    sums += "".join(f"{hashlib.sha256(data).hexdigest()}  {file}\n" for file, data in pictures.items())
    return {**{f"{name}/{file}": data for file, data in pictures.items()}, f"{name}/{SUMS}": sums.encode()}


def write_member(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Write an array into an .npz, uncompressed and without the time."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy", EPOCH), "w", force_zip64=True) as member:
        np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def _npz(samples: Samples, stamp: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        write_member(archive, "arr_0", samples.values)
        if samples.labels is not None:
            write_member(archive, "arr_1", samples.labels)
        archive.comment = f"{stamp}{'0' * 64}".encode()  # the digest does not cover its own place, the last 64 bytes
    body = buffer.getbuffer()[:-64]
    digest = hashlib.sha256(body).hexdigest().encode()
    return bytes(body) + digest


def _tar(layout: Layout, index: int, samples: Samples, stamp: str) -> bytes:
    """Return a .tar in WebDataset's layout: <key>.png and, with labels, <key>.cls, next to each other."""
    buffer = io.BytesIO()
    first, _ = layout.bounds(index)
    digits = max(5, len(str(layout.num_samples - 1)))
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, pixels in enumerate(samples.values):
            parts = [(".png", _png(pixels))]
            if samples.labels is not None:
                parts.append((".cls", str(samples.labels[row]).encode()))
            for suffix, content in parts:
                member = tarfile.TarInfo(f"{first + row:0{digits}d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    body = buffer.getvalue()
    head = tarfile.TarInfo.create_pax_global_header({"comment": stamp + hashlib.sha256(body).hexdigest()})
    assert len(head) == TAR_HEAD
    return head + body


def _pictures(layout: Layout, index: int, samples: Samples) -> dict[str, bytes]:
    first, _ = layout.bounds(index)
    digits = max(5, len(str(layout.num_samples - 1)))
    files = {}
    for row, pixels in enumerate(samples.values):
        label = "" if samples.labels is None else f"-class{samples.labels[row]}"
        files[f"{first + row:0{digits}d}{label}.png"] = _png(pixels)
    return files


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()
