"""The time projections of all residual blocks for every step of a loop, computed before the first step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm.networks.frozen.blueprint import Embeddings
from fastddpm.networks.frozen.instructions import Instruction, Machine

MAX_BYTES = 256 * 2**20
_ROWS_AT_ONCE = 4096


class TimeTable:
    """The time projections of a step: `row` [1 or N, sum C], looked up in a table on the device.

    Without classes the table has a row per step. With classes it has one per step and class if that fits into
    `max_bytes`. If it does not, or if labels are not integers below a known number, a row is computed from the
    embeddings of the step and of the labels, by one matrix product for all blocks.
    """

    def __init__(
        self, machine: Machine, embeddings: Embeddings, weight: Tensor, bias: Tensor, timesteps: Tensor,
        labels: Tensor | None, batch: int, dtype: torch.dtype, max_bytes: int = MAX_BYTES,
    ) -> None:  # fmt: skip
        """Take `weight` [sum C, E] and `bias` [sum C], float64, from `Blueprint.time_projections`."""
        self._m, self._embeddings, self._weight, self._bias = machine, embeddings, weight, bias
        self._timesteps, self._labels = timesteps, labels
        device, (width, reads), steps = weight.device, weight.shape, len(timesteps)
        channels = reads // 2 if embeddings.reads_raw else reads

        def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        self.row = empty(1 if labels is None else batch, width)
        self.instructions: list[Instruction] = []
        classes = embeddings.num_labels
        fits = classes is not None and steps * classes * width * dtype.itemsize <= max_bytes
        self._classes = 1 if labels is None else classes if fits else None  # per row of the table
        if self._classes is None:
            self._table, self._of_step = empty(steps, channels), empty(1, channels)
            self._of_labels, self._sum = empty(batch, channels), empty(batch, channels)
            self._weight_t, self._own_bias = empty(reads, width), empty(width)
            self._active = self._sum
            size = self._weight_t.numel() * dtype.itemsize
            self._emit("time.lookup", lambda: self._look_up(machine.step, self._of_step))
            self._emit("time.add", lambda: torch.add(self._of_step, self._of_labels, out=self._sum))
            self._emit("time.activate", self._activate)
            self._emit("time.project", lambda: torch.addmm(self._own_bias, self._active, self._weight_t, out=self.row),
                       flops=2 * batch * width * reads, more=size)  # fmt: skip
        else:
            self._table = empty(steps * self._classes, width)
            if labels is None:
                self._emit("time.lookup", lambda: self._look_up(machine.step, self.row))
            else:
                index, count = empty(batch, of=torch.int64), self._classes
                self._emit("time.index", lambda: torch.add(labels, machine.step, alpha=count, out=index))
                self._emit("time.lookup", lambda: self._look_up(index, self.row))

    def load_timesteps(self) -> None:
        """Fill the table for the present timesteps and weights."""
        of_time = self._embeddings.of_time(self._timesteps)
        if self._classes is None:
            self._table.copy_(of_time)
            self._weight_t.copy_(self._weight.T)
            self._own_bias.copy_(self._bias)
            return
        of_labels = None
        if self._labels is not None:
            of_labels = self._embeddings.of_labels(torch.arange(self._classes, device=self._table.device))
        steps_at_once = max(_ROWS_AT_ONCE // self._classes, 1)
        for start in range(0, len(of_time), steps_at_once):
            part = of_time[start : start + steps_at_once]
            emb = self._embeddings.activate(part if of_labels is None else part[:, None] + of_labels)
            rows = torch.addmm(self._bias, emb.flatten(0, -2), self._weight.T)
            first = start * self._classes
            self._table[first : first + len(rows)] = rows.to(self._table.dtype)

    def load_labels(self) -> None:
        """Take over the present labels, unless every step looks them up."""
        if self._classes is None:
            assert self._labels is not None
            self._of_labels.copy_(self._embeddings.of_labels(self._labels))

    def _activate(self) -> None:
        self._active = self._embeddings.activate(self._sum)

    def _look_up(self, index: Tensor, out: Tensor) -> None:
        torch.index_select(self._table, 0, index, out=out)

    def _emit(self, name: str, run: Callable[[], object], flops: int = 0, more: int = 0) -> None:
        size = 2 * self.row.numel() * self.row.itemsize + more
        self.instructions.append(Instruction(name, "time", (), (), 1, flops, size, run))
