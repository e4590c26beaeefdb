"""Compute the convolution in plain torch: `eager` in x's dtype, `reference` in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_by_torch(
    x: Tensor, weight: Tensor, x2: Tensor | None, bias: Tensor | None, residual: Tensor | None, stride: int,
    padding: int, upsample: bool, shape: torch.Size, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return conv(upsample(concat(x, x2)), weight) + bias + residual, of `shape`, computed in `dtype`."""
    h = (x if x2 is None else torch.cat((x, x2), 1)).to(dtype)
    if upsample:
        h = F.interpolate(h, scale_factor=2, mode="nearest")
    kernel = weight.shape[2]
    below, right = ((a - 1) * stride + kernel - padding - b for a, b in zip(shape[2:], h.shape[2:], strict=True))
    if (below, right) != (padding, padding):
        h, padding = F.pad(h, (padding, right, padding, below)), 0
    value = F.conv2d(h, weight.to(dtype), None if bias is None else bias.to(dtype), stride, padding)
    return value if residual is None else value + residual.to(dtype)
