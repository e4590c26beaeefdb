"""The proofs of `reverse_step_`: DDPM with noise made in registers; guidance, learned variance and history."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastddpm_kernels.philox import sample_keys
from fastddpm_kernels.proof import Proof, channels_last, exact, of_op
from fastddpm_kernels.reverse_step import reverse_step_

BACKENDS = ("triton", "native")
_TABLE = [[1.1, -0.4, 0.6, 0.3, 0.0, 0.0, 0.25], [1.2, -0.7, 0.8, 0.2, 0.15, -0.3, 0.5]]


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the op on a backend. The state is float32; `dtype` is the network's."""
    shape = (4, 3, 32, 32)
    wide = exact(dtype, device, x=shape, out=shape, both=(8, 6, 32, 32), x0=shape, noise=shape)
    table = torch.tensor(_TABLE, device=device)
    log_variance = torch.tensor([[-3.0, -2.5], [-2.0, -1.0]], device=device)
    step = torch.ones(1, dtype=torch.int64, device=device)
    keys = sample_keys([5] * 4, range(4), device)

    def ddpm(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        x, net_in = wide["x"].float(), channels_last(torch.empty(shape, dtype=dtype, device=device))
        reverse_step_(x, channels_last(wide["out"].to(dtype)), table, step * 0, net_in=net_in, keys=keys,
                      clip_range=1.0, backend=backend)  # fmt: skip
        return {"x": x, "net_in": net_in}

    def guided(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        x, x0 = wide["x"].float(), wide["x0"].float()
        reverse_step_(x, channels_last(wide["both"].to(dtype)), table, step, x0=x0, multistep=True,
                      noise=wide["noise"].float(), log_variance=log_variance,
                      guidance_scale=torch.tensor([3.0], device=device), backend=backend)  # fmt: skip
        return {"x": x, "x0": x0}

    yield of_op("reverse_step", "DDPM", backend, dtype, ddpm)
    yield of_op("reverse_step", "guided, learned variance, multistep", backend, dtype, guided)
