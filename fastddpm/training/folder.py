"""Serve folders of pictures: find their files and broken pictures, and read pixels."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.common.images import Listing, list_pictures, read_pixels
from fastddpm.training.order import Pick

__all__ = ["Broken", "Listing", "PictureFolder", "list_pictures"]

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


class PictureFolder:
    """Serve the pictures of a folder as uint8 [C, H, W], read by `fastddpm.common.images.read_pixels`.

    Every file is read once at the start, in threads. Unreadable files are listed in `broken` and skipped. The others
    stay in memory if they fit, else they are read again when needed. If one cannot be read then, the next readable one
    replaces it, with a warning.

    Args:
        listing: the files and classes.
        shape: (C, H, W).
        cache_bytes: the most bytes of pixels to keep in memory.
        known: an earlier `verdict` for this folder; if it is still valid and the pictures do not fit into memory, they
            are not read to find the broken ones.
        advance: called after every file.

    Raises:
        ValueError: no picture can be read.
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
        self.listing, self.shape = listing, shape
        self._pixels: Tensor | None = None
        if len(listing.paths) * int(np.prod(shape)) <= cache_bytes:
            self._pixels = torch.empty((len(listing.paths), *shape), dtype=torch.uint8)
        broken = None if self._pixels is not None or known is None else _of_verdict(known, listing)
        if broken is None:
            broken = self._read_all(advance)
        else:
            for _ in listing.paths:
                advance()
        self.broken = broken
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
        """Return the names of the classes by label; empty if there are none."""
        return self.listing.classes

    @property
    def labels(self) -> tuple[int, ...]:
        """Return the labels of pictures that can be read, rising; empty without classes."""
        return tuple(sorted({self.listing.labels[place] for place in self._good})) if self.classes else ()

    @property
    def in_memory(self) -> bool:
        """Return whether the pictures are in memory, so that reading is free."""
        return self._pixels is not None

    @property
    def good(self) -> Sequence[int]:
        """Return the places in the listing of the pictures that can be read, by their numbers."""
        return self._good

    def verdict(self) -> dict[str, Any]:
        """Return the findings as plain values: for `known`, and for people to read."""
        return {
            "folder": str(self.listing.root),
            "pictures": len(self),
            "classes": list(self.classes),
            "passed_over": list(self.listing.passed_over[:100]),
            "broken": [{"path": entry.path, "reason": entry.reason} for entry in self.broken],
            "fingerprint": self.listing.fingerprint,
        }

    def read(self, picks: Sequence[Pick]) -> tuple[Tensor, Tensor | None]:
        """Return pixels uint8 [N, C, H, W] and labels int64 [N], None without classes."""
        pixels, places = self.read_places(picks)
        return pixels, None if self._labels is None else self._labels[places]

    def read_places(self, picks: Sequence[Pick]) -> tuple[Tensor, Tensor]:
        """Return pixels uint8 [N, C, H, W] and the places of these pictures in the listing, int64 [N]."""
        if self._pixels is not None:
            places = torch.tensor([self._good[pick.image] for pick in picks])
            return self._pixels[places], places
        pairs = [self._read_or_next(pick.image) for pick in picks]
        return torch.stack([pixels for _, pixels in pairs]), torch.tensor([place for place, _ in pairs])

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
        path = self.listing.paths[place]
        full = self.listing.root / path
        try:
            return torch.from_numpy(read_pixels(full, self.shape))
        except Exception as error:  # decoders raise anything for broken files, and one file must not end a run
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            reason = reason.partition("\n")[0].removeprefix(f"{full} ") or type(error).__name__
            return Broken(path, reason)


def _of_verdict(known: Mapping[str, Any], listing: Listing) -> list[Broken] | None:
    """Return the broken pictures that an earlier verdict names; None if it is of other pictures, or altered."""
    entries = known.get("broken")
    if known.get("fingerprint") != listing.fingerprint or not isinstance(entries, list):
        return None
    if not all(isinstance(entry, dict) and entry.keys() == {"path", "reason"} for entry in entries):
        return None
    return [Broken(str(entry["path"]), str(entry["reason"])) for entry in entries]
