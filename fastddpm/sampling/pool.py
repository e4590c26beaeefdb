"""A sampler's loops, kept for the next batch of the same layout: same buffers, same graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from fastddpm.sampling.loop import Layout, Loop
from fastddpm.sampling.runner import Runner

IDLE = 4  # loops that are kept for later


@dataclass(eq=False)
class Slot:
    """A loop and what runs it, lent to one user at a time.

    Attributes:
        loop, runner: the two; the runner may be replaced.
        built: the stream on which the loop's memory was allocated; None where there are no streams.
        released: recorded at the end of the last lease.
    """

    loop: Loop
    runner: Runner
    built: torch.cuda.Stream | None = None
    released: torch.cuda.Event | None = None


class LoopPool:
    """Lends loops by layout. Safe for threads, each of which gets one of its own.

    Args:
        make: builds a loop and its runner for a layout.
        device: where the loops are.
        idle: how many unused ones are kept, those used last.

    Attributes:
        built: how many loops have been built.
    """

    def __init__(
        self, make: Callable[[Layout], tuple[Loop, Runner]], device: torch.device, *, idle: int = IDLE
    ) -> None:
        self._make, self._device, self._most = make, device, idle
        self._idle: list[Slot] = []  # the one used last at the end
        self._lock = threading.Lock()  # held for bookkeeping alone, never while a loop is built or used
        self.built = 0

    @contextmanager
    def lease(self, layout: Layout) -> Iterator[Slot]:
        """A loop of `layout` for oneself, idle or new. After an error inside, it is not used again."""
        slot = self._take(layout)
        if slot is None:
            loop, runner = self._make(layout)
            slot = Slot(loop, runner, self._stream())
            with self._lock:
                self.built += 1
        elif (stream := self._stream()) is not None and slot.released is not None:
            stream.wait_event(slot.released)
        try:
            yield slot
        except BaseException:
            if (stream := self._stream()) is not None:
                with suppress(RuntimeError):  # the error that is under way tells more
                    stream.synchronize()  # what still runs reads memory that is about to be freed
            raise
        self._give_back(slot)

    def clear(self) -> int:
        """Frees the loops that are not in use, and returns how many they were."""
        with self._lock:
            dropped, self._idle = self._idle, []
        return len(dropped)

    @property
    def idle(self) -> int:
        """How many loops are kept that are not in use."""
        return len(self._idle)

    def _take(self, layout: Layout) -> Slot | None:
        with self._lock:
            for index in range(len(self._idle) - 1, -1, -1):
                if self._idle[index].loop.layout == layout:
                    return self._idle.pop(index)
        return None

    def _give_back(self, slot: Slot) -> None:
        stream = self._stream()
        if stream is not None:
            slot.released = slot.released or torch.cuda.Event()
            slot.released.record(stream)
            if slot.built is not None and slot.built != stream:
                # The allocator takes memory back as of the stream it was allocated on, whenever the loop is freed.
                slot.built.wait_event(slot.released)
        with self._lock:
            self._idle.append(slot)
            dropped = self._idle[: -self._most] if self._most else self._idle[:]
            del self._idle[: len(dropped)]
        del dropped  # outside of the lock: freeing graphs may take a while

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a pool is an empty one."""
        return {"make": self._make, "device": self._device, "idle": self._most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["make"], state["device"], idle=state["idle"])  # type: ignore[misc]
