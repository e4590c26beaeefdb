"""Show the progress of a job: a bar, or a line a minute without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastddpm.common.progress import Bar, progress_bar
from fastddpm.common.shards import Layout
from fastddpm.scale.worker import FAILED, KEPT, Outcome

LINE_S = 60.0


class Watch:
    """Counts outcomes.

    Args:
        layout: of the job.
        total: ranges that this process watches.
        bar: moved by samples, or None.
        line: called with a line at most once a minute, or None.
        clock: the time in seconds.
    """

    def __init__(
        self,
        layout: Layout,
        total: int,
        bar: Bar | None,
        line: Callable[[str], object] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout, self._total, self._bar, self._line, self._clock = layout, total, bar, line, clock
        self._start = self._told = clock()
        self._ranges = self._failed = self._drawn = 0

    def __call__(self, outcome: Outcome) -> None:
        """Count a range."""
        first, end = self._layout.bounds(outcome.index)
        self._ranges += 1
        self._failed += outcome.what == FAILED
        self._drawn += 0 if outcome.what == KEPT else end - first
        if self._bar is not None:
            self._bar.text = f"{self._rate():.4g} samples/s, {self._counts()}"
            self._bar(end - first)
        now = self._clock()
        if self._line is not None and now - self._told >= LINE_S:
            self._told = now
            self._line(self.text())

    def text(self) -> str:
        """Return a line with rate, remaining time and ranges."""
        rate = self._rate()
        left = (self._total - self._ranges) * self._layout.shard_size
        eta = f"{left / rate / 60:.1f} minutes left" if rate else "time left unknown"
        done = f"{self._ranges} of {self._total} ranges"
        return f"{done}, {rate:.4g} samples/s, {eta}, {self._counts()}"

    def _rate(self) -> float:
        return self._drawn / max(self._clock() - self._start, 1e-9)

    def _counts(self) -> str:
        return f"{self._failed} failed, {self._total - self._ranges} ranges remain"


@contextmanager
def watching(layout: Layout, total: int, samples: int, *, shown: bool) -> Iterator[Watch]:
    """Show the progress of `total` ranges of so many samples on standard error, or not at all."""
    if not shown:
        yield Watch(layout, total, None, None)
    elif sys.stderr.isatty():
        with progress_bar(samples, "sampling") as bar:
            yield Watch(layout, total, bar, None)
    else:
        yield Watch(layout, total, None, lambda text: print(text, file=sys.stderr, flush=True))
