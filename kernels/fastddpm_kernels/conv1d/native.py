"""Call the native convolution of sequences: channels-last, all float32 or all bfloat16, biases float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm_kernels.conv1d.packing import PackedWeight
from fastddpm_kernels.native.binding import THREADS, bind


def bind_conv1d(
    y: Tensor, x: Tensor, weight: PackedWeight, x2: Tensor | None, bias: Tensor | None, stride: int, padding: int
) -> Callable[[], None]:
    """Return a function that writes the convolution of concat(x, x2), plus bias, to `y`."""
    (n, channels, length), channels2 = x.shape, 0 if x2 is None else x2.shape[1]
    return bind(
        "fastddpm_conv1d", y, x, x2, weight.values, bias, n, length, channels, channels2, y.shape[2], y.shape[1],
        weight.kernel, stride, padding, weight.transposed, x.dtype == torch.bfloat16, THREADS,
    )  # fmt: skip
