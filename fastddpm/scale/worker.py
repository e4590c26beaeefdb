"""Settle one range: keep its shard if it is whole, else draw and write it. Every engine uses this."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastddpm.common.shards import Layout, check
from fastddpm.scale.drawing import Drawer, NotFinite
from fastddpm.scale.encoding import encode
from fastddpm.scale.places import Place

KEPT, WRITTEN, FAILED = "kept", "written", "failed"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a range.

    Attributes:
        index: of the range.
        what: "kept", "written" or "failed".
        reason: why it failed, or why its shard was drawn again; else empty.
    """

    index: int
    what: str
    reason: str = ""


def labels_from(values: Any, num_samples: int) -> np.ndarray | None:
    """Return labels as int64 [num_samples]: one for all, or one for each.

    Raises:
        TypeError, ValueError: they are not integers, or their number differs.
    """
    if values is None:
        return None
    from fastddpm.common import checks

    return checks.labels(values, num_samples, None).numpy()


@dataclass(eq=False)
class Worker:
    """Settles ranges of a job.

    Attributes:
        place: where shards are written.
        layout: of the job.
        drawer: draws.
        present: the names in the place when the job began; other names are not looked up.
    """

    place: Place
    layout: Layout
    drawer: Drawer
    present: set[str]

    def settle(self, index: int) -> Outcome:
        """Ensure that the shard of a range exists and is whole.

        Raises:
            OSError: it cannot be written; nothing of it is left.
            torch.OutOfMemoryError: not even one sample fits.
        """
        name, failure = self.layout.name(index), self.layout.failure(index)
        reason = ""
        if name in self.present:
            try:
                check(self.layout, index, self.place.read)
            except FileNotFoundError:
                pass
            except ValueError as error:
                reason = str(error)
            else:
                self._forget(failure)
                return Outcome(index, KEPT)
        try:
            samples = self.drawer.draw(*self.layout.bounds(index))
        except NotFinite as error:
            self.place.write({failure: _failure(error)})
            if name in self.present:
                self.place.remove(name)
            return Outcome(index, FAILED, str(error))
        self.place.write(encode(self.layout, index, samples))
        self._forget(failure)
        return Outcome(index, WRITTEN, reason)

    def _forget(self, failure: str) -> None:
        if failure in self.present:
            self.place.remove(failure)


def _failure(error: NotFinite) -> bytes:
    content: Mapping[str, Any] = {"reason": str(error), "samples": error.samples, "step": error.step}
    return (json.dumps(content, indent=2) + "\n").encode()
