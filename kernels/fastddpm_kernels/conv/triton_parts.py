"""Share code among the convolution kernels: pixels of a tile, norm coefficients, sums and statistics.

A tile has BLOCK_M rows and BLOCK_N columns: pixels and output channels. Its pixels are of one image, or of several
whole ones where these are small: PIXELS rows, a power of two, belong to one image.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(v):
    return v / (1.0 + tl.exp2(v * -1.4426950408889634))


@triton.jit
def pixels_of_tile(tile, N, P, BLOCK_M: tl.constexpr, PIXELS: tl.constexpr):
    """Return (first sample, sample of each row relative to it, pixel of each row, first pixel, which rows exist)."""
    row = tl.arange(0, BLOCK_M)
    if PIXELS < BLOCK_M:
        n0 = tile * (BLOCK_M // PIXELS)
        relative = row // PIXELS
        start = 0
        p = row % PIXELS
    else:
        tiles = tl.cdiv(P, PIXELS)
        n0 = tile // tiles
        relative = tl.zeros((BLOCK_M,), tl.int32)
        start = (tile - n0 * tiles) * PIXELS
        p = start + row
    return n0, relative, p, start, (p < P) & (n0 + relative < N)


@triton.jit
def _blocks(values, plane, n, P, g, start, MEMBERS, first, units, channels, SPAN: tl.constexpr, COLUMNS: tl.constexpr):
    """Return (count, mean, squared deviations) [group, column] of some blocks of a tensor in each group of sample n.

    A column is a span and one of the MEMBERS units that a group has; `first` is the unit of the concatenation at which
    the tensor begins. Blocks that do not exist count zero.
    """
    spans = tl.cdiv(P, SPAN)
    column = start + tl.arange(0, COLUMNS)
    s = column // MEMBERS
    unit = g[:, None] * MEMBERS + (column - s * MEMBERS)[None, :] - first
    mask = (unit >= 0) & (unit < units) & (s < spans)[None, :]
    place = (n.to(tl.int64) * spans + s[None, :]) * units + unit
    mean = tl.load(values + place, mask=mask, other=0.0)
    deviation = tl.load(values + plane + place, mask=mask, other=0.0)
    count = tl.where(mask, (tl.minimum(P - s * SPAN, SPAN) * (channels // units))[None, :].to(tl.float32), 0.0)
    return count, mean, deviation


@triton.jit
def write_coefficients(
    row, statistics, plane, units, statistics2, plane2, units2, weight, bias, scale, shift, scale_stride, shift_stride,
    eps, n, P, g0, groups, SIZE, C, C2,
    SPAN: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write a and b, with film(group_norm(x)) = a x + b, for the channels of GROUPS groups of sample n.

    `row` is float32 memory: a [C + C2], b [C + C2], means [groups], reciprocal deviations [groups]. Every thread may
    read it when the function returns. Blocks are merged in two passes, so that nothing cancels.
    """
    tl.debug_barrier()  # every thread has read what an earlier tile of the program left there
    total = C + C2
    g = g0 + tl.arange(0, GROUPS)
    spans = tl.cdiv(P, SPAN)
    members = SIZE // (C // units)
    sums = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, spans * members, COLUMNS):
        count, mean, deviation = _blocks(statistics, plane, n, P, g, start, members, 0, units, C, SPAN, COLUMNS)
        sums += tl.sum(count * mean, axis=1)
    if statistics2 is not None:
        members2 = SIZE // (C2 // units2)
        first2 = C // (C2 // units2)
        for start in range(0, spans * members2, COLUMNS):
            count, mean, deviation = _blocks(
                statistics2, plane2, n, P, g, start, members2, first2, units2, C2, SPAN, COLUMNS
            )
            sums += tl.sum(count * mean, axis=1)
    number = 1.0 * P * SIZE
    centre = sums / number
    squares = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, spans * members, COLUMNS):
        count, mean, deviation = _blocks(statistics, plane, n, P, g, start, members, 0, units, C, SPAN, COLUMNS)
        mean -= centre[:, None]
        squares += tl.sum(deviation + count * mean * mean, axis=1)
    if statistics2 is not None:
        for start in range(0, spans * members2, COLUMNS):
            count, mean, deviation = _blocks(
                statistics2, plane2, n, P, g, start, members2, first2, units2, C2, SPAN, COLUMNS
            )
            mean -= centre[:, None]
            squares += tl.sum(deviation + count * mean * mean, axis=1)
    means = row + 2 * total
    tl.store(means + g, centre, mask=g < groups)
    tl.store(means + groups + g, tl.rsqrt(squares / number + eps), mask=g < groups)
    tl.debug_barrier()

    end = tl.minimum((g0 + GROUPS) * SIZE, total)
    for c0 in range(g0 * SIZE, end, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = c < end
        a = tl.load(means + groups + c // SIZE, mask=mask, other=0.0)
        a *= tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
        b -= tl.load(means + c // SIZE, mask=mask, other=0.0) * a
        if scale is not None:
            factor = 1.0 + tl.load(scale + n * scale_stride + c, mask=mask, other=0.0).to(tl.float32)
            a *= factor
            b = b * factor + tl.load(shift + n * shift_stride + c, mask=mask, other=0.0).to(tl.float32)
        tl.store(row + c, a, mask=mask)
        tl.store(row + total + c, b, mask=mask)
    tl.debug_barrier()


@triton.jit
def finish(
    acc, y, bias, time_bias, time_stride, residual, statistics, plane, n0, relative, start, exists, place, column0, N,
    P, CO,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, SPAN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Add bias, time row and residual to a tile, store it, and the statistics of what is stored.

    `place` is the pixel of y, relative to sample n0, that each row is stored to; with statistics it must be
    `relative * P + p`.
    """
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    column = column0 + tl.arange(0, BLOCK_N)
    mask = exists[:, None] & (column < CO)[None, :]
    if bias is not None:
        acc += tl.load(bias + column, mask=column < CO, other=0.0).to(tl.float32)[None, :]
    if time_bias is not None:
        if IMAGES:
            rows = time_bias + (n0 + relative)[:, None] * time_stride + column[None, :]
            acc += tl.load(rows, mask=mask, other=0.0).to(tl.float32)
        else:
            row = tl.load(time_bias + n0 * time_stride + column, mask=column < CO, other=0.0)
            acc += row.to(tl.float32)[None, :]
    base = n0.to(tl.int64) * P * CO
    offsets = place[:, None] * CO + column[None, :]
    if residual is not None:
        acc += tl.load(residual + base + offsets, mask=mask, other=0.0).to(tl.float32)
    stored = acc.to(y.dtype.element_ty)
    tl.store(y + base + offsets, stored, mask=mask)
    if statistics is not None:
        SEGMENTS: tl.constexpr = BLOCK_M // SPAN
        UNITS: tl.constexpr = BLOCK_N // UNIT
        v = tl.reshape(tl.where(exists[:, None], stored.to(tl.float32), 0.0), (SEGMENTS, SPAN, BLOCK_N))
        present = tl.reshape(exists, (SEGMENTS, SPAN))
        number = tl.sum(present.to(tl.float32), axis=1)[:, None] * UNIT
        number = tl.where(number > 0.0, number, 1.0)
        mean = tl.sum(tl.reshape(tl.sum(v, axis=1), (SEGMENTS, UNITS, UNIT)), axis=2) / number
        centre = tl.reshape(tl.broadcast_to(mean[:, :, None], (SEGMENTS, UNITS, UNIT)), (SEGMENTS, BLOCK_N))
        v = tl.where(present[:, :, None], v - centre[:, None, :], 0.0)
        squares = tl.sum(tl.reshape(tl.sum(v * v, axis=1), (SEGMENTS, UNITS, UNIT)), axis=2)

        first = tl.arange(0, SEGMENTS) * SPAN  # row of the tile
        n = n0 + first // PIXELS
        pixel = start + first % PIXELS
        spans = tl.cdiv(P, SPAN)
        units = CO // UNIT
        unit = column0 // UNIT + tl.arange(0, UNITS)
        place = (n.to(tl.int64) * spans + pixel // SPAN)[:, None] * units + unit[None, :]
        there = ((n < N) & (pixel < P))[:, None] & (unit < units)[None, :]
        tl.store(statistics + place, mean, mask=there)
        tl.store(statistics + plane + place, squares, mask=there)
