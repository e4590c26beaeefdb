"""How many samples go through the network at once: all, as many as the user says, or as many as are fastest and fit.

batch_size="auto" measures sizes where that costs little of the run, and halves what turns out not to fit.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastddpm.common.progress import Report, check_progress, progress_bar
from fastddpm.networks.network import Network
from fastddpm.sampling.chunking import (
    CANDIDATES,
    GAIN,
    choose_chunk,
    chunks,
    even_chunk,
    free_memory,
    is_out_of_memory,
    log_halving,
    release_memory,
    run_halving,
)
from fastddpm.sampling.loop import Layout, Loop
from fastddpm.sampling.pool import LoopPool, Slot
from fastddpm.sampling.run import Run, layout_of_one
from fastddpm.sampling.runner import Graphs, PlainRunner, Runner
from fastddpm.sampling.settings import LoopSettings

SHARE = 0.05  # of the estimated whole run that measuring may take
STEPS = 3  # that a measurement of one size takes: one to warm up, two that count
MEMORY = 0.8  # of the free memory that is planned with: allocators and libraries need some of their own
SIZES = (4, *CANDIDATES)

_log = logging.getLogger(__name__)


class Batching:
    """Takes the samples of runs through loops that are kept from run to run."""

    def __init__(self, network: Network, settings: LoopSettings, graphs: Graphs) -> None:
        # Functions of these three, not methods: what refers to a sampler keeps its memory past it.
        build = partial(_build_loop, network, settings)
        self.pool = LoopPool(partial(_build_slot, build, graphs), network.device)
        self.sizes = BatchSizes(build, network.device)

    def walk(self, run: Run, batch_size: int | str | None, progress: bool | Report) -> None:
        """All samples of `run` through its table; the arguments as in `Sampler.sample`.

        Raises:
            torch.OutOfMemoryError: so many samples at once do not fit; with "auto", not even one.
        """
        check_progress(progress)
        count, chunk = len(run.images), batch_size
        auto = batch_size == "auto" and not run.needs_all_at_once
        if not isinstance(chunk, int):
            chunk = self.sizes.choose(run, count) if auto else count
        with progress_bar(run.steps * -(-count // chunk), "sampling", enabled=progress) as bar:
            run.bar = None if progress is False else bar
            if auto:
                self._walk_halving(run, count, chunk)
                return
            for rows in chunks(count, chunk):
                try:
                    self._chunk(run, rows)
                except (RuntimeError, MemoryError) as error:
                    if is_out_of_memory(error):
                        error.args = (f"{error}\n{run.advice}",)
                    raise

    def _walk_halving(self, run: Run, count: int, chunk: int) -> None:
        done = 0

        def work(rows: slice) -> None:
            nonlocal done
            self._chunk(run, rows)
            done = rows.stop

        def halve(failed: int, chunk: int) -> None:
            log_halving(failed, chunk)
            if run.bar is not None:
                run.bar.extend(run.steps * (len(chunks(count - done, chunk)) - len(chunks(count - done, failed))))

        if (fitted := run_halving(count, chunk, work, halve)) < chunk:
            self.sizes.remember(run, fitted)

    def _chunk(self, run: Run, rows: slice) -> None:
        layout = run.layout(rows)
        try:
            with self.pool.lease(layout) as slot:
                run.chunk(rows, slot)
            return
        except (RuntimeError, MemoryError) as error:
            if not (is_out_of_memory(error) and self.pool.clear()):
                raise
        release_memory()  # of loops that were kept for other layouts: without them there may be enough
        with self.pool.lease(layout) as slot:
            run.chunk(rows, slot)


def _build_loop(network: Network, settings: LoopSettings, layout: Layout) -> Loop:
    return Loop(network, layout, settings)


def _build_slot(build: Callable[[Layout], Loop], graphs: Graphs, layout: Layout) -> tuple[Loop, Runner]:
    loop = build(layout)
    return loop, graphs.runner(loop)


class BatchSizes:
    """Chooses how many samples go through the network at once, and remembers it for each layout.

    Args:
        make: builds a loop for a layout. Nothing of it is kept.
        device: where the loops are.
    """

    def __init__(self, make: Callable[[Layout], Loop], device: torch.device) -> None:
        self._make, self._device = make, device
        self._best: dict[Layout, int] = {}
        # How many fit when that was first asked. Not asked again: what loops hold for the next run is not free then.
        self._fit: dict[Layout, int] = {}

    def choose(self, run: Run, count: int) -> int:
        """Samples at once for the `count` samples of a run, so that chunks are of almost equal size.

        What one and two samples allocate says how many fit. Below that, sizes are timed if that takes at most 5 % of
        the whole run, and only those for which it does; else it is as many as fit. Where the run is so short that
        four sample-steps are more than its 5 %, it is all of them.

        Raises:
            torch.OutOfMemoryError: not even one sample fits.
        """
        key, work = layout_of_one(run), count * run.steps
        if key in self._best:
            return even_chunk(count, self._best[key])
        if count == 1 or SHARE * work < 4:
            return count
        most, first = min(count, self._limit(run, key)), SIZES[0]
        if first >= most or 2 * STEPS * first > SHARE * work:  # twice: it is measured to set the budget, and again
            return even_chunk(count, most)
        seconds = self._seconds(run, first)
        choice = choose_chunk(
            count,
            run=partial(self._measure, run),
            max_chunk=most,
            # Where the smallest size does not fit, its halves are tried, and nothing above them.
            budget_s=1e-9 if seconds is None else SHARE * work * seconds / first,
            candidates=SIZES,
        )
        _log.info("batch_size 'auto' is %d for %d samples: %s", choice.chunk, count, choice.reason)
        rates = {size: size / seconds for size, seconds in choice.seconds_per_step.items()}
        self._best[key] = min(size for size, rate in rates.items() if rate * GAIN >= max(rates.values()))
        return choice.chunk

    def remember(self, run: Run, chunk: int) -> None:
        """More than `chunk` samples at once have turned out not to fit."""
        key = layout_of_one(run)
        self._best[key] = min(chunk, self._best.get(key, chunk))

    def _measure(self, run: Run, size: int) -> float:
        loop = self._make(run.layout(slice(0, size)))
        return run.seconds_per_step(Slot(loop, run.graphs.runner(loop, "step")))  # the mode that is captured soonest

    def _seconds(self, run: Run, size: int) -> float | None:
        """Seconds per step of `size` samples; None if they do not fit."""
        try:
            return self._measure(run, size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        release_memory()
        return None

    def _limit(self, run: Run, key: Layout) -> int:
        """How many samples fit in the memory that is free, at least 1."""
        if key not in self._fit:
            self._peak(run, 1)  # what is made once and for all, such as converted weights, is then there
            one, two = self._peak(run, 1), self._peak(run, 2)
            if one is None or two is None:
                return 1
            self._fit[key] = max(1, int(MEMORY * free_memory(self._device)) // max(1, two - one))
        return self._fit[key]

    def _peak(self, run: Run, size: int) -> int | None:
        """Bytes that a loop of `size` samples and a step of it hold at a time; None if they do not fit."""
        try:
            with Allocated() as allocated:
                loop = self._make(run.layout(slice(0, size)))
                run.one_step(Slot(loop, PlainRunner(loop)))
            return allocated.peak
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        release_memory()
        return None


class Allocated(TorchDispatchMode):
    """Counts the memory of the tensors that operations return while it is entered, on any device.

    What a kernel uses inside is not seen.

    Attributes:
        live, peak: bytes held now, and at most at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # else a view, or in place
                given.add(storage._cdata)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes()).atexit = False
        return out

    def _count(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
