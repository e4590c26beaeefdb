"""The proof of `geglu_`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastddpm_kernels.geglu import geglu_
from fastddpm_kernels.proof import Proof, channels_last, exact, of_op

BACKENDS = ("triton", "native")


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the op on a backend."""
    wide = exact(dtype, device, x=(2, 640, 9, 5))

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        y = channels_last(torch.empty(2, 320, 9, 5, dtype=dtype, device=device))
        geglu_(y, channels_last(wide["x"].to(dtype)), backend=backend)
        return {"y": y}

    yield of_op("geglu", "320 channels", backend, dtype, run)
