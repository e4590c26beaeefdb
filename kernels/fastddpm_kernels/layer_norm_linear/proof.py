"""The proofs of `layer_norm_linear_`: with a gate and without, many pixels and few."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastddpm_kernels.layer_norm_linear import layer_norm_linear_
from fastddpm_kernels.proof import Proof, channels_last, exact, of_op

BACKENDS = ("triton",)


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the op on a backend."""
    for variant, gate, c, o, size in (("64x64", False, 320, 960, 32), ("gated", True, 320, 640, 8)):
        rows = o * (1 + gate)
        wide = exact(dtype, device, x=(2, c, size, size), weight=(rows, c), bias=(rows,))
        wide["weight"] /= 16  # as in a network: near 1 / sqrt(c), so that the product is about as large as the bias

        def run(
            backend: str, dtype: torch.dtype, wide: dict[str, Tensor] = wide, gate: bool = gate, o: int = o
        ) -> dict[str, Tensor]:
            x, weight = channels_last(wide["x"].to(dtype)), wide["weight"].to(dtype)
            y = channels_last(torch.empty(len(x), o, *x.shape[2:], dtype=dtype, device=x.device))
            sums = weight.double().sum(1).to(torch.promote_types(dtype, torch.float32))
            layer_norm_linear_(y, x, weight, sums, wide["bias"].to(sums), gate=gate, backend=backend)
            return {"y": y}

        yield of_op("layer_norm_linear", variant, backend, dtype, run)
