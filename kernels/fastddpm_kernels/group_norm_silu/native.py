"""Call the native norms. Images are channels-last, all float32 or all bfloat16; vectors and rows float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm_kernels.native.binding import THREADS, bind, row_stride


def bind_group_norm(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, x2: Tensor | None,
    residual: Tensor | None, total: Tensor | None, time_bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, silu: bool, *, mean: Tensor | None = None, rstd: Tensor | None = None,
) -> Callable[[], None]:  # fmt: skip
    """Return a function that writes `y`, with a residual `total`, and for gradients `mean`, `rstd` [N, num_groups]."""
    return bind(
        "fastddpm_group_norm", y, x, x2, residual, total, weight, bias, time_bias, scale, shift,
        *map(row_stride, (time_bias, scale, shift)), *_sizes(x, x2), num_groups, eps, silu, x.dtype == torch.bfloat16,
        THREADS, mean, rstd,
    )  # fmt: skip


def group_norm_gradient(
    dx: Tensor, dx2: Tensor | None, sums: Tensor, dy: Tensor, x: Tensor, x2: Tensor | None, weight: Tensor,
    bias: Tensor, mean: Tensor, rstd: Tensor, time_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    silu: bool,
) -> None:  # fmt: skip
    """Write `dx`, `dx2` and the sums over pixels `sums` [3, N, C + C2], from which all other gradients follow."""
    bind(
        "fastddpm_group_norm_gradient", dx, dx2, sums, dy, x, x2, weight, bias, mean, rstd, time_bias, scale, shift,
        *map(row_stride, (time_bias, scale, shift)), *_sizes(x, x2), mean.shape[1], silu, x.dtype == torch.bfloat16,
        THREADS,
    )()  # fmt: skip


def bind_rms_norm(
    y: Tensor, x: Tensor, weight: Tensor, eps: float, x2: Tensor | None, residual: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, silu: bool,
) -> Callable[[], None]:  # fmt: skip
    """Return a function that writes `y`."""
    return bind(
        "fastddpm_rms_norm", y, x, x2, residual, weight, scale, shift, row_stride(scale), row_stride(shift),
        *_sizes(x, x2), eps, silu, x.dtype == torch.bfloat16, THREADS,
    )  # fmt: skip


def _sizes(x: Tensor, x2: Tensor | None) -> tuple[int, int, int, int]:
    """Return samples, pixels, and channels of x and of x2."""
    return x.shape[0], math.prod(x.shape[2:]), x.shape[1], 0 if x2 is None else x2.shape[1]
