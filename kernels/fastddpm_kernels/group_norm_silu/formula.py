"""Compute the norms in plain torch: the specification in float64, and idiomatic torch in the input's own dtype."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, x2: Tensor | None, time_bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    h = x.double() if x2 is None else torch.cat((x, x2), 1).double()
    if time_bias is not None:
        h = h + per_channel(time_bias.double(), h)
    groups = h.unflatten(1, (num_groups, -1))
    over = tuple(range(2, groups.ndim))
    centred = groups - groups.mean(over, keepdim=True)
    variance = centred.square().mean(over, keepdim=True)
    h = (centred / (variance + eps).sqrt()).flatten(1, 2)
    h = h * per_channel(weight.double(), h) + per_channel(bias.double(), h)
    return film_silu(h, scale, shift, silu).to(x.dtype)


def group_norm_eager(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, x2: Tensor | None, time_bias: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    h = x if x2 is None else torch.cat((x, x2), 1)
    if time_bias is not None:
        h = h + per_channel(time_bias.to(h.dtype), h)
    h = torch.group_norm(h, num_groups, weight.to(h.dtype), bias.to(h.dtype), eps)
    return film_silu(h, scale, shift, silu)


def group_norm_eager_(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, x2: Tensor | None,
    time_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool,
) -> None:  # fmt: skip
    """Write exactly the bits of `group_norm_eager` to y, which also serves as scratch; y may be x without x2."""
    h = x if x2 is None else torch.cat((x, x2), 1, out=y)
    if time_bias is not None:
        h = torch.add(h, per_channel(time_bias.to(h.dtype), h), out=y)
    h = torch.group_norm(h, num_groups, weight.to(h.dtype), bias.to(h.dtype), eps)
    if scale is not None and shift is not None:
        h.mul_(1 + per_channel(scale.to(h.dtype), h)).add_(per_channel(shift.to(h.dtype), h))
    if silu:
        torch.ops.aten.silu.out(h, out=y)
    else:
        y.copy_(h)


def rms_norm_input(x: Tensor, x2: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return x and x2, each with its part of `bias` [C + C2] added."""
    if bias is None:
        return x, x2
    own = per_channel(bias.to(x.dtype), x)
    return x + own[: x.shape[1]], None if x2 is None else x2 + own[x.shape[1] :]


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, x2: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool
) -> Tensor:
    h = x.double() if x2 is None else torch.cat((x, x2), 1).double()
    h = F.normalize(h, dim=1, eps=eps) * per_channel(weight.double(), h) * math.sqrt(h.shape[1])
    return film_silu(h, scale, shift, silu).to(x.dtype)


def rms_norm_eager(
    x: Tensor, weight: Tensor, eps: float, x2: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool
) -> Tensor:
    h = x if x2 is None else torch.cat((x, x2), 1)
    # F.normalize would take the norm in h's dtype, where an eps of 1e-12 is zero in fp16 and a black pixel NaN.
    wide = torch.promote_types(h.dtype, torch.float32)
    norm = torch.linalg.vector_norm(h, dim=1, keepdim=True, dtype=wide).clamp_min(eps)
    h = (h * (math.sqrt(h.shape[1]) / norm)).to(h.dtype) * per_channel(weight.to(h.dtype), h)
    return film_silu(h, scale, shift, silu)


def film_silu(h: Tensor, scale: Tensor | None, shift: Tensor | None, silu: bool) -> Tensor:
    if scale is not None and shift is not None:
        h = h * (1 + per_channel(scale.to(h.dtype), h)) + per_channel(shift.to(h.dtype), h)
    return F.silu(h) if silu else h


def per_channel(value: Tensor, x: Tensor) -> Tensor:
    """Return `[C]` or `[N, C]` in a shape that broadcasts against `[N, C, ...]`."""
    return value.reshape(*value.shape, *(1,) * (x.ndim - 2))
