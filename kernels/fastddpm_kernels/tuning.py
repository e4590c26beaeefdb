"""Define the tasks of an op's `tuning.py`: an op at one shape, with its candidates, operands and truth."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels import tuned
from fastddpm_kernels.backend import why_not
from fastddpm_kernels.tuned import Choice, Key

Operands = dict[str, Any]  # tensors, or None

WARPS = (1, 2, 4, 8, 16)
# At least four elements each, those of one counter of the noise. Results are the same bits.
ELEMENTWISE: tuple[dict[str, Sequence[Any]], ...] = ({"block": tuple(2**k for k in range(5, 15)), "num_warps": WARPS},)
# Those that a frozen U-Net runs where it calls cuDNN, or in its place.
OF_CUDA = ("upsample_conv", "fused_conv", "attention_block", "layer_norm_linear")
CHECKED = 3  # samples that are compared with float64: the first, one in the middle, the last


class Task(ABC):
    """An op at one shape, on one device.

    Attributes:
        key: op, dtype and shape.
        device: where it runs.
        named: the shape, by name.
    """

    def __init__(self, key: Key, device: torch.device) -> None:
        self.key, self.device, self.named = key, device, key.named()

    @abstractmethod
    def candidates(self) -> list[Choice]:
        """Return all choices worth trying: the heuristic one first, then similar ones; none twice."""

    @abstractmethod
    def operands(self, seed: int) -> Operands:
        """Return random inputs and buffers for the results."""

    @abstractmethod
    def call(self, choice: Choice, operands: Operands) -> Callable[[], object]:
        """Return a function that runs the op on `operands` by `choice`, any number of times."""

    @abstractmethod
    def results(self, operands: Operands) -> dict[str, Tensor]:
        """Return the results of a call; the first dimension is that of `samples`."""

    @abstractmethod
    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the `results` of some samples: in float64, and by idiomatic torch in the op's dtype."""

    @abstractmethod
    def cost(self) -> tuple[int, int]:
        """Return the bytes that a call moves and its floating-point operations."""

    @property
    def num_samples(self) -> int:
        return self.named["batch"]

    def another(self, operands: Operands) -> Operands:
        """Return the same operands in other memory."""
        return {name: t.clone() if isinstance(t, Tensor) else t for name, t in operands.items()}

    def tolerance(self, choice: Choice) -> dict[str, Any]:
        """Return arguments of `testing.assert_close` for a choice whose error may exceed twice torch's."""
        return {}

    def samples(self) -> Tensor:
        """Return the samples to check."""
        places = torch.linspace(0, self.num_samples - 1, min(CHECKED, self.num_samples))
        return places.round().to(torch.int64).unique().to(self.device)

    def title(self) -> str:
        """Return the op and its shape in words."""
        dtype = str(self.key.dtype).removeprefix("torch.")
        return f"{self.key.op} {dtype} " + " ".join(f"{name}={value}" for name, value in self.named.items())

    # What the ops share.

    def random(self, seed: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal random numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
        return values.to(dtype or self.key.dtype)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.key.dtype, device=self.device)


class ElementwiseTask(Task):
    """An element-wise op on a GPU; tunes the elements and warps of a program.

    Every choice gives the same bits. Results are still compared with float64: a compiler may be wrong.
    """

    def candidates(self) -> list[Choice]:
        blocks = [
            {"block": 32 * warps * elements, "num_warps": warps} for warps in WARPS for elements in (2, 4, 8, 16, 32)
        ]
        return nearest_first(blocks, self.heuristic())

    def another(self, operands: Operands) -> Operands:
        return self.operands(1)  # a clone of a slice would have other strides

    def heuristic(self) -> Choice:
        """Return the choice without a table."""
        from fastddpm_kernels.device.strided import block_and_warps

        numel = self.named["channels"] * self.named["pixels"]
        block, num_warps = block_and_warps(None, self.named["batch"], numel, self.device, self.most_block())
        return {"block": block, "num_warps": num_warps}

    def most_block(self) -> int:
        """Return the most elements of a program without a table."""
        from fastddpm_kernels.device.strided import MOST_BLOCK

        return MOST_BLOCK

    @abstractmethod
    def launch(self, choice: Choice | None, operands: Operands) -> Any:
        """Return the only launch of the op."""

    def call(self, choice: Choice, operands: Operands) -> Callable[[], object]:
        from fastddpm_kernels.device.strided import run

        made, like = self.launch(choice, operands), next(iter(self.results(operands).values()))
        return lambda: run(made, like)

    def image(
        self, seed: int | None, channels: int, *, height: int = 1, width: int | None = None, rows: int | None = None,
        dtype: torch.dtype | None = None, last: bool | None = None,
    ) -> Tensor:  # fmt: skip
        """Return [N, channels, height, width], random or (seed None) to be written."""
        n, width = rows or self.named["batch"], self.named["pixels"] if width is None else width
        last = bool(self.named["channels_last"]) if last is None else last
        shape = (n, height, width, channels) if last else (n, channels, height, width)
        values = self.empty(*shape, dtype=dtype) if seed is None else self.random(seed, *shape, dtype=dtype)
        return values.movedim(-1, 1) if last else values

    def vector(self, *values: float) -> Tensor:
        """Return values in float32 on the device."""
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    @property
    def elements(self) -> int:
        """Return the number of elements of an image, over all samples."""
        return self.named["batch"] * self.named["channels"] * self.named["pixels"]


def make_task(key: Key, device: torch.device) -> Task:
    """Return the task of an op at a shape."""
    task: Task = tuned.tunable(key.op).task(key, device)
    return task


def tuned_ops(device: torch.device) -> tuple[str, ...]:
    """Return the ops that have choices on a device and can run there."""

    def runs(op: str) -> bool:
        if op == "conv":
            return device.type == "cpu" and why_not("native", "cpu", "conv", torch.float32) is None
        if op in OF_CUDA and torch.version.hip is not None:
            return False
        return device.type == "cuda" and why_not("triton", "cuda") is None

    return tuple(op for op in tuned.OPS if runs(op))


def nearest_first(choices: Iterable[Choice], to: Choice) -> list[Choice]:
    """Return `to`, then the others by how many factors of two they differ from it; none twice."""

    def distance(choice: Choice) -> float:
        total = 0.0
        for name in {*choice, *to}:
            a, b = choice.get(name), to.get(name)
            if type(a) is int and type(b) is int:
                total += abs(math.log2(a) - math.log2(b))
            elif a != b:
                total += 2
        return total

    found: list[Choice] = []
    for choice in [to, *sorted(choices, key=distance)]:
        if choice not in found:
            found.append(choice)
    return found
