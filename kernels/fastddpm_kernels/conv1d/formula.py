"""Compute the convolution in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv1d_by_torch(
    x: Tensor, weight: Tensor, x2: Tensor | None, bias: Tensor | None, stride: int, padding: int, transposed: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the convolution of concat(x, x2), or its transposed one, computed in `dtype`."""
    both = x if x2 is None else torch.cat((x, x2), 1)
    convolve = F.conv_transpose1d if transposed else F.conv1d
    own = None if bias is None else bias.to(dtype)
    return convolve(both.to(dtype), weight.to(dtype), own, stride, padding)
