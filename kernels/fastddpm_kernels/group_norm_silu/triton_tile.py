"""Share code among the kernels of the norms: tiles, channels and groups.

A tensor [N, C, ...] is treated as [N, C, P] with P pixels, contiguous or channels-last. A tile is indexed
[pixel, channel] in both formats; the compiler orders the threads along the contiguous dimension. A slab is a run of
whole groups.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

# The interpreter has none of the device's functions.
_ON_DEVICE = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def pointers(x, x2, n, p, c, P, C1: tl.constexpr, C2: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return addresses of concat(x, x2)[n, c, p] as [pixel, channel]; `n` is int64, since N * C * P may pass 2^31."""
    if CHANNELS_LAST:
        address = x + n * P * C1 + (p[:, None] * C1 + c[None, :])
    else:
        address = x + n * P * C1 + (c[None, :] * P + p[:, None])
    if C2 > 0:
        if CHANNELS_LAST:
            second = x2 + n * P * C2 + (p[:, None] * C2 + (c[None, :] - C1))
        else:
            second = x2 + n * P * C2 + ((c[None, :] - C1) * P + p[:, None])
        address = tl.where(c[None, :] < C1, address, second)
    return address


@triton.jit
def row(values, n, stride, c, mask):
    """Return values[n, c] as float32."""
    return tl.load(values + n * stride + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def affine(weight, bias, scale, shift, n, scale_stride, shift_stride, c, mask):
    """Return (a, b) per channel, with film(weight * h + bias) = a * h + b."""
    a = row(weight, 0, 0, c, mask)
    b = tl.zeros_like(a)
    if bias is not None:
        b += row(bias, 0, 0, c, mask)
    if scale is not None:
        factor = 1.0 + row(scale, n, scale_stride, c, mask)
        a = a * factor
        b = b * factor + row(shift, n, shift_stride, c, mask)
    return a, b


@triton.jit
def silu(v):
    """Return v / (1 + e^-v): the hardware's power of 2 and inverse, without the care for numbers below 2^-126.

    Together they are right to 5 units in the last place, and below -87, where the divisor ends, -0.
    """
    if _ON_DEVICE:
        return libdevice.fast_dividef(v, 1.0 + libdevice.fast_expf(-v))
    return v * tl.sigmoid(v)


@triton.jit
def silu_gradient(dy, v):
    s = tl.sigmoid(v)
    return dy * s * (1.0 + v * (1.0 - s))


@triton.jit
def slab_channels(slab, C: tl.constexpr, GROUPS: tl.constexpr, SLAB_GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the channels of a slab, and a mask of the existing ones."""
    WIDTH: tl.constexpr = SLAB_GROUPS * (C // GROUPS)
    local = tl.arange(0, BLOCK_C)
    c = slab * WIDTH + local
    return c, (local < WIDTH) & (c < C)


@triton.jit
def slab_groups(slab, GROUPS: tl.constexpr, SLAB_GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Return the groups of a slab, and a mask of the existing ones."""
    local = tl.arange(0, BLOCK_G)
    g = slab * SLAB_GROUPS + local
    return g, (local < SLAB_GROUPS) & (g < GROUPS)


@triton.jit
def membership(SIZE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """Return a mask [channel, group]: which channels of a slab belong to which of its groups, of any SIZE."""
    return (tl.arange(0, BLOCK_C) // SIZE)[:, None] == tl.arange(0, BLOCK_G)[None, :]


@triton.jit
def to_groups(values, member):
    """Return the sums of a per-channel vector over each group."""
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@triton.jit
def sum_groups(tile, SIZE: tl.constexpr, BLOCK_G: tl.constexpr):
    """Return the sums of a tile [pixel, channel] over the pixels and channels of each group.

    A thread adds up what it holds of a group before threads exchange sums. The channels that it can add are a power of
    2; of a group of 10, say, they are pairs, and the sums of pairs are added at the end.
    """
    CELL: tl.constexpr = SIZE & -SIZE
    CELLS: tl.constexpr = tile.shape[1] // CELL
    split = tl.trans(tl.reshape(tile, [tile.shape[0], CELLS, CELL]), (1, 0, 2))
    sums = tl.sum(tl.reshape(split, [CELLS, tile.shape[0] * CELL]), axis=1)
    if CELL == SIZE:
        return sums
    return to_groups(sums, membership(SIZE // CELL, CELLS, BLOCK_G))


@triton.jit
def to_channels(values, member):
    """Return each channel's copy of a per-group vector."""
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


def unit_rows(values: Tensor | None) -> tuple[Tensor | None, int]:
    """Return `values` [N, C] with adjacent channels, and the stride of its rows (0 if expanded)."""
    if values is None:
        return None, 0
    if values.stride(1) != 1 and values.shape[1] > 1:
        values = values.contiguous()
    return values, values.stride(0)
