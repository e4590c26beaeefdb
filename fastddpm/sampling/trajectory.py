"""Record the states and predictions of a sampling loop every k steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Moments of a loop, in the order they were passed; the last one is always the end.

    Attributes:
        x: float32 [K, N, ...], the state after the step; `x[-1]` is what `Sampler.sample` returns otherwise.
        x0: float32 [K, N, ...], the x0 predicted in that step, or by the last one before it that had a prediction. None
            for a table that stores another quantity (`StepTable.stores`), such as that of "plms" or "lms".
        timesteps: int64 [K], the timestep the network was told in that step.
    """

    x: Tensor
    x0: Tensor | None
    timesteps: Tensor


class Recorder:
    """Fills a `Trajectory`, one chunk of the batch after the other.

    Args:
        every: k; a moment is kept after the k-th, 2k-th, ... step, and after the last.
        timesteps: int64 [S], of all steps of the loop.
        shape: (N, ...), of all samples.
        device: where the moments are kept.
    """

    def __init__(self, every: int, timesteps: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
        steps = len(timesteps)
        self.every = every
        self.moments = list(dict.fromkeys([*range(every - 1, steps, every), steps - 1]))
        self._planned = timesteps[self.moments]
        self.timesteps = self._planned.clone()
        self.x = torch.empty((len(self.moments), *shape), device=device)
        self.x0 = torch.empty_like(self.x)
        self._passed = 0  # moments of the chunk under way
        self._most = 0  # most moments of any chunk so far

    def begin_chunk(self) -> None:
        """Start a chunk, perhaps one that failed before."""
        self._passed = 0

    def after_step(self, index: int, rows: slice, x: Tensor, x0: Tensor) -> None:
        """Keep the state if step `index` of the loop, counted from 0, is one of the moments."""
        if index == self.moments[self._passed]:
            self.x[self._passed, rows], self.x0[self._passed, rows] = x, x0
            self._passed += 1

    def end_of_chunk(self, index: int, timestep: int, rows: slice, x: Tensor, x0: Tensor) -> None:
        """End a chunk after step `index`, which is its last moment if a callback stopped it there."""
        stopped = self._passed == 0 or index != self.moments[self._passed - 1]
        self._passed += stopped
        if self._passed > self._most or (self._passed == self._most and not stopped):
            self.timesteps[: self._passed] = self._planned[: self._passed]  # those of the chunk that went furthest
            if stopped:
                self.timesteps[self._passed - 1] = timestep
        self.x[self._passed - 1 :, rows], self.x0[self._passed - 1 :, rows] = x, x0
        self._most, self._passed = max(self._most, self._passed), 0

    def trajectory(self, *, stores_x0: bool = True) -> Trajectory:
        """Return what was kept; x0 only with `stores_x0`. A chunk that stopped earlier than others repeats its end."""
        x0 = self.x0[: self._most] if stores_x0 else None
        return Trajectory(self.x[: self._most], x0, self.timesteps[: self._most])
