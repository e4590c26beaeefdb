"""Compute a convolution as an implicit matrix product: rows are pixels, columns output channels, K taps by channels.

One program makes a tile of the result in one float32 accumulator. K runs over blocks of input channels, and within a
block over the taps, which read nearly the same pixels again. The two sources of a concatenation and those of the
shortcut are loops of their own. With a norm each value is normalised and activated on its way to the product; padding is
zero after that. `finish` adds bias, time row and residual, and leaves the statistics of what it stores.

Few tiles are split over K: programs write their sums to the workspace, and a second launch, or the tile's last program,
adds them up in order, so results are the same bits at every run. An image upsampled by two is four convolutions of 2x2, one for each phase of the
result's rows and columns, whose weights are sums of taps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastddpm_kernels import tuned
from fastddpm_kernels.conv.packing import phase_weight
from fastddpm_kernels.conv.plan import COLUMNS, FMA, HALF, TF32, Problem, Tile, likely_tile, row_size
from fastddpm_kernels.conv.statistics import Norm, span_of
from fastddpm_kernels.conv.triton_parts import finish, pixels_of_tile, write_coefficients
from fastddpm_kernels.device.tensor_float import to_tf32
from fastddpm_kernels.device.variant import Launch, Variant, packaged_variants, run_launches
from fastddpm_kernels.group_norm_silu.plan import num_processors
from fastddpm_kernels.group_norm_silu.triton_tile import unit_rows

OPTIONS = {"enable_fp_fusion": True}
VENDOR = {"implementation": "vendor"}
GROUP_M = 8  # tiles of rows that run side by side for all columns


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
        if INSIDE:
            inside = exists
        else:
            inside = exists & (iy + dy >= 0) & (iy + dy < H) & (ix + dx >= 0) & (ix + dx < W)
        if EVEN:
            mask = inside[:, None]
            b = tl.load(weights + (tap * weight_tap + c)[:, None])
        else:
            mask = inside[:, None] & (c < C)[None, :]
            b = tl.load(weights + (tap * weight_tap + c)[:, None], mask=(c < C)[:, None], other=0.0)
        a = tl.load(x + row[:, None] + ((dy * W + dx) * C + c)[None, :], mask=mask, other=0.0)
        if NORM:
            if IMAGES:
                place = table + relative[:, None] * row_stride + c[None, :]
                scale = tl.load(place, mask=mask, other=0.0)
                shift = tl.load(place + total, mask=mask, other=0.0)
            else:
                scale = tl.load(table + c, mask=c < C, other=0.0)[None, :]
                shift = tl.load(table + total + c, mask=c < C, other=0.0)[None, :]
            v = a.to(tl.float32) * scale + shift
            if SILU:
                v = v / (1.0 + tl.exp2(v * -1.4426950408889634))
            a = tl.where(mask, v, 0.0).to(a.dtype)
        if PRECISION == "tf32" and a.dtype == tl.float32:
            a = to_tf32(a)
            b = to_tf32(b)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _conv(
    y, sums, counters, x, x2, weight, shortcut, shortcut2, shortcut_weight, bias, time_bias, residual, statistics, table,
    of_x, of_x2, gamma, beta, scale, shift,
    plane, time_stride, row_stride, plane1, plane2, units1, units2, scale_stride, shift_stride, eps, groups, SIZE,
    N, H, W, GH, GW, C, C2, D, D2, O, PADDING,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, UPSAMPLE: tl.constexpr, INSIDE: tl.constexpr, EVEN: tl.constexpr,
    NORM: tl.constexpr, SILU: tl.constexpr, MERGE: tl.constexpr, GROUPS: tl.constexpr, IN_SPAN: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr, PIXELS: tl.constexpr, SPAN: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    GROUP_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    IMAGES: tl.constexpr = PIXELS < BLOCK_M
    P = GH * GW
    tiles_m = tl.cdiv(N, BLOCK_M // PIXELS) if IMAGES else N * tl.cdiv(P, PIXELS)
    tiles_n = tl.cdiv(O, BLOCK_N)
    tiles = tiles_m * tiles_n
    part = tl.program_id(0) // tiles  # of K; or of K and the phases
    tile = tl.program_id(0) - part * tiles
    group = tile // (GROUP_M * tiles_n)
    within = tile - group * (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + within % height
    column0 = (within // height) * BLOCK_N
    column = tl.minimum(column0 + tl.arange(0, BLOCK_N), O - 1)  # those beyond the end are not stored

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
        own += (part % 4).to(tl.int64) * O * taps * weight_tap
    at = (relative * H + iy) * W + ix
    base = n0.to(tl.int64) * H * W

    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = table
    if NORM:
        if MERGE:
            row += tl.program_id(0).to(tl.int64) * (BLOCK_M // PIXELS) * row_stride
            for image in range(0, BLOCK_M // PIXELS):
                if n0 + image < N:
                    write_coefficients(
                        row + image * row_stride, of_x, plane1, units1, of_x2, plane2, units2, gamma, beta, scale,
                        shift, scale_stride, shift_stride, eps, n0 + image, H * W, 0, groups, SIZE, C, C2,
                        IN_SPAN, GROUPS, BLOCK_COLUMNS, 128,
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
    acc = _accumulate(
        acc, x + base * C, own, 0, low, high, row, row_stride, C + C2, relative, at, iy, ix, exists, column, H, W, C,
        taps * weight_tap, weight_tap, KERNEL, INSIDE, EVEN, NORM, SILU, IMAGES, PRECISION, BLOCK_K,
    )  # fmt: skip
    if x2 is not None:
        row2 = row
        if NORM:
            row2 += C
        acc = _accumulate(
            acc, x2 + base * C2, own + C, steps, low, high, row2, row_stride, C + C2, relative, at, iy, ix, exists,
            column, H, W, C2, taps * weight_tap, weight_tap, KERNEL, INSIDE, EVEN, NORM, SILU, IMAGES, PRECISION,
            BLOCK_K,
        )  # fmt: skip
    if shortcut is not None:
        here = n0.to(tl.int64) * P
        acc = _accumulate(
            acc, shortcut + here * D, shortcut_weight, steps + steps2, low, high, row, row_stride, 0, relative, place,
            iy, ix, exists, column, GH, GW, D, D + D2, 0, 1, True, EVEN, False, False, IMAGES, PRECISION, BLOCK_K,
        )  # fmt: skip
        if shortcut2 is not None:
            acc = _accumulate(
                acc, shortcut2 + here * D2, shortcut_weight + D, steps + steps2 + steps3, low, high, row, row_stride, 0,
                relative, place, iy, ix, exists, column, GH, GW, D2, D + D2, 0, 1, True, EVEN, False, False, IMAGES,
                PRECISION, BLOCK_K,
            )  # fmt: skip
    Q = P * 4 if UPSAMPLE else P
    last = True
    if SPLITS > 1:
        columns = column0 + tl.arange(0, BLOCK_N)
        mask = exists[:, None] & (columns < O)[None, :]
        pointers = sums + n0.to(tl.int64) * Q * O + (place[:, None] * O + columns[None, :])
        stride = (n0 * 0 + N).to(tl.int64) * Q * O
        tl.store(pointers + split * stride, acc, mask=mask)
        last = False
        if counters is not None:  # the last program of a tile adds up all its sums, in order
            tl.debug_barrier()  # every thread has stored its part
            counter = counters + tl.program_id(0) - split * (tl.num_programs(0) // SPLITS)
            last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
            if last:
                tl.store(counter, 0)  # for the next call
                acc = tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
                for _ in range(1, SPLITS):
                    pointers += stride
                    acc += tl.load(pointers, mask=mask, other=0.0, cache_modifier=".cg")
    if last:
        finish(
            acc, y, bias, time_bias, time_stride, residual, statistics, plane, n0, relative, start, exists, place,
            column0, N, Q, O, IMAGES, PIXELS, SPAN, UNIT,
        )  # fmt: skip


@triton.jit
def _finish(
    y, sums, bias, time_bias, residual, statistics, plane, time_stride, N, P, O,
    SPLITS: tl.constexpr, PIXELS: tl.constexpr, SPAN: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add up the splits, in order, and finish."""
    tiles_n = tl.cdiv(O, BLOCK_N)
    tile_m = tl.program_id(0) // tiles_n
    column0 = (tl.program_id(0) - tile_m * tiles_n) * BLOCK_N
    column = column0 + tl.arange(0, BLOCK_N)
    n0, relative, p, start, exists = pixels_of_tile(tile_m, N, P, BLOCK_M, PIXELS)
    place = relative * P + p
    mask = exists[:, None] & (column < O)[None, :]
    pointers = sums + n0.to(tl.int64) * P * O + (place[:, None] * O + column[None, :])
    step = (n0 * 0 + N).to(tl.int64) * P * O
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    for _ in range(1, SPLITS):
        pointers += step
        acc += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    finish(
        acc, y, bias, time_bias, time_stride, residual, statistics, plane, n0, relative, start, exists, place, column0,
        N, P, O, PIXELS < BLOCK_M, PIXELS, SPAN, UNIT,
    )  # fmt: skip


@triton.jit
def _norm_table(
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
        scale_stride, shift_stride, eps, n, P, (tl.program_id(0) - n * parts) * GROUPS, groups, SIZE, C, C2,
        IN_SPAN, GROUPS, BLOCK_COLUMNS, 128,
    )  # fmt: skip


class Operands(NamedTuple):
    """The arguments of `conv_` that its kernels read and write; the weight as they read it (`channels_last_weight`)."""

    y: Tensor
    x: Tensor
    weight: Tensor
    x2: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    stride: int = 1
    padding: int = 1
    upsample: bool = False
    norm: Norm | None = None
    time_bias: Tensor | None = None
    shortcut: Tensor | None = None
    shortcut2: Tensor | None = None
    shortcut_weight: Tensor | None = None
    statistics: Tensor | None = None
    allow_tf32: bool = False

    @property
    def kernel(self) -> int:
        return 2 if self.upsample else self.weight.shape[2]


def channels_last_weight(weight: Tensor, upsample: bool) -> Tensor:
    """Return a weight as the kernel reads it: [O][k][k][C], or with `upsample` [phase][O][2][2][C]; a copy if needed."""
    if upsample:
        return weight if weight.ndim == 5 else phase_weight(weight)
    return weight.contiguous(memory_format=torch.channels_last)


def problem_of(o: Operands) -> Problem:
    """Return what decides how a call is divided."""
    n, out, *size = o.y.shape
    height, width = o.x.shape[2:] if o.upsample else size
    c2, d, d2 = (0 if image is None else image.shape[1] for image in (o.x2, o.shortcut, o.shortcut2))
    columns = groups = 0
    if o.norm is not None:
        groups = o.norm.num_groups
        members = (o.x.shape[1] + c2) // groups
        for values, channels in ((o.norm.statistics, o.x.shape[1]), (o.norm.statistics2, c2)):
            if values is not None:
                columns = max(columns, values.shape[2] * (members * values.shape[3] // channels))
    return Problem(
        n, height, width, o.x.shape[1], c2, out, o.kernel, o.upsample, d, d2, span_of(*o.y.shape[2:]),
        0 if o.statistics is None else out // o.statistics.shape[3], columns, groups, o.x.itemsize,
        HALF if o.x.itemsize == 2 else TF32 if o.allow_tf32 else FMA,
    )  # fmt: skip


def make_launches(o: Operands, tile: Tile, workspace: Tensor | None) -> list[Launch]:
    """Return the launches of a call, also for ahead-of-time compilation (meta tensors suffice)."""
    problem = problem_of(o)
    if reason := tile.why_not(problem):
        raise ValueError(reason)
    of_table, of_sums = tile.workspace(problem)
    if workspace is None and of_table + of_sums:
        workspace = torch.empty(of_table + of_sums, dtype=torch.float32, device=o.x.device)
    table = sums = None
    if workspace is not None:
        table = workspace[:of_table] if of_table else None
        sums = workspace[of_table : of_table + of_sums] if of_sums else None
    launches = []
    if o.norm is not None and not tile.merge:
        launches.append(_table_launch(o, o.norm, problem, tile, table))
    launches.append(_conv_launch(o, problem, tile, table, sums))
    if not tile.finishes(problem):
        if sums is None or tile.one_launch:  # the result is there but for its statistics
            rest = finish_launch(o.y, o.y, None, None, None, o.statistics, 1, tile.pdl)
        else:
            rest = finish_launch(o.y, sums, o.bias, o.time_bias, o.residual, o.statistics, tile.splits, tile.pdl)
        launches.append(rest)
    return launches


def _conv_launch(o: Operands, problem: Problem, tile: Tile, table: Tensor | None, sums: Tensor | None) -> Launch:
    c, c2, d, d2 = problem.channels, problem.channels2, problem.shortcut, problem.shortcut2
    pixels, whole = tile.pixels(problem), tile.finishes(problem)
    plain = tile.splits > 1 and not tile.one_launch  # what is to be added waits for the second launch
    counters = None
    if tile.splits > 1 and tile.one_launch:
        counters = torch.zeros(tile.programs(problem) // tile.splits, dtype=torch.int32, device=o.x.device)
    time_bias, time_stride = unit_rows(None if plain else o.time_bias)
    statistics = o.statistics if whole else None
    args: dict[str, Any] = {
        "y": None if plain else o.y, "sums": sums, "counters": counters, "x": o.x, "x2": o.x2, "weight": o.weight, "shortcut": o.shortcut,
        "shortcut2": o.shortcut2, "shortcut_weight": o.shortcut_weight, "bias": None if plain else o.bias,
        "time_bias": time_bias, "residual": None if plain else o.residual, "statistics": statistics, "table": table,
        **_norm_args(o.norm, problem), "plane": _plane(statistics), "time_stride": time_stride,
        "N": problem.n, "H": o.x.shape[2], "W": o.x.shape[3], "GH": problem.height, "GW": problem.width,
        "C": c, "C2": c2, "D": d, "D2": d2, "O": problem.out, "PADDING": o.padding,
    }  # fmt: skip
    below, right = (
        (a - 1) * o.stride + o.kernel - o.padding - b for a, b in zip(o.y.shape[2:], o.x.shape[2:], strict=True)
    )
    constexprs = {
        "KERNEL": o.kernel, "STRIDE": o.stride, "UPSAMPLE": o.upsample,
        "INSIDE": not o.upsample and o.padding == 0 and below <= 0 and right <= 0,
        "EVEN": all(value % tile.block_k == 0 for value in (c, c2, d, d2)),
        "NORM": o.norm is not None, "SILU": o.norm is not None and o.norm.activation == "silu",
        "MERGE": tile.merge and o.norm is not None,
        "GROUPS": triton.next_power_of_2(max(problem.groups, 1)), "IN_SPAN": span_of(*o.x.shape[2:]),
        "SPLITS": tile.splits, "PRECISION": "ieee" if problem.rate == FMA else "tf32", "PIXELS": pixels,
        "SPAN": problem.span if statistics is not None else 1, "UNIT": problem.unit if statistics is not None else 1,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "BLOCK_COLUMNS": _columns(problem), "GROUP_M": GROUP_M, "PDL": tile.pdl,
    }  # fmt: skip
    options = {"num_stages": tile.num_stages, **_launch_options(tile.pdl)}
    return Launch("conv.tile", _conv, tile.programs(problem), args, constexprs, tile.num_warps, options)


def _norm_args(norm: Norm | None, problem: Problem) -> dict[str, Any]:
    """Return the arguments of the kernels that merge statistics."""
    if norm is None:
        names = ("of_x", "of_x2", "gamma", "beta", "scale", "shift")
        numbers = ("row_stride", "plane1", "plane2", "units1", "units2", "scale_stride", "shift_stride", "groups",
                   "SIZE")  # fmt: skip
        return {**dict.fromkeys(names), **dict.fromkeys(numbers, 0), "eps": 0.0}
    scale, scale_stride = unit_rows(norm.scale)
    shift, shift_stride = unit_rows(norm.shift)
    first, second = norm.statistics, norm.statistics2
    return {
        "of_x": first, "of_x2": second, "gamma": norm.weight, "beta": norm.bias, "scale": scale, "shift": shift,
        "row_stride": row_size(problem), "plane1": _plane(first), "plane2": _plane(second), "units1": first.shape[3],
        "units2": 0 if second is None else second.shape[3], "scale_stride": scale_stride, "shift_stride": shift_stride,
        "eps": float(norm.eps), "groups": norm.num_groups,
        "SIZE": (problem.channels + problem.channels2) // norm.num_groups,
    }  # fmt: skip


def _table_launch(o: Operands, norm: Norm, problem: Problem, tile: Tile, table: Tensor | None) -> Launch:
    groups = triton.next_power_of_2(norm.num_groups)
    while groups > 1 and problem.n * -(-norm.num_groups // groups) < 64:
        groups //= 2
    args = {"table": table, **_norm_args(norm, problem), "P": o.x.shape[2] * o.x.shape[3], "C": problem.channels,
            "C2": problem.channels2}  # fmt: skip
    columns = min(1024 // groups, triton.next_power_of_2(problem.columns))
    constexprs = {"GROUPS": groups, "IN_SPAN": span_of(*o.x.shape[2:]), "BLOCK_COLUMNS": columns, "PDL": tile.pdl}
    programs = problem.n * -(-norm.num_groups // groups)
    return Launch("conv.table", _norm_table, programs, args, constexprs, 4, _launch_options(tile.pdl))


def finish_launch(
    y: Tensor, sums: Tensor, bias: Tensor | None, time_bias: Tensor | None, residual: Tensor | None,
    statistics: Tensor | None, splits: int, pdl: bool = False,
) -> Launch:  # fmt: skip
    """Return the launch that adds up `splits` tensors of y's form, adds the rest and leaves the statistics."""
    n, out, height, width = y.shape
    span, pixels = span_of(height, width), height * width
    unit = 1 if statistics is None else out // statistics.shape[3]
    block_m = max(span, 16)
    block_n = max(unit, min(32, triton.next_power_of_2(out)))
    part = min(block_m, triton.next_power_of_2(pixels))
    tiles = -(-n // (block_m // part)) if part < block_m else n * -(-pixels // part)
    time_bias, time_stride = unit_rows(time_bias)
    args = {"y": y, "sums": sums, "bias": bias, "time_bias": time_bias, "residual": residual, "statistics": statistics,
            "plane": _plane(statistics), "time_stride": time_stride, "N": n, "P": pixels, "O": out}  # fmt: skip
    constexprs = {"SPLITS": splits, "PIXELS": part, "SPAN": span, "UNIT": unit, "BLOCK_M": block_m, "BLOCK_N": block_n,
                  "PDL": pdl}  # fmt: skip
    return Launch("conv.finish", _finish, tiles * -(-out // block_n), args, constexprs, 4, _launch_options(pdl))


def _plane(statistics: Tensor | None) -> int:
    return 0 if statistics is None else statistics[0].numel()


def _columns(problem: Problem) -> int:
    return min(COLUMNS, triton.next_power_of_2(max(problem.columns, 1)))


def _launch_options(pdl: bool) -> dict[str, Any]:
    return {**OPTIONS, "launch_pdl": True} if pdl else OPTIONS


def key_shape(o: Operands) -> tuple[int, ...]:
    """Return the shape of a call in a tuned table: the fields of "fused_conv"."""
    n, c, height, width = o.x.shape
    c2, d, d2 = (0 if image is None else image.shape[1] for image in (o.x2, o.shortcut, o.shortcut2))
    return (
        n, height, width, c, c2, o.y.shape[1], 3 if o.upsample else o.weight.shape[2], o.stride, int(o.upsample),
        0 if o.norm is None else o.norm.num_groups, int(o.norm is not None and o.norm.activation == "silu"), d + d2,
        0 if o.statistics is None else o.y.shape[1] // o.statistics.shape[3], int(o.allow_tf32),
    )  # fmt: skip


def tuned_choice(o: Operands) -> tuned.Choice | None:
    """Return the measured choice for a call; None if there is none."""
    return tuned.choice("fused_conv", o.x.device, o.x.dtype, key_shape(o))


def tile_of(o: Operands, choice: tuned.Choice | None = None) -> Tile:
    """Return the tile of a choice that fits the call, else the likely best one."""
    problem = problem_of(o)
    if choice is not None and choice != VENDOR:
        tile = Tile(**choice)
        if tile.why_not(problem) is None:
            return tile if _has_pdl(o.x.device) else replace(tile, pdl=False)
    return likely_tile(problem, num_processors(o.x.device))


def _has_pdl(device: torch.device) -> bool:
    """Return whether a launch on the device may begin before the one that it depends on ends."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def bind(o: Operands, workspace: Tensor | None, choice: tuned.Choice | None = None) -> Callable[[], object]:
    """Return a function that runs the call, by a choice or, if None, by the tuned or the likely best tile."""
    tile = tile_of(o, tuned_choice(o) if choice is None else choice)
    launches = make_launches(o._replace(weight=channels_last_weight(o.weight, o.upsample)), tile, workspace)
    return partial(run_launches, launches, o.x)


def bind_epilogue(
    y: Tensor, x: Tensor, bias: Tensor | None, time_bias: Tensor | None, residual: Tensor | None,
    statistics: Tensor | None,
) -> Callable[[], object]:  # fmt: skip
    """Return a function that writes x plus the rest to y, and its statistics."""
    return partial(run_launches, [finish_launch(y, x, bias, time_bias, residual, statistics, 1)], x)
