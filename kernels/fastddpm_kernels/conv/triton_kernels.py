"""Compute a convolution as an implicit matrix product: rows are pixels, columns output channels, K taps by channels.

One program makes a tile of the result in one float32 accumulator. K runs over blocks of input channels, and within a
block over the taps, which read nearly the same pixels again. The two sources of a concatenation and those of the
shortcut are loops of their own. With a norm each value is normalised and activated on its way to the product; padding
is zero after that. `finish` adds bias, time row and residual, and leaves the statistics of what it stores.

Few tiles are split over K: programs write their sums to the workspace, and a second launch, or the tile's last program,
adds them up in order, so results are the same bits at every run. An image upsampled by two is four convolutions of 2x2,
one for each phase of the result's rows and columns, whose weights are sums of taps.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastddpm_kernels.conv.triton_parts import finish, pixels_of_tile, silu, write_coefficients
from fastddpm_kernels.device.tensor_float import to_tf32


@triton.jit
def _normalised(a, table, row_stride, total, relative, c, C, mask, SILU: tl.constexpr, IMAGES: tl.constexpr):
    """Return the normalised and activated a, and zero where the mask is not set."""
    if IMAGES:
        place = table + relative[:, None] * row_stride + c[None, :]
        scale = tl.load(place, mask=mask, other=0.0)
        shift = tl.load(place + total, mask=mask, other=0.0)
    else:
        scale = tl.load(table + c, mask=c < C, other=0.0)[None, :]
        shift = tl.load(table + total + c, mask=c < C, other=0.0)[None, :]
    v = a.to(tl.float32) * scale + shift
    if SILU:
        v = silu(v)
    return tl.where(mask, v, 0.0).to(a.dtype)


@triton.jit
def _accumulate(
    acc, x, weight, begin, low, high, table, row_stride, total, relative, at, iy, ix, exists, column, H, W, C,
    weight_row, weight_tap,
    KERNEL: tl.constexpr, INSIDE: tl.constexpr, EVEN: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr,
    IMAGES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return acc plus the products of one source, in those of its steps that are from `low` to `high`.

    `begin` is the first of its steps; `at` the pixel of tap 0 for each row, relative to `x`; `table` the norm's a for
    the source's channels, b is `total` further.
    """
    k = tl.arange(0, BLOCK_K)
    steps = KERNEL * KERNEL * tl.cdiv(C, BLOCK_K)
    row = at * C
    weights = weight + column[None, :] * weight_row
    for step in range(tl.maximum(low, begin) - begin, tl.minimum(high, begin + steps) - begin):
        tap = step % (KERNEL * KERNEL)
        c = (step // (KERNEL * KERNEL)) * BLOCK_K + k
        dy = tap // KERNEL
        dx = tap % KERNEL
        inside = exists
        if not INSIDE:
            inside &= (iy + dy >= 0) & (iy + dy < H) & (ix + dx >= 0) & (ix + dx < W)
        if EVEN:
            mask = inside[:, None]
            b = tl.load(weights + (tap * weight_tap + c)[:, None])
        else:
            mask = inside[:, None] & (c < C)[None, :]
            b = tl.load(weights + (tap * weight_tap + c)[:, None], mask=(c < C)[:, None], other=0.0)
        a = tl.load(x + row[:, None] + ((dy * W + dx) * C + c)[None, :], mask=mask, other=0.0)
        if NORM:
            a = _normalised(a, table, row_stride, total, relative, c, C, mask, SILU, IMAGES)
        if PRECISION == "tf32" and a.dtype == tl.float32:
            a = to_tf32(a)
            b = to_tf32(b)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _accumulate_boxes(
    acc, x, weight, begin, low, high, table, row_stride, total, relative, iy, ix, exists, n0, y0, x0, first_row, first,
    H, W, C, weight_tap,
    KERNEL: tl.constexpr, INSIDE: tl.constexpr, NORM: tl.constexpr, SILU: tl.constexpr, IMAGES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return what `_accumulate` does, by descriptors: `x` of boxes of pixels and channels, `weight` of rows.

    The tile is a rectangle, or whole images. `n0`, `y0` and `x0` are the first pixel of tap 0, `first_row` the tile's
    first row of the weight, and `first` the source's first channel in it. What is outside of the image is read as zero.
    """
    steps = KERNEL * KERNEL * tl.cdiv(C, BLOCK_K)
    for step in range(tl.maximum(low, begin) - begin, tl.minimum(high, begin + steps) - begin):
        tap = step % (KERNEL * KERNEL)
        c0 = (step // (KERNEL * KERNEL)) * BLOCK_K
        dy = tap // KERNEL
        dx = tap % KERNEL
        a = tl.reshape(x.load([n0, y0 + dy, x0 + dx, c0]), (BLOCK_M, BLOCK_K))
        b = tl.trans(weight.load([first_row, tap * weight_tap + first + c0]))
        if NORM:
            inside = exists
            if not INSIDE:
                inside &= (iy + dy >= 0) & (iy + dy < H) & (ix + dx >= 0) & (ix + dx < W)
            c = c0 + tl.arange(0, BLOCK_K)
            a = _normalised(a, table, row_stride, total, relative, c, C, inside[:, None], SILU, IMAGES)
        if PRECISION == "tf32" and a.dtype == tl.float32:
            a = to_tf32(a)
            b = to_tf32(b)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _tile(
    index,
    y, sums, counters, x, x2, weight, shortcut, shortcut2, shortcut_weight, bias, time_bias, residual, statistics,
    table, of_x, of_x2, gamma, beta, scale, shift, plane, time_stride, row_stride, plane1, plane2, units1, units2,
    scale_stride, shift_stride, eps, groups, SIZE, N, H, W, GH, GW, C, C2, D, D2, CO, PADDING, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, UPSAMPLE: tl.constexpr, INSIDE: tl.constexpr, EVEN: tl.constexpr, NORM: tl.constexpr,
    SILU: tl.constexpr, MERGE: tl.constexpr, GROUPS: tl.constexpr, IN_SPAN: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, PIXELS: tl.constexpr, SPAN: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP_M: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Compute one part of K of one tile, and in a phase if there are any: the number `index` of all."""
    IMAGES: tl.constexpr = PIXELS < BLOCK_M
    P = GH * GW
    tiles_m = tl.cdiv(N, BLOCK_M // PIXELS) if IMAGES else N * tl.cdiv(P, PIXELS)
    tiles_n = tl.cdiv(CO, BLOCK_N)
    tiles = tiles_m * tiles_n
    total = tiles * SPLITS * 4 if UPSAMPLE else tiles * SPLITS
    part = index // tiles  # of K; or of K and the phases
    tile = index - part * tiles
    group = tile // (GROUP_M * tiles_n)
    within = tile - group * (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + within % height
    column0 = (within // height) * BLOCK_N
    column = tl.minimum(column0 + tl.arange(0, BLOCK_N), CO - 1)  # those beyond the end are not stored

    n0, relative, p, start, exists = pixels_of_tile(tile_m, N, P, BLOCK_M, PIXELS)
    oy = p // GW
    ox = p - oy * GW
    iy = oy * STRIDE - PADDING
    ix = ox * STRIDE - PADDING
    place = relative * P + p
    taps: tl.constexpr = KERNEL * KERNEL
    weight_tap = C + C2
    own = weight
    split = part
    if UPSAMPLE:
        split = part // 4
        py = (part % 4) // 2
        px = part % 2
        iy += py
        ix += px
        place = (relative * 2 * GH + 2 * oy + py) * 2 * GW + 2 * ox + px
        if not TMA:
            own += (part % 4).to(tl.int64) * CO * taps * weight_tap
    at = (relative * H + iy) * W + ix
    base = n0.to(tl.int64) * H * W

    row = table
    if NORM:
        if MERGE:
            row += tl.program_id(0).to(tl.int64) * (BLOCK_M // PIXELS) * row_stride
            for image in range(0, BLOCK_M // PIXELS):
                if n0 + image < N:
                    write_coefficients(
                        row + image * row_stride, of_x, plane1, units1, of_x2, plane2, units2, gamma, beta, scale,
                        shift, scale_stride, shift_stride, eps, n0 + image, H * W, 0, groups, SIZE, C, C2, IN_SPAN,
                        GROUPS, BLOCK_COLUMNS, 128,
                    )  # fmt: skip
        else:
            row += n0.to(tl.int64) * row_stride

    steps = taps * tl.cdiv(C, BLOCK_K)
    steps2 = taps * tl.cdiv(C2, BLOCK_K)
    steps3 = tl.cdiv(D, BLOCK_K)
    all_steps = steps + steps2 + steps3 + tl.cdiv(D2, BLOCK_K)
    low = 0
    high = all_steps
    if SPLITS > 1:
        each = tl.cdiv(all_steps, SPLITS)
        low = split * each
        high = tl.minimum(low + each, all_steps)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    row2 = row
    if NORM:
        row2 += C
    if TMA:
        y0 = start // GW
        x0 = start - y0 * GW
        y1 = y0 * STRIDE - PADDING
        x1 = x0 * STRIDE - PADDING
        first_row = column0
        if UPSAMPLE:
            y1 += py
            x1 += px
            first_row += (part % 4) * CO
        acc = _accumulate_boxes(
            acc, x, weight, 0, low, high, row, row_stride, C + C2, relative, iy, ix, exists, n0, y1, x1, first_row, 0,
            H, W, C, weight_tap, KERNEL, INSIDE, NORM, SILU, IMAGES, PRECISION, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        if x2 is not None:
            acc = _accumulate_boxes(
                acc, x2, weight, steps, low, high, row2, row_stride, C + C2, relative, iy, ix, exists, n0, y1, x1,
                first_row, C, H, W, C2, weight_tap, KERNEL, INSIDE, NORM, SILU, IMAGES, PRECISION, BLOCK_M, BLOCK_K,
            )  # fmt: skip
        if shortcut is not None:
            acc = _accumulate_boxes(
                acc, shortcut, shortcut_weight, steps + steps2, low, high, row, row_stride, 0, relative, iy, ix, exists,
                n0, y0, x0, column0, 0, GH, GW, D, 0, 1, True, False, False, IMAGES, PRECISION, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            if shortcut2 is not None:
                acc = _accumulate_boxes(
                    acc, shortcut2, shortcut_weight, steps + steps2 + steps3, low, high, row, row_stride, 0, relative,
                    iy, ix, exists, n0, y0, x0, column0, D, GH, GW, D2, 0, 1, True, False, False, IMAGES, PRECISION,
                    BLOCK_M, BLOCK_K,
                )  # fmt: skip
    else:
        acc = _accumulate(
            acc, x + base * C, own, 0, low, high, row, row_stride, C + C2, relative, at, iy, ix, exists, column, H, W,
            C, taps * weight_tap, weight_tap, KERNEL, INSIDE, EVEN, NORM, SILU, IMAGES, PRECISION, BLOCK_K,
        )  # fmt: skip
        if x2 is not None:
            acc = _accumulate(
                acc, x2 + base * C2, own + C, steps, low, high, row2, row_stride, C + C2, relative, at, iy, ix, exists,
                column, H, W, C2, taps * weight_tap, weight_tap, KERNEL, INSIDE, EVEN, NORM, SILU, IMAGES, PRECISION,
                BLOCK_K,
            )  # fmt: skip
        if shortcut is not None:
            here = n0.to(tl.int64) * P
            acc = _accumulate(
                acc, shortcut + here * D, shortcut_weight, steps + steps2, low, high, row, row_stride, 0, relative,
                place, iy, ix, exists, column, GH, GW, D, D + D2, 0, 1, True, EVEN, False, False, IMAGES, PRECISION,
                BLOCK_K,
            )  # fmt: skip
            if shortcut2 is not None:
                acc = _accumulate(
                    acc, shortcut2 + here * D2, shortcut_weight + D, steps + steps2 + steps3, low, high, row,
                    row_stride, 0, relative, place, iy, ix, exists, column, GH, GW, D2, D + D2, 0, 1, True, EVEN, False,
                    False, IMAGES, PRECISION, BLOCK_K,
                )  # fmt: skip
    Q = P * 4 if UPSAMPLE else P
    if SPLITS == 1:
        finish(
            acc, y, bias, time_bias, time_stride, residual, statistics, plane, n0, relative, start, exists, place,
            column0, N, Q, CO, IMAGES, PIXELS, SPAN, UNIT,
        )  # fmt: skip
    else:
        columns = column0 + tl.arange(0, BLOCK_N)
        mask = exists[:, None] & (columns < CO)[None, :]
        pointers = sums + n0.to(tl.int64) * Q * CO + (place[:, None] * CO + columns[None, :])
        stride = (n0 * 0 + N).to(tl.int64) * Q * CO
        tl.store(pointers + split * stride, acc, mask=mask)
        if counters is not None:  # the last program of a tile adds up all its sums, in order
            tl.debug_barrier()  # every thread has stored its part
            counter = counters + index - split * (total // SPLITS)
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
                tl.store(counter, 0)  # for the next call
                acc = tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
                for _ in range(1, SPLITS):
                    pointers += stride
                    acc += tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
                finish(
                    acc, y, bias, time_bias, time_stride, residual, statistics, plane, n0, relative, start, exists,
                    place, column0, N, Q, CO, IMAGES, PIXELS, SPAN, UNIT,
                )  # fmt: skip


@triton.jit
def conv_kernel(
    y, sums, counters, x, x2, weight, shortcut, shortcut2, shortcut_weight, bias, time_bias, residual, statistics,
    table, of_x, of_x2, gamma, beta, scale, shift, plane, time_stride, row_stride, plane1, plane2, units1, units2,
    scale_stride, shift_stride, eps, groups, SIZE, N, H, W, GH, GW, C, C2, D, D2, CO, PADDING, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, UPSAMPLE: tl.constexpr, INSIDE: tl.constexpr, EVEN: tl.constexpr, NORM: tl.constexpr,
    SILU: tl.constexpr, MERGE: tl.constexpr, GROUPS: tl.constexpr, IN_SPAN: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, PIXELS: tl.constexpr, SPAN: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP_M: tl.constexpr, PDL: tl.constexpr,
    TMA: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if PERSISTENT:  # fewer programs than tiles; else each has one, in fewer registers
        tiles_m = tl.cdiv(N, BLOCK_M // PIXELS) if PIXELS < BLOCK_M else N * tl.cdiv(GH * GW, PIXELS)
        total = tiles_m * tl.cdiv(CO, BLOCK_N) * SPLITS * (4 if UPSAMPLE else 1)
        for index in range(tl.program_id(0), total, tl.num_programs(0)):
            _tile(
                index, y, sums, counters, x, x2, weight, shortcut, shortcut2, shortcut_weight, bias, time_bias,
                residual, statistics, table, of_x, of_x2, gamma, beta, scale, shift, plane, time_stride, row_stride,
                plane1, plane2, units1, units2, scale_stride, shift_stride, eps, groups, SIZE, N, H, W, GH, GW, C, C2,
                D, D2, CO, PADDING, KERNEL, STRIDE, UPSAMPLE, INSIDE, EVEN, NORM, SILU, MERGE, GROUPS, IN_SPAN, SPLITS,
                PRECISION, PIXELS, SPAN, UNIT, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_COLUMNS, GROUP_M, TMA,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), y, sums, counters, x, x2, weight, shortcut, shortcut2, shortcut_weight, bias, time_bias,
            residual, statistics, table, of_x, of_x2, gamma, beta, scale, shift, plane, time_stride, row_stride, plane1,
            plane2, units1, units2, scale_stride, shift_stride, eps, groups, SIZE, N, H, W, GH, GW, C, C2, D, D2, CO,
            PADDING, KERNEL, STRIDE, UPSAMPLE, INSIDE, EVEN, NORM, SILU, MERGE, GROUPS, IN_SPAN, SPLITS, PRECISION,
            PIXELS, SPAN, UNIT, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_COLUMNS, GROUP_M, TMA,
        )  # fmt: skip


@triton.jit
def finish_kernel(
    y, sums, bias, time_bias, residual, statistics, plane, time_stride, N, P, CO,
    SPLITS: tl.constexpr, PIXELS: tl.constexpr, SPAN: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add up the splits, in order, and finish."""
    tiles_n = tl.cdiv(CO, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    column0 = (tl.program_id(0) - tile_m * tiles_n) * BLOCK_N
    column = column0 + tl.arange(0, BLOCK_N)
    n0, relative, p, start, exists = pixels_of_tile(tile_m, N, P, BLOCK_M, PIXELS)
    place = relative * P + p
    mask = exists[:, None] & (column < CO)[None, :]
    pointers = sums + n0.to(tl.int64) * P * CO + (place[:, None] * CO + column[None, :])
    step = (n0 * 0 + N).to(tl.int64) * P * CO
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    for _ in range(1, SPLITS):
        pointers += step
        acc += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    finish(
        acc, y, bias, time_bias, time_stride, residual, statistics, plane, n0, relative, start, exists, place, column0,
        N, P, CO, PIXELS < BLOCK_M, PIXELS, SPAN, UNIT,
    )  # fmt: skip


@triton.jit
def table_kernel(
    table, of_x, of_x2, gamma, beta, scale, shift, row_stride, plane1, plane2, units1, units2, scale_stride,
    shift_stride, eps, groups, SIZE, P, C, C2,
    GROUPS: tl.constexpr, IN_SPAN: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the norm's coefficients for some groups of a sample."""
    parts = tl.cdiv(groups, GROUPS)
    n = tl.program_id(0) // parts
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    write_coefficients(
        table + n.to(tl.int64) * row_stride, of_x, plane1, units1, of_x2, plane2, units2, gamma, beta, scale, shift,
        scale_stride, shift_stride, eps, n, P, (tl.program_id(0) - n * parts) * GROUPS, groups, SIZE, C, C2, IN_SPAN,
        GROUPS, BLOCK_COLUMNS, 128,
    )  # fmt: skip


@triton.jit
def apply_kernel(
    h, x, x2, table, of_x, of_x2, gamma, beta, scale, shift, row_stride, plane1, plane2, units1, units2, scale_stride,
    shift_stride, eps, groups, SIZE, P, C, C2,
    SILU: tl.constexpr, MERGE: tl.constexpr, GROUPS: tl.constexpr, IN_SPAN: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write silu(film(group_norm(concat(x, x2)))) to h."""
    parts = tl.cdiv(P, BLOCK_P)
    n = tl.program_id(0) // parts
    p = (tl.program_id(0) - n * parts) * BLOCK_P + tl.arange(0, BLOCK_P)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if MERGE:
        row = table + tl.program_id(0).to(tl.int64) * row_stride
        write_coefficients(
            row, of_x, plane1, units1, of_x2, plane2, units2, gamma, beta, scale, shift, scale_stride, shift_stride,
            eps, n, P, 0, groups, SIZE, C, C2, IN_SPAN, GROUPS, BLOCK_COLUMNS, 128,
        )  # fmt: skip
    else:
        row = table + n.to(tl.int64) * row_stride
    total = C + C2
    base = n.to(tl.int64) * P
    for c0 in range(0, total, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (p < P)[:, None] & (c < total)[None, :]
        pointers = x + base * C + (p[:, None] * C + c[None, :])
        if x2 is not None:
            pointers = tl.where(c[None, :] < C, pointers, x2 + base * C2 + (p[:, None] * C2 + (c - C)[None, :]))
        v = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        v *= tl.load(row + c, mask=c < total, other=0.0)[None, :]
        v += tl.load(row + total + c, mask=c < total, other=0.0)[None, :]
        if SILU:
            v = silu(v)
        tl.store(h + base * total + (p[:, None] * total + c[None, :]), v.to(h.dtype.element_ty), mask=mask)
