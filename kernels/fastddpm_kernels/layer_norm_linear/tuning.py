"""Tune the layer norms before products on a GPU: norm, product and gate in one kernel, or in two or three."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.geglu import geglu_
from fastddpm_kernels.layer_norm import layer_norm_
from fastddpm_kernels.layer_norm_linear import layer_norm_linear_
from fastddpm_kernels.tuned import Choice, Tunable
from fastddpm_kernels.tuning import Operands, Task


class LayerNormLinearTask(Task):
    """A layer norm and the product that follows. Each pixel is a sample."""

    @property
    def num_samples(self) -> int:
        return self.named["pixels"]

    def candidates(self) -> list[Choice]:
        return [{"implementation": "two"}, {"implementation": "one"}]

    def operands(self, seed: int) -> Operands:
        pixels, c, out, gate, _ = self.key.shape
        weight = self.random(seed + 1, out * (1 + gate), c) / c**0.5
        wide = torch.promote_types(self.key.dtype, torch.float32)
        return {
            "x": self.random(seed, pixels, c), "y": self.empty(pixels, out), "weight": weight,
            "sums": weight.double().sum(1).to(wide), "bias": self.random(seed + 2, len(weight)),
        }  # fmt: skip

    def call(self, choice: Choice, operands: Operands) -> Callable[[], object]:
        on_gpu, gate = self.device.type == "cuda", bool(self.named["gate"])
        backend = "triton" if on_gpu else "eager"
        if choice["implementation"] == "one":
            return layer_norm_linear_.bind(**operands, gate=gate, allow_tf32=bool(self.named["tf32"]), backend=backend)
        x, y, weight, bias = (operands[name] for name in ("x", "y", "weight", "bias"))
        h, flat = torch.empty_like(x), weight.T.contiguous()
        ones, zeros = torch.ones_like(x[0]), torch.zeros_like(x[0])
        norm = layer_norm_.bind(h, x, ones, zeros, backend=backend)
        wide = self.empty(len(x), len(weight)) if gate else y
        gated = geglu_.bind(y, wide, backend=backend) if gate else None

        def run() -> None:
            norm()
            torch.addmm(bias, h, flat, out=wide)
            if gated is not None:
                gated()

        return run

    def results(self, operands: Operands) -> dict[str, Tensor]:
        return {"y": operands["y"]}

    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        found = []
        for dtype, backend in ((torch.float64, "reference"), (self.key.dtype, "eager")):
            own: dict[str, Any] = {name: value.to(dtype) for name, value in operands.items()}
            own["x"], own["y"] = own["x"][samples], own["y"][samples]
            layer_norm_linear_(**own, gate=bool(self.named["gate"]), backend=backend)
            found.append(own["y"])
        return {"y": (found[0], found[1])}

    def tolerance(self, choice: Choice) -> dict[str, Any]:
        # TensorFloat-32 has float16's significant bits.
        return {"dtype": torch.float16 if self.named["tf32"] else self.key.dtype, "factor": 4.0}

    def cost(self) -> tuple[int, int]:
        pixels, c, out, gate, _ = self.key.shape
        columns = out * (1 + gate)
        return self.key.dtype.itemsize * (pixels * (c + out) + columns * c), 2 * pixels * columns * c


OPS = {
    "layer_norm_linear": Tunable(
        ("pixels", "channels", "out_channels", "gate", "tf32"), ({"implementation": ("two", "one")},),
        LayerNormLinearTask, kernels=None,
    )
}  # fmt: skip
