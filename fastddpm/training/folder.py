"""Folders of pictures: what is in them, what is broken, and their pixels."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.training.order import Pick

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Broken:
    """A picture that cannot be read.

    Attributes:
        path: relative to the folder.
        reason: in one line.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """The picture files of a folder, sorted, and their classes.

    Attributes:
        root: the folder.
        paths: relative to it.
        labels: of each path, its place in `classes`; empty without classes.
        classes: names of the subfolders of `root` that hold pictures, sorted; empty if pictures lie in `root` itself.
        fingerprint: changes when a file is added, removed or written.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    fingerprint: str


def list_pictures(folder: str | os.PathLike[str]) -> Listing:
    """Find the files below a folder that PIL could read, by their suffixes; hidden ones are left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no picture in it.
    """
    from fastddpm.common.images import picture_files  # PIL is imported where pictures are

    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    found = sorted(str(path.relative_to(root)) for path in picture_files(root))
    if not found:
        raise ValueError(f"{root} holds no picture, must hold files such as .png or .jpg, also in subfolders")
    digest = hashlib.sha256()
    for path in found:
        stat = os.stat(root / path) if os.path.exists(root / path) else None  # a dangling link is found out by reading
        digest.update(f"{path}\0{stat.st_size if stat else -1}\0{stat.st_mtime_ns if stat else -1}\n".encode())
    parts = [path.split(os.sep, 1) for path in found]
    classes = sorted({part[0] for part in parts}) if all(len(part) == 2 for part in parts) else []
    place_of = {name: place for place, name in enumerate(classes)}
    labels = tuple(place_of[part[0]] for part in parts) if classes else ()
    return Listing(root, tuple(found), labels, tuple(classes), digest.hexdigest())


class PictureFolder:
    """The pictures of a folder as uint8 [C, H, W], read by `fastddpm.common.images.read_pixels`.

    Every file is read once at the start, in threads. Those that cannot be are listed in `broken` and left out; the rest
    is kept in memory if it fits, else read again when its turn comes. One that can no longer be read then is replaced
    by the next one that can, with a warning.

    Args:
        listing: what there is.
        shape: (C, H, W).
        cache_bytes: of pixels that are kept in memory at most.
        known: what `verdict` returned for this folder before; where it still holds and the pictures do not fit into
            memory, they are not read to find the broken ones.
        advance: called after every file.

    Raises:
        ValueError: no picture can be read, or pictures of `shape` do not exist.
    """

    def __init__(
        self,
        listing: Listing,
        shape: tuple[int, int, int],
        *,
        cache_bytes: int,
        known: Mapping[str, Any] | None = None,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        from fastddpm.common.images import MODES

        if shape[0] not in MODES:
            raise ValueError(f"the model's data have {shape[0]} channels, must have 1, 3 or 4 to be read from pictures")
        self.listing, self.shape = listing, shape
        self._pixels: Tensor | None = None
        if len(listing.paths) * int(np.prod(shape)) <= cache_bytes:
            self._pixels = torch.empty((len(listing.paths), *shape), dtype=torch.uint8)
        if self._pixels is None and known is not None and known.get("fingerprint") == listing.fingerprint:
            self.broken = [Broken(entry["path"], entry["reason"]) for entry in known["broken"]]
            for _ in listing.paths:
                advance()
        else:
            self.broken = self._read_all(advance)
        bad = {entry.path for entry in self.broken}
        self._good = [place for place, path in enumerate(listing.paths) if path not in bad]
        if not self._good:
            raise ValueError(
                f"{listing.root} holds no picture that can be read; {self.broken[0].path}: {self.broken[0].reason}"
            )
        self._labels = torch.tensor(listing.labels, dtype=torch.int64) if listing.classes else None
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self._good)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; empty if there are none."""
        return self.listing.classes

    @property
    def in_memory(self) -> bool:
        """Whether reading costs nothing."""
        return self._pixels is not None

    def verdict(self) -> dict[str, Any]:
        """What was found, as plain values: for `known`, and for people to look at."""
        return {
            "folder": str(self.listing.root),
            "pictures": len(self),
            "classes": list(self.classes),
            "broken": [{"path": entry.path, "reason": entry.reason} for entry in self.broken],
            "fingerprint": self.listing.fingerprint,
        }

    def read(self, picks: Sequence[Pick]) -> tuple[Tensor, Tensor | None]:
        """Pixels uint8 [N, C, H, W] and labels int64 [N], None without classes."""
        places = torch.tensor([self._good[pick.image] for pick in picks])
        if self._pixels is not None:
            return self._pixels[places], None if self._labels is None else self._labels[places]
        pairs = [self._read_or_next(pick.image) for pick in picks]
        labels = None if self._labels is None else self._labels[torch.tensor([place for place, _ in pairs])]
        return torch.stack([pixels for _, pixels in pairs]), labels

    def _read_or_next(self, index: int) -> tuple[int, Tensor]:
        for further in range(len(self)):
            place = self._good[(index + further) % len(self)]
            result = self._read(place)
            if isinstance(result, Tensor):
                return place, result
            if result.path not in self._warned:
                self._warned.add(result.path)
                _log.warning("%s can no longer be read and is left out: %s", result.path, result.reason)
        raise ValueError(f"{self.listing.root} holds no picture that can be read any more")

    def _read_all(self, advance: Callable[[], object]) -> list[Broken]:
        broken: list[Broken] = []

        def store(place: int) -> Broken | None:
            result = self._read(place)
            if isinstance(result, Broken):
                return result
            if self._pixels is not None:
                self._pixels[place] = result
            return None

        with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter's lock
            results: Iterable[Broken | None] = pool.map(store, range(len(self.listing.paths)))
            for result in results:
                advance()
                if result is not None:
                    broken.append(result)
        return broken

    def _read(self, place: int) -> Tensor | Broken:
        from fastddpm.common.images import read_pixels

        path = self.listing.paths[place]
        full = self.listing.root / path
        try:
            return torch.from_numpy(read_pixels(full, self.shape))
        except Exception as error:  # decoders raise anything for broken files, and one file must not end a run
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            reason = reason.partition("\n")[0].removeprefix(f"{full} ") or type(error).__name__
            return Broken(path, reason)
