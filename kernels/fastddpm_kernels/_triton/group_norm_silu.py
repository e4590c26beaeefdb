"""GroupNorm, FiLM and SiLU, forward, in one of two ways (`make_plan` chooses).

- One pass: a program holds a slab (whole groups of one sample, all pixels) in registers; x is read once.
- Two passes: `_statistics` splits the pixels over many programs, each of which writes its mean and sum of squared
  deviations; `_apply` combines those of all splits (Chan, Golub & LeVeque 1979) and normalises. Each slot has one
  writer and sums have a fixed order, so results are reproducible to the bit.

What the first pass writes is per group, not per channel: the second pass reads 4 to 16 times less of it. The time
bias moves a channel's mean and nothing else, so it is added to means, never to pixels.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels._triton.norm_tile import (
    Launch,
    Limits,
    affine,
    make_plan,
    membership,
    num_processors,
    pointers,
    row,
    silu,
    slab_channels,
    slab_groups,
    to_channels,
    to_groups,
    unit_rows,
)
from fastddpm_kernels._triton.variant import Variant

LIMITS = Limits(one_pass_elements=32768, tile_elements=8192, thread_elements=32, max_splits=128)


@triton.jit
def _one_pass(
    y, mean_out, rstd_out, x, x2, weight, bias, time_bias, scale, shift,
    time_stride, scale_stride, shift_stride, P, eps,
    C1: tl.constexpr, C2: tl.constexpr, GROUPS: tl.constexpr, SLAB_GROUPS: tl.constexpr,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
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
    mask = (p < P)[:, None] & mask_c[None, :]

    tile = tl.load(pointers(x, x2, n, p, c, P, C1, C2, CHANNELS_LAST), mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(tile, axis=0)
    if time_bias is not None:
        moved = row(time_bias, n, time_stride, c, mask_c)
        mean = to_groups(total / P + moved, member) / SIZE
        centre = to_channels(mean, member) - moved
    else:
        mean = to_groups(total / P, member) / SIZE
        centre = to_channels(mean, member)
    tile = tl.where(mask, tile - centre[None, :], 0.0)
    variance = to_groups(tl.sum(tile * tile, axis=0) / P, member) / SIZE
    rstd = tl.rsqrt(variance + eps)

    a, b = affine(weight, bias, scale, shift, n, scale_stride, shift_stride, c, mask_c)
    v = tile * (a * to_channels(rstd, member))[None, :] + b[None, :]
    if SILU:
        v = silu(v)
    tl.store(pointers(y, None, n, p, c, P, C, 0, CHANNELS_LAST), v.to(y.dtype.element_ty), mask=mask)
    g, mask_g = slab_groups(slab, GROUPS, SLAB_GROUPS, BLOCK_G)
    tl.store(mean_out + n * GROUPS + g, mean, mask=mask_g)
    tl.store(rstd_out + n * GROUPS + g, rstd, mask=mask_g)


@triton.jit
def _statistics(
    partial, x, x2, time_bias, time_stride, P, partial_stride, splits, tiles,
    C1: tl.constexpr, C2: tl.constexpr, GROUPS: tl.constexpr, SLAB_GROUPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """partial[0, n, split, group]: the mean; partial[1, ...]: the sum of squared deviations from it."""
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
        tile = tl.load(pointers(x, x2, n, p, c, P, C1, C2, CHANNELS_LAST), mask=mask, other=0.0).to(tl.float32)
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
    y, mean_out, rstd_out, partial, x, x2, weight, bias, time_bias, scale, shift,
    time_stride, scale_stride, shift_stride, P, partial_stride, splits, tiles, eps,
    C1: tl.constexpr, C2: tl.constexpr, GROUPS: tl.constexpr, SLAB_GROUPS: tl.constexpr,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = C1 + C2
    SIZE: tl.constexpr = C // GROUPS
    SLABS: tl.constexpr = (GROUPS + SLAB_GROUPS - 1) // SLAB_GROUPS
    # The last of `_statistics` first: what those read is still in L2.
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
        tile = tl.load(pointers(x, x2, n, p, c, P, C1, C2, CHANNELS_LAST), mask=mask, other=0.0).to(tl.float32)
        v = (tile - centre[None, :]) * a[None, :] + b[None, :]
        if SILU:
            v = silu(v)
        tl.store(pointers(y, None, n, p, c, P, C, 0, CHANNELS_LAST), v.to(y.dtype.element_ty), mask=mask)


def forward_launches(
    y: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, x2: Tensor | None,
    time_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool,
) -> list[Launch]:  # fmt: skip
    """The launches that write y, mean and rstd [N, groups]. x, x2 and y are dense and of one memory format."""
    (n, channels), groups = y.shape[:2], mean.shape[1]
    plan = make_plan(x, channels, groups, num_processors(x.device), LIMITS)
    time_bias, time_stride = unit_rows(time_bias)
    scale, scale_stride = unit_rows(scale)
    shift, shift_stride = unit_rows(shift)
    source = {"x": x, "x2": x2, "time_bias": time_bias, "time_stride": time_stride, "P": math.prod(x.shape[2:])}
    target = {"y": y, "mean_out": mean, "rstd_out": rstd, "weight": weight.contiguous(), "bias": bias.contiguous(),
              "scale": scale, "shift": shift, "scale_stride": scale_stride, "shift_stride": shift_stride,
              "eps": eps}  # fmt: skip
    layout = {"C1": x.shape[1], "C2": channels - x.shape[1], "GROUPS": groups,
              "CHANNELS_LAST": not x.is_contiguous(), **plan.constexprs()}  # fmt: skip
    programs = n * plan.slabs * plan.splits
    if plan.one_pass:
        return [Launch("group_norm_silu.one_pass", _one_pass, programs, {**source, **target},
                       {**layout, "SILU": silu}, plan.num_warps)]  # fmt: skip
    partial = torch.empty(2, n, plan.splits, groups, dtype=torch.float32, device=x.device)
    split = {"partial": partial, "partial_stride": partial.stride(0), "splits": plan.splits, "tiles": plan.tiles}
    return [
        Launch("group_norm_silu.statistics", _statistics, programs, {**source, **split}, layout, plan.num_warps),
        Launch("group_norm_silu.apply", _apply, programs, {**source, **split, **target},
               {**layout, "SILU": silu, "BLOCK_S": triton.next_power_of_2(plan.splits)}, plan.num_warps),
    ]  # fmt: skip


def aot_variants() -> list[Variant]:
    """Every kernel of `group_norm_silu` and `rms_norm_silu`, at sizes of U-Nets that are in use."""
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
            launches = _example_launches(n, c1, c2, side, channels_last, time_bias, film, _DTYPES[dtype])
            variants += [launch.variant(f"{dtype}, {tag}") for launch in launches]
    return variants


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _example_launches(
    n: int, c1: int, c2: int, side: int, channels_last: bool, time_bias: bool, film: bool, dtype: torch.dtype
) -> list[Launch]:
    """Launches on meta tensors: forward and backward, with SiLU where there is a time bias or FiLM."""
    from fastddpm_kernels._triton import group_norm_silu_backward, rms_norm_silu

    def image(channels: int) -> Tensor:
        shape = (n, side, side, channels) if channels_last else (n, channels, side, side)
        return torch.empty(shape, dtype=dtype, device="meta").movedim(-1 if channels_last else 1, 1)

    def vector(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    channels, groups, silu = c1 + c2, 32, time_bias or film
    x, x2, y = image(c1), image(c2) if c2 else None, image(channels)
    weight, mean, rows = vector(channels), vector(n, groups), vector(n, channels, dtype=dtype)
    time = rows if time_bias else None
    scale = shift = rows if film else None
    launches = forward_launches(y, mean, mean, x, weight, weight, 1e-5, x2, time, scale, shift, silu)
    sums = vector(3, n, channels)
    launches += group_norm_silu_backward.backward_launches(
        x, x2, sums, y, x, weight, weight, mean, mean, x2, time, scale, shift, silu
    )
    if film or side == 64:
        launches += rms_norm_silu.forward_launches(y, x, weight, 1e-12, x2, scale, shift, silu)
        launches += rms_norm_silu.backward_launches(x, x2, y, x, weight, 1e-12, x2, scale, shift, silu)[0]
    return launches
