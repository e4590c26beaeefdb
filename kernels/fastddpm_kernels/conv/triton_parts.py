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
def _blocks(values, plane, n, g, start, MEMBERS, first, units, COLUMNS: tl.constexpr):
    """Return (present, mean, squared deviations) [group, column] of some blocks of a tensor in each group of sample n.

    `first` is the unit of the concatenation at which the tensor begins. Blocks that do not exist are zero.
    """
    column = start + tl.arange(0, COLUMNS)
    unit = g[:, None] * MEMBERS + column[None, :] - first
    mask = (unit >= 0) & (unit < units) & (column < MEMBERS)[None, :]
    place = n.to(tl.int64) * units + unit
    mean = tl.load(values + place, mask=mask, other=0.0)
    deviation = tl.load(values + plane + place, mask=mask, other=0.0)
    return mask.to(tl.float32), mean, deviation


@triton.jit
def write_coefficients(
    row, statistics, plane, units, statistics2, plane2, units2, weight, bias, scale, shift, scale_stride, shift_stride,
    eps, n, P, g0, groups, SIZE, C, C2,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write a and b, with film(group_norm(x)) = a x + b, for the channels of GROUPS groups of sample n.

    `row` is float32 memory: a [C + C2], b [C + C2], means [groups], reciprocal deviations [groups]. Every thread may
    read it when the function returns. Blocks are merged in two passes, so that nothing cancels.
    """
    tl.debug_barrier()  # every thread has read what an earlier tile of the program left there
    total = C + C2
    g = g0 + tl.arange(0, GROUPS)
    unit = C // units
    members = SIZE // unit
    sums = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, members, COLUMNS):
        present, mean, deviation = _blocks(statistics, plane, n, g, start, members, 0, units, COLUMNS)
        sums += tl.sum(mean, axis=1) * unit
    if statistics2 is not None:
        unit2 = C2 // units2
        members2 = SIZE // unit2
        first2 = C // unit2
        for start in range(0, members2, COLUMNS):
            present, mean, deviation = _blocks(statistics2, plane2, n, g, start, members2, first2, units2, COLUMNS)
            sums += tl.sum(mean, axis=1) * unit2
    centre = sums / SIZE
    squares = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, members, COLUMNS):
        present, mean, deviation = _blocks(statistics, plane, n, g, start, members, 0, units, COLUMNS)
        mean = (mean - centre[:, None]) * present
        squares += tl.sum(deviation / P + mean * mean * unit, axis=1)
    if statistics2 is not None:
        for start in range(0, members2, COLUMNS):
            present, mean, deviation = _blocks(statistics2, plane2, n, g, start, members2, first2, units2, COLUMNS)
            mean = (mean - centre[:, None]) * present
            squares += tl.sum(deviation / P + mean * mean * unit2, axis=1)
    means = row + 2 * total
    tl.store(means + g, centre, mask=g < groups)
    tl.store(means + groups + g, tl.rsqrt(squares / SIZE + eps), mask=g < groups)
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
    acc, y, bias, time_bias, time_stride, residual, statistics, blocks, arrivals, plane, n0, relative, start, exists,
    place, column0, N, P, CO, part, parts, pixels,
    IMAGES: tl.constexpr, PIXELS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Add bias, time row and residual to a tile, store it, and leave the statistics of what is stored.

    `place` is the pixel of y, relative to sample n0, that each row is stored to. The tile is number `part` of the
    `parts` that a sample has for these columns; the last one to arrive merges the statistics of all. If there are
    several, each grid of `pixels` pixels (one, or four phases) begins with a new one.
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
        SEGMENTS: tl.constexpr = BLOCK_M // PIXELS  # samples of the tile
        UNITS: tl.constexpr = BLOCK_N // UNIT
        v = tl.reshape(tl.where(exists[:, None], stored.to(tl.float32), 0.0), (SEGMENTS, PIXELS, BLOCK_N))
        present = tl.reshape(exists, (SEGMENTS, PIXELS))
        number = tl.sum(present.to(tl.float32), axis=1)[:, None] * UNIT
        number = tl.where(number > 0.0, number, 1.0)
        mean = tl.sum(tl.reshape(tl.sum(v, axis=1), (SEGMENTS, UNITS, UNIT)), axis=2) / number
        centre = tl.reshape(tl.broadcast_to(mean[:, :, None], (SEGMENTS, UNITS, UNIT)), (SEGMENTS, BLOCK_N))
        v = tl.where(present[:, :, None], v - centre[:, None, :], 0.0)
        squares = tl.sum(tl.reshape(tl.sum(v * v, axis=1), (SEGMENTS, UNITS, UNIT)), axis=2)

        n = n0 + tl.arange(0, SEGMENTS)
        units = CO // UNIT
        unit = column0 // UNIT + tl.arange(0, UNITS)
        there = (n < N)[:, None] & (unit < units)[None, :]
        if arrivals is None:
            at = n.to(tl.int64)[:, None] * units + unit[None, :]
            tl.store(statistics + at, mean, mask=there)
            tl.store(statistics + plane + at, squares, mask=there)
        else:
            other = (n0 * 0 + N).to(tl.int64) * parts * units
            at = blocks + (n.to(tl.int64) * parts + part)[:, None] * units + unit[None, :]
            tl.store(at, mean, mask=there)
            tl.store(at + other, squares, mask=there)
            tl.debug_barrier()  # every thread has stored its part
            counter = arrivals + n0 * tl.cdiv(CO, BLOCK_N) + column0 // BLOCK_N
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1:
                tl.store(counter, 0)  # for the next call
                for segment in range(0, SEGMENTS):
                    if n0 + segment < N:
                        sample = blocks + (n0 + segment).to(tl.int64) * parts * units
                        _merge(
                            statistics, sample, other, plane, n0 + segment, parts, pixels, unit, units, PIXELS, UNIT
                        )  # fmt: skip


@triton.jit
def _merge(
    statistics, sample, other, plane, n, parts, pixels, unit, units, PIXELS: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """Merge the statistics of all parts of a sample, for some units, in two passes: nothing cancels."""
    each = tl.cdiv(pixels, PIXELS)
    number = 1.0 * pixels * (parts // each)
    total = tl.zeros((unit.shape[0],), tl.float32)
    for first in range(0, parts, 16):
        i = first + tl.arange(0, 16)
        mask = (i < parts)[:, None] & (unit < units)[None, :]
        count = tl.minimum(pixels - i % each * PIXELS, PIXELS).to(tl.float32)[:, None]
        at = sample + i[:, None] * units + unit[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0.0, cache_modifier=".cg") * count, axis=0)
    mean = total / number
    squares = tl.zeros((unit.shape[0],), tl.float32)
    for first in range(0, parts, 16):
        i = first + tl.arange(0, 16)
        mask = (i < parts)[:, None] & (unit < units)[None, :]
        count = tl.minimum(pixels - i % each * PIXELS, PIXELS).to(tl.float32)[:, None]
        at = sample + i[:, None] * units + unit[None, :]
        delta = tl.where(mask, tl.load(at, mask=mask, other=0.0, cache_modifier=".cg") - mean[None, :], 0.0)
        squares += tl.sum(delta * delta * (count * UNIT), axis=0)
        squares += tl.sum(tl.load(at + other, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
    at = n.to(tl.int64) * units + unit
    tl.store(statistics + at, mean, mask=unit < units)
    tl.store(statistics + plane + at, squares, mask=unit < units)
