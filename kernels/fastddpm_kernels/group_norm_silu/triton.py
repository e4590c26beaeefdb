"""Compute (a residual sum,) GroupNorm, FiLM and SiLU, forward, in one of two ways (see `plan.py`).

- One pass: a program holds a slab (whole groups of one sample, all pixels) in registers; x is read once.
- Two passes: `_statistics` splits the pixels over many programs, each of which writes its mean and sum of squared
  deviations; `_apply` combines those of all splits (Chan, Golub & LeVeque 1979) and normalises. Each slot has one
  writer and sums have a fixed order, so results are reproducible to the bit.

A residual is added where x is first read; both passes see the rounded sum. Arguments that are None are compiled away.

The first pass writes values per group, not per channel, so the second pass reads 4 to 16 times less. The time bias
moves only a channel's mean, so it is added to means, never to pixels.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels import tuned
from fastddpm_kernels.device.variant import Launch, Variant, packaged_variants
from fastddpm_kernels.group_norm_silu.plan import Plan, derived_plan, forward_plan, forward_workspace, in_place_plan
from fastddpm_kernels.group_norm_silu.triton_tile import (
    affine,
    membership,
    pointers,
    row,
    silu,
    slab_channels,
    slab_groups,
    sum_groups,
    to_channels,
    to_groups,
    unit_rows,
)


@triton.jit
def _load(x, x2, residual, total, n, p, c, mask, P, C1: tl.constexpr, C2: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return concat(x + residual, x2)[n, c, p] as float32; the sum is rounded to x's dtype and written to `total`."""
    tile = tl.load(pointers(x, x2, n, p, c, P, C1, C2, CHANNELS_LAST), mask=mask, other=0.0)
    if residual is not None:
        if C2 > 0:
            mask = mask & (c < C1)[None, :]
        more = tl.load(pointers(residual, None, n, p, c, P, C1, 0, CHANNELS_LAST), mask=mask, other=0.0)
        tile = (tile.to(tl.float32) + more.to(tl.float32)).to(x.dtype.element_ty)
        if total is not None:
            tl.store(pointers(total, None, n, p, c, P, C1, 0, CHANNELS_LAST), tile, mask=mask)
    return tile.to(tl.float32)


@triton.jit
def _one_pass(
    y, mean_out, rstd_out, x, x2, residual, total, weight, bias, time_bias, scale, shift,
    time_stride, scale_stride, shift_stride, P, eps,
    C1: tl.constexpr, C2: tl.constexpr, GROUPS: tl.constexpr, SLAB_GROUPS: tl.constexpr,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALL_PIXELS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = C1 + C2
    SIZE: tl.constexpr = C // GROUPS
    SLABS: tl.constexpr = (GROUPS + SLAB_GROUPS - 1) // SLAB_GROUPS
    slab = tl.program_id(0) % SLABS
    n = (tl.program_id(0) // SLABS).to(tl.int64)
    c, mask_c = slab_channels(slab, C, GROUPS, SLAB_GROUPS, BLOCK_C)
    member = membership(SIZE, BLOCK_C, BLOCK_G)
    p = tl.arange(0, BLOCK_P)
    # Say when a block covers all pixels: otherwise the masks of two tiles in flight take registers and spill.
    mask = (p < (BLOCK_P if ALL_PIXELS else P))[:, None] & mask_c[None, :]

    tile = _load(x, x2, residual, total, n, p, c, mask, P, C1, C2, CHANNELS_LAST)
    mean = sum_groups(tile, SIZE, BLOCK_G) / (P * SIZE)
    if time_bias is not None:
        moved = row(time_bias, n, time_stride, c, mask_c)
        mean += to_groups(moved, member) / SIZE
        centre = to_channels(mean, member) - moved
    else:
        centre = to_channels(mean, member)
    tile = tl.where(mask, tile - centre[None, :], 0.0)
    variance = sum_groups(tile * tile, SIZE, BLOCK_G) / (P * SIZE)
    rstd = tl.rsqrt(variance + eps)

    a, b = affine(weight, bias, scale, shift, n, scale_stride, shift_stride, c, mask_c)
    v = tile * (a * to_channels(rstd, member))[None, :] + b[None, :]
    if SILU:
        v = silu(v)
    tl.store(pointers(y, None, n, p, c, P, C, 0, CHANNELS_LAST), v.to(y.dtype.element_ty), mask=mask)
    if mean_out is not None:
        g, mask_g = slab_groups(slab, GROUPS, SLAB_GROUPS, BLOCK_G)
        tl.store(mean_out + n * GROUPS + g, mean, mask=mask_g)
        tl.store(rstd_out + n * GROUPS + g, rstd, mask=mask_g)


@triton.jit
def _statistics(
    partial, x, x2, residual, total, time_bias, time_stride, P, partial_stride, splits, tiles,
    C1: tl.constexpr, C2: tl.constexpr, GROUPS: tl.constexpr, SLAB_GROUPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Write partial[0, n, split, group], the mean, and partial[1, ...], the sum of squared deviations from it."""
    C: tl.constexpr = C1 + C2
    SIZE: tl.constexpr = C // GROUPS
    SLABS: tl.constexpr = (GROUPS + SLAB_GROUPS - 1) // SLAB_GROUPS
    slab = tl.program_id(0) % SLABS
    split = tl.program_id(0) // SLABS % splits
    n = (tl.program_id(0) // SLABS // splits).to(tl.int64)
    c, mask_c = slab_channels(slab, C, GROUPS, SLAB_GROUPS, BLOCK_C)
    start = split * tiles * BLOCK_P
    end = tl.minimum(start + tiles * BLOCK_P, P)

    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for p0 in range(start, end, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & mask_c[None, :]
        tile = _load(x, x2, residual, total, n, p, c, mask, P, C1, C2, CHANNELS_LAST)
        seen = (p0 - start).to(tl.float32)
        new = tl.minimum(end - p0, BLOCK_P).to(tl.float32)
        tile_mean = tl.sum(tile, axis=0) / new
        tile = tl.where(mask, tile - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        mean += delta * (new / (seen + new))
        squares += tl.sum(tile * tile, axis=0) + delta * delta * (seen * new / (seen + new))

    if time_bias is not None:
        mean += row(time_bias, n, time_stride, c, mask_c)
    member = membership(SIZE, BLOCK_C, BLOCK_G)
    group_mean = to_groups(mean, member) / SIZE
    delta = tl.where(mask_c, mean - to_channels(group_mean, member), 0.0)
    group_squares = to_groups(squares + delta * delta * (end - start).to(tl.float32), member)
    g, mask_g = slab_groups(slab, GROUPS, SLAB_GROUPS, BLOCK_G)
    slot = partial + (n * splits + split) * GROUPS + g
    tl.store(slot, group_mean, mask=mask_g)
    tl.store(slot + partial_stride, group_squares, mask=mask_g)


@triton.jit
def _apply(
    y, mean_out, rstd_out, partial, x, x2, residual, weight, bias, time_bias, scale, shift,
    time_stride, scale_stride, shift_stride, P, partial_stride, splits, tiles, eps,
    C1: tl.constexpr, C2: tl.constexpr, GROUPS: tl.constexpr, SLAB_GROUPS: tl.constexpr,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = C1 + C2
    SIZE: tl.constexpr = C // GROUPS
    SLABS: tl.constexpr = (GROUPS + SLAB_GROUPS - 1) // SLAB_GROUPS
    # Start with the last tiles of `_statistics`: their input is still in L2.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    slab = program % SLABS
    split = program // SLABS % splits
    n = (program // SLABS // splits).to(tl.int64)
    c, mask_c = slab_channels(slab, C, GROUPS, SLAB_GROUPS, BLOCK_C)
    g, mask_g = slab_groups(slab, GROUPS, SLAB_GROUPS, BLOCK_G)
    span = tiles * BLOCK_P

    s = tl.arange(0, BLOCK_S)
    slot = partial + (n * splits + s[:, None]) * GROUPS + g[None, :]
    mask_s = (s < splits)[:, None] & mask_g[None, :]
    means = tl.load(slot, mask=mask_s, other=0.0)
    squares = tl.load(slot + partial_stride, mask=mask_s, other=0.0)
    share = (tl.maximum(tl.minimum(P - s * span, span), 0).to(tl.float32) / P)[:, None]
    mean = tl.sum(means * share, axis=0)
    delta = means - mean[None, :]
    variance = tl.sum(squares / P + delta * delta * (share * SIZE), axis=0) / SIZE
    rstd = tl.rsqrt(variance + eps)
    if mean_out is not None:  # noqa: SIM102  (decided when compiling)
        if split == 0:
            tl.store(mean_out + n * GROUPS + g, mean, mask=mask_g)
            tl.store(rstd_out + n * GROUPS + g, rstd, mask=mask_g)

    member = membership(SIZE, BLOCK_C, BLOCK_G)
    centre = to_channels(mean, member)
    if time_bias is not None:
        centre -= row(time_bias, n, time_stride, c, mask_c)
    a, b = affine(weight, bias, scale, shift, n, scale_stride, shift_stride, c, mask_c)
    a *= to_channels(rstd, member)
    start = split * span
    end = tl.minimum(start + span, P)
    for p0 in range(start, end, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & mask_c[None, :]
        tile = _load(x, x2, residual, None, n, p, c, mask, P, C1, C2, CHANNELS_LAST)
        v = (tile - centre[None, :]) * a[None, :] + b[None, :]
        if SILU:
            v = silu(v)
        tl.store(pointers(y, None, n, p, c, P, C, 0, CHANNELS_LAST), v.to(y.dtype.element_ty), mask=mask)


def forward_launches(
    y: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, x2: Tensor | None,
    time_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool, plan: Plan | None = None,
) -> list[Launch]:  # fmt: skip
    """Return the launches that write y, mean and rstd [N, groups]. x, x2 and y are dense and of one memory format.

    `plan`: overrides the chosen one."""
    weight, bias = weight.contiguous(), bias.contiguous()
    plan = plan or forward_plan(x, len(weight), mean.shape[1])
    return _launches(
        plan, y, mean, rstd, x, weight, bias, mean.shape[1], eps, x2, None, None, time_bias, scale, shift, silu, None
    )


def in_place_launches(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, x2: Tensor | None,
    residual: Tensor | None, total: Tensor | None, time_bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, silu: bool, workspace: Tensor | None, plan: Plan | None = None,
) -> list[Launch]:  # fmt: skip
    """Return the launches that write y and, if given, total. They copy nothing and allocate only a missing workspace.

    y, total and residual may be x: a program reads what it overwrites, and no other program reads it (the second
    pass reads the total that the first wrote).
    """
    plan = plan or in_place_plan(x, len(weight), num_groups, None if workspace is None else workspace.numel())
    return _launches(
        plan, y, None, None, x, weight, bias, num_groups, eps, x2, residual, total, time_bias, scale, shift, silu,
        workspace,
    )  # fmt: skip


def _launches(
    plan: Plan, y: Tensor, mean: Tensor | None, rstd: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor,
    groups: int, eps: float, x2: Tensor | None, residual: Tensor | None, total: Tensor | None,
    time_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool, workspace: Tensor | None,
) -> list[Launch]:  # fmt: skip
    n, channels = y.shape[:2]
    time_bias, time_stride = unit_rows(time_bias)
    scale, scale_stride = unit_rows(scale)
    shift, shift_stride = unit_rows(shift)
    source = {"x": x, "x2": x2, "residual": residual, "time_bias": time_bias, "time_stride": time_stride,
              "P": math.prod(x.shape[2:])}  # fmt: skip
    target = {"y": y, "mean_out": mean, "rstd_out": rstd, "weight": weight, "bias": bias, "scale": scale,
              "shift": shift, "scale_stride": scale_stride, "shift_stride": shift_stride, "eps": eps}  # fmt: skip
    layout = {"C1": x.shape[1], "C2": channels - x.shape[1], "GROUPS": groups,
              "CHANNELS_LAST": not x.is_contiguous(), **plan.constexprs()}  # fmt: skip
    programs = n * plan.slabs * plan.splits
    if plan.one_pass:
        return [Launch("group_norm_silu.one_pass", _one_pass, programs, {**source, "total": total, **target},
                       {**layout, "SILU": silu, "ALL_PIXELS": source["P"] == plan.block_p},
                       plan.num_warps)]  # fmt: skip
    partial = workspace
    if partial is None:
        partial = torch.empty(forward_workspace(x, groups, plan), dtype=torch.float32, device=x.device)
    split = {"partial": partial, "partial_stride": n * plan.splits * groups, "splits": plan.splits,
             "tiles": plan.tiles}  # fmt: skip
    second = source if total is None else {**source, "x": total, "residual": None}
    return [
        Launch("group_norm_silu.statistics", _statistics, programs, {**source, "total": total, **split}, layout,
               plan.num_warps),
        Launch("group_norm_silu.apply", _apply, programs, {**second, **split, **target},
               {**layout, "SILU": silu, "BLOCK_S": triton.next_power_of_2(plan.splits)}, plan.num_warps),
    ]  # fmt: skip


def aot_variants() -> list[Variant]:
    """Return every kernel of `group_norm_silu` and `rms_norm_silu` at common U-Net sizes, and the tuned ones."""
    from fastddpm_kernels.group_norm_silu import (
        triton_backward as group_norm_silu_backward,
    )
    from fastddpm_kernels.group_norm_silu import (
        triton_rms as rms_norm_silu,
    )

    variants = []
    for tag, n, c1, c2, side, channels_last, time_bias, film, dtypes in (
        ("32x32", 64, 128, 0, 32, True, True, False, ("fp32", "fp16", "bf16")),
        ("16x16 concat film", 64, 256, 128, 16, True, False, True, ("fp32", "fp16")),
        ("16x16 contiguous", 2, 256, 0, 16, False, False, False, ("fp16",)),
        ("64x64", 4, 256, 0, 64, True, False, False, ("fp16",)),
        ("256x256", 4, 128, 0, 256, True, True, False, ("fp32", "fp16", "bf16")),
        ("128x128 concat film", 4, 256, 128, 128, True, False, True, ("fp16",)),
        ("256x256 contiguous", 4, 128, 0, 256, False, True, True, ("fp16",)),
    ):
        for dtype in dtypes:
            x, x2, y, rows = _example(n, c1, c2, side, channels_last, _DTYPES[dtype])
            launches = _example_launches(x, x2, y, rows if time_bias else None, rows if film else None)
            variants += [launch.variant(f"{dtype}, {tag}") for launch in launches]
    for tag, n, c1, c2, side, channels_last, dtypes in (
        ("32x32 residual", 64, 128, 0, 32, True, ("fp32", "fp16", "bf16")),
        ("32x32 residual concat", 64, 256, 128, 32, True, ("fp32", "fp16")),
        ("64x64 residual", 4, 256, 0, 64, True, ("fp32", "fp16", "bf16")),
        ("64x64 residual concat", 4, 256, 256, 64, True, ("fp32", "fp16")),
        ("256x256 residual", 4, 128, 0, 256, True, ("fp32", "fp16", "bf16")),
        ("128x128 residual concat", 4, 256, 128, 128, True, ("fp16",)),
        ("256x256 residual contiguous", 4, 128, 0, 256, False, ("fp16",)),
    ):
        for dtype in dtypes:
            x, x2, y, rows = _example(n, c1, c2, side, channels_last, _DTYPES[dtype])
            variants += [
                launch.variant(f"{dtype}, {tag}{'' if total is x else ', no total'}")
                for total in (x, None)
                for launch in _example_in_place(x, x2, y, rows, total)
                if total is x or launch.kernel is _apply  # which then computes the sum again
            ]
    variants += packaged_variants(("group_norm_silu", "group_norm_silu_"), tuned_variants)
    variants += packaged_variants(("group_norm_silu_backward",), group_norm_silu_backward.tuned_variants)
    return variants + packaged_variants(("rms_norm_silu", "rms_norm_silu_backward"), rms_norm_silu.tuned_variants)


def tuned_variants(key: tuned.Key, choice: tuned.Choice) -> list[Variant]:
    """Return the kernels of a tuned choice: without a residual and, if the op takes one, with it."""
    n, pixels, c1, c2, groups, last = key.shape
    x, x2, y, rows = _example(n, c1, c2, (1, pixels), bool(last), key.dtype)
    plan = derived_plan(n, pixels, c1 + c2, groups, **choice)
    if plan is None:
        raise ValueError("its tile is larger than a kernel could hold")
    weight, mean = (torch.empty(shape, dtype=torch.float32, device="meta") for shape in ((c1 + c2,), (n, groups)))
    if key.op == "group_norm_silu":
        launches = forward_launches(y, mean, mean, x, weight, weight, 1e-5, x2, rows, None, None, True, plan)
    else:
        launches = [
            launch
            for residual, total in ((None, None), (x, x), (x, None))
            for launch in in_place_launches(
                y, x, weight, weight, groups, 1e-5, x2, residual, total, rows, None, None, True, None, plan
            )
        ]
    return [launch.variant(f"tuned, {key.dtype}, {key.shape}, {index}") for index, launch in enumerate(launches)]


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _example(
    n: int, c1: int, c2: int, size: int | tuple[int, int], channels_last: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return x, x2, y and a row [N, C] on the meta device."""
    size = (size, size) if isinstance(size, int) else size

    def image(channels: int) -> Tensor:
        shape = (n, *size, channels) if channels_last else (n, channels, *size)
        return torch.empty(shape, dtype=dtype, device="meta").movedim(-1 if channels_last else 1, 1)

    rows = torch.empty(n, c1 + c2, dtype=dtype, device="meta")
    return image(c1), image(c2) if c2 else None, image(c1 + c2), rows


def _example_launches(
    x: Tensor, x2: Tensor | None, y: Tensor, time_bias: Tensor | None, film: Tensor | None
) -> list[Launch]:
    """Return launches forward and backward, with SiLU if there is a time bias or FiLM."""
    from fastddpm_kernels.group_norm_silu import (
        triton_backward as group_norm_silu_backward,
    )
    from fastddpm_kernels.group_norm_silu import (
        triton_rms as rms_norm_silu,
    )

    (n, channels), silu = y.shape[:2], time_bias is not None or film is not None
    shapes = ((channels,), (n, 32), (3, n, channels))
    weight, mean, sums = (torch.empty(shape, dtype=torch.float32, device="meta") for shape in shapes)
    launches = forward_launches(y, mean, mean, x, weight, weight, 1e-5, x2, time_bias, film, film, silu)
    launches += group_norm_silu_backward.backward_launches(
        x, x2, sums, y, x, weight, weight, mean, mean, x2, time_bias, film, film, silu
    )
    if film is not None or y.shape[2] == 64:
        launches += rms_norm_silu.forward_launches(y, x, weight, 1e-12, x2, film, film, silu)
        launches += rms_norm_silu.forward_launches(y, x, weight, 1e-12, x2, film, film, silu, weight, y)
        launches += rms_norm_silu.backward_launches(x, x2, y, x, weight, 1e-12, x2, film, film, silu)[0]
    return launches


def _example_in_place(x: Tensor, x2: Tensor | None, y: Tensor, time_bias: Tensor, total: Tensor | None) -> list[Launch]:
    weight = y.new_empty(y.shape[1])
    return in_place_launches(y, x, weight, weight, 32, 1e-5, x2, x, total, time_bias, None, None, True, None)
