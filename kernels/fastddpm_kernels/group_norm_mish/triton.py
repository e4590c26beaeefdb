"""Normalise a group of a sample in one program: held in registers where it fits, else read three times."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels.device.variant import Launch, Variant, run_launches
from fastddpm_kernels.group_norm_silu.triton_tile import row, unit_rows

LARGEST_TILE = 16384  # values that a program holds


@triton.jit
def _mish(v):
    """v tanh(log(1 + e^v)) = v n / (n + 2) with n = e^v (e^v + 2); from 20 on the factor is 1 in float32."""
    e = tl.exp(tl.minimum(v, 20.0))
    n = e * (e + 2.0)
    return v * (n / (n + 2.0))


@triton.jit
def _group_norm_mish(
    y, x, weight, bias, scale, shift, residual, scale_stride, shift_stride, P, eps,
    C: tl.constexpr, GROUPS: tl.constexpr, ALL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = C // GROUPS
    n = (tl.program_id(0) // GROUPS).to(tl.int64)
    local = tl.arange(0, BLOCK_C)
    inside = local < SIZE
    c = tl.program_id(0) % GROUPS * SIZE + local
    pixels = tl.arange(0, BLOCK_P)
    start = n * P * C
    count = (P * SIZE).to(tl.float32)
    if ALL:
        mask = (pixels < P)[:, None] & inside[None, :]
        tile = tl.load(x + start + pixels[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(tl.sum(tile, axis=1), axis=0) / count
        tile = tl.where(mask, tile - mean, 0.0)
        variance = tl.sum(tl.sum(tile * tile, axis=1), axis=0) / count
    else:
        sums = tl.zeros([BLOCK_C], tl.float32)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + pixels
            mask = (p < P)[:, None] & inside[None, :]
            tile = tl.load(x + start + p[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
            sums += tl.sum(tile, axis=0)
        mean = tl.sum(sums, axis=0) / count
        squares = tl.zeros([BLOCK_C], tl.float32)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + pixels
            mask = (p < P)[:, None] & inside[None, :]
            tile = tl.load(x + start + p[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
            tile = tl.where(mask, tile - mean, 0.0)
            squares += tl.sum(tile * tile, axis=0)
        variance = tl.sum(squares, axis=0) / count
    factor = row(weight, 0, 0, c, inside) / tl.sqrt(variance + eps)
    offset = row(bias, 0, 0, c, inside)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + pixels
        mask = (p < P)[:, None] & inside[None, :]
        at = start + p[:, None] * C + c[None, :]
        if not ALL:
            tile = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean
        v = _mish(tile * factor[None, :] + offset[None, :])
        if scale is not None:
            v = v * row(scale, n, scale_stride, c, inside)[None, :]
        if shift is not None:
            v = v + row(shift, n, shift_stride, c, inside)[None, :]
        if residual is not None:
            v += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)


def make_launch(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, *, largest: int = LARGEST_TILE,
) -> Launch:  # fmt: skip
    """Return the only launch, also for ahead-of-time compilation (meta tensors suffice)."""
    pixels = math.prod(x.shape[2:])
    block_c, block_p = triton.next_power_of_2(x.shape[1] // num_groups), triton.next_power_of_2(pixels)
    fits = block_c * block_p <= largest
    if not fits:
        block_p = max(largest // 4 // block_c, 1)
    scale, scale_stride = unit_rows(scale)
    shift, shift_stride = unit_rows(shift)
    args = {
        "y": y, "x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual,
        "scale_stride": scale_stride, "shift_stride": shift_stride, "P": pixels, "eps": eps,
    }  # fmt: skip
    constexprs = {"C": x.shape[1], "GROUPS": num_groups, "ALL": fits, "BLOCK_P": block_p, "BLOCK_C": block_c}
    num_warps = min(max(block_c * block_p // 512, 1), 16)
    return Launch("group_norm_mish", _group_norm_mish, len(x) * num_groups, args, constexprs, num_warps)


def bind(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None,
) -> Callable[[], object]:  # fmt: skip
    """Return a function that writes y, which is not empty."""
    launches = [make_launch(y, x, weight, bias, num_groups, eps, scale, shift, residual)]
    return lambda: run_launches(launches, x)


def aot_variants() -> list[Variant]:
    """Return variants: both norms of a block at a robot's horizons, in registers or not."""
    variants = []
    for tag, dtype, n, channels, length, film, residual in (
        ("film", torch.float16, 1, 2048, 4, True, False),
        ("film", torch.bfloat16, 1, 2048, 16, True, False),
        ("film", torch.float32, 1, 512, 64, True, False),
        ("shift", torch.float16, 1, 512, 16, False, False),
        ("residual", torch.float16, 64, 1024, 32, None, True),
        ("residual", torch.float32, 64, 1024, 32, None, True),
        ("long", torch.float16, 8, 512, 4096, True, True),
        ("long", torch.float32, 8, 512, 4096, True, True),
    ):
        x = torch.empty(n, length, channels, dtype=dtype, device="meta").movedim(-1, 1)
        vector, rows = torch.empty(channels, device="meta"), torch.empty(n, 2 * channels, device="meta")
        scale, shift = rows.chunk(2, dim=1)
        made = make_launch(
            x, x, vector, vector, 8, 1e-5, scale if film else None, None if film is None else shift,
            x if residual else None,
        )  # fmt: skip
        name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        variants.append(made.variant(f"{name}, {tag}"))
    return variants
