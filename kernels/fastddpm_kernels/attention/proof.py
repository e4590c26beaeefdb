"""The proof of `attention_`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastddpm_kernels.attention import attention_
from fastddpm_kernels.proof import Proof, channels_last, exact, of_op

BACKENDS = ("native",)


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the op on a backend."""
    wide = exact(dtype, device, qkv=(2, 192, 9, 7))

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        y = channels_last(torch.empty(2, 64, 9, 7, dtype=dtype, device=device))
        attention_(y, channels_last(wide["qkv"].to(dtype)), 2, 32, backend=backend)
        return {"y": y}

    yield of_op("attention", "2 heads of 32, 63 pixels", backend, dtype, run)
