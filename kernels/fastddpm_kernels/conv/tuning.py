"""Tune 3x3 convolutions: the algorithm on a CPU; on a GPU, fused ones and the form for upsampled images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm_kernels import conv
from fastddpm_kernels.conv.fused_tuning import ALTERNATIVES, FIELDS, FusedConvTask
from fastddpm_kernels.conv.upsampling import cudnn_conv, cudnn_conv_transpose, double_, transposed_weight
from fastddpm_kernels.tuned import Choice, Tunable
from fastddpm_kernels.tuning import Operands, Task, nearest_first


class UpsampleTask(Task):
    """Upsampling by two and a 3x3 convolution without bias, as in a frozen U-Net."""

    def candidates(self) -> list[Choice]:
        return [{"implementation": "transposed"}, {"implementation": "plain"}]

    def operands(self, seed: int) -> Operands:
        n, height, width, channels, out, _ = self.key.shape
        weight = self.random(seed + 1, out, channels, 3, 3) / math.sqrt(9 * channels)
        transposed = transposed_weight(weight).to(weight.dtype)
        return {
            "x": self.random(seed, n, height, width, channels).movedim(-1, 1),
            "doubled": self.empty(n, 2 * height, 2 * width, channels).movedim(-1, 1),
            "y": self.empty(n, 2 * height, 2 * width, out).movedim(-1, 1),
            "plain": weight.contiguous(memory_format=torch.channels_last),
            "transposed": transposed.contiguous(memory_format=torch.channels_last),
        }

    def call(self, choice: Choice, operands: Operands) -> Callable[[], object]:
        o, tf32, on_gpu = operands, bool(self.named["tf32"]), self.device.type == "cuda"

        def plain() -> None:
            double_(o["doubled"], o["x"])
            if on_gpu:
                cudnn_conv(o["doubled"], o["plain"], 1, 1, tf32, o["y"])
            else:
                o["y"].copy_(F.conv2d(o["doubled"], o["plain"], padding=1))

        def transposed() -> None:
            if on_gpu:  # it returns new memory: cuDNN's op has no `out`
                o["y"] = cudnn_conv_transpose(o["x"], o["transposed"], tf32)
            else:
                o["y"].copy_(F.conv_transpose2d(o["x"], o["transposed"], stride=2, padding=1))

        return plain if choice["implementation"] == "plain" else transposed

    def results(self, operands: Operands) -> dict[str, Tensor]:
        return {"y": operands["y"]}

    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        def eager(dtype: torch.dtype) -> Tensor:
            x = F.interpolate(operands["x"][samples].to(dtype), scale_factor=2)
            return F.conv2d(x, operands["plain"].to(dtype), padding=1)

        return {"y": (eager(torch.float64), eager(self.key.dtype))}

    def tolerance(self, choice: Choice) -> dict[str, Any]:
        # Taps are added up before they are rounded. TensorFloat-32 has float16's significant bits.
        return {"dtype": torch.float16} if self.named["tf32"] else {"factor": 4.0}

    def cost(self) -> tuple[int, int]:
        n, height, width, channels, out, _ = self.key.shape
        pixels = n * height * width
        elements = pixels * (channels + 4 * out) + 16 * channels * out
        return elements * self.key.dtype.itemsize, 32 * pixels * channels * out


class ConvTask(Task):
    """A 3x3 convolution by the native backend. The weight is packed beforehand."""

    def candidates(self) -> list[Choice]:
        possible = conv.possible_algorithms(self.named["upsample"], self.key.dtype)
        likely = conv.likely_algorithm(*self.key.shape, dtype=self.key.dtype)
        return nearest_first([{"algorithm": name} for name in possible], {"algorithm": likely})

    def image(self, seed: int | None, channels: int, factor: int) -> Tensor:
        shape = (self.named["batch"], self.named["height"] * factor, self.named["width"] * factor, channels)
        values = self.empty(*shape) if seed is None else self.random(seed, *shape)
        return values.permute(0, 3, 1, 2)

    def operands(self, seed: int) -> Operands:
        channels, out, factor = self.named["channels"], self.named["out_channels"], 1 + self.named["upsample"]
        return {
            "x": self.image(seed, channels, 1),
            "weight": self.random(seed + 1, out, channels, 3, 3) / math.sqrt(9 * channels),
            "bias": self.random(seed + 2, out),
            "y": self.image(None, out, factor),
            "packed": {},
        }

    def another(self, operands: Operands) -> Operands:
        packed = {name: replace(own, values=own.values.clone()) for name, own in operands["packed"].items()}
        return super().another(operands) | {"packed": packed}

    def call(self, choice: Choice, operands: Operands) -> Callable[[], object]:
        o, upsample, algorithm = operands, bool(self.named["upsample"]), choice["algorithm"]
        packed = o["packed"].get(algorithm)
        if packed is None:
            packed = o["packed"][algorithm] = conv.pack(o["weight"], algorithm, upsample, dtype=self.key.dtype)

        def run() -> None:
            conv.conv_(o["y"], o["x"], packed, bias=o["bias"], upsample=upsample, backend="native")

        return run

    def results(self, operands: Operands) -> dict[str, Tensor]:
        return {"y": operands["y"]}

    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        o = operands
        eager = torch.empty_like(o["y"][samples])
        exact = torch.empty_like(eager, dtype=torch.float64)
        for y, backend in ((exact, "reference"), (eager, "eager")):
            x, weight, bias = (t.to(y.dtype) for t in (o["x"][samples], o["weight"], o["bias"]))
            conv.conv_(y, x, weight, bias=bias, upsample=bool(self.named["upsample"]), backend=backend)
        return {"y": (exact, eager)}

    def tolerance(self, choice: Choice) -> dict[str, Any]:
        name = choice["algorithm"]
        return {"factor": 2 * conv.error_factor(name), "max_factor": 2 * conv.error_factor(name, worst=True)}

    def cost(self) -> tuple[int, int]:
        n, height, width, channels, out, upsample, _ = self.key.shape
        pixels = n * height * width
        outputs = pixels * (4 if upsample else 1)
        elements = pixels * channels + outputs * out + 9 * channels * out
        return self.key.dtype.itemsize * elements, 18 * outputs * channels * out


OPS = {
    "upsample_conv": Tunable(
        ("batch", "height", "width", "channels", "out_channels", "tf32"),
        ({"implementation": ("transposed", "plain")},),
        UpsampleTask,
        kernels=None,
    ),
    "fused_conv": Tunable(FIELDS, ALTERNATIVES, FusedConvTask),
    "conv": Tunable(  # threads are torch's
        ("batch", "height", "width", "channels", "out_channels", "upsample", "threads"),
        ({"algorithm": conv.ALGORITHMS},),
        ConvTask,
        kernels=None,
    ),
}
