"""How a loop's steps are run: one by one, or as CUDA graphs. Both give the same numbers, bit for bit.

A graph holds where a loop's tensors are, not what is in them, so that one serves every batch that is loaded later.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastddpm.sampling.chunking import is_out_of_memory
from fastddpm.sampling.cuda_graph import MODES, CapturedBody, CaptureError, tuned, why_not
from fastddpm.sampling.loop import Body, Loop

MEASURED_ROWS = 256  # loops with room for fewer steps are over before measuring how to run graphs has paid

_log = logging.getLogger(__name__)


class Segment(NamedTuple):
    """Steps that run in one go.

    Attributes:
        kind: the body of all of them.
        first: the row of the first.
        steps: how many.
    """

    kind: Body
    first: int
    steps: int


def segments(bodies: Sequence[Body], start: int = 0, periods: Iterable[int] = ()) -> Iterator[Segment]:
    """The rows from `start` on in order, as few segments as can be.

    A segment ends where the body changes, and after every k-th step, counted from `start`, for every k in `periods`:
    there the host has something to do.
    """
    periods = tuple(periods)
    first = start
    for row in range(start, len(bodies)):
        done = row - start + 1
        last = row + 1 == len(bodies) or bodies[row + 1] != bodies[row]
        if last or any(done % period == 0 for period in periods):
            yield Segment(bodies[row], first, row + 1 - first)
            first = row + 1


class Runner(Protocol):
    """What runs the steps of one loop.

    Attributes:
        mode: "plain", or how graphs are run; None before that is known.
    """

    mode: str | None

    def prepare(self, kinds: Iterable[Body]) -> int:
        """Makes ready what `advance` needs for these bodies; if that is anything, what is loaded has to be loaded anew.

        Returns:
            How many captures were made. What was captured before is not again.
        """

    def advance(self, kind: Body, count: int) -> None:
        """`count` steps of one body, on the current stream; the host does not wait for them."""


class PlainRunner:
    """Asks for every operation of every step."""

    mode: str | None = "plain"

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def prepare(self, kinds: Iterable[Body]) -> int:
        return 0

    def advance(self, kind: Body, count: int) -> None:
        with tuned():  # the convolutions that a graph would hold
            for _ in range(count):
                self._loop.body(kind)


class GraphRunner:
    """Captures each body once and replays it.

    A body is captured anew where the model's weights have moved to other memory (not where they changed in place), and
    for each setting of autocast.
    """

    def __init__(self, loop: Loop, mode: str = "auto") -> None:
        """`mode` is "auto" or one of `cuda_graph.MODES`. With "auto" it is measured, and "step" for short loops."""
        short = mode == "auto" and loop.layout.rows < MEASURED_ROWS
        self._loop, self._wanted = loop, "step" if short else mode
        self._captured: dict[tuple[Body, torch.dtype | None], CapturedBody] = {}
        self._addresses: tuple[int, ...] = ()
        self.mode: str | None = None
        self.measured_us: dict[str, float] = {}

    def prepare(self, kinds: Iterable[Body]) -> int:
        """As `Runner.prepare`. Steps are run for it, so that the loop must be loaded, and is no longer afterwards.

        Raises:
            CaptureError: a body cannot be captured.
        """
        addresses = self._loop.network.addresses()
        if addresses != self._addresses:
            self._captured.clear()
            self._addresses = addresses
        captures = 0
        for kind in dict.fromkeys(kinds):
            if self._key(kind) in self._captured:
                continue
            with _no_autocast_cache():
                captured = CapturedBody(
                    partial(self._loop.body, kind), self._loop.step, mode=self._wanted, reset=_rewinds(self._loop.step)
                )
            self._captured[self._key(kind)] = captured
            captures += captured.captures
            if self.mode is None or kind.network:
                self.mode, self.measured_us = captured.mode, dict(captured.measured)
        return captures

    def advance(self, kind: Body, count: int) -> None:
        self._captured[self._key(kind)].advance(count)

    def _key(self, kind: Body) -> tuple[Body, torch.dtype | None]:
        device = self._loop.x.device.type
        return kind, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class Graphs:
    """Whether a sampler's loops are captured, and what came of it.

    Args:
        cuda_graph: "auto", one of `cuda_graph.MODES`, or False.
        device: where the loops are.

    Raises:
        ValueError: it is none of these, or one that cannot be used on the device.
    """

    def __init__(self, cuda_graph: str | bool, device: torch.device) -> None:
        if cuda_graph is not False and cuda_graph not in ("auto", *MODES):
            raise ValueError(f"cuda_graph is {cuda_graph!r}, must be 'auto', {', '.join(map(repr, MODES))} or False")
        self._wanted: str | None = None if cuda_graph is False else str(cuda_graph)
        self._why_not: str | None = "cuda_graph is False"
        if self._wanted is not None:
            self._why_not = why_not("step" if self._wanted == "auto" else self._wanted, device)
        if self._wanted in MODES and self._why_not is not None:
            raise ValueError(f"cuda_graph is {cuda_graph!r}, which cannot be used here: {self._why_not}")
        self._lock = threading.Lock()
        self._captures = 0
        self._mode: str | None = None if self._why_not is None else "plain"
        self._measured_us: dict[str, float] = {}

    def runner(self, loop: Loop, mode: str | None = None) -> Runner:
        """A runner for `loop`; of graphs in the mode given, else in the sampler's."""
        if self._wanted is None or self._why_not is not None:
            return PlainRunner(loop)
        return GraphRunner(loop, self._wanted if mode is None else mode)

    def prepare(self, runner: Runner, loop: Loop, kinds: Sequence[Body]) -> tuple[Runner, bool]:
        """`Runner.prepare`, and with "auto" a plain runner from when on a body could not be captured.

        Returns:
            The runner to go on with, and whether `loop` has to be loaded anew.

        Raises:
            CaptureError: a body cannot be captured, and graphs were asked for by name.
            torch.OutOfMemoryError: there was no memory for it.
        """
        if self._why_not is not None and not isinstance(runner, PlainRunner):
            return PlainRunner(loop), False
        try:
            captures = runner.prepare(kinds)
        except CaptureError as error:
            if error.__cause__ is not None and is_out_of_memory(error.__cause__):
                raise error.__cause__ from None
            if self._wanted != "auto":
                raise
            self._give_up(str(error))
            return PlainRunner(loop), True
        if captures:
            with self._lock:
                self._captures += captures
                self._mode, self._measured_us = runner.mode, getattr(runner, "measured_us", {})
        return runner, captures > 0

    def report(self) -> dict[str, Any]:
        """See `Sampler.graph_report`."""
        with self._lock:
            return {
                "mode": self._mode,
                "measured_us": dict(self._measured_us),
                "captures": self._captures,
                "why_not": self._why_not,
            }

    def _give_up(self, why: str) -> None:
        with self._lock:
            first, self._why_not = self._why_not is None, why
            self._mode, self._measured_us = "plain", {}
        if first:
            _log.warning("the loop cannot be captured as a CUDA graph and runs step by step: %s", why)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())


def _rewinds(step: Tensor) -> Callable[[], None]:
    """The function that takes a loop back to its first row, from which there is room for `loop.ROWS` steps."""

    def rewind() -> None:
        step.zero_()

    return rewind


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Inside, autocast keeps no converted weights: a graph would read them after they are gone."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
