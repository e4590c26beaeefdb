"""Time on a device: events on a GPU, a clock on the CPU; several arms side by side; and a limit on it all."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import torch


class OutOfTime(BaseException):
    """A time limit has passed. No `Exception`, so that a library's own `except Exception` lets it through."""


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds from before `run` to the end of all that it asked of the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Gives back memory that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of `values`, linear between neighbours."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def spread(seconds: Sequence[float], per: int = 1) -> dict[str, float | int]:
    """Median, quantiles and least of `seconds`, each over `per`, in microseconds; and how many there were."""
    us = [value / per * 1e6 for value in seconds]
    return {
        "median": quantile(us, 0.5),
        "p20": quantile(us, 0.2),
        "p80": quantile(us, 0.8),
        "min": min(us),
        "samples": len(us),
    }


def interleave(
    runs: dict[str, Callable[[], float]], *, seconds: float, least: int = 3, most: int = 25
) -> Iterator[tuple[str, float]]:
    """Calls every one of `runs` once a round, in an order that turns by one, and yields (name, its result).

    So all arms see the same drift of clocks and temperature. It stops after `most` rounds, or when another round
    would pass `seconds` and `least` rounds are done, or at once when `seconds` are over twice.
    """
    names, start, slowest = list(runs), time.monotonic(), 0.0
    for round_ in range(most):
        began = time.monotonic()
        if round_ >= least and began - start + slowest > seconds:
            return
        turn = round_ % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            if time.monotonic() - start > 2 * seconds:
                return
            yield name, runs[name]()
        slowest = max(slowest, time.monotonic() - began)


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


def capture(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], None]:
    """A function that replays `calls`, one after the other, from a CUDA graph; on the CPU it just calls them.

    So a short kernel is timed without the gaps that launching it from Python leaves.
    """
    if device.type != "cuda":

        def plain() -> None:
            for call in calls:
                call()

        plain()
        return plain
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # Else the graph would work in the memory that cuBLAS keeps for the stream, which is freed under it as soon as
    # another graph is captured that clears this: fastddpm's and torch.compile's do.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    return graph.replay


def first_lines(error: BaseException | str, lines: int = 3, width: int = 300) -> str:
    """The type of an error and the first lines of what it says."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return "\n".join(line[:width] for line in text.strip().splitlines()[:lines])


def split_time(seconds: float, weights: dict[str, float]) -> dict[str, float]:
    """`seconds`, divided in proportion to `weights`."""
    total = sum(weights.values()) or 1.0
    return {name: max(seconds, 0.0) * weight / total for name, weight in weights.items()}
