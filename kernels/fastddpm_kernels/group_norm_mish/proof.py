"""The proofs of `group_norm_mish_`: FiLM and residual, in registers and not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.group_norm_mish import group_norm_mish_
from fastddpm_kernels.proof import Proof, exact, of_op

BACKENDS = ("triton", "native")


def proofs(backend: str, dtype: torch.dtype, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs of the op on a backend."""
    for variant, channels, length in (("few positions", 192, 4), ("many positions", 64, 4096)):
        sequence, row = (2, length, channels), (2, channels)
        shapes = {"x": sequence, "residual": sequence, "scale": row, "shift": row, "weight": row[1:], "bias": row[1:]}
        wide = exact(dtype, device, **shapes)

        def run(backend: str, dtype: torch.dtype, wide: dict[str, Tensor] = wide) -> dict[str, Tensor]:
            rows = torch.float64 if dtype == torch.float64 else torch.float32
            values: dict[str, Any] = {
                n: v.to(dtype).transpose(1, 2) if v.ndim == 3 else v.to(rows) for n, v in wide.items()
            }
            y = torch.empty_like(values["x"])
            group_norm_mish_(y, **values, num_groups=8, backend=backend)
            return {"y": y}

        yield of_op("group_norm_mish", variant, backend, dtype, run)
