"""Choose how many samples go through the network at once, for `batch_size="auto"`.

More samples per pass use a device better, up to a point. Past it a pass takes proportionally longer, or even longer if
its activations no longer fit into a cache. The point is measured, if measuring costs little compared to the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastddpm.common import checks
from fastddpm.sampling.memory import Allocated, free_memory, is_out_of_memory, not_even_one, release_memory
from fastddpm.sampling.pool import LoopPool

if TYPE_CHECKING:
    from fastddpm.sampling.run import Run

SIZES = (4, *(2**k for k in range(4, 14)))  # 4, 16, 32, ... 8192
CUDA_SIZES = tuple(2**k for k in range(6, 14))  # below 64 a GPU is idle
GAIN = 1.03  # in samples per second that a larger size must bring
SHARE = 0.05  # of the run's sample-steps, for measuring
STEPS = 3  # of a measurement: one to warm up, two that count
MEMORY = 0.8  # of the free memory to use: allocators and libraries need the rest

_log = logging.getLogger(__name__)


class BatchSizes:
    """Chooses how many samples go through the network at once, and remembers it for each kind of run.

    Args:
        pool: builds the loops that are measured. None of them is kept.
    """

    def __init__(self, pool: LoopPool) -> None:
        self._pool = pool
        self._best: dict[object, int] = {}
        # How many fit at the first call. Later calls would see less, since memory kept for the next run is not free.
        self._fit: dict[object, int] = {}

    def choose(self, run: Run, count: int) -> int:
        """Return the samples per pass for the `count` samples of a run, so that its chunks are of almost equal size.

        The memory of a few samples tells how many fit. Smaller sizes are timed as long as their steps cost at most 5 %
        of the run's; set-up does not count. A run too short for that takes as many as fit. A run so short that four
        sample-steps are more than 5 % of it takes all. On CUDA, where a larger batch is usually faster, the answer is
        also as many as fit if the 5 % end while sizes still gain.

        Raises:
            torch.OutOfMemoryError: not even one sample fits.
        """
        key, work = run.key(), count * run.steps
        if key in self._best:
            return even_chunk(count, self._best[key])
        if count == 1 or SHARE * work < 4:
            return count
        cuda = self._pool.network.device.type == "cuda"
        sizes = CUDA_SIZES if cuda else SIZES
        first = sizes[0]
        most = min(count, self._limit(run, key, min(first, count)))
        if first >= most or STEPS * first > SHARE * work:
            return even_chunk(count, most)
        choice = choose_chunk(
            count,
            run=lambda size: self._seconds_per_step(run, size),
            max_chunk=most,
            budget=SHARE * work,
            candidates=sizes,
            hopeful=cuda,
        )
        _log.info("batch_size 'auto' is %d for %d samples: %s", choice.chunk, count, choice.reason)
        self._best[key] = choice.best
        return choice.chunk

    def remember(self, run: Run, chunk: int) -> None:
        """Note that more than `chunk` samples at once do not fit."""
        self._best[run.key()] = min(chunk, self._best.get(run.key(), chunk))

    def _seconds_per_step(self, run: Run, size: int) -> float:
        return run.seconds_per_step(self._pool.build(run.shapes(slice(0, size)), "step"))  # the mode captured soonest

    def _limit(self, run: Run, key: object, size: int) -> int:
        """Return how many samples fit in the free memory, at least 1, by what a step of `size` allocates."""
        if key not in self._fit:
            while (peak := self._peak(run, size)) is None:
                release_memory()
                if size == 1:
                    return 1
                size //= 2
            self._fit[key] = max(1, size * int(MEMORY * free_memory(self._pool.network.device)) // max(1, peak))
        return self._fit[key]

    def _peak(self, run: Run, size: int) -> int | None:
        """Return the bytes that a loop of `size` samples and a step of it hold at a time; None if they do not fit."""
        shapes = run.shapes(slice(0, size))
        try:
            run.one_step(self._pool.build(shapes, "plain"))  # allocates what stays, such as converted weights
            with Allocated() as allocated:
                run.one_step(self._pool.build(shapes, "plain"))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return allocated.peak


@dataclass(frozen=True)
class ChunkChoice:
    """A number of samples per pass, and why.

    Attributes:
        chunk: samples per pass.
        best: the fastest size, of which `chunk` is the even share.
        seconds_per_step: what was measured, by size, in the order of measurement.
        reason: one line.
    """

    chunk: int
    best: int
    seconds_per_step: dict[int, float]
    reason: str


def choose_chunk(
    count: int,
    *,
    run: Callable[[int], float],
    max_chunk: int | None = None,
    budget: float = math.inf,
    candidates: Sequence[int] = SIZES,
    hopeful: bool = False,
) -> ChunkChoice:
    """Return the number of samples per pass that draws `count` samples fastest, by trying.

    Sizes rise as long as each brings more than 3 % more samples per second than the best one before. The first size
    that brings fewer ends the search; one in between is skipped once. Memory, `count` and `budget` end it too.
    `even_chunk` then evens out the best size.

    Args:
        count: samples to draw in all.
        run: runs a few steps with n samples, warmed up, and returns the seconds per step. It raises an error for which
            `is_out_of_memory` holds if n samples do not fit.
        max_chunk: the most samples per pass; None for no limit.
        budget: the cost of all measurements, in sample-steps at the speed of the first size. The first size is always
            tried; a later one only if, at the rate of the last, it costs no more than is left.
        candidates: rising sizes to try; those above the limits are replaced by the limit.
        hopeful: take the largest size where the budget ends while sizes still bring more.

    Raises:
        ValueError: an argument is out of range.
        torch.OutOfMemoryError: not even one sample fits.
    """
    checks.positive(count, "count")
    most = count if max_chunk is None else min(count, checks.positive(max_chunk, "max_chunk"))
    if not budget > 0:
        raise ValueError(f"budget is {budget}, must be a positive number of sample-steps")
    sizes = [checks.positive(size, "every size of candidates") for size in candidates]
    if not sizes or sizes != sorted(set(sizes)):
        raise ValueError(f"candidates is {list(candidates)}, must be rising sizes")
    sizes = [size for size in sizes if size < most]
    if not sizes:
        return ChunkChoice(most, most, {}, f"{most} at once, too few to measure")
    sizes.append(most)

    measured: dict[int, float] = {}
    failed, last = None, sizes[0]
    while (seconds := _try(last, run)) is None:
        failed, last = last, last // 2
    measured[last] = seconds
    if failed is not None:
        return _evened(count, last, measured, f"{failed} ran out of memory")
    best, unit = last, seconds / last  # seconds of a sample-step
    reason, flat = f"{most} is the most there may be", False
    for size in sizes[1:]:
        if STEPS * (sum(measured.values()) + measured[last] * size / last) > budget * unit:
            reason = f"{size} would cost more than measuring may"
            if hopeful and not flat:
                return ChunkChoice(even_chunk(count, most), most, measured, f"{reason}, and more was faster so far")
            break
        seconds = _try(size, run)
        if seconds is None:
            reason = f"{size} ran out of memory"
            break
        measured[size], last = seconds, size
        gain = (size / seconds) / (best / measured[best])
        if gain > GAIN:
            best, flat = size, False
        elif gain < 1 or flat:
            reason = f"{size} is {'slower' if gain < 1 else 'hardly faster'} per sample"
            break
        else:
            flat = True
    return _evened(count, best, measured, reason)


def even_chunk(count: int, most: int) -> int:
    """Return the size of chunks that splits `count` into as few chunks of at most `most` as possible, almost equal."""
    return -(-count // -(-count // most))


def log_halving(failed: int, chunk: int) -> None:
    """Warn that `failed` samples at once did not fit and the run goes on with `chunk`."""
    _log.warning("out of memory with %d samples at once; going on with %d", failed, chunk)


def _try(size: int, run: Callable[[int], float]) -> float | None:
    """Return the seconds per step with `size` samples; None if they do not fit."""
    try:
        seconds = float(run(size))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if size == 1:
            raise not_even_one(error) from error
    else:
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"run({size}) returned {seconds}, must be a positive number of seconds")
        return seconds
    release_memory()
    return None


def _evened(count: int, best: int, measured: dict[int, float], reason: str) -> ChunkChoice:
    chunk = even_chunk(count, best)
    rate = f"{best / measured[best]:.4g} samples x steps per second at {best}"
    text = f"{rate}, the best of {len(measured)} sizes; {reason}"
    if chunk != best:
        text += f"; evened out to {chunk}"
    return ChunkChoice(chunk, best, measured, text)
