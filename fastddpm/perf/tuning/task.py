"""What tuning needs to know of an op at one shape: the choices there are, something to run them on, and the truth."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fastddpm_kernels import tuned as _tuned
from fastddpm_kernels.tuned import Choice, Key
from torch import Tensor

Operands = dict[str, Any]  # tensors, or None

CHECKED = 3  # samples that are held against float64: the first, one in the middle, the last


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
        """All choices worth a try, what the heuristics choose first, then those that are like it; none twice."""

    @abstractmethod
    def operands(self, seed: int) -> Operands:
        """Random inputs and places for the results."""

    @abstractmethod
    def call(self, choice: Choice, operands: Operands) -> Callable[[], object]:
        """What runs the op on `operands` in the way of `choice`, as often as one wants."""

    @abstractmethod
    def results(self, operands: Operands) -> dict[str, Tensor]:
        """What a call writes; the first dimension is that of `samples`."""

    @abstractmethod
    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """For some of the samples, the `results` in float64, and as idiomatic torch has them in the op's dtype."""

    @abstractmethod
    def cost(self) -> tuple[int, int]:
        """Bytes that a call moves, and operations that it takes."""

    @property
    def num_samples(self) -> int:
        return self.named["batch"]

    def another(self, operands: Operands) -> Operands:
        """The same in other memory."""
        return {name: t.clone() if isinstance(t, Tensor) else t for name, t in operands.items()}

    def tolerance(self, choice: Choice) -> dict[str, Any]:
        """Arguments of `testing.assert_close`, where a choice may lose more than twice what idiomatic torch does."""
        return {}

    def samples(self) -> Tensor:
        """Which samples are checked."""
        places = torch.linspace(0, self.num_samples - 1, min(CHECKED, self.num_samples))
        return places.round().to(torch.int64).unique().to(self.device)

    def title(self) -> str:
        """In words."""
        dtype = str(self.key.dtype).removeprefix("torch.")
        return f"{self.key.op} {dtype} " + " ".join(f"{name}={value}" for name, value in self.named.items())

    # What the ops share.

    def random(self, seed: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal random numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
        return values.to(dtype or self.key.dtype)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.key.dtype, device=self.device)


def make_task(key: Key, device: torch.device) -> Task:
    """The task of an op at a shape."""
    from fastddpm.perf.tuning.convolutions import ConvTask, PointwiseTask, UpsampleTask
    from fastddpm.perf.tuning.elementwise import QSampleTask, ResidualAddTask, ReverseStepTask
    from fastddpm.perf.tuning.norm_gradients import GroupNormGradientTask, RMSNormGradientTask
    from fastddpm.perf.tuning.norms import GroupNormTask, RMSNormTask

    kinds: dict[str, type[Task]] = {
        "group_norm_silu": GroupNormTask,
        "group_norm_silu_": GroupNormTask,
        "group_norm_silu_backward": GroupNormGradientTask,
        "rms_norm_silu": RMSNormTask,
        "rms_norm_silu_backward": RMSNormGradientTask,
        "pointwise_conv": PointwiseTask,
        "upsample_conv": UpsampleTask,
        "reverse_step": ReverseStepTask,
        "q_sample": QSampleTask,
        "residual_add": ResidualAddTask,
        "conv": ConvTask,
    }
    return kinds[key.op](key, device)


def tuned_ops(device: torch.device) -> tuple[str, ...]:
    """The ops that have choices on a device; none if what would run them is not there."""
    from fastddpm_kernels.backend import why_not

    def runs(op: str) -> bool:
        if op == "conv":
            return device.type == "cpu" and why_not("native", "cpu", "conv", torch.float32) is None
        if op == "upsample_conv" and torch.version.hip is not None:  # where a frozen U-Net does not call cuDNN
            return False
        return device.type == "cuda" and why_not("triton", "cuda") is None

    return tuple(op for op in _tuned.FIELDS if runs(op))


def nearest_first(choices: Iterable[Choice], to: Choice) -> list[Choice]:
    """`to`, then the others, those before that differ from it by fewer factors of two; none twice."""

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
