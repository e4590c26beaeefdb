"""Predict the time of a step on a GPU that is not there, from counts and a few constants of the GPU.

A kernel takes the longest of four times, and at least the time from one kernel of a graph to the next:

- its products at the rate of the processors that have a tile of the result. With few tiles, each reads its rows and
  columns over all of K from L2, 64 bytes a cycle; splitting K over idle processors helps a convolution, `SPLITS` times
  at most;
- its bytes at the rate of large copies;
- its instructions at four warps a cycle and processor, counted in the machine code (`benchmarks/results/aot.json`).

The constants of the H200 are those that others report; no figure here was measured by this project. A first measurement
corrects them: `benchmarks/NOTES.md` holds predictions beside what came of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastddpm.networks.frozen.instructions import Instruction

SCHEMA = "fastddpm.prediction/1"
SPLITS = 4  # by which split-K shortens a product with few tiles, at most
TILE = 128  # of a product's result where there are many; a quarter where there are few
L2_BYTES = 64  # a cycle, to one processor
# Instructions of an element, fp16, sm_90; of the kernels that make or normalise images.
PER_ELEMENT = {"norm": 21.8, "residual": 14.6, "reverse_step": 71.0}

Record = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """What a prediction knows of a GPU.

    Attributes:
        name: of the GPU.
        processors: streaming multiprocessors.
        clock: cycles per second under load.
        flops: operations per second of the largest matrix products, by bytes of a value: 2 for fp16, 4 for TF32.
        copy: bytes per second of a large copy, read and written.
        kernel_us: from one dependent kernel of a graph to the next, if it does next to nothing.
    """

    name: str
    processors: int
    clock: float
    flops: dict[int, float]
    copy: float
    kernel_us: float

    def issue(self) -> float:
        """Return the instructions of threads per second."""
        return self.processors * 4 * 32 * self.clock


MACHINES = {
    "h200": Machine("NVIDIA H200", 132, 1.755e9, {2: 790e12, 4: 400e12}, 4.3e12, 2.0),
    "h100": Machine("NVIDIA H100 SXM", 132, 1.755e9, {2: 790e12, 4: 400e12}, 3.0e12, 2.0),
    "a100": Machine("NVIDIA A100 80 GB", 108, 1.41e9, {2: 250e12, 4: 125e12}, 1.7e12, 2.4),
    "4090": Machine("NVIDIA RTX 4090", 128, 2.52e9, {2: 150e12, 4: 75e12}, 0.92e12, 1.8),
}


def predict(instructions: Iterable[Instruction], machine: Machine, batch: int, shape: tuple[int, ...]) -> list[Record]:
    """Return the predicted time of every instruction of a step in fp16, and of the sampler's own kernels.

    Args:
        instructions: of `frozen.cuda_instructions` for the batch.
        machine: one of `MACHINES`.
        batch: samples.
        shape: of a sample.

    Returns:
        [{"name", "kind", "size", "kernels", "flops", "bytes", "us", "bound"}], "bound" being "compute", "memory",
        "issue" or "latency".
    """
    rows = [_row(i, machine, batch) for i in instructions if i.kernels]
    elements = batch * math.prod(shape)
    step = {"name": "reverse_step", "kind": "step", "size": None, "kernels": 1, "flops": 0, "bytes": 12 * elements}
    issue = elements * PER_ELEMENT["reverse_step"] / machine.issue()
    counter = {"name": "counter", "kind": "step", "size": None, "kernels": 1, "flops": 0, "bytes": 16}
    return [*rows, _timed(step, machine, 0.0, issue), _timed(counter, machine, 0.0, 0.0)]


def _row(i: Instruction, machine: Machine, batch: int) -> Record:
    row = {
        "name": i.name, "kind": i.kind, "size": i.size, "kernels": i.kernels, "flops": i.flops, "bytes": i.bytes,
    }  # fmt: skip
    issue = i.bytes / 4 * PER_ELEMENT.get(i.kind, 0.0) / machine.issue()  # each element read and written, in 16 bits
    return _timed(row, machine, _product_seconds(i, machine, batch), issue)


def _timed(row: Record, machine: Machine, product: float, issue: float) -> Record:
    """Add "us" and "bound" to a row."""
    seconds = {"compute": product, "memory": row["bytes"] / machine.copy, "issue": issue}
    bound = max(seconds, key=lambda name: seconds[name])
    floor = machine.kernel_us * 1e-6
    # What a kernel does comes on top of half of the time from kernel to kernel: the rest overlaps.
    longest = max(seconds[bound] + (row["kernels"] - 0.5) * floor, row["kernels"] * floor)
    return {**row, "us": longest * 1e6, "bound": bound if seconds[bound] > 0.5 * floor else "latency"}


def _product_seconds(i: Instruction, machine: Machine, batch: int) -> float:
    """Return the time of an instruction's products on the processors that have tiles of them."""
    if not i.flops:
        return 0.0
    whole = i.flops / machine.flops[2]
    if i.size is None or i.kind not in ("conv", "pointwise"):
        return whole
    m = batch * math.prod(i.size)
    columns, k = _columns(i, m)
    rate = machine.flops[2] / machine.processors

    def seconds(side: int) -> float:
        tiles = math.ceil(m / side) * math.ceil(columns / side)
        one = max(2 * side * side * k / rate, 2 * side * k * 2 / (L2_BYTES * machine.clock))
        split = min(machine.processors // tiles, SPLITS) if tiles < machine.processors and i.kind == "conv" else 1
        return math.ceil(tiles / machine.processors) * one / max(split, 1)

    return max(whole, min(seconds(TILE), seconds(TILE // 2)))


def _columns(i: Instruction, m: int) -> tuple[float, float]:
    """Return (output channels, K) of a product of m rows, from its operations and bytes.

    A convolution of 3x3 reads C channels and writes N, with 9 C N weights; a product of 1x1 has C N.
    """
    weights = i.flops / (2 * m)  # of 3x3 9 C N, of 1x1 C N
    taps = 9 if i.kind == "conv" else 1
    total = max(i.bytes / 2 - weights, 1.0) / m  # C + N
    inner = total * total / 4 - weights / taps
    columns = total / 2 - math.sqrt(inner) if inner > 0 else math.sqrt(weights / taps)
    columns = max(columns, 1.0)
    return columns, weights / columns


def grouped(rows: Iterable[Record]) -> list[Record]:
    """Return sums over rows of one kind and size, the longest first, with the most frequent bound of each."""
    groups: dict[tuple[str, Any], list[Record]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["size"]), []).append(row)
    found = []
    for (kind, size), members in groups.items():
        bounds = [member["bound"] for member in members]
        sums = {name: sum(member[name] for member in members) for name in ("kernels", "flops", "bytes", "us")}
        found.append({"kind": kind, "size": size, "bound": max(set(bounds), key=bounds.count), **sums})
    return sorted(found, key=lambda group: -group["us"])
