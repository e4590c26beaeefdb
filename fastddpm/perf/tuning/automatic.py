"""Tuning before a loop, for a sampler that was asked to (`autotune=True`)."""

from __future__ import annotations

import logging
from functools import partial

from fastddpm_kernels import tuned as _tuned
from fastddpm_kernels.tuned import Key

from fastddpm.networks.network import Network
from fastddpm.perf.tuning.search import Stopwatch, stopwatch, summary, tune
from fastddpm.perf.tuning.shapes import recorded
from fastddpm.perf.tuning.store import save
from fastddpm.perf.tuning.task import tuned_ops
from fastddpm.sampling.batching import BatchSizes
from fastddpm.sampling.chunking import chunks, is_out_of_memory
from fastddpm.sampling.loop import Loop
from fastddpm.sampling.pool import Slot
from fastddpm.sampling.run import Run
from fastddpm.sampling.runner import PlainRunner
from fastddpm.sampling.settings import LoopSettings

SECONDS = 20.0  # that the shapes of a run may take, once: what was found is kept
_log = logging.getLogger(__name__)


def tune_run(
    network: Network, settings: LoopSettings, sizes: BatchSizes, run: Run, batch_size: int | str | None, *,
    seconds: float = SECONDS, clock: Stopwatch = stopwatch,
) -> int:  # fmt: skip
    """Tunes the shapes of a run for which no table has an answer, into the user's own. Returns how many were measured.

    Args:
        network, settings: of the loops.
        sizes: chooses how many samples go through the network at once, where `batch_size` is "auto".
        run: what is about to run.
        batch_size: as in `Sampler.sample`.
        seconds: for all shapes together.
        clock: as in `tune`.

    Raises:
        OSError: the table cannot be written.
    """
    device, count = network.device, len(run.images)
    ops = tuned_ops(device)
    if not ops:
        return 0
    chunk = batch_size if isinstance(batch_size, int) else count
    if batch_size == "auto" and not run.needs_all_at_once:
        chunk = sizes.choose(run, count)

    def bind(size: int) -> Slot:
        loop = Loop(network, run.layout(slice(0, size)), settings)
        return Slot(loop, PlainRunner(loop))

    keys: dict[Key, int] = {}
    for size in {rows.stop - rows.start for rows in chunks(count, chunk)}:
        try:
            keys |= recorded(partial(bind, size), run.one_step, ops)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return 0  # whoever runs the loop says so, or takes a smaller batch
    known = _tuned.known(device)
    missing = {key: times for key, times in keys.items() if key not in known}
    if not missing:
        return 0
    _log.info("tuning %d shapes, for at most %.0f s", len(missing), seconds)
    outcomes = tune(missing, device, seconds, clock=clock)
    _log.info("%s", summary(outcomes))
    return save(outcomes, device, _tuned.user_path(device))
