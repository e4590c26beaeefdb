"""Compute the gradient of GroupNorm, FiLM and SiLU, in one pass or two like the forward.

With u the normalised input, v = a * u + b what SiLU sees, and dv the gradient there, all gradients follow from
three sums over the pixels of each sample's channel,

    sums[0] = sum dv      sums[1] = sum dv * u      sums[2] = sum u

The gradient of the input needs them over each group of G elements (Wu & He 2018):

    dx = rstd * (a * dv - sum_group(a * dv) / G - u * sum_group(a * dv * u) / G)

The caller computes the gradient of every per-channel argument from the sums in a line of arithmetic.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels import tuned
from fastddpm_kernels.device.variant import Launch, Variant
from fastddpm_kernels.group_norm_silu.plan import BACKWARD_LIMITS, Plan, backward_plan, derived_plan
from fastddpm_kernels.group_norm_silu.triton_tile import (
    affine,
    membership,
    pointers,
    row,
    silu_gradient,
    slab_channels,
    to_channels,
    to_groups,
    unit_rows,
)

LIMITS = BACKWARD_LIMITS


@triton.jit
def _normalisation(mean, rstd, time_bias, time_stride, n, c, mask, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """Return (centre, rstd) per channel, with u = (x - centre) * rstd."""
    centre = tl.load(mean + n * GROUPS + c // SIZE, mask=mask, other=0.0)
    if time_bias is not None:
        centre -= row(time_bias, n, time_stride, c, mask)
    return centre, tl.load(rstd + n * GROUPS + c // SIZE, mask=mask, other=0.0)


@triton.jit
def _u_and_dv(
    dy, x, x2, centre, rstd, a, b, mask, n, p, c, P,
    C1: tl.constexpr, C2: tl.constexpr, SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    u = tl.load(pointers(x, x2, n, p, c, P, C1, C2, CHANNELS_LAST), mask=mask, other=0.0).to(tl.float32)
    dv = tl.load(pointers(dy, None, n, p, c, P, C1 + C2, 0, CHANNELS_LAST), mask=mask, other=0.0).to(tl.float32)
    u = tl.where(mask, (u - centre[None, :]) * rstd[None, :], 0.0)
    if SILU:
        dv = silu_gradient(dv, u * a[None, :] + b[None, :])
    return u, dv


@triton.jit
def _coefficients(a, rstd, mean_dv, mean_dvu, member, SIZE: tl.constexpr):
    """Return (ka, kb, ku) per channel, with dx = ka * dv - (kb + u * ku)."""
    group_dv = to_channels(to_groups(a * mean_dv, member) / SIZE, member)
    group_dvu = to_channels(to_groups(a * mean_dvu, member) / SIZE, member)
    return rstd * a, rstd * group_dv, rstd * group_dvu


@triton.jit
def _one_pass(
    dx, dx2, sums, dy, x, x2, mean, rstd, weight, bias, time_bias, scale, shift,
    time_stride, scale_stride, shift_stride, P, sums_stride,
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

    centre, rstd_c = _normalisation(mean, rstd, time_bias, time_stride, n, c, mask_c, SIZE, GROUPS)
    a, b = affine(weight, bias, scale, shift, n, scale_stride, shift_stride, c, mask_c)
    u, dv = _u_and_dv(dy, x, x2, centre, rstd_c, a, b, mask, n, p, c, P, C1, C2, SILU, CHANNELS_LAST)
    sum_dv = tl.sum(dv, axis=0)
    sum_dvu = tl.sum(dv * u, axis=0)
    sum_u = tl.sum(u, axis=0)
    ka, kb, ku = _coefficients(a, rstd_c, sum_dv / P, sum_dvu / P, member, SIZE)
    d = ka[None, :] * dv - (kb[None, :] + u * ku[None, :])
    tl.store(pointers(dx, dx2, n, p, c, P, C1, C2, CHANNELS_LAST), d.to(dx.dtype.element_ty), mask=mask)
    slot = sums + n * C + c
    tl.store(slot, sum_dv, mask=mask_c)
    tl.store(slot + sums_stride, sum_dvu, mask=mask_c)
    tl.store(slot + 2 * sums_stride, sum_u, mask=mask_c)


@triton.jit
def _partial_sums(
    partial, dy, x, x2, mean, rstd, weight, bias, time_bias, scale, shift,
    time_stride, scale_stride, shift_stride, P, partial_stride, splits, tiles,
    C1: tl.constexpr, C2: tl.constexpr, GROUPS: tl.constexpr, SLAB_GROUPS: tl.constexpr,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write partial[0..2, n, split, c], the three sums over `tiles` tiles of pixels."""
    C: tl.constexpr = C1 + C2
    SLABS: tl.constexpr = (GROUPS + SLAB_GROUPS - 1) // SLAB_GROUPS
    slab = tl.program_id(0) % SLABS
    split = tl.program_id(0) // SLABS % splits
    n = (tl.program_id(0) // SLABS // splits).to(tl.int64)
    c, mask_c = slab_channels(slab, C, GROUPS, SLAB_GROUPS, BLOCK_C)
    centre, rstd_c = _normalisation(mean, rstd, time_bias, time_stride, n, c, mask_c, C // GROUPS, GROUPS)
    a, b = affine(weight, bias, scale, shift, n, scale_stride, shift_stride, c, mask_c)

    sum_dv = tl.zeros([BLOCK_C], tl.float32)
    sum_dvu = tl.zeros([BLOCK_C], tl.float32)
    sum_u = tl.zeros([BLOCK_C], tl.float32)
    start = split * tiles * BLOCK_P
    end = tl.minimum(start + tiles * BLOCK_P, P)
    for p0 in range(start, end, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & mask_c[None, :]
        u, dv = _u_and_dv(dy, x, x2, centre, rstd_c, a, b, mask, n, p, c, P, C1, C2, SILU, CHANNELS_LAST)
        sum_dv += tl.sum(dv, axis=0)
        sum_dvu += tl.sum(dv * u, axis=0)
        sum_u += tl.sum(u, axis=0)
    slot = partial + (n * splits + split) * C + c
    tl.store(slot, sum_dv, mask=mask_c)
    tl.store(slot + partial_stride, sum_dvu, mask=mask_c)
    tl.store(slot + 2 * partial_stride, sum_u, mask=mask_c)


@triton.jit
def _input_gradient(
    dx, dx2, sums, partial, dy, x, x2, mean, rstd, weight, bias, time_bias, scale, shift,
    time_stride, scale_stride, shift_stride, P, sums_stride, partial_stride, splits, tiles,
    C1: tl.constexpr, C2: tl.constexpr, GROUPS: tl.constexpr, SLAB_GROUPS: tl.constexpr,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = C1 + C2
    SIZE: tl.constexpr = C // GROUPS
    SLABS: tl.constexpr = (GROUPS + SLAB_GROUPS - 1) // SLAB_GROUPS
    # Start with the last tiles of `_partial_sums`: their input is still in L2.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    slab = program % SLABS
    split = program // SLABS % splits
    n = (program // SLABS // splits).to(tl.int64)
    c, mask_c = slab_channels(slab, C, GROUPS, SLAB_GROUPS, BLOCK_C)
    member = membership(SIZE, BLOCK_C, BLOCK_G)
    centre, rstd_c = _normalisation(mean, rstd, time_bias, time_stride, n, c, mask_c, SIZE, GROUPS)
    a, b = affine(weight, bias, scale, shift, n, scale_stride, shift_stride, c, mask_c)

    s = tl.arange(0, BLOCK_S)
    slot = partial + (n * splits + s[:, None]) * C + c[None, :]
    mask_s = (s < splits)[:, None] & mask_c[None, :]
    sum_dv = tl.sum(tl.load(slot, mask=mask_s, other=0.0), axis=0)
    sum_dvu = tl.sum(tl.load(slot + partial_stride, mask=mask_s, other=0.0), axis=0)
    ka, kb, ku = _coefficients(a, rstd_c, sum_dv / P, sum_dvu / P, member, SIZE)
    if split == 0:
        sum_u = tl.sum(tl.load(slot + 2 * partial_stride, mask=mask_s, other=0.0), axis=0)
        total = sums + n * C + c
        tl.store(total, sum_dv, mask=mask_c)
        tl.store(total + sums_stride, sum_dvu, mask=mask_c)
        tl.store(total + 2 * sums_stride, sum_u, mask=mask_c)

    start = split * tiles * BLOCK_P
    end = tl.minimum(start + tiles * BLOCK_P, P)
    for p0 in range(start, end, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & mask_c[None, :]
        u, dv = _u_and_dv(dy, x, x2, centre, rstd_c, a, b, mask, n, p, c, P, C1, C2, SILU, CHANNELS_LAST)
        d = ka[None, :] * dv - (kb[None, :] + u * ku[None, :])
        tl.store(pointers(dx, dx2, n, p, c, P, C1, C2, CHANNELS_LAST), d.to(dx.dtype.element_ty), mask=mask)


def backward_launches(
    dx: Tensor, dx2: Tensor | None, sums: Tensor, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor,
    rstd: Tensor, x2: Tensor | None, time_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool,
    plan: Plan | None = None,
) -> list[Launch]:  # fmt: skip
    """Return the launches that write dx, dx2 and sums [3, N, C]. dy, x, x2 and the results are dense and of one format.

    `plan`: overrides the chosen one."""
    (n, channels), groups = dy.shape[:2], mean.shape[1]
    plan = plan or backward_plan(x, channels, groups, LIMITS)
    time_bias, time_stride = unit_rows(time_bias)
    scale, scale_stride = unit_rows(scale)
    shift, shift_stride = unit_rows(shift)
    source = {"dy": dy, "x": x, "x2": x2, "mean": mean, "rstd": rstd, "weight": weight.contiguous(),
              "bias": bias.contiguous(), "time_bias": time_bias, "scale": scale, "shift": shift,
              "time_stride": time_stride, "scale_stride": scale_stride, "shift_stride": shift_stride,
              "P": math.prod(x.shape[2:])}  # fmt: skip
    target = {"dx": dx, "dx2": dx2, "sums": sums, "sums_stride": sums.stride(0)}
    layout = {"C1": x.shape[1], "C2": channels - x.shape[1], "GROUPS": groups, "SILU": silu,
              "CHANNELS_LAST": not x.is_contiguous(), **plan.constexprs()}  # fmt: skip
    programs = n * plan.slabs * plan.splits
    if plan.one_pass:
        return [Launch("group_norm_silu.backward", _one_pass, programs, {**source, **target}, layout,
                       plan.num_warps)]  # fmt: skip
    partial = torch.empty(3, n, plan.splits, channels, dtype=torch.float32, device=x.device)
    split = {"partial": partial, "partial_stride": partial.stride(0), "splits": plan.splits, "tiles": plan.tiles}
    without_groups = {name: value for name, value in layout.items() if name != "BLOCK_G"}
    return [
        Launch("group_norm_silu.partial_sums", _partial_sums, programs, {**source, **split}, without_groups,
               plan.num_warps),
        Launch("group_norm_silu.input_gradient", _input_gradient, programs, {**source, **split, **target},
               {**layout, "BLOCK_S": triton.next_power_of_2(plan.splits)}, plan.num_warps),
    ]  # fmt: skip


def tuned_variants(key: tuned.Key, choice: tuned.Choice) -> list[Variant]:
    """Return the kernels of a tuned choice: with a time bias, and with FiLM, as in U-Nets."""
    n, pixels, c1, c2, groups, last = key.shape
    plan = derived_plan(n, pixels, c1 + c2, groups, **choice, per_channel=True)
    if plan is None:
        raise ValueError("its tile is larger than a kernel could hold")

    def image(channels: int) -> Tensor:
        shape = (n, 1, pixels, channels) if last else (n, channels, 1, pixels)
        return torch.empty(shape, dtype=key.dtype, device="meta").movedim(-1 if last else 1, 1)

    shapes = ((c1 + c2,), (n, groups), (3, n, c1 + c2))
    weight, mean, sums = (torch.empty(shape, dtype=torch.float32, device="meta") for shape in shapes)
    x, x2, dy = image(c1), image(c2) if c2 else None, image(c1 + c2)
    rows = torch.empty(n, c1 + c2, dtype=key.dtype, device="meta")
    return [
        launch.variant(f"tuned, {key.dtype}, {key.shape}, {'film' if film else 'time bias'}")
        for film in (False, True)
        for given in ((None, rows, rows) if film else (rows, None, None),)
        for launch in backward_launches(x, x2, sums, dy, x, weight, weight, mean, mean, x2, *given, True, plan)
    ]
