"""The proofs of `residual_add_`: alone, and into an image with a border."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastddpm_kernels.proof import Proof, channels_last, exact, of_op
from fastddpm_kernels.residual_add import residual_add_

BACKENDS = ("triton",)


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the op on a backend."""
    wide = exact(dtype, device, x=(2, 96, 16, 16), residual=(2, 96, 16, 16), bias=(96,))

    def bordered(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        x, residual = (channels_last(wide[name].to(dtype)) for name in ("x", "residual"))
        y = channels_last(torch.zeros(2, 96, 17, 17, dtype=dtype, device=device))[:, :, :16, :16]
        total = torch.empty_like(x)
        residual_add_(y, x, residual=residual, bias=wide["bias"].float(), total=total, backend=backend)
        return {"y": y, "total": total}

    yield of_op("residual_add", "with a border", backend, dtype, bordered)
