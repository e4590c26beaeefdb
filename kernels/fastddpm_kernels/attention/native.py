"""Call the native attention. Tensors are all float32, or all bfloat16 with even strides and channels per head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm_kernels.native.binding import THREADS, bind


def bind_attention(
    y: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, statistics: Tensor | None = None
) -> Callable[[], None]:
    """Return a function that writes the attention to `y` and, for gradients, `statistics` [N, heads, 2, P], float32.

    y, q, k and v are [N, P, heads * ..], channels adjacent and pixels one stride apart, also from one sample to the
    next.
    """
    n, pixels, _ = q.shape
    return bind(
        "fastddpm_attention", y, q, k, v, y.stride(1), q.stride(1), k.stride(1), v.stride(1), n, pixels, heads,
        q.shape[2] // heads, v.shape[2] // heads, scale, q.dtype == torch.bfloat16, THREADS, statistics,
    )  # fmt: skip


def attention_gradient(
    dq: Tensor, dk: Tensor, dv: Tensor, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, statistics: Tensor, heads: int,
    scale: float,
) -> None:  # fmt: skip
    """Write the gradients `dq`, `dk` and `dv`; all tensors are contiguous, with the shapes of `bind_attention`."""
    n, pixels, _ = q.shape
    bind(
        "fastddpm_attention_gradient", dq, dk, dv, dy, q, k, v, statistics, n, pixels, heads, q.shape[2] // heads,
        v.shape[2] // heads, scale, q.dtype == torch.bfloat16, THREADS,
    )()  # fmt: skip
