"""One call of `Sampler.sample`: the loop over the table.

    Sampler.sample -> Run.draw -> Run._walk: for rows in table: Runner.advance -> Loop.body -> network, reverse_step

A `Sampler` holds settings and a table, a `Run` the arguments of one call, a `Batch` the inputs that differ from sample
to sample, and a `Loop` the buffers on the device. Its `Runner` runs the steps: from Python, or as CUDA graphs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from fastddpm_kernels import philox
from torch import Tensor

from fastddpm.common.progress import Bar, Report, check_progress, progress_bar
from fastddpm.process.tables import StepTable
from fastddpm.sampling.batch import Batch, Giver, NoiseSource
from fastddpm.sampling.batch_size import BatchSizes, log_halving
from fastddpm.sampling.loop import Body, Loop, Shapes, buffer_shapes
from fastddpm.sampling.memory import is_out_of_memory, not_even_one, release_memory
from fastddpm.sampling.pool import LoopPool
from fastddpm.sampling.runner import Runner, most_frequent
from fastddpm.sampling.trajectory import Recorder

StepCallback = Callable[[int, int, Tensor], bool | None]

# On CUDA: the most progress reports per chunk, and the fewest steps between two, so that graphs of several steps pay
# off.
BAR_UPDATES, BAR_STEPS = 50, 4


class Segment(NamedTuple):
    """Steps that run together: `steps` of one kind from row `first` on."""

    kind: Body
    first: int
    steps: int


def segments(bodies: Sequence[Body], start: int = 0, periods: Iterable[int] = ()) -> Iterator[Segment]:
    """Yield the rows from `start` on in order, in as few segments as possible.

    A segment ends where the kind of step changes, and after every k-th step, counted from `start`, for every k in
    `periods`: there the host has work to do.
    """
    periods = tuple(periods)
    first = start
    for row in range(start, len(bodies)):
        done = row - start + 1
        last = row + 1 == len(bodies) or bodies[row + 1] != bodies[row]
        if last or any(done % period == 0 for period in periods):
            yield Segment(bodies[row], first, row + 1 - first)
            first = row + 1


@dataclass(eq=False)
class Run:
    """One call of `Sampler.sample`.

    Attributes:
        pool: of the sampler's loops.
        table, start: the rows to walk, from `start` on.
        batch: of all samples.
        shape: [N, ...] of all samples.
        x_T: [N, ...], the samples before the first step, or None to draw them.
        noise, known_noise, callback: as in `Sampler.sample`.
        recorder: of the trajectory, or None.
    """

    pool: LoopPool
    table: StepTable
    start: int
    batch: Batch
    shape: tuple[int, ...]
    x_T: Tensor | None = None
    noise: NoiseSource | None = None
    known_noise: NoiseSource | None = None
    callback: StepCallback | None = None
    recorder: Recorder | None = None
    bar: Bar | None = None

    def draw(self, sizes: BatchSizes, batch_size: int | str | None, progress: bool | Report) -> Tensor:
        """Take all samples through the table, in chunks, and return them: float32 [N, ...].

        Raises:
            torch.OutOfMemoryError: this many samples do not fit at once; with "auto", not even one fits.
        """
        check_progress(progress)
        count, first, at_once = self.shape[0], 0, callable(self.noise) or callable(self.known_noise)
        images = torch.empty(self.shape, dtype=torch.float32, device=self.pool.network.device)
        auto = batch_size == "auto" and not at_once  # a noise function could not know which samples it draws for
        chunk = sizes.choose(self, count) if auto else batch_size if isinstance(batch_size, int) else count
        chosen = chunk
        with progress_bar(self.steps * -(-count // chunk), "sampling", enabled=progress) as bar:
            self.bar = None if progress is False else bar
            while first < count:
                rows, done = slice(first, min(first + chunk, count)), bar.done
                try:
                    self._walk(rows, images)
                    first = rows.stop
                except (RuntimeError, MemoryError) as error:
                    if self.bar is not None:
                        bar(done - bar.done)  # these steps will be done again
                    smaller = self._smaller(error, rows.stop - first, auto, at_once)
                else:
                    continue
                release_memory()
                if smaller is not None:
                    if self.bar is not None:
                        bar.extend(self.steps * (-(-(count - first) // smaller) - -(-(count - first) // chunk)))
                    chunk = smaller
        if chunk < chosen:
            sizes.remember(self, chunk)
        return images

    def first_not_finite(self, sample: int) -> int | None:
        """Walk the table again with one sample, and return the first row after which it is not finite, or None.

        Return None also if the user's noise is a function, since a function draws for all samples at once.
        """
        if callable(self.noise) or callable(self.known_noise):
            return None
        found: list[int] = []

        def look(row: int, timestep: int, x: Tensor) -> bool:
            if not bool(x.isfinite().all()):
                found.append(row)
            return bool(found)

        again = replace(self, callback=look, recorder=None, bar=None)
        nowhere = torch.empty(self.shape[1:], device=self.pool.network.device).expand(self.shape)
        again._walk(slice(sample, sample + 1), nowhere)
        return found[0] if found else None

    def _smaller(self, error: BaseException, size: int, auto: bool, at_once: bool) -> int | None:
        """Return how many samples to try after `size` ran out of memory; None for the same again with more free memory.

        Raises:
            RuntimeError, MemoryError: the error itself, if nothing helps.
        """
        if not is_out_of_memory(error):
            raise error
        if self.pool.clear():  # of loops that were kept for other shapes
            return None
        if not auto:
            error.args = (f"{error}\n{_advice(at_once)}",)
            raise error
        if size == 1:
            raise not_even_one(error) from error
        log_halving(size, -(-size // 2))
        return -(-size // 2)

    def _walk(self, rows: slice, images: Tensor) -> None:
        """Take some of the samples through the table, and put them into `images`."""
        with self.pool.lease(self.shapes(rows)) as runner:
            loop = self._load(rows, runner)
            giver = Giver()
            moments = _Moments(self, rows, loop)
            for kind, first, steps in segments(loop.bodies, self.start, self.periods(loop.x.device)):
                self._give_noise(giver, first, rows, loop)
                runner.advance(kind, steps)
                if moments.passed(first + steps - 1, steps):
                    break
            moments.end()
            images[rows] = loop.x

    @property
    def steps(self) -> int:
        """The number of steps of every sample."""
        return len(self.table) - self.start

    def shapes(self, rows: slice) -> Shapes:
        """Return the shapes of the buffers for some of the samples."""
        return buffer_shapes(
            self.table,
            (len(range(*rows.indices(self.shape[0]))), *self.shape[1:]),
            self.batch.samples(rows),
            self.pool.settings,
            self.pool.network,
            keep_x0=self.recorder is not None,
            noise=self.noise is not None,
            known_noise=self.known_noise is not None,
        )

    def key(self) -> object:
        """Return a key, equal for runs whose loops differ only in their numbers of samples and rows."""
        return frozenset((name, shape[1:], dtype) for name, (shape, dtype) in self.shapes(slice(0, 1)).items())

    def one_step(self, runner: Runner) -> Body:
        """Run one step of the most frequent kind, for as many samples as the loop has, and return that kind."""
        loop = self._load(slice(0, len(runner.loop.x)), runner, only_most=True)
        kind = most_frequent(loop.bodies[self.start :])
        loop.step.zero_()  # row 0 leaves room for more steps
        runner.advance(kind, 1)
        return kind

    def seconds_per_step(self, runner: Runner, steps: int = 2) -> float:
        """Return how long a step of `one_step` takes, once warmed up."""
        kind, device = self.one_step(runner), runner.loop.x.device
        _wait_for(device)
        begin = time.perf_counter()
        runner.advance(kind, steps)
        _wait_for(device)
        return (time.perf_counter() - begin) / steps

    def periods(self, device: torch.device) -> list[int]:
        """Return the periods, in steps, after which the host has work to do."""
        periods = []
        if self.callback is not None or self.noise is not None or self.known_noise is not None:
            periods.append(1)
        if self.recorder is not None:
            periods.append(self.recorder.every)
        if self.bar is not None:
            periods.append(max(BAR_STEPS, -(-self.steps // BAR_UPDATES)) if device.type == "cuda" else 1)
        return periods

    def _load(self, rows: slice, runner: Runner, *, only_most: bool = False) -> Loop:
        batch = self.batch.samples(rows)
        if self.x_T is not None:
            x = self.x_T[rows]
        else:
            backend = self.pool.settings.backend
            x = philox.normal(batch.keys, self.shape[1:], step=0, stream=philox.STREAM_INITIAL, backend=backend)
            x *= self.table.init_noise_sigma
        runner.load(self.table, x, batch, self.start, only_most=only_most)
        return runner.loop

    def _give_noise(self, giver: Giver, row: int, rows: slice, loop: Loop) -> None:
        """Put the user's noise for a row into the loop, if that row uses it."""
        if self.noise is not None and self.table.rows[row, 6] != 0:
            giver.give(loop.buffers["noise"], self.noise, row, rows, "noise")
        if self.known_noise is not None and self.table.levels[row, 1] != 0:
            giver.give(loop.buffers["known_noise"], self.known_noise, row, rows, "known_noise")


class _Moments:
    """Does the host's work between the segments of a chunk: progress, the trajectory, the callback.

    The bar follows the steps that the device has done, not those that the host has enqueued. The host stays two
    segments ahead, so that the device never waits for it.
    """

    def __init__(self, run: Run, rows: slice, loop: Loop) -> None:
        self._run, self._rows, self._loop = run, rows, loop
        self._pending: deque[tuple[torch.cuda.Event, int]] = deque()
        self._timesteps = run.table.timesteps.tolist()
        self._row = run.start
        if run.recorder is not None:
            run.recorder.begin_chunk()

    def passed(self, row: int, steps: int) -> bool:
        """Note that the loop has passed `row` after `steps` further steps. Return whether the callback stops it."""
        run, loop, self._row = self._run, self._loop, row
        if run.bar is not None and loop.x.device.type == "cuda":
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(loop.x.device))
            self._pending.append((event, steps))
            self._drain(run.bar, 2)
        elif run.bar is not None:
            run.bar(steps)
        if run.recorder is not None:
            run.recorder.after_step(row - run.start, self._rows, loop.x, loop.buffers["x0"])
        return run.callback is not None and bool(run.callback(row, self._timesteps[row], loop.x))

    def end(self) -> None:
        """Note that the loop has ended at the row passed last."""
        run, loop, row = self._run, self._loop, self._row
        if run.bar is not None:
            self._drain(run.bar, 0)
        if run.recorder is not None:
            timestep, x0 = self._timesteps[row], loop.buffers["x0"]
            run.recorder.end_of_chunk(row - run.start, timestep, self._rows, loop.x, x0)

    def _drain(self, bar: Bar, left: int) -> None:
        while len(self._pending) > left:
            event, steps = self._pending.popleft()
            event.synchronize()
            bar(steps)


def _advice(at_once: bool) -> str:
    """Return advice for when memory runs out."""
    if at_once:
        return "noise from a function is for all samples at once; as a tensor it would let batch_size be 'auto'"
    return "batch_size='auto' takes as many samples at once as fit"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
