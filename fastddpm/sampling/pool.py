"""Keep a sampler's loops for the next batch whose buffers have the same shapes: same memory, same graphs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from fastddpm.networks.network import Network
from fastddpm.sampling.loop import Loop, Shapes
from fastddpm.sampling.runner import GraphRecord, Runner, make_runner
from fastddpm.sampling.settings import LoopSettings

IDLE = 4  # loops that are kept for later


class LoopPool:
    """Lends loops with their runners, each to one user at a time. It is thread-safe.

    Args:
        network, settings, graphs: of the loops.
        idle: how many unused loops are kept; the most recently used stay.

    Attributes:
        built: how many loops were built to be lent.
    """

    def __init__(self, network: Network, settings: LoopSettings, graphs: GraphRecord, *, idle: int = IDLE) -> None:
        self.network, self.settings, self.graphs, self._most = network, settings, graphs, idle
        self._idle: list[Runner] = []  # the one used last at the end
        self._lock = threading.Lock()  # held for bookkeeping alone, never while a loop is built or used
        self.built = 0

    def build(self, shapes: Shapes, mode: str | None = None) -> Runner:
        """Return a new loop that the pool does not keep; `mode` as for `make_runner`."""
        return make_runner(Loop(self.network, shapes, self.settings), self.graphs, mode)

    @contextmanager
    def lease(self, shapes: Shapes) -> Iterator[Runner]:
        """Lend a loop with buffers of these shapes, kept or new. After an error inside, the loop is not reused."""
        runner = self._take(shapes)
        if runner is None:
            runner = self.build(shapes)
            with self._lock:
                self.built += 1
        elif (stream := self._stream()) is not None and runner.released is not None:
            stream.wait_event(runner.released)
        try:
            yield runner
        except BaseException:
            if (stream := self._stream()) is not None:
                with suppress(RuntimeError):  # the original error tells more
                    stream.synchronize()  # work still running reads memory that is about to be freed
            raise
        self._give_back(runner)

    def clear(self) -> int:
        """Free the loops that are not in use, and return their number."""
        with self._lock:
            dropped, self._idle = self._idle, []
        return len(dropped)

    @property
    def idle(self) -> list[Runner]:
        """The loops that are kept and not in use."""
        return list(self._idle)

    def _take(self, shapes: Shapes) -> Runner | None:
        with self._lock:
            for index in range(len(self._idle) - 1, -1, -1):
                if self._idle[index].loop.shapes == shapes:
                    return self._idle.pop(index)
        return None

    def _give_back(self, runner: Runner) -> None:
        stream = self._stream()
        if stream is not None:
            runner.released = runner.released or torch.cuda.Event()
            runner.released.record(stream)
            if runner.built is not None and runner.built != stream:
                # The allocator takes memory back as of the stream it was allocated on, whenever the loop is freed.
                runner.built.wait_event(runner.released)
        with self._lock:
            self._idle.append(runner)
            dropped = self._idle[: -self._most] if self._most else self._idle[:]
            del self._idle[: len(dropped)]
        del dropped  # outside of the lock: freeing graphs may take a while

    def _stream(self) -> torch.cuda.Stream | None:
        device = self.network.device
        return torch.cuda.current_stream(device) if device.type == "cuda" else None

    def __getstate__(self) -> dict[str, Any]:
        """Copy a pool without its loops."""
        return {"network": self.network, "settings": self.settings, "graphs": self.graphs, "idle": self._most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
