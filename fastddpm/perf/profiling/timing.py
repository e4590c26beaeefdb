"""Time work on a device, by events on a GPU and by a clock elsewhere; time several runs in turn; compute quantiles."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds from the start of `run` to the end of all work that it gave an idle device."""
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
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def release(device: torch.device) -> None:
    """Free memory without references."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def quantile(values: Sequence[float], q: float) -> float:
    """Return the q-quantile of `values`, linear between neighbours."""
    return float(np.quantile(values, q))


def quantiles(values: Sequence[float]) -> dict[str, float | int]:
    """Return the median, the 20 % and 80 % quantiles, the minimum and the number of `values`."""
    p20, median, p80 = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return {"median": median, "p20": p20, "p80": p80, "min": min(values), "samples": len(values)}


def spread(seconds: Sequence[float], per: int = 1) -> dict[str, float | int]:
    """Return `quantiles` of `seconds`, each divided by `per`, in microseconds."""
    return quantiles([value / per * 1e6 for value in seconds])


def interleave(
    runs: dict[str, Callable[[], float]], *, seconds: float, least: int = 3, most: int = 25
) -> Iterator[tuple[str, float]]:
    """Call each of `runs` once per round, in an order that rotates by one, and yield (name, its result).

    So all see the same drift of clocks and temperature. It stops after `most` rounds; or after `least` rounds if
    another one would exceed `seconds` in total; or at once when twice the `seconds` have passed.
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
    """Return the results of `run`, called again and again as in `interleave`."""
    return [value for _, value in interleave({"": run}, seconds=seconds, least=least, most=most)]


def capture(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], None]:
    """Return a function that replays `calls`, one after the other, from a CUDA graph; elsewhere it calls them.

    The graph times a short kernel without the gaps of launches from Python.
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
    # The graph must not use the workspace that cuBLAS keeps for the stream: the next capture by fastddpm or
    # torch.compile frees it.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    return graph.replay


def first_lines(error: BaseException | str, lines: int = 3, width: int = 300) -> str:
    """Return the type of an error and the first lines of its message."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return "\n".join(line[:width] for line in text.strip().splitlines()[:lines])
