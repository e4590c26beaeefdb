"""Compute group norm, Mish, FiLM and residual in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None,
) -> None:  # fmt: skip
    """Write the definition, in float64, to `y`."""
    groups = x.double().unflatten(1, (num_groups, -1))
    over = tuple(range(2, groups.ndim))
    centred = groups - groups.mean(over, keepdim=True)
    variance = centred.square().mean(over, keepdim=True)
    h = (centred / (variance + eps).sqrt()).flatten(1, 2)
    h = h * per_channel(weight.double(), h) + per_channel(bias.double(), h)
    h = h * torch.tanh(torch.logaddexp(h, torch.zeros_like(h)))
    if scale is not None:
        h = h * per_channel(scale.double(), h)
    if shift is not None:
        h = h + per_channel(shift.double(), h)
    y.copy_(h if residual is None else h + residual.double())


def eager(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None,
) -> None:  # fmt: skip
    """Write the same in x's dtype to `y`, rounded after each operation."""
    h = F.mish(torch.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps))
    if scale is not None:
        h *= per_channel(scale.to(h.dtype), h)
    if shift is not None:
        h += per_channel(shift.to(h.dtype), h)
    y.copy_(h if residual is None else h.add_(residual))


def per_channel(value: Tensor, x: Tensor) -> Tensor:
    """Return [C] or [N, C] in a shape that broadcasts against x [N, C, ...]."""
    return value.reshape(*value.shape, *(1,) * (x.ndim - 2))
