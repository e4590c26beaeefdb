"""Run the steps of a loop: one by one, as CUDA graphs, or as native programs on the CPU.

All give the same numbers, bit for bit. Graphs and programs hold the addresses of a loop's buffers, not their values,
so one serves every batch that is loaded later. Only `make_runner` chooses between them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from fastddpm_kernels.native.program import Program, RecordError, record
from torch import Tensor

from fastddpm.process.tables import StepTable
from fastddpm.sampling.batch import Batch
from fastddpm.sampling.cuda_graph import MODES, CapturedBody, CaptureError, tuned, why_not
from fastddpm.sampling.loop import Body, Loop
from fastddpm.sampling.memory import is_out_of_memory

MEASURED_ROWS = 256  # shorter loops end before measuring how to run graphs pays off
NATIVE_SECONDS = 0.2  # the longest call of a native program, unless one step takes longer: nothing can interrupt it

_log = logging.getLogger(__name__)


@dataclass
class GraphRecord:
    """A record of whether a sampler's loops are captured, and of the results. Threads may share it.

    Attributes:
        wanted: "auto" or one of `cuda_graph.MODES`.
        why_not: why there are no graphs, or None.
        native: whether a native program may run a loop's steps, on the CPU.
        made: (mode, microseconds per step by mode, captures) of every body that was captured.
    """

    wanted: str
    why_not: str | None
    native: bool = False
    made: list[tuple[str, dict[str, float], int]] = field(default_factory=list)

    @classmethod
    def parse(cls, cuda_graph: str | bool, device: torch.device) -> GraphRecord:
        """Read the argument of `Sampler`.

        Raises:
            ValueError: it is not known, or names a mode that cannot be used on the device.
        """
        if cuda_graph is False:
            return cls("auto", "cuda_graph is False")
        if cuda_graph not in ("auto", *MODES):
            raise ValueError(f"cuda_graph is {cuda_graph!r}, must be 'auto', {', '.join(map(repr, MODES))} or False")
        wanted = str(cuda_graph)
        reason = why_not("step", device, trusted=True) if wanted == "auto" else why_not(wanted, device)
        if wanted != "auto" and reason is not None:
            raise ValueError(f"cuda_graph is {cuda_graph!r}, which cannot be used here: {reason}")
        return cls(wanted, reason, native=device.type == "cpu")

    def give_up(self, why: str) -> None:
        """Run every loop step by step from now on."""
        first, self.why_not = self.why_not is None, why
        if first:
            _log.warning("the loop cannot be captured as a CUDA graph and runs step by step: %s", why)

    def report(self) -> dict[str, Any]:
        """See `Sampler.graph_report`."""
        used = self.made and (self.why_not is None or self.native)
        mode, measured, _ = self.made[-1] if used else (None if self.why_not is None else "plain", {}, 0)
        return {
            "mode": mode,
            "measured_us": dict(measured),
            "captures": sum(captures for _, _, captures in self.made),
            "why_not": self.why_not,
        }


def make_runner(loop: Loop, graphs: GraphRecord, mode: str | None = None) -> Runner:
    """Return the runner of a loop; `mode`, "plain" or one of `cuda_graph.MODES`, replaces the sampler's."""
    if graphs.native and mode is None and loop.settings.backend == "native" and loop.settings.classifier is None:
        return NativeRunner(loop, graphs)
    return Runner(loop) if graphs.why_not is not None or mode == "plain" else GraphRunner(loop, graphs, mode)


class Runner:
    """Runs the steps of one loop, operation by operation.

    Attributes:
        loop: the loop.
        built: the stream that the loop's memory was allocated on; None where there are no streams.
        released: recorded when the loop was last given back to its pool.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.built = torch.cuda.current_stream(loop.x.device) if loop.x.device.type == "cuda" else None
        self.released: torch.cuda.Event | None = None

    def load(self, table: StepTable, x: Tensor, batch: Batch, start: int = 0, *, only_most: bool = False) -> None:
        """Load a batch as `Loop.load` does, and prepare its steps: all, or only those of the most frequent kind."""
        self.loop.load(table, x, batch, start)

    def advance(self, kind: Body, steps: int) -> None:
        """Run `steps` steps of one kind on the current stream. The host does not wait for them."""
        with tuned():  # chooses the convolutions that a graph would hold
            for _ in range(steps):
                self.loop.body(kind)


class GraphRunner(Runner):
    """Captures each kind of step once and replays it; runs plainly after a capture has failed.

    A step is captured again where the model's weights have moved to other memory (not where they changed in place), and
    for each setting of autocast.
    """

    def __init__(self, loop: Loop, graphs: GraphRecord, mode: str | None = None) -> None:
        super().__init__(loop)
        self._graphs, wanted = graphs, graphs.wanted if mode is None else mode
        self._mode = "step" if wanted == "auto" and len(loop.buffers["rows"]) < MEASURED_ROWS else wanted
        self._captured: dict[tuple[Body, torch.dtype | None], CapturedBody] = {}
        self._addresses: tuple[int, ...] = ()

    def load(self, table: StepTable, x: Tensor, batch: Batch, start: int = 0, *, only_most: bool = False) -> None:
        """See `Runner.load`.

        Raises:
            CaptureError: a step cannot be captured, and graphs were asked for by name.
            torch.OutOfMemoryError: there is no memory for it.
        """
        self.loop.load(table, x, batch, start)
        kinds = list(dict.fromkeys(self.loop.bodies[start:]))
        if only_most:
            kinds = [most_frequent(self.loop.bodies[start:])]
        if self._graphs.why_not is None and self._capture(kinds):
            self.loop.load(table, x, batch, start)  # capturing runs steps

    def advance(self, kind: Body, steps: int) -> None:
        """See `Runner.advance`."""
        if self._graphs.why_not is None:
            self._captured[self._key(kind)].advance(steps)
        else:
            super().advance(kind, steps)

    def _capture(self, kinds: list[Body]) -> bool:
        """Capture the kinds not yet captured. Return whether steps were run for it."""
        addresses = self.loop.network.addresses()
        if addresses != self._addresses:
            self._captured.clear()
            self._addresses = addresses
        missing = [kind for kind in kinds if self._key(kind) not in self._captured]
        for kind in sorted(missing, key=lambda kind: kind.network):  # the report is about the last one
            step = self.loop.step
            try:
                with _no_autocast_cache():
                    captured = CapturedBody(partial(self.loop.body, kind), step, mode=self._mode, reset=_rewinds(step))
            except CaptureError as error:
                if error.__cause__ is not None and is_out_of_memory(error.__cause__):
                    raise error.__cause__ from None
                if self._graphs.wanted != "auto":
                    raise
                self._graphs.give_up(str(error))
                return True
            self._captured[self._key(kind)] = captured
            self._graphs.made.append((captured.mode, dict(captured.measured), captured.captures))
        return bool(missing)

    def _key(self, kind: Body) -> tuple[Body, torch.dtype | None]:
        device = self.loop.x.device.type
        return kind, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class NativeRunner(Runner):
    """Records each kind of step once and lets the native library run it; runs plainly what cannot be recorded."""

    def __init__(self, loop: Loop, graphs: GraphRecord) -> None:
        super().__init__(loop)
        self._graphs = graphs
        self._programs: dict[Body, Program | None] = {}
        self._seconds = NATIVE_SECONDS  # of a step

    def load(self, table: StepTable, x: Tensor, batch: Batch, start: int = 0, *, only_most: bool = False) -> None:
        """See `Runner.load`."""
        self.loop.load(table, x, batch, start)
        kinds = self.loop.bodies[start:]
        missing = {most_frequent(kinds)} if only_most else set(kinds)
        missing -= self._programs.keys()
        for kind in missing:
            self._programs[kind] = self._record(kind)
        if missing:
            self.loop.load(table, x, batch, start)  # recording a step runs its torch operations

    def advance(self, kind: Body, steps: int) -> None:
        """See `Runner.advance`."""
        program = self._programs[kind]
        if program is None:
            super().advance(kind, steps)
            return
        while steps > 0:
            begin, now = time.perf_counter(), max(1, min(steps, int(NATIVE_SECONDS / self._seconds)))
            program.advance(now)
            self._seconds = max((time.perf_counter() - begin) / now, 1e-7)
            steps -= now

    def _record(self, kind: Body) -> Program | None:
        try:
            with _no_autocast_cache():
                program = record(partial(self.loop.body, kind))
        except RecordError as error:
            _log.info("steps of the kind %s run one by one: %s", kind, error)
            return None
        self._graphs.made.append(("native", {}, 1))
        return program


def most_frequent(kinds: list[Body]) -> Body:
    """Return the most frequent kind of step, the first of several."""
    return max(dict.fromkeys(kinds), key=kinds.count)


def _rewinds(step: Tensor) -> Callable[[], None]:
    """Return a function that takes a loop back to its first row, which `loop.ROWS` steps may follow."""

    def rewind() -> None:
        step.zero_()

    return rewind


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Keep autocast from caching converted weights: a graph would read them after they are gone."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
