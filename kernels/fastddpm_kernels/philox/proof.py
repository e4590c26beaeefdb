"""The proof of `normal`: noise has the same bits on every backend, to the rounding of its logarithm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastddpm_kernels.philox import STREAM_STEP, normal, sample_keys
from fastddpm_kernels.proof import Proof, of_op

BACKENDS = ("triton", "native")


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the op on a backend; it has one dtype."""
    if dtype != torch.float32:
        return
    keys = sample_keys([2**63 + 1] * 4, range(4), device)

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"noise": normal(keys, (3, 33, 31), step=7, stream=STREAM_STEP, backend=backend)}

    yield of_op("philox", "normal", backend, dtype, run)
