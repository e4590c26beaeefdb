"""One call of `Sampler.sample`: a table walked by all samples, in chunks, with what the host does on the way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastddpm.common.progress import Bar
from fastddpm.process.tables import StepTable
from fastddpm.sampling.batch import Batch, NoiseSource, give_noise
from fastddpm.sampling.loop import Body, Layout, layout_of
from fastddpm.sampling.pool import Slot
from fastddpm.sampling.runner import Graphs, segments
from fastddpm.sampling.settings import LoopSettings
from fastddpm.sampling.trajectory import Recorder

StepCallback = Callable[[int, int, Tensor], bool | None]

# Where the host is ahead of the device, progress is told at most so often per chunk, and after no fewer steps, so that
# graphs of several steps stay worth their while.
BAR_UPDATES, BAR_STEPS = 50, 4


@dataclass(eq=False)
class Run:
    """What the chunks of one call share.

    Attributes:
        table, start: the rows to walk, from `start` on.
        batch: of all samples.
        initial: gives some of the samples as they are before the first step, float [n, ...].
        images: float32 [N, ...], where the samples go in the end.
        settings: of the sampler.
        graphs: how loops are run.
        noise, known_noise, callback: as in `Sampler.sample`.
        recorder: of the trajectory, or None.
        bar: of the progress, or None.
    """

    table: StepTable
    start: int
    batch: Batch
    initial: Callable[[slice], Tensor]
    images: Tensor
    settings: LoopSettings
    graphs: Graphs
    noise: NoiseSource | None = None
    known_noise: NoiseSource | None = None
    callback: StepCallback | None = None
    recorder: Recorder | None = None
    bar: Bar | None = None

    @property
    def steps(self) -> int:
        """How many steps every sample takes."""
        return len(self.table) - self.start

    @property
    def needs_all_at_once(self) -> bool:
        """Whether noise comes from a function, which could not know for which samples it is asked."""
        return callable(self.noise) or callable(self.known_noise)

    @property
    def advice(self) -> str:
        """What helps where memory runs out."""
        if self.needs_all_at_once:
            return "noise from a function is for all samples at once; as a tensor it would let batch_size be 'auto'"
        return "batch_size='auto' takes as many samples at once as fit"

    def layout(self, rows: slice) -> Layout:
        """The layout of the loop for some of the samples."""
        return layout_of(
            self.table,
            tuple(self.images[rows].shape),
            self.batch.samples(rows),
            self.settings,
            keep_x0=self.recorder is not None,
            noise=self.noise is not None,
            known_noise=self.known_noise is not None,
        )

    def chunk(self, rows: slice, slot: Slot) -> None:
        """All steps of some of the samples, in a loop of their layout."""
        done = 0 if self.bar is None else self.bar.done
        try:
            self._walk(rows, slot)
        except (RuntimeError, MemoryError):
            if self.bar is not None:
                self.bar(done - self.bar.done)  # they will be done again
            raise

    def _walk(self, rows: slice, slot: Slot) -> None:
        self._load(rows, slot)
        loop, recorder = slot.loop, self.recorder
        if recorder is not None:
            recorder.begin_chunk()
        timesteps = self.table.timesteps.tolist()
        adds_noise, levels = (self.table.rows[:, 6] != 0).tolist(), self.table.levels[:, 1].tolist()
        pace = _Pace(self.bar, loop.x.device)
        row = self.start
        for kind, row, count in segments(loop.bodies, self.start, self._periods(loop.x.device)):
            if adds_noise[row]:
                give_noise(loop.noise, self.noise, row, rows, "noise")
            if levels[row]:
                give_noise(loop.known_noise, self.known_noise, row, rows, "known_noise")
            slot.runner.advance(kind, count)
            pace.advance(count)
            row += count - 1
            if recorder is not None and loop.x0 is not None:
                recorder.after_step(row - self.start, rows, loop.x, loop.x0)
            if self.callback is not None and self.callback(row, timesteps[row], loop.x):
                break
        pace.finish()
        if recorder is not None and loop.x0 is not None:
            recorder.end_of_chunk(row - self.start, timesteps[row], rows, loop.x, loop.x0)
        self.images[rows] = loop.x

    def one_step(self, slot: Slot) -> Body:
        """A step of the kind that there is most of, for the first samples, as many as the loop has; and its kind."""
        kind = self._load(slice(0, len(slot.loop.x)), slot, only=True)
        slot.loop.step.zero_()  # from there on there is room for more steps
        slot.runner.advance(kind, 1)
        return kind

    def seconds_per_step(self, slot: Slot, steps: int = 2) -> float:
        """How long such a step takes, once warmed up."""
        kind = self.one_step(slot)
        device = slot.loop.x.device
        _wait_for(device)
        begin = time.perf_counter()
        slot.runner.advance(kind, steps)
        _wait_for(device)
        return (time.perf_counter() - begin) / steps

    def _load(self, rows: slice, slot: Slot, *, only: bool = False) -> Body:
        """Loads some of the samples, and captures what has not been: all kinds of steps, or the `only` most frequent.

        Returns:
            The most frequent kind of step.
        """
        loop, batch = slot.loop, self.batch.samples(rows)
        x = self.initial(rows)
        loop.load(self.table, x, batch, self.start)
        kinds = loop.bodies[self.start :]
        most = max(dict.fromkeys(kinds), key=kinds.count)
        slot.runner, stale = self.graphs.prepare(slot.runner, loop, [most] if only else kinds)
        if stale:  # capturing runs steps
            loop.load(self.table, x, batch, self.start)
        return most

    def _periods(self, device: torch.device) -> list[int]:
        """After every how many steps the host has something to do."""
        periods = []
        if self.callback is not None or self.noise is not None or self.known_noise is not None:
            periods.append(1)
        if self.recorder is not None:
            periods.append(self.recorder.every)
        if self.bar is not None:
            periods.append(max(BAR_STEPS, -(-self.steps // BAR_UPDATES)) if device.type == "cuda" else 1)
        return periods


class _Pace:
    """Moves a bar as the device does the steps, not as the host asks for them.

    The host stays two segments ahead: enough for the device never to wait for it.
    """

    def __init__(self, bar: Bar | None, device: torch.device) -> None:
        self._bar, self._device = bar, device
        self._pending: deque[tuple[torch.cuda.Event, int]] = deque()

    def advance(self, count: int) -> None:
        if self._bar is None:
            return
        if self._device.type != "cuda":
            self._bar(count)
            return
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._pending.append((event, count))
        self._drain(2)

    def finish(self) -> None:
        self._drain(0)

    def _drain(self, left: int) -> None:
        while len(self._pending) > left and self._bar is not None:
            event, count = self._pending.popleft()
            event.synchronize()
            self._bar(count)


def layout_of_one(run: Run) -> Layout:
    """What of a run's layout does not depend on how many samples or steps it has."""
    return replace(run.layout(slice(0, 1)), rows=0)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
