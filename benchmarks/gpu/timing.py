"""A limit on time, and how time is shared out. `fastddpm.perf.profiling` has what is timed."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class OutOfTime(BaseException):
    """A time limit has passed. No `Exception`, so that a library's own `except Exception` lets it through."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Inside, `OutOfTime` is raised once `seconds` are over: by a signal, so in the main thread only.

    Elsewhere, and where there are no such signals, the time is not limited. Limits may stand within each other.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"{seconds:.0f} s")

    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    # Again every few seconds, should a library's `except BaseException` have swallowed the first.
    outer, again = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:  # of a limit around this one
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - start), 0.01), again)


def split_time(seconds: float, weights: dict[str, float]) -> dict[str, float]:
    """`seconds`, divided in proportion to `weights`."""
    total = sum(weights.values()) or 1.0
    return {name: max(seconds, 0.0) * weight / total for name, weight in weights.items()}
