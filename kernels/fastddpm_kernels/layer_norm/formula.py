"""Compute layer norm in plain torch: the specification in float64, and torch's own in the input's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, total: Tensor | None
) -> None:
    """Write the layer norm of x + residual, in float64, to `y`, and the sum to `total`."""
    h = x.double() if residual is None else x.double() + residual.double()
    if total is not None:
        total.copy_(h)
    centred = h - h.mean(1, keepdim=True)
    h = centred / (centred.square().mean(1, keepdim=True) + eps).sqrt()
    y.copy_(h * _per_channel(weight.double(), x) + _per_channel(bias.double(), x))


def eager(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, total: Tensor | None
) -> None:
    """Write the layer norm of x + residual to `y`, and the sum to `total`."""
    h = x if residual is None else torch.add(x, residual, out=total)
    rows = h.movedim(1, -1)
    y.movedim(1, -1).copy_(F.layer_norm(rows, rows.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps))


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(-1, *(1,) * (x.ndim - 2))
