"""The proofs of `layer_norm_`: with a residual and without."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastddpm_kernels.layer_norm import layer_norm_
from fastddpm_kernels.proof import Proof, channels_last, exact, of_op

BACKENDS = ("triton", "native")


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the op on a backend."""
    wide = exact(dtype, device, x=(2, 320, 9, 5), residual=(2, 320, 9, 5), weight=(320,), bias=(320,))
    vectors = wide["weight"].float(), wide["bias"].float()

    def alone(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        x = channels_last(wide["x"].to(dtype))
        y = torch.empty_like(x)
        layer_norm_(y, x, *vectors, backend=backend)
        return {"y": y}

    def summed(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        x, residual = (channels_last(wide[name].to(dtype)) for name in ("x", "residual"))
        y, total = torch.empty_like(x), torch.empty_like(x)
        layer_norm_(y, x, *vectors, residual=residual, total=total, backend=backend)
        return {"y": y, "total": total}

    yield of_op("layer_norm", "320 channels", backend, dtype, alone)
    yield of_op("layer_norm", "of a sum", backend, dtype, summed)
