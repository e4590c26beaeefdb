"""The proofs of the norms: one launch and several, FiLM and a time row, two sources and a residual; RMS norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.group_norm_silu import group_norm_silu_, rms_norm_silu_
from fastddpm_kernels.proof import Proof, channels_last, exact, of_op

BACKENDS = ("triton", "native")
# Channels of both sources, size, groups: one launch of few pixels, one of many, several launches.
_CASES = {"4x4": (256, 0, 4, 32), "32x32": (64, 0, 32, 32), "64x64, two sources": (8, 8, 64, 4)}


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the ops on a backend."""
    for variant, (c, c2, size, groups) in _CASES.items():
        image, row = (2, c, size, size), (2, c + c2)
        shapes = {"x": image, "weight": row[1:], "bias": row[1:], "time_bias": row, "scale": row, "shift": row}
        shapes |= {"x2": (2, c2, size, size)} if c2 else {"residual": image}
        wide = exact(dtype, device, **shapes)

        def run(
            backend: str, dtype: torch.dtype, wide: dict[str, Tensor] = wide, groups: int = groups
        ) -> dict[str, Tensor]:
            rows = torch.float64 if dtype == torch.float64 else torch.float32
            values: dict[str, Any] = {
                n: channels_last(v.to(dtype)) if v.ndim == 4 else v.to(rows) for n, v in wide.items()
            }
            n, channels = values["scale"].shape
            y = channels_last(torch.empty(n, channels, *values["x"].shape[2:], dtype=dtype, device=device))
            x, weight, bias = (values.pop(name) for name in ("x", "weight", "bias"))
            group_norm_silu_(y, x, weight, bias, groups, **values, backend=backend)
            return {"y": y}

        yield of_op("group_norm_silu", variant, backend, dtype, run)

    wide = exact(dtype, device, x=(2, 64, 16, 16), weight=(64,), residual=(2, 64, 16, 16))

    def rms(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        x, residual = (channels_last(wide[name].to(dtype)) for name in ("x", "residual"))
        y = torch.empty_like(x)
        weight = wide["weight"].to(torch.float64 if dtype == torch.float64 else torch.float32)
        rms_norm_silu_(y, x, weight, residual=residual, backend=backend)
        return {"y": y}

    yield of_op("group_norm_silu", "RMS norm", backend, dtype, rms)
