"""Call the native norm: sequences channels-last, all float32 or all bfloat16; vectors and rows float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm_kernels.native.binding import THREADS, bind, row_stride


def bind_group_norm_mish(
    y: Tensor, x: Tensor, num_groups: int, eps: float, residual: Tensor | None, weight: Tensor, bias: Tensor,
    scale: Tensor | None, shift: Tensor | None,
) -> Callable[[], None]:  # fmt: skip
    """Return a function that writes `y`."""
    return bind(
        "fastddpm_group_norm_mish", y, x, residual, weight, bias, scale, shift, row_stride(scale), row_stride(shift),
        len(x), math.prod(x.shape[2:]), x.shape[1], num_groups, eps, x.dtype == torch.bfloat16, THREADS,
    )  # fmt: skip
