"""Define the layout of folders of shards, and check and read shards.

    manifest.json                      what was drawn, and how it is cut into ranges
    shard-00000-00511.npz              samples 0 to 511; or .tar, or a folder of PNGs
    part-00000/shard-...               above 10,000 ranges
    failed-00512-01023.json            why a range has no shard

Every shard carries the manifest's hash, its range and the SHA-256 of its content: an .npz in the comment of the zip, a
.tar in its first (pax) header, a folder in its file SHA256SUMS, which `sha256sum -c` reads.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastddpm.common.images import open_picture, read_npz

MANIFEST = "manifest.json"
SCHEMA = 1
KIND = "fastddpm shards"
FORMATS = {"npz": ".npz", "wds": ".tar", "png": ""}
SUMS = "SHA256SUMS"
MOST_FILES = 10_000  # in one folder
PART = 1000  # shards of a sub-folder
MOST_NAMED = 5  # ranges in a message
_FIRST = re.compile(r"(?:shard|failed)-(\d+)-")  # the first sample of a range
TAR_HEAD = 1024  # bytes of a .tar before what its checksum covers


class Samples(NamedTuple):
    """The samples of a shard: uint8 [n, H, W, C], or float32 [n, ...]; and their labels, [n], or None."""

    values: np.ndarray
    labels: np.ndarray | None


@dataclass(frozen=True)
class Layout:
    """How samples are cut into shards, and what the shards are called.

    Attributes:
        num_samples, shard_size: all of them, and those of a shard; the last shard may have fewer.
        format: "npz", "png" or "wds".
        job: the first digits of the manifest's SHA-256, which every shard carries.
    """

    num_samples: int
    shard_size: int
    format: str
    job: str = ""

    def __len__(self) -> int:
        return -(-self.num_samples // self.shard_size)

    def bounds(self, index: int) -> tuple[int, int]:
        """Return the first sample of a range and the one after its last."""
        first = index * self.shard_size
        return first, min(first + self.shard_size, self.num_samples)

    def words(self, index: int) -> str:
        """Return `<first>-<last>`, with as many digits as the last sample has, at least five."""
        first, end = self.bounds(index)
        digits = max(5, len(str(self.num_samples - 1)))
        return f"{first:0{digits}d}-{end - 1:0{digits}d}"

    def _in_part(self, index: int, name: str) -> str:
        return f"part-{index // PART:05d}/{name}" if len(self) > MOST_FILES else name

    def name(self, index: int) -> str:
        """Return the path of a range's shard in the folder."""
        return self._in_part(index, f"shard-{self.words(index)}{FORMATS[self.format]}")

    def failure(self, index: int) -> str:
        """Return the path of the file that says why a range failed."""
        return self._in_part(index, f"failed-{self.words(index)}.json")

    def stamp(self, index: int) -> str:
        """Return the stamp of a shard, which precedes its checksum."""
        return f"fastddpm {self.job} {self.words(index)} sha256="


def layout_of(manifest: Mapping[str, Any], content: bytes) -> Layout:
    """Return the layout that a manifest states; `content` is its file."""
    return Layout(
        manifest["num_samples"], manifest["shard_size"], manifest["format"], hashlib.sha256(content).hexdigest()[:16]
    )


def parse_manifest(content: bytes, where: str) -> dict[str, Any]:
    """Return what a manifest states.

    Raises:
        ValueError: it is no manifest of shards, is damaged, or was written by a newer version; `where` names it.
    """
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise ValueError(f"{where} is no manifest of shards, must be one that fastddpm wrote")
    schema = manifest.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ValueError(f"{where} has schema {schema}, of a newer fastddpm; this one reads up to {SCHEMA}")
    counts = [manifest.get(name) for name in ("num_samples", "shard_size")]
    if not all(_count(count) for count in counts) or manifest.get("format") not in tuple(FORMATS):
        raise ValueError(f"{where} is damaged: num_samples, shard_size or format is not what it can be")
    sample = manifest.get("sample")
    if (
        not isinstance(sample, dict) or sample.get("dtype") not in ("uint8", "float32")
        or not isinstance(sample.get("shape"), list) or not all(_count(size) for size in sample["shape"])
        or (sample["dtype"] == "uint8" and len(sample["shape"]) != 3)
    ):  # fmt: skip
        raise ValueError(f"{where} is damaged: sample is not a shape and dtype that it can have")
    return manifest


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def decode(layout: Layout, index: int, read: Callable[[str], bytes]) -> Samples:
    """Return the samples of a shard, once it is what was written.

    Args:
        layout: of the folder.
        index: of the range.
        read: returns the content of a file of the folder.

    Raises:
        ValueError: it is cut off, altered, or another range's or job's.
        OSError: it cannot be read.
    """
    check(layout, index, read)
    name = layout.name(index)
    if layout.format == "npz":
        arrays = read_npz(name, content=read(name))
        return Samples(arrays.get("arr_0", np.empty(0)), arrays.get("arr_1"))
    pictures: dict[str, bytes] = {}
    labels: list[int] = []
    if layout.format == "wds":
        with tarfile.open(fileobj=io.BytesIO(read(name)), mode="r:") as tar:
            for member in tar:
                file = tar.extractfile(member)
                content = b"" if file is None else file.read()
                if member.name.endswith(".cls"):
                    labels.append(int(content))
                else:
                    pictures[member.name] = content
    else:
        for file_name in _listed(read(f"{name}/{SUMS}"))[1]:
            pictures[file_name] = read(f"{name}/{file_name}")
            if match := re.search(r"-class(-?\d+)\.png$", file_name):
                labels.append(int(match[1]))
    values = np.stack([_pixels(name, content) for name, content in pictures.items()])
    return Samples(values, np.asarray(labels, dtype=np.int64) if labels else None)


def check(layout: Layout, index: int, read: Callable[[str], bytes]) -> None:
    """Raise ValueError unless a shard is what was written; arguments and other errors as for `decode`."""
    name, stamp = layout.name(index), layout.stamp(index).encode()
    if layout.format == "png":
        try:
            said, sums = _listed(read(f"{name}/{SUMS}"))
            first, end = layout.bounds(index)
            whole = said == stamp.decode().removesuffix(" sha256=") and len(sums) == end - first
            whole = whole and all(_digest(read(f"{name}/{file}")) == known for file, known in sums.items())
        except (FileNotFoundError, UnicodeDecodeError):
            whole = False
    else:
        data = read(name)
        if layout.format == "npz":
            body, said_of = data[:-64], data[-64 - len(stamp) :]
        else:
            body, said_of = data[TAR_HEAD:], data[512:TAR_HEAD].partition(b"comment=")[2]
        whole = said_of.startswith(stamp) and said_of[len(stamp) : len(stamp) + 64] == _digest(body).encode()
    if not whole:
        raise ValueError(f"{name} is damaged: its checksum is not that of its content")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _listed(content: bytes) -> tuple[str, dict[str, str]]:
    """Return what SHA256SUMS says of its shard, and the digests of its files by name, in order."""
    said, *lines = content.decode("ascii").splitlines() or [""]
    pairs = [line.split("  ", 1) for line in lines]
    return said.removeprefix("# "), {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def _pixels(name: str, content: bytes) -> np.ndarray:
    with open_picture(name, content) as picture:
        pixels = np.asarray(picture)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def is_shard_folder(folder: Path) -> bool:
    """Return whether `folder` has a manifest of shards."""
    try:
        content = (folder / MANIFEST).read_bytes()
        return isinstance(found := json.loads(content), dict) and found.get("kind") == KIND
    except (OSError, ValueError, RecursionError):
        return False


class ShardFolder:
    """A folder of shards on this machine, to be read.

    Attributes:
        manifest, layout: of the folder.
        shape: of one sample as it is stored: (H, W, C), or any in float32.
        dtype: "uint8" or "float32".

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: it is no such folder, or ranges are missing or failed; the message says which.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, {folder} is no folder of shards")
        content = path.read_bytes()
        self.manifest = parse_manifest(content, str(path))
        self.layout = layout_of(self.manifest, content)
        stored = self.manifest["sample"]
        self.shape: tuple[int, ...] = tuple(stored["shape"])
        self.dtype: str = stored["dtype"]
        if problem := self._missing():
            raise ValueError(f"{folder} lacks {problem}, must be whole: run its `fastddpm sample` again")

    def _missing(self) -> str | None:
        """Return how many ranges have no shard, and which; None if all have one.

        Names of files are looked at, not ranges: a manifest may state any number of those.
        """
        layout = self.layout
        found = {
            path.relative_to(self.folder).as_posix()
            for pattern in ("shard-*", "failed-*", "part-*/shard-*", "part-*/failed-*")
            for path in self.folder.glob(pattern)
        }
        starts = {int(match[1]) // layout.shard_size for name in found if (match := _FIRST.search(name))}
        shards = sum(layout.name(index) in found for index in starts)
        if shards == len(layout):
            return None
        failed = sum(layout.failure(index) in found and layout.name(index) not in found for index in starts)
        missing = (index for index in range(len(layout)) if layout.name(index) not in found)
        words = few_ranges(layout, list(itertools.islice(missing, MOST_NAMED)), len(layout) - shards)
        return (
            f"{len(layout) - shards} of {len(layout)} ranges ({words}{f'; {failed} of them failed' if failed else ''})"
        )

    def __iter__(self) -> Iterator[Samples]:
        """Yield the samples of every shard in order, each once it was checked."""
        for index in range(len(self.layout)):
            try:
                samples = decode(self.layout, index, self._read)
                first, end = self.layout.bounds(index)
                if samples.values.shape != (end - first, *self.shape) or samples.values.dtype != self.dtype:
                    raise ValueError(f"{self.layout.name(index)} has other samples than the manifest states")
            except (ValueError, tarfile.TarError) as error:
                raise ValueError(f"{self.folder / str(error)}; run its `fastddpm sample` again") from None
            yield samples

    @property
    def labelled(self) -> bool:
        """Whether samples have labels."""
        return self.manifest.get("class_labels") is not None

    def _read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def few_ranges(layout: Layout, indices: list[int], count: int | None = None) -> str:
    """Return ranges for a message: the first `MOST_NAMED`, and how many more there are of `count` in all."""
    more = (len(indices) if count is None else count) - MOST_NAMED
    return ", ".join(layout.words(index) for index in indices[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
