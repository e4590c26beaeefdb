"""Tune the sum of a residual block on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.residual_add import residual_add_
from fastddpm_kernels.tuned import Choice, Tunable
from fastddpm_kernels.tuning import ELEMENTWISE, ElementwiseTask, Operands


class ResidualAddTask(ElementwiseTask):
    """`residual_add_`, into an image with or without a border."""

    def heuristic(self) -> Choice:
        from fastddpm_kernels.residual_add.triton import heuristic_choice

        return heuristic_choice(self.key.dtype.itemsize)

    def operands(self, seed: int) -> Operands:
        named, channels = self.named, self.named["channels"]
        height, width, more = named["height"], named["width"], named["padded"]
        x, residual = (self.image(seed + k, channels, height=height, width=width) for k in (0, 1))
        y = self.image(None, channels, height=height + more, width=width + more)[:, :, :height, :width]
        bias = self.random(seed + 2, channels, 1, 1, dtype=torch.float32)
        return {
            "y": y, "x": x, "residual": residual if named["residual"] else None,
            "bias": bias if named["bias"] else None, "total": torch.empty_like(x) if named["total"] else None,
        }  # fmt: skip

    def launch(self, choice: Choice | None, operands: Operands) -> Any:
        from fastddpm_kernels.residual_add.triton import make_launch

        return make_launch(**operands, choice=choice)

    def results(self, operands: Operands) -> dict[str, Tensor]:
        return {name: t for name in ("y", "total") if (t := operands[name]) is not None}

    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        bias = None if operands["bias"] is None else operands["bias"].flatten()
        found = []
        for dtype, backend in ((torch.float64, "reference"), (self.key.dtype, "eager")):
            x, residual = (None if (t := operands[n]) is None else t[samples].to(dtype) for n in ("x", "residual"))
            assert x is not None
            y = torch.empty_like(x)
            residual_add_(y, x, residual=residual, bias=bias, backend=backend)
            found.append(y)
        return {name: (found[0], found[1]) for name in self.results(operands)}

    def cost(self) -> tuple[int, int]:
        named = self.named
        images = 2 + named["residual"] + named["total"]
        elements = named["batch"] * named["channels"] * named["height"] * named["width"]
        return images * elements * self.key.dtype.itemsize, 0


_FIELDS = ("batch", "channels", "height", "width", "channels_last", "padded", "residual", "bias", "total")
OPS = {"residual_add": Tunable(_FIELDS, ELEMENTWISE, ResidualAddTask)}
