"""The proofs of `pointwise_conv_`: many and few pixels, one source and two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.pointwise_conv import pointwise_conv_
from fastddpm_kernels.proof import Proof, channels_last, exact, of_op

BACKENDS = ("triton",)
# Samples, channels of both sources and of the result, size.
_CASES = {"many pixels": (2, 64, 0, 128, 16), "two sources": (2, 128, 64, 128, 4)}


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the op on a backend."""
    for variant, (n, c, c2, o, size) in {
        "many pixels": (4, 128, 0, 256, 32),
        "two sources": (2, 256, 128, 256, 4),
    }.items():
        shapes = {"x": (n, c, size, size), "weight": (o, c), "bias": (o,), "residual": (n, o, size, size)}
        shapes |= {"x2": (n, c2, size, size), "weight2": (o, c2)} if c2 else {}
        wide = exact(dtype, device, **shapes)

        def run(backend: str, dtype: torch.dtype, wide: dict[str, Tensor] = wide) -> dict[str, Tensor]:
            values: dict[str, Any] = {name: value.to(dtype) for name, value in wide.items()}
            values = {name: channels_last(value) if value.ndim == 4 else value for name, value in values.items()}
            y = torch.empty_like(values["residual"])
            pointwise_conv_(y, values.pop("x"), values.pop("weight"), **values, backend=backend)
            return {"y": y}

        yield of_op("pointwise_conv", variant, backend, dtype, run)
