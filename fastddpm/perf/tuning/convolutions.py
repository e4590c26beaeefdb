"""1x1 convolutions on a GPU: tiles, or the vendor's product; those of an upsampled image: as a transposed one or as
they are written. 3x3 convolutions on the CPU: which algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from fastddpm_kernels import conv
from fastddpm_kernels.group_norm_silu.plan import num_processors
from fastddpm_kernels.pointwise_conv import by_matmul, pointwise_conv_
from fastddpm_kernels.tuned import Choice
from torch import Tensor

from fastddpm.networks.frozen import instructions
from fastddpm.networks.frozen.folding import upsample_conv
from fastddpm.perf.tuning.task import Operands, Task, nearest_first

STAGES = (2, 3, 4, 5)
STAGED = 200 * 1024  # bytes of shared memory that all stages of a tile may take


class PointwiseTask(Task):
    """`pointwise_conv_` with a bias."""

    @property
    def num_samples(self) -> int:
        return self.named["rows"]

    def samples(self) -> Tensor:
        """Rows from all over, since one is little."""
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
        from fastddpm_kernels.pointwise_conv.triton import run_choice

        o, allow_tf32 = operands, bool(self.named["tf32"])

        def run() -> None:
            run_choice(
                choice, o["y"], o["x"], o["weight"], o["x2"], o["weight2"], o["bias"], o["residual"], allow_tf32
            )

        return run

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


class UpsampleTask(Task):
    """Upsampling by two and a 3x3 convolution, by the instructions of a frozen U-Net. There is no bias then."""

    def candidates(self) -> list[Choice]:
        return [{"implementation": "transposed"}, {"implementation": "plain"}]

    def operands(self, seed: int) -> Operands:
        n, height, width, channels, out, _ = self.key.shape
        weight = self.random(seed + 1, out, channels, 3, 3) / math.sqrt(9 * channels)
        transposed = upsample_conv(weight).to(weight.dtype)
        return {
            "x": self.random(seed, n, height, width, channels).movedim(-1, 1),
            "doubled": self.empty(n, 2 * height, 2 * width, channels).movedim(-1, 1),
            "y": self.empty(n, 2 * height, 2 * width, out).movedim(-1, 1),
            "plain": weight.contiguous(memory_format=torch.channels_last),
            "transposed": transposed.contiguous(memory_format=torch.channels_last),
        }

    def call(self, choice: Choice, operands: Operands) -> Callable[[], object]:
        o, static = operands, self.device.type == "cuda"
        m = instructions.Machine(True, static, "triton", bool(self.named["tf32"]), [o["x"], o["doubled"], o["y"]])
        if choice["implementation"] == "plain":
            runs = [instructions.double(m, 0, 1), instructions.conv(m, 1, 2, o["plain"], None, 1, 1)]
        else:
            runs = [instructions.upsample(m, 0, 2, o["transposed"], None)]

        def run() -> None:
            for each in runs:
                each()
            o["y"] = m.slots[2]  # a new place, where the instruction cannot be told one

        return run

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
