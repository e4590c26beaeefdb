"""The time projections of all residual blocks for every step of a loop, computed before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from fastddpm.networks.frozen.blueprint import Embeddings
from fastddpm.networks.frozen.instructions import Instruction, Machine

MAX_BYTES = 256 * 2**20
_ROWS_AT_ONCE = 4096
_WEIGHTS_AT_ONCE = 2**20


class TimeTable:
    """The time projections of a step: `row` [1 or N, sum C], looked up in a table on the device.

    Without labels and embedded conditions the table has a row per step. With classes it has one per step and class,
    with other labels or with conditions one per step and sample, if that fits into `max_bytes`. If it does not, a row
    is computed from the embeddings of the step and of the samples, by one matrix product for all blocks. Where time
    and samples separate (`Embeddings.separates`), their projections are added instead.
    """

    def __init__(
        self, machine: Machine, embeddings: Embeddings, weight: Tensor, bias: Tensor, timesteps: Tensor,
        labels: Tensor | None, batch: int, dtype: torch.dtype, max_bytes: int = MAX_BYTES,
        conditions: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """Take `weight` [sum C, E] and `bias` [sum C], float64, from `Blueprint.time_projections`."""
        self._embeddings, self._weight, self._bias = embeddings, weight, bias
        self._timesteps, self._labels = timesteps, labels
        self._conditions = {name: conditions[name] for name in embeddings.conditions if name in conditions}
        self._of_time = self._free = self._of_free = torch.empty(0)
        device, (width, reads), steps = weight.device, weight.shape, len(timesteps)
        channels = embeddings.width or (reads // 2 if embeddings.reads_raw else reads)

        def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        def fits(count: int) -> bool:
            return steps * count * width * dtype.itemsize <= max_bytes

        classes = embeddings.num_labels
        by_sample = labels is not None or bool(self._conditions)
        self.row = empty(batch if by_sample else 1, width)
        self.instructions: list[Instruction] = []
        self._kind: Literal["steps", "classes", "samples", "separate", "products"]
        if not by_sample:
            self._kind = "steps"
        elif embeddings.separates:
            self._kind = "separate"
        elif not self._conditions and classes is not None and fits(classes):
            self._kind = "classes"
        else:
            self._kind = "samples" if fits(batch) else "products"
        self._count = {"classes": classes or 1, "samples": batch}.get(self._kind, 1)  # of rows per step
        if self._kind == "products":
            self._table, self._of_step = empty(steps, channels), empty(1, channels)
            self._of_samples, self._sum = empty(batch, channels), empty(batch, channels)
            self._weight_t, self._own_bias = empty(reads, width), empty(width)
            self._active = self._sum
            size = self._weight_t.numel() * dtype.itemsize
            self._emit("time.lookup", lambda: self._look_up(machine.step, self._of_step))
            self._emit("time.add", lambda: torch.add(self._of_step, self._of_samples, out=self._sum))
            self._emit("time.activate", self._activate)
            self._emit("time.project", lambda: torch.addmm(self._own_bias, self._active, self._weight_t, out=self.row),
                       flops=2 * batch * width * reads, more=size)  # fmt: skip
            return
        self._table = empty(steps * self._count, width)
        if self._kind == "steps":
            self._emit("time.lookup", lambda: self._look_up(machine.step, self.row))
        elif self._kind == "separate":
            self._of_step, self._of_samples = empty(1, width), empty(batch, width)
            self._emit("time.lookup", lambda: self._look_up(machine.step, self._of_step))
            self._emit("time.add", lambda: torch.add(self._of_samples, self._of_step, out=self.row))
        else:
            index, count = empty(batch, of=torch.int64), self._count
            row = labels if self._kind == "classes" else torch.arange(batch, device=device)
            assert row is not None
            self._emit("time.index", lambda: torch.add(row, machine.step, alpha=count, out=index))
            self._emit("time.lookup", lambda: self._look_up(index, self.row))

    def load_timesteps(self) -> None:
        """Take over the present timesteps and weights."""
        of_time = self._embeddings.of_time(self._timesteps)
        if self._kind == "products":
            self._table.copy_(of_time)
            self._weight_t.copy_(self._weight.T)
            self._own_bias.copy_(self._bias)
        elif self._kind == "samples":
            self._of_time = of_time  # `load_samples` does the rest
        elif self._kind == "classes":
            self._fill(of_time, self._embeddings.of_labels(torch.arange(self._count, device=self._table.device)))
        else:
            self._fill(of_time)
        if self._kind == "separate":  # of a call, only the columns that time leaves free are multiplied
            self._free = (self._embeddings.activate(of_time) == 0).all(dim=0)
            self._of_free = self._weight[:, self._free].to(torch.promote_types(self._table.dtype, torch.float32))

    def load_samples(self) -> None:
        """Take over the present labels and conditions, unless every step looks them up; after `load_timesteps`."""
        if self._kind in ("steps", "classes"):
            return
        parts = []
        if self._labels is not None:
            parts.append(self._embeddings.of_labels(self._labels))
        if self._conditions:
            parts.append(self._embeddings.of_conditions(self._conditions))
        of_samples = sum(parts[1:], parts[0])
        if self._kind == "samples":
            self._fill(self._of_time, of_samples)
        elif self._kind == "separate":
            active = self._embeddings.activate(of_samples)[:, self._free].to(self._of_free)
            self._of_samples.copy_(active @ self._of_free.T)
        else:
            self._of_samples.copy_(of_samples)

    def _fill(self, of_time: Tensor, others: Tensor | None = None) -> None:
        """Fill the table for embeddings of time [S, E], each added to all `others` [count, E]."""
        steps_at_once = max(_ROWS_AT_ONCE // max(self._count, 1), 1)
        for start in range(0, len(of_time), steps_at_once):
            part = of_time[start : start + steps_at_once]
            emb = self._embeddings.activate(part if others is None else part[:, None] + others)
            rows = self._project(emb.flatten(0, -2)) + self._bias
            first = start * self._count
            self._table[first : first + len(rows)] = rows.to(self._table.dtype)

    def _project(self, emb: Tensor) -> Tensor:
        """Return emb [.., E] times the weight, in float64. The weight may be stored in fewer bits: a part at a time."""
        parts = self._weight.split(max(_WEIGHTS_AT_ONCE // self._weight.shape[1], 1))
        return torch.cat([emb @ part.to(emb.dtype).T for part in parts], dim=-1)

    def _activate(self) -> None:
        self._active = self._embeddings.activate(self._sum)

    def _look_up(self, index: Tensor, out: Tensor) -> None:
        torch.index_select(self._table, 0, index, out=out)

    def _emit(self, name: str, run: Callable[[], object], flops: int = 0, more: int = 0) -> None:
        size = 2 * self.row.numel() * self.row.itemsize + more
        self.instructions.append(Instruction(name, "time", (), (), 1, flops, size, run))
