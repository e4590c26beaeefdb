"""Tune the attention blocks of one head on a GPU: the whole block in one kernel, or norm, projections and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm_kernels.attention_block import attention_block_, fold
from fastddpm_kernels.group_norm_silu import group_norm_silu_
from fastddpm_kernels.tuned import Choice, Tunable
from fastddpm_kernels.tuning import Operands, Task


class AttentionBlockTask(Task):
    """An attention block as a frozen U-Net has it: its output projection is folded into the values."""

    def candidates(self) -> list[Choice]:
        return [{"implementation": "parts"}, {"implementation": "block"}]

    def operands(self, seed: int) -> Operands:
        n, pixels, c, _, _ = self.key.shape
        x = self.random(seed, n, 1, pixels, c).permute(0, 3, 1, 2)
        qkv, qkv_bias = self.random(seed + 1, 3 * c, c) / c**0.5, self.random(seed + 2, 3 * c) / 4
        wide = torch.promote_types(self.key.dtype, torch.float32)
        folded = fold(qkv, qkv_bias, torch.eye(c, device=x.device), torch.zeros(c, device=x.device), c)
        names = ("scores", "scores_bias", "values", "values_bias")
        matrices = {
            name: value.to(self.key.dtype if value.ndim == 2 else wide).contiguous()
            for name, value in zip(names, folded, strict=True)
        }
        vectors = {"weight": self.random(seed + 3, c).to(wide), "bias": self.random(seed + 4, c).to(wide)}
        return {
            "x": x,
            "y": torch.empty_like(x),
            "qkv": qkv.T.contiguous(),
            "qkv_bias": qkv_bias,
            **vectors,
            **matrices,
        }

    def call(self, choice: Choice, operands: Operands) -> Callable[[], object]:
        if choice["implementation"] == "block":
            return attention_block_.bind(**self._block(operands), backend="auto" if self._on_gpu else "eager")
        n, pixels, c, groups, _ = self.key.shape
        x, y, backend = operands["x"], operands["y"], "triton" if self._on_gpu else "eager"
        h, projected = torch.empty_like(x), self.empty(n * pixels, 3 * c)
        norm = group_norm_silu_.bind(
            h, x, operands["weight"], operands["bias"], groups, activation=None, backend=backend
        )
        rows, out = h.permute(0, 2, 3, 1).view(-1, c), y.permute(0, 2, 3, 1).view(n, pixels, c)
        own = x.permute(0, 2, 3, 1).view(n, pixels, c)

        def run() -> None:
            norm()
            torch.addmm(operands["qkv_bias"], rows, operands["qkv"], out=projected)
            q, k, v = projected.view(n, 1, pixels, 3 * c).split(c, dim=3)
            torch.add(own, F.scaled_dot_product_attention(q, k, v)[:, 0], out=out)

        return run

    def results(self, operands: Operands) -> dict[str, Tensor]:
        return {"y": operands["y"]}

    def truth(self, operands: Operands, samples: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        found = []
        for dtype, backend in ((torch.float64, "reference"), (self.key.dtype, "eager")):
            own: dict[str, Any] = {
                name: value.to(dtype) if isinstance(value, Tensor) else value
                for name, value in self._block(operands).items()
            }
            own["x"] = own["x"][samples]
            own["y"] = torch.empty_like(own["x"])
            attention_block_(**own, backend=backend)
            found.append(own["y"])
        return {"y": (found[0], found[1])}

    def tolerance(self, choice: Choice) -> dict[str, Any]:
        # The parts round other intermediate values than the block. TensorFloat-32 has float16's significant bits.
        return {"dtype": torch.float16 if self.named["tf32"] else self.key.dtype, "factor": 4.0}

    def cost(self) -> tuple[int, int]:
        n, pixels, c, _, _ = self.key.shape
        return self.key.dtype.itemsize * 2 * c * (n * pixels + c), 4 * n * pixels * c * (c + pixels)

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _block(self, operands: Operands) -> dict[str, Any]:
        """Return the arguments of `attention_block_`."""
        own = {name: value for name, value in operands.items() if not name.startswith("qkv")}
        return {**own, "num_groups": self.named["groups"], "allow_tf32": bool(self.named["tf32"])}


OPS = {
    "attention_block": Tunable(
        ("batch", "pixels", "channels", "groups", "tf32"), ({"implementation": ("parts", "block")},),
        AttentionBlockTask, kernels=None,
    )
}  # fmt: skip
