"""The proofs of `conv1d_`: few positions and many, two sources, every second position, and the transposed one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.conv1d import conv1d_
from fastddpm_kernels.proof import Proof, exact, of_op

BACKENDS = ("triton", "native")
# Channels of both sources, length, kernel, stride, padding, and the length of the result.
_CASES = {
    "few positions": (96, 0, 4, 5, 1, 2, 4),
    "two sources": (40, 24, 32, 5, 1, 2, 32),
    "stride 2": (64, 0, 16, 3, 2, 1, 8),
    "transposed": (48, 0, 8, 4, 2, 1, 16),
}


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the op on a backend."""
    for variant, (c, c2, length, kernel, stride, padding, out_length) in _CASES.items():
        transposed, inner = variant == "transposed", c + c2
        weight = (inner, 80, kernel) if transposed else (80, inner, kernel)
        shapes = {"x": (2, length, c), "weight": weight, "bias": (80,)} | ({"x2": (2, length, c2)} if c2 else {})
        wide = exact(dtype, device, **shapes)
        options = {"stride": stride, "padding": padding, "transposed": transposed}

        def run(
            backend: str,
            dtype: torch.dtype,
            wide: dict[str, Tensor] = wide,
            options: dict[str, Any] = options,
            out_length: int = out_length,
        ) -> dict[str, Tensor]:
            values: dict[str, Any] = {name: value.to(dtype) for name, value in wide.items()}
            values = {n: v.transpose(1, 2) if n in ("x", "x2") else v for n, v in values.items()}
            y = torch.empty(2, out_length, 80, dtype=dtype, device=device).transpose(1, 2)
            conv1d_(y, **values, **options, backend=backend)
            return {"y": y}

        yield of_op("conv1d", variant, backend, dtype, run)
