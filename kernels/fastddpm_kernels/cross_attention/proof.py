"""The proofs of `cross_attention_`: to a text, and to a masked text and the image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastddpm_kernels.cross_attention import cross_attention_
from fastddpm_kernels.proof import Proof, channels_last, exact, of_op

BACKENDS = ("native",)


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the op on a backend."""
    wide = exact(dtype, device, qkv=(2, 240, 9, 7), kv=(2, 160, 1, 77), mask=(2, 140))

    def run(backend: str, dtype: torch.dtype, *, own: bool) -> dict[str, Tensor]:
        qkv, kv = (channels_last(wide[name].to(dtype)) for name in ("qkv", "kv"))
        y = channels_last(torch.empty(2, 80, 9, 7, dtype=dtype, device=device))
        mask = wide["mask"].float() if own else None
        cross_attention_(y, qkv[:, :80], kv, 2, own=qkv[:, 80:] if own else None, mask=mask, backend=backend)
        return {"y": y}

    yield of_op("cross_attention", "2 heads of 40, 77 tokens", backend, dtype, lambda *on: run(*on, own=False))
    yield of_op("cross_attention", "masked, and to itself", backend, dtype, lambda *on: run(*on, own=True))
