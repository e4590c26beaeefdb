"""How many samples go through the network at once: measured, limited by memory, and halved where that was not enough.

More samples per pass use a device better, up to a point: past it a pass takes proportionally longer, or longer than
that where its activations leave a cache. Where the point lies is measured, not computed.

Nothing here knows of samplers: work is a function of a number of samples or of a slice of them.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastddpm.common import checks

CANDIDATES = tuple(2**k for k in range(4, 14))  # 16 to 8192
GAIN = 1.03  # in samples per second, which a larger size must bring
# What allocators say in errors that are not `torch.OutOfMemoryError`.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChunkChoice:
    """A number of samples per pass, and why.

    Attributes:
        chunk: samples per pass.
        seconds_per_step: what was measured, by size, in the order of measurement.
        reason: one line.
    """

    chunk: int
    seconds_per_step: dict[int, float]
    reason: str


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be allocated on `device`.

    CUDA: what the driver has free and what torch's allocator holds unused, within the fraction of the device that
    the process may use. CPU: what the system can give without swapping, within the limits of its control groups.

    Raises:
        ValueError: there is no telling for a device of this type.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return max(0, min(free, allowed - reserved) + reserved - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    if device.type == "cpu":
        return _free_host_memory(Path("/"))
    raise ValueError(f"device is '{device}', must be cuda, mps or cpu for its free memory to be known")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OUT_OF_MEMORY)


def release_memory() -> None:
    """Gives back what torch's allocators hold unused.

    To be called when an error has been handled, not while it is: its traceback holds the tensors of every frame.
    """
    gc.collect()  # frames and tensors in reference cycles
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def choose_chunk(
    count: int,
    *,
    run: Callable[[int], float],
    max_chunk: int | None = None,
    budget_s: float,
    candidates: Sequence[int] = CANDIDATES,
    clock: Callable[[], float] = time.perf_counter,
) -> ChunkChoice:
    """The number of samples per pass with which `count` samples are done soonest, by trying.

    Sizes rise as long as each brings more than 3 % more samples per second than the best one before. The first that
    brings fewer ends it; one in between is looked past once. So do memory, `count` and `budget_s`. The best size is
    then evened out: see `even_chunk`.

    Args:
        count: samples to be drawn in all.
        run: runs a few steps with n samples, warmed up, and returns the seconds per step. It raises an error for which
            `is_out_of_memory` holds if n samples do not fit.
        max_chunk: the most samples per pass; None for no limit.
        budget_s: seconds that all calls of `run` may take. A size is not tried if, at the rate of the last, it would
            not be done within them; the first one always is.
        candidates: rising sizes to try; those above the limits are replaced by the limit.
        clock: seconds, for the budget.

    Raises:
        ValueError: an argument is out of range.
        torch.OutOfMemoryError: not even one sample fits.
    """
    checks.positive(count, "count")
    most = count if max_chunk is None else min(count, checks.positive(max_chunk, "max_chunk"))
    if not budget_s > 0:
        raise ValueError(f"budget_s is {budget_s}, must be a positive number of seconds")
    sizes = [checks.positive(size, "every size of candidates") for size in candidates]
    if not sizes or sizes != sorted(set(sizes)):
        raise ValueError(f"candidates is {list(candidates)}, must be rising sizes")
    sizes = [size for size in sizes if size < most]
    if not sizes:
        return ChunkChoice(most, {}, f"{most} at once, too few to measure")
    sizes.append(most)

    measured: dict[int, float] = {}
    begin = clock()
    best, reason = _first(sizes[0], run, measured)
    if best < sizes[0]:
        return _evened(count, best, measured, reason)
    last, last_s = best, clock() - begin
    reason = f"{most} is the most there may be"
    flat = False
    for size in sizes[1:]:
        before = clock()
        if before - begin + last_s * size / last > budget_s:
            reason = f"{size} would not have been measured within {budget_s:g} s"
            break
        seconds = _try(size, run)
        if seconds is None:
            reason = f"{size} ran out of memory"
            break
        measured[size] = seconds
        gain = (size / seconds) / (best / measured[best])
        if gain > GAIN:
            best, flat = size, False
        elif gain < 1 or flat:
            reason = f"{size} is {'slower' if gain < 1 else 'hardly faster'} per sample"
            break
        else:
            flat = True
        last, last_s = size, clock() - before
    return _evened(count, best, measured, reason)


def even_chunk(count: int, most: int) -> int:
    """The size of chunks for `count` samples in as few of at most `most` as can be, all of almost the same size."""
    return -(-count // -(-count // most))


def chunks(count: int, chunk: int) -> list[slice]:
    """Slices that together are range(count), each of `chunk` samples, the last of what is left."""
    checks.positive(chunk, "chunk")
    return [slice(first, min(first + chunk, count)) for first in range(0, count, chunk)]


def log_halving(failed: int, chunk: int) -> None:
    """Says that `failed` samples at once did not fit, so that it goes on with `chunk`."""
    _log.warning("out of memory with %d samples at once; going on with %d", failed, chunk)


def run_halving(
    count: int, chunk: int, work: Callable[[slice], None], on_halve: Callable[[int, int], None] = log_halving
) -> int:
    """Does `work` for all of `count` samples, `chunk` at a time, or half as many wherever memory runs out.

    What was done before stays done. The slice that failed is done again from its start, in smaller ones.

    Args:
        count: samples, 0 or more.
        chunk: samples at once, to begin with.
        work: work(rows) does the samples of a slice. It may be called again for rows at which it failed.
        on_halve: told of every change, as on_halve(samples that did not fit, samples at once from now on).

    Returns:
        Samples at once in the end: at most `chunk`.

    Raises:
        torch.OutOfMemoryError: one sample does not fit. Any other error of `work` is passed on.
    """
    checks.positive(chunk, "chunk")
    first = 0
    while first < count:
        rows = slice(first, min(first + chunk, count))
        size = rows.stop - rows.start
        if _fits(work, rows, size):
            first = rows.stop
            continue
        release_memory()
        chunk = (size + 1) // 2
        on_halve(size, chunk)
    return chunk


def _fits(work: Callable[[slice], None], rows: slice, size: int) -> bool:
    try:
        work(rows)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if size == 1:
            raise _not_even_one(error) from error
        return False
    return True


def _not_even_one(error: BaseException) -> torch.OutOfMemoryError:
    first_line = str(error).split("\n", 1)[0] or type(error).__name__
    return torch.OutOfMemoryError(f"not enough memory for a single sample at a time: {first_line}")


def _try(size: int, run: Callable[[int], float]) -> float | None:
    """Seconds per step with `size` samples; None if they do not fit."""
    seconds = _run_or_none(size, run)
    if seconds is None:
        release_memory()
    elif not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"run({size}) returned {seconds}, must be a positive number of seconds")
    return seconds


def _run_or_none(size: int, run: Callable[[int], float]) -> float | None:
    try:
        return float(run(size))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if size == 1:
            raise _not_even_one(error) from error
    return None


def _first(size: int, run: Callable[[int], float], measured: dict[int, float]) -> tuple[int, str]:
    """Measures `size`, or the first of its halves that fits, and says so."""
    failed = None
    while (seconds := _try(size, run)) is None:
        failed, size = size, size // 2
    measured[size] = seconds
    return size, "" if failed is None else f"{failed} ran out of memory"


def _evened(count: int, best: int, measured: dict[int, float], reason: str) -> ChunkChoice:
    chunk = even_chunk(count, best)
    rate = f"{best / measured[best]:.4g} samples x steps per second at {best}"
    text = f"{rate}, the best of {len(measured)} sizes; {reason}"
    if chunk != best:
        text += f"; evened out to {chunk}"
    return ChunkChoice(chunk, measured, text)


# -- memory of the host -----------------------------------------------------------------------------------------------


def _free_host_memory(root: Path) -> int:
    """Bytes the system can still give; `root` is where its file systems are mounted."""
    known = [value for value in (_meminfo(root), _cgroup(root)) if value is not None]
    if known:
        return min(known)
    pages = _sysconf("SC_AVPHYS_PAGES") or _sysconf("SC_PHYS_PAGES")
    size = _sysconf("SC_PAGE_SIZE")
    if pages is None or size is None:
        raise ValueError("device is 'cpu', and this system does not tell its free memory")
    return pages * size


def _sysconf(name: str) -> int | None:
    try:
        value = os.sysconf(name)
    except (AttributeError, ValueError, OSError):
        return None
    return value if value > 0 else None


def _meminfo(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup(root: Path) -> int | None:
    """The least that is left in the control groups of this process, of version 2 or 1; None without a limit."""
    groups = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines() if line.count(":") >= 2]
    left = []
    for _, controllers, path in groups:
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be the host's, of which only the root is mounted.
        group = mount / path.strip("/")
        while True:
            if (free := _left_in(group, *names)) is not None:
                left.append(free)
            if group == mount:
                break
            group = group.parent
    return min(left) if left else None


def _left_in(group: Path, limit_name: str, usage_name: str, reclaimable: str) -> int | None:
    limit, usage = _read(group / limit_name).strip(), _read(group / usage_name).strip()
    if not limit.isdecimal() or not usage.isdecimal():  # "max", or no such group
        return None
    stat = dict(line.split(" ", 1) for line in _read(group / "memory.stat").splitlines() if " " in line)
    cached = int(stat.get(reclaimable, 0))  # file pages that are dropped when memory is wanted
    return max(0, int(limit) - int(usage) + cached)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
