"""Tune 1x1 convolutions on a GPU: tiles, or the vendor's matrix product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.device.processors import num_processors
from fastddpm_kernels.pointwise_conv import pointwise_conv_
from fastddpm_kernels.pointwise_conv.formula import by_matmul
from fastddpm_kernels.tuned import Choice, Tunable
from fastddpm_kernels.tuning import WARPS, Operands, Task, nearest_first

STAGES = (2, 3, 4, 5)
STAGED = 200 * 1024  # bytes of shared memory that all stages of a tile may take


class PointwiseTask(Task):
    """`pointwise_conv_` with a bias."""

    @property
    def num_samples(self) -> int:
        return self.named["rows"]

    def samples(self) -> Tensor:
        """Return rows spread over the whole range."""
        places = torch.linspace(0, self.num_samples - 1, min(512, self.num_samples), dtype=torch.float64)
        return places.round().to(torch.int64).unique().to(self.device)

    def candidates(self) -> list[Choice]:
        from fastddpm_kernels.pointwise_conv.triton import MATMUL, choose_tile, unit_of

        rows, columns, channels, second, _, allow_tf32 = self.key.shape
        itemsize, unit = self.key.dtype.itemsize, unit_of(self.key.dtype, bool(allow_tf32))
        tile = choose_tile(rows, columns, channels, second, itemsize, unit, num_processors(self.device))
        own = asdict(tile)
        found = nearest_first(self._tiles(own, unit.shapes), own)
        if itemsize == 2:  # in float32 torch's own switches would say how it rounds
            found.insert(1, MATMUL)
        return found

    def _tiles(self, own: dict[str, int], shapes: tuple[tuple[int, int, int], ...]) -> Iterator[Choice]:
        rows, columns, channels, second = self.key.shape[:4]
        widest = max(16, 1 << (max(channels, second) - 1).bit_length())
        for block_m, block_n, usual in shapes:
            if block_m >= 2 * max(rows, 16) or block_n >= 2 * max(columns, 16):
                continue
            for block_k in {own["block_k"] // 2, own["block_k"], own["block_k"] * 2}:
                for warps in {max(usual // 2, 1), usual, min(usual * 2, 8)}:
                    for stages in STAGES:
                        staged = (block_m + block_n) * block_k * self.key.dtype.itemsize * stages
                        if 16 <= block_k <= min(widest, 256) and staged <= STAGED:
                            yield {"block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": warps,
                                   "num_stages": stages}  # fmt: skip

    def operands(self, seed: int) -> Operands:
        rows, columns, channels, second, residual, _ = self.key.shape
        scale = 1 / math.sqrt(channels + second)
        return {
            "x": self.random(seed, rows, channels),
            "weight": self.random(seed + 1, columns, channels) * scale,
            "x2": self.random(seed + 2, rows, second) if second else None,
            "weight2": self.random(seed + 3, columns, second) * scale if second else None,
            "bias": self.random(seed + 4, columns, dtype=torch.float32),
            "residual": self.random(seed + 5, rows, columns) if residual else None,
            "y": self.empty(rows, columns),
        }

    def call(self, choice: Choice, operands: Operands) -> Callable[[], object]:
        from fastddpm_kernels.pointwise_conv.triton import bind_choice

        return bind_choice(choice, **operands, allow_tf32=bool(self.named["tf32"]))

    def results(self, operands: Operands) -> dict[str, Tensor]:
        return {"y": operands["y"]}

    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        o = {name: t[samples] if t is not None and name in ("x", "x2", "residual", "y") else t
             for name, t in operands.items()}  # fmt: skip
        given = {name: o[name] for name in ("x", "weight", "x2", "weight2", "bias", "residual")}
        wide: dict[str, Any] = {name: t if t is None else t.double() for name, t in given.items()}
        exact, eager = o["y"].double(), torch.empty_like(o["y"])
        pointwise_conv_(exact, backend="reference", **wide)
        by_matmul(eager, **given)
        return {"y": (exact, eager)}

    def tolerance(self, choice: Choice) -> dict[str, Any]:
        # TensorFloat-32 has float16's significant bits.
        return {"dtype": torch.float16} if self.named["tf32"] else {}

    def cost(self) -> tuple[int, int]:
        rows, columns, channels, second, residual, _ = self.key.shape
        inner = channels + second
        elements = rows * (inner + columns * (1 + residual)) + columns * inner
        return elements * self.key.dtype.itemsize, 2 * rows * columns * inner


_FIELDS = ("rows", "columns", "channels", "channels2", "residual", "tf32")
_SIDES = tuple(2**k for k in range(4, 9))
_TILES = {"block_m": _SIDES, "block_n": _SIDES, "block_k": _SIDES, "num_warps": WARPS, "num_stages": range(1, 7)}
OPS = {"pointwise_conv": Tunable(_FIELDS, (_TILES, {"implementation": ("addmm",)}), PointwiseTask)}
