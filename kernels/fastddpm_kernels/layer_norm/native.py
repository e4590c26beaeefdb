"""Call the native layer norm. Images are channels-last, all float32 or all bfloat16; vectors float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm_kernels.native.binding import THREADS, bind


def bind_layer_norm(
    y: Tensor, x: Tensor, eps: float, residual: Tensor | None, total: Tensor | None, weight: Tensor, bias: Tensor
) -> Callable[[], None]:
    """Return a function that writes `y`, and with a residual `total`."""
    channels = x.shape[1]
    return bind(
        "fastddpm_layer_norm", y, x, residual, total, weight, bias, x.numel() // channels, channels, eps,
        x.dtype == torch.bfloat16, THREADS,
    )  # fmt: skip
