"""Call the native attention with separate keys and values. Images are all float32 or all bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm_kernels.layout import rows
from fastddpm_kernels.native.binding import THREADS, bind


def bind_cross_attention(
    y: Tensor, q: Tensor, kv: Tensor, heads: int, own: Tensor | None, mask: Tensor | None
) -> Callable[[], None]:
    """Return a function that writes `y`. A mask that is not float32 and contiguous is converted at every run."""

    def stride(image: Tensor | None) -> int:
        view = None if image is None else rows(image)
        return 0 if view is None else view.stride(0)

    def pixels(image: Tensor | None) -> int:
        return 0 if image is None else image.shape[2] * image.shape[3]

    def make(mask: Tensor | None) -> Callable[[], None]:
        return bind(
            "fastddpm_cross_attention", y, q, kv, own, mask, *map(stride, (y, q, kv, own)), q.shape[0],
            *map(pixels, (q, kv, own)), heads, q.shape[1] // heads, (q.shape[1] // heads) ** -0.5,
            q.dtype == torch.bfloat16, THREADS,
        )  # fmt: skip

    if mask is None or (mask.dtype == torch.float32 and mask.is_contiguous()):
        return make(mask)
    return lambda: make(mask.float().contiguous())()
