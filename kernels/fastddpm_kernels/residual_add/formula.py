"""Compute the sum in plain torch; `bias` is broadcastable to x."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(y: Tensor, x: Tensor, residual: Tensor | None, bias: Tensor | None, total: Tensor | None) -> None:
    """Write x + residual + bias, summed in float64, to `y` and `total`."""
    value = x.double()
    for term in (residual, bias):
        value = value if term is None else value + term.double()
    y.copy_(value)
    if total is not None:
        total.copy_(value)


def eager(y: Tensor, x: Tensor, residual: Tensor | None, bias: Tensor | None, total: Tensor | None) -> None:
    """Write x + residual + bias to `y` and `total`, rounded after each addition."""
    if bias is not None:
        bias = bias.to(x.dtype)
    if residual is not None:
        torch.add(x, residual, out=y)
        if bias is not None:
            y.add_(bias)
    elif bias is not None:
        torch.add(x, bias, out=y)
    elif y is not x:
        y.copy_(x)
    if total is not None:
        total.copy_(y)
