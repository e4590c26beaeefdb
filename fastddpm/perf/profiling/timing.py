"""Time on a device: events on a GPU, a clock elsewhere; several runs side by side; medians and quantiles."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence

import torch


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds from before `run` to the end of all that it asked of the device, for which nothing is waiting."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        synchronize(device)
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
    elif device.type == "mps":
        torch.mps.synchronize()


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


def quantiles(values: Sequence[float]) -> dict[str, float | int]:
    """Median, 20 % and 80 % quantile and least of `values`, and how many there were."""
    return {
        "median": quantile(values, 0.5),
        "p20": quantile(values, 0.2),
        "p80": quantile(values, 0.8),
        "min": min(values),
        "samples": len(values),
    }


def spread(seconds: Sequence[float], per: int = 1) -> dict[str, float | int]:
    """`quantiles` of `seconds`, each over `per`, in microseconds."""
    return quantiles([value / per * 1e6 for value in seconds])


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


def repeat(run: Callable[[], float], *, seconds: float, least: int = 3, most: int = 25) -> list[float]:
    """What `run` returns, called again and again as in `interleave`."""
    return [value for _, value in interleave({"": run}, seconds=seconds, least=least, most=most)]


def capture(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], None]:
    """A function that replays `calls`, one after the other, from a CUDA graph; elsewhere it just calls them.

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
