"""Compute `reverse_step` in plain torch: `eager` in x's dtype, `reference` in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastddpm_kernels.checks import values_are_at_hand
from fastddpm_kernels.philox import STREAM_KNOWN, STREAM_STEP, torch_normal


class Options(NamedTuple):
    """The optional inputs of `reverse_step`, in the order of the custom ops' schemas."""

    keys: Tensor | None
    noise: Tensor | None
    x0_prev: Tensor | None
    clip_range: float | None
    log_variance: Tensor | None
    guidance_scale: Tensor | None
    known: Tensor | None
    known_mask: Tensor | None
    known_table: Tensor | None
    known_noise: Tensor | None
    threshold: Tensor | None = None


def torch_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor,
    o: Options,
    dtype: torch.dtype,
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (x_next, x0), computed in `dtype` and returned in `x`'s dtype. `history` is only read."""
    given_dtype = x.dtype
    x = x.to(dtype)
    a, b, c, d, e, f, s, *older = table_row(table, step, dtype)
    unconditional, prediction, v = split_out(x, out, o.guidance_scale is not None)
    prediction = guide(unconditional, prediction, o.guidance_scale)
    x0 = torch.addcmul(a * x, b, prediction)
    if o.clip_range is not None:
        x0 = x0.clamp(-o.clip_range, o.clip_range)
    elif o.threshold is not None:
        bound = per_sample(o.threshold, x0)
        x0 = x0.clamp(-bound, bound) / bound
    x_next = torch.addcmul(torch.addcmul(c * x0, d, x), e, prediction)
    if o.x0_prev is not None and not _is_zero(f):
        # Before the first x0 is written, a buffer may hold NaN, and 0 * NaN is NaN.
        x_next = x_next + torch.where(f == 0, 0, f * o.x0_prev.to(dtype))
    for factor, past in zip(older, () if history is None else history, strict=False):
        if not _is_zero(factor):
            x_next = x_next + torch.where(factor == 0, 0, factor * past.to(dtype))
    if (o.noise is not None or o.keys is not None) and not _is_zero(s):
        std = s if o.log_variance is None else s * learned_std(v, o.log_variance, step)
        x_next = torch.addcmul(x_next, std, given_or_made(o.noise, o.keys, x, step, STREAM_STEP))
    if o.known is not None:
        assert o.known_mask is not None
        assert o.known_table is not None
        signal, sigma = table_row(o.known_table, step, dtype)
        known, mask = signal * o.known.to(dtype), o.known_mask.to(dtype)
        if not _is_zero(sigma):
            known = torch.addcmul(known, sigma, given_or_made(o.known_noise, o.keys, x, step, STREAM_KNOWN))
        x_next = mask * known + (1 - mask) * x_next
    return x_next.to(given_dtype), x0.to(given_dtype)


def table_row(table: Tensor, step: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the entries of `table[step]`, each [1], so that they broadcast against any shape."""
    return table.index_select(0, step).to(dtype).unbind(1)


def split_out(x: Tensor, out: Tensor, guided: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the unconditional prediction (None if not guided), the (conditional) one and v, in `x`'s dtype.

    v is the second half of the channels; it has no channels if the variance is not learned.
    """
    channels = x.shape[1]
    out = out.to(x.dtype)
    unconditional = None
    if guided:
        unconditional, out = out.chunk(2)
        unconditional = unconditional[:, :channels]
    return unconditional, out[:, :channels], out[:, channels:]


def guide(unconditional: Tensor | None, conditional: Tensor, scale: Tensor | None) -> Tensor:
    """Apply classifier-free guidance; return `conditional` itself if there is no scale."""
    if unconditional is None or scale is None:
        return conditional
    return unconditional + per_sample(scale, conditional) * (conditional - unconditional)


def per_sample(scale: Tensor, like: Tensor) -> Tensor:
    """Return a scale [1] or [N] as [., 1, ...], to multiply a tensor [N, C, ...]."""
    return scale.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def learned_std(v: Tensor, log_variance: Tensor, step: Tensor) -> Tensor:
    """Return the standard deviation that v in [-1, 1] places between those of `log_variance[step]`."""
    log_min, log_max = table_row(log_variance, step, v.dtype)
    fraction = (v + 1) / 2
    return (0.5 * (fraction * log_max + (1 - fraction) * log_min)).exp()


def given_or_made(noise: Tensor | None, keys: Tensor | None, x: Tensor, step: Tensor, stream: int) -> Tensor:
    """Return `noise`, or if it is None the noise of `keys`, in `x`'s dtype."""
    if noise is not None:
        return noise.to(x.dtype)
    assert keys is not None
    return torch_normal(keys, x.shape[1:], step, stream, x.dtype)


def _is_zero(coefficient: Tensor) -> bool:
    """Return whether this is known to be 0 without waiting for a device; False while a compiler traces."""
    return values_are_at_hand(coefficient) and float(coefficient) == 0
