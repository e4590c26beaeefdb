"""Compute layer norm, product and gate in plain torch: the definition in float64, and torch's own in x's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: bool) -> None:
    """Write the definition, in float64, to `y`."""
    h = x.double().movedim(1, -1)
    centred = h - h.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    out = normed @ weight.double().mT + bias.double()
    if gate:
        values, gates = out.chunk(2, dim=-1)
        out = values * (0.5 * gates * (1 + torch.erf(gates * 0.5**0.5)))
    y.copy_(out.movedim(-1, 1))


def eager(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, gate: bool) -> None:
    """Write the result of torch's layer norm, product and GELU, each rounded to x's dtype, to `y`."""
    h = x.movedim(1, -1)
    out = F.linear(F.layer_norm(h, h.shape[-1:], eps=eps), weight, bias.to(x.dtype))
    if gate:
        values, gates = out.chunk(2, dim=-1)
        out = values * F.gelu(gates)
    y.copy_(out.movedim(-1, 1))
