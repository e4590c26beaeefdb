"""The proofs of `q_sample`: noise given, and made in registers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastddpm_kernels.philox import sample_keys
from fastddpm_kernels.proof import Proof, channels_last, exact, of_op
from fastddpm_kernels.q_sample import q_sample

BACKENDS = ("triton",)


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the op on a backend."""
    shape = (8, 3, 32, 32)
    wide = exact(dtype, device, x0=shape, noise=shape)
    angle = torch.linspace(0.1, 1.5, 7, device=device)
    table, t = torch.stack([angle.cos(), angle.sin()], 1), torch.arange(8, device=device) % 7
    keys = sample_keys([5] * 8, range(8), device)
    step = torch.full((1,), 3, dtype=torch.int64, device=device)

    def given(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        x, target = q_sample(wide["x0"].to(dtype), table, t, noise=wide["noise"].to(dtype),
                             prediction_type="v_prediction", backend=backend)  # fmt: skip
        return {"x_t": x, "target": target}

    def made(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        x, target = q_sample(channels_last(wide["x0"].to(dtype)), table, t, keys=keys, step=step, backend=backend)
        return {"x_t": x, "target": target}

    yield of_op("q_sample", "noise given", backend, dtype, given)
    yield of_op("q_sample", "noise made", backend, dtype, made)
