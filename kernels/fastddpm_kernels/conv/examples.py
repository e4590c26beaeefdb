"""Make the operands of fused convolutions: for proofs, tuning, ahead-of-time compilation and tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.conv.formula import statistics_by_torch
from fastddpm_kernels.conv.statistics import Norm, statistics_shape, statistics_unit

Make = Callable[..., Tensor]  # takes a name and a shape


@dataclass(frozen=True)
class Example:
    """A call of `conv_` by its sizes.

    Attributes:
        n, height, width, channels: of x.
        out: channels of y.
        channels2: of x2, 0 without.
        kernel, stride, upsample: of the convolution.
        padding: None for that of the kernel, and for none with stride 2 (but below and to the right).
        groups: of the norm, 0 without.
        silu, film: whether the norm has them.
        shortcut: whether x and x2 are also convolved by 1x1.
        bias, time, residual, statistics: whether they are given.
        units: channels of a block of y's statistics, 0 for a fitting number.
    """

    n: int
    height: int
    width: int
    channels: int
    out: int
    channels2: int = 0
    kernel: int = 3
    stride: int = 1
    padding: int | None = None
    upsample: bool = False
    groups: int = 0
    silu: bool = True
    film: bool = False
    shortcut: bool = False
    bias: bool = True
    time: bool = True
    residual: bool = True
    statistics: bool = True
    units: int = 0

    @property
    def above(self) -> int:
        if self.padding is not None:
            return self.padding
        return 0 if self.stride == 2 else self.kernel // 2

    @property
    def size(self) -> tuple[int, int]:
        """Return the height and width of y: of an image padded below and to the right as far as the stride needs."""
        if self.upsample:
            return 2 * self.height, 2 * self.width
        low, high = ((side + 2 * self.above - self.kernel) // self.stride + 1 for side in (self.height, self.width))
        return (low, high) if self.stride == 1 else (-(-self.height // self.stride), -(-self.width // self.stride))

    @property
    def unit(self) -> int:
        return self.units or statistics_unit(self.out, (max(self.out // 8, 1), 0))

    def make(self, fill: Make) -> dict[str, Any]:
        """Return the operands but y, each from `fill(name, *shape)`; images as [N, C, H, W] of whatever order."""
        inner, size = self.channels + self.channels2, self.size
        own = (self.n, self.channels, self.height, self.width)
        second = (self.n, self.channels2, self.height, self.width)
        scale = 1 / math.sqrt(inner * self.kernel**2)
        values: dict[str, Any] = {
            "x": fill("x", *own), "weight": fill("weight", self.out, inner, self.kernel, self.kernel) * scale,
        }  # fmt: skip
        if self.channels2:
            values["x2"] = fill("x2", *second)
        if self.bias:
            values["bias"] = fill("bias", self.out)
        if self.time:
            values["time_bias"] = fill("time_bias", self.n, self.out)
        if self.residual:
            values["residual"] = fill("residual", self.n, self.out, *size)
        if self.shortcut:
            values["shortcut"] = fill("shortcut", self.n, self.channels, *size)
            if self.channels2:
                values["shortcut2"] = fill("shortcut2", self.n, self.channels2, *size)
            values["shortcut_weight"] = fill("shortcut_weight", self.out, inner) * (1 / math.sqrt(inner))
        if self.groups:
            values["norm.weight"], values["norm.bias"] = fill("norm.weight", inner), fill("norm.bias", inner)
            if self.film:
                for name in ("norm.scale", "norm.shift"):
                    values[name] = fill(name, self.n, inner)
        return values

    def call(self, values: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Return the arguments of `conv_` from `make`'s, in `dtype`; y and its statistics hold NaN."""
        own = {name: value.to(dtype, copy=True) for name, value in values.items()}
        for name in ("x", "x2", "weight", "residual", "shortcut", "shortcut2"):
            if name in own:
                own[name] = own[name].contiguous(memory_format=torch.channels_last)
        like = own["x"]
        wide = torch.promote_types(dtype, torch.float32)
        norm: dict[str, Any] = {name[5:]: own.pop(name) for name in list(own) if name.startswith("norm.")}
        if self.groups:
            size = (self.channels + self.channels2) // self.groups
            given: dict[str, Any] = {}
            for name, image, begin in (("statistics", like, 0), ("statistics2", own.get("x2"), self.channels)):
                if image is not None:
                    unit = statistics_unit(image.shape[1], (size, begin))
                    given[name] = torch.empty(statistics_shape(image, unit), dtype=wide, device=like.device)
                    if image.device.type != "meta":
                        statistics_by_torch(given[name], image)
            own["norm"] = Norm(num_groups=self.groups, activation="silu" if self.silu else None, **norm, **given)
        y = torch.full((self.n, *self.size, self.out), math.nan, dtype=dtype, device=like.device).permute(0, 3, 1, 2)
        own |= {"y": y, "stride": self.stride, "padding": self.above, "upsample": self.upsample}
        if self.statistics:
            own["statistics"] = torch.full(statistics_shape(y, self.unit), math.nan, dtype=wide, device=like.device)
        return own


def results(call: dict[str, Any]) -> dict[str, Tensor]:
    """Return y and the mean and deviation of its blocks (a stack of both would compare unlike numbers)."""
    found = {"y": call["y"]}
    if call.get("statistics") is not None:
        found["mean"], found["deviation"] = call["statistics"]
    return found
