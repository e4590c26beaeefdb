"""Tune the fused convolutions on a GPU: the vendor's convolution and the kernels around it, or tiles of our own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm_kernels.conv import conv_, conv_epilogue_
from fastddpm_kernels.conv.examples import Example, results
from fastddpm_kernels.conv.plan import (
    FMA,
    FMA_SHAPES,
    NORMS,
    SPLITS,
    TENSOR_SHAPES,
    Problem,
    Tile,
    most_stages,
    predicted_cycles,
)
from fastddpm_kernels.conv.upsampling import cudnn_conv, cudnn_conv_transpose, transposed_weight
from fastddpm_kernels.group_norm_silu import group_norm_silu_
from fastddpm_kernels.pointwise_conv import pointwise_conv_
from fastddpm_kernels.tuned import Choice
from fastddpm_kernels.tuning import Operands, Task

FIELDS = ("batch", "height", "width", "channels", "channels2", "out_channels", "kernel", "stride", "upsample", "groups",
          "silu", "shortcut", "unit", "tf32")  # fmt: skip
_SIDES = tuple(2**k for k in range(4, 9))
ALTERNATIVES: tuple[dict[str, Any], ...] = (
    {"implementation": ("vendor",)},
    {"block_m": _SIDES, "block_n": _SIDES, "block_k": _SIDES[:4], "splits": range(1, 33), "one_launch": (True, False),
     "num_warps": (2, 4, 8), "num_stages": range(1, 7), "norm": NORMS, "pdl": (True, False), "tma": (True, False),
     "persistent": (True, False)},
)  # fmt: skip
MOST = 120  # tiles to try, those of least predicted time


class FusedConvTask(Task):
    """`conv_` with bias, time row, a residual or shortcut, and what the shape says."""

    @cached_property
    def example(self) -> Example:
        """Return a call of the shape, with what the shape does not tell."""
        from fastddpm_kernels.conv.triton import example_of

        return example_of(self.key)

    @property
    def tf32(self) -> bool:
        return bool(self.named["tf32"])

    def candidates(self) -> list[Choice]:
        from fastddpm_kernels.conv.triton import VENDOR, operands_of, problem_of, processors_and_shared

        problem = problem_of(operands_of(self.example, self.key.dtype, self.tf32))
        processors, shared = processors_and_shared(self.device)
        tiles = sorted(tiles_of(problem, shared), key=lambda tile: predicted_cycles(problem, tile, processors))
        return [VENDOR, *(tile.choice() for tile in tiles[:MOST])]

    def operands(self, seed: int) -> Operands:
        numbers = itertools.count(seed)
        values = self.example.make(lambda name, *shape: self.random(next(numbers), *shape, dtype=torch.float32))
        return self.example.call(values, self.key.dtype)

    def another(self, operands: Operands) -> Operands:
        return self.operands(1)

    def call(self, choice: Choice, operands: Operands) -> Callable[[], object]:
        from fastddpm_kernels.conv.triton import VENDOR, bind
        from fastddpm_kernels.conv.triton import Operands as OfKernel

        if choice != VENDOR:
            return bind(OfKernel(**operands, allow_tf32=self.tf32), None, choice)
        if self.device.type != "cuda":
            return conv_.bind(**operands, backend="eager")
        steps = self._vendor(operands)

        def run() -> None:
            for step in steps:
                step()

        return run

    def _vendor(self, o: Operands) -> list[Callable[[], object]]:
        """Return the launches without our convolution: norm, convolution, shortcut, and the rest."""
        steps: list[Callable[[], object]] = []
        h, x2, norm, y, residual = o["x"], o.get("x2"), o.get("norm"), o["y"], o.get("residual")
        if norm is not None:
            h = _like(h, norm.weight.shape[0])
            steps.append(
                group_norm_silu_.bind(
                    h, o["x"], norm.weight, norm.bias, norm.num_groups, eps=norm.eps, x2=x2, scale=norm.scale,
                    shift=norm.shift, activation=norm.activation, backend="triton",
                )
            )  # fmt: skip
        elif x2 is not None:
            h = _like(h, h.shape[1] + x2.shape[1])
            steps.append(lambda: torch.cat((o["x"], x2), 1, out=h))
        if self.example.upsample:
            weight = transposed_weight(o["weight"]).to(h.dtype).contiguous(memory_format=torch.channels_last)
            steps.append(lambda: y.copy_(cudnn_conv_transpose(h, weight, self.tf32)))
        elif self.example.kernel == 1:
            flat = o["weight"].flatten(1)
            steps.append(pointwise_conv_.bind(y, h, flat, allow_tf32=self.tf32, backend="triton"))
        else:
            padded = _padded(h, steps) if self.example.stride == 2 else h
            stride, padding, weight = self.example.stride, self.example.above, o["weight"]
            steps.append(lambda: cudnn_conv(padded, weight, stride, padding, self.tf32, y))
        if self.example.shortcut:
            second, weight2 = o.get("shortcut2"), None
            first = o["shortcut_weight"]
            if second is not None:
                first, weight2 = (
                    part.contiguous() for part in first.split((self.example.channels, second.shape[1]), 1)
                )
            steps.append(
                pointwise_conv_.bind(
                    y, o["shortcut"], first, x2=second, weight2=weight2, residual=y, allow_tf32=self.tf32,
                    backend="triton",
                )
            )  # fmt: skip
        rest = {"bias": o.get("bias"), "time_bias": o.get("time_bias"), "statistics": o.get("statistics")}
        steps.append(conv_epilogue_.bind(y, y, residual=residual, **rest, backend="triton"))
        return steps

    def results(self, operands: Operands) -> dict[str, Tensor]:
        return results(operands)

    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        found = []
        for dtype, backend in ((torch.float64, "reference"), (self.key.dtype, "eager")):
            call = _of_samples(operands, samples, dtype)
            conv_(**call, backend=backend)
            found.append(results(call))
        return {name: (value, found[1][name]) for name, value in found[0].items()}

    def tolerance(self, choice: Choice) -> dict[str, Any]:
        # TensorFloat-32 has float16's significant bits; statistics are of values that are rounded.
        return {"factor": 4.0, "dtype": torch.float16 if self.tf32 else self.key.dtype}

    def cost(self) -> tuple[int, int]:
        e = self.example
        inner, (height, width) = e.channels + e.channels2, e.size
        outputs, taps = e.n * height * width, 4 if e.upsample else e.kernel**2
        short = inner if e.shortcut else 0
        elements = e.n * e.height * e.width * inner + outputs * (e.out * (1 + e.residual) + short)
        elements += e.out * (inner * e.kernel**2 + short)
        return elements * self.key.dtype.itemsize, 2 * outputs * e.out * (inner * taps + short)


def tiles_of(problem: Problem, shared: int) -> Iterator[Tile]:
    """Yield the search space of a problem: every tile that can run it."""
    shapes = FMA_SHAPES if problem.rate == FMA else TENSOR_SHAPES
    deepest = 32 if problem.rate == FMA else 256 // problem.itemsize
    norms = NORMS if problem.columns else NORMS[:1]
    for (m, n, warps), splits, norm in itertools.product(shapes, SPLITS, norms):
        for block_k in (16, 32, 64, 128):
            most = most_stages(problem, m, n, block_k, shared)
            if block_k > deepest or block_k >= 2 * max(problem.channels, 16) or most < 2:
                continue
            for one, stages, more in itertools.product(
                (True, False)[: 1 + (splits > 1)], {most, max(most - 1, 2)}, (1, 2)
            ):
                tile = Tile(m, n, block_k, splits, one, min(warps * more, 8), stages, norm)
                if tile.why_not(problem) is None and not (more == 2 and warps == 8):
                    yield tile
                    for hopper in (
                        replace(tile, pdl=True),
                        replace(tile, pdl=True, tma=True),
                        replace(tile, pdl=True, tma=True, persistent=True),
                    ):
                        if shared > 220 * 1024 and hopper.why_not(problem) is None:  # a GPU that has both
                            yield hopper


def _like(x: Tensor, channels: int) -> Tensor:
    return x.new_empty(x.shape[0], *x.shape[2:], channels).permute(0, 3, 1, 2)


def _padded(h: Tensor, steps: list[Callable[[], object]]) -> Tensor:
    """Return memory for h with a row below and a column to the right, which a step fills."""
    target = F.pad(h, (0, 1, 0, 1)).contiguous(memory_format=torch.channels_last)
    inner = target[:, :, :-1, :-1]
    steps.append(lambda: inner.copy_(h))
    return target


def _of_samples(operands: Operands, samples: Tensor, dtype: torch.dtype) -> Operands:
    """Return the operands of some samples in another dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    found: Operands = {}
    for name, value in operands.items():
        if name in ("weight", "bias", "shortcut_weight"):
            value = value.to(dtype)
        elif name == "statistics":
            value = value[:, samples].to(wide)
        elif name == "norm":
            rows = {field: getattr(value, field) for field in ("scale", "shift")}
            blocks = {field: getattr(value, field) for field in ("statistics", "statistics2")}
            value = value._replace(
                weight=value.weight.to(dtype), bias=value.bias.to(dtype),
                **{field: row if row is None else row[samples].to(dtype) for field, row in rows.items()},
                **{field: own if own is None else own[:, samples].to(wide) for field, own in blocks.items()},
            )  # fmt: skip
        elif isinstance(value, Tensor):
            value = value[samples].to(dtype)
        found[name] = value
    return found
