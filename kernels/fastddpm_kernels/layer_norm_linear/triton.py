"""Multiply pixels as they are, and correct the products by each pixel's mean and deviation.

One program makes a tile of the result, [BLOCK_M, BLOCK_N], in one accumulator, or two if values are gated. It reads all
channels of its pixels, so it has their statistics when the products are complete: sums of differences from the pixel's
first channel, which do not cancel where a mean is large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels.device.processors import num_processors
from fastddpm_kernels.device.tensor_float import to_tf32
from fastddpm_kernels.device.variant import Launch, Variant, run_launches
from fastddpm_kernels.layout import rows
from fastddpm_kernels.pointwise_conv.triton import (
    FMA,
    GROUP_M,
    NUM_STAGES_OF_64,
    OPTIONS,
    Tile,
    choose_tile,
    unit_of,
    warps_of_64,
)


@triton.jit
def _layer_norm_linear(
    y, x, weight, sums, bias, M, eps,
    Y_STRIDE: tl.constexpr, X_STRIDE: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, GATE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_n: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    row = (group * GROUP_M + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)

    # Entries beyond the end are computed from the last row or column, and not stored.
    row_in = tl.minimum(row, M - 1).to(tl.int64)
    column_in = tl.minimum(column, COLUMNS - 1)
    k = tl.arange(0, BLOCK_K)
    a_pointers = x + row_in[:, None] * X_STRIDE + k[None, :]
    b_pointers = weight + column_in[None, :] * C + k[:, None]
    first = tl.load(x + row_in * X_STRIDE).to(tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    gates = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, C, BLOCK_K):
        inside = start + k < C
        a = tl.load(a_pointers, mask=inside[None, :], other=0.0)
        b = tl.load(b_pointers, mask=inside[:, None], other=0.0)
        d = tl.where(inside[None, :], a.to(tl.float32) - first[:, None], 0.0)
        total += tl.sum(d, axis=1)
        squares += tl.sum(d * d, axis=1)
        if x.dtype.element_ty == tl.float32:
            a = d  # as exact, and its products do not cancel; in 16 bits the difference would be rounded
            if PRECISION == "tf32":
                a = to_tf32(a)
                b = to_tf32(b)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if GATE:
            b = tl.load(b_pointers + COLUMNS * C, mask=inside[:, None], other=0.0)
            if PRECISION == "tf32" and x.dtype.element_ty == tl.float32:
                b = to_tf32(b)
            gates = tl.dot(a, b, gates, input_precision=PRECISION)
        a_pointers += BLOCK_K
        b_pointers += BLOCK_K
    moved = total / C
    mean = moved[:, None]
    if x.dtype.element_ty != tl.float32:
        mean += first[:, None]
    inverse = tl.rsqrt(squares / C - moved * moved + eps)[:, None]
    of_row = tl.load(sums + column_in).to(tl.float32)[None, :]
    acc = (acc - mean * of_row) * inverse + tl.load(bias + column_in).to(tl.float32)[None, :]
    if GATE:
        of_row = tl.load(sums + COLUMNS + column_in).to(tl.float32)[None, :]
        gates = (gates - mean * of_row) * inverse + tl.load(bias + COLUMNS + column_in).to(tl.float32)[None, :]
        acc *= 0.5 * gates * (1.0 + tl.erf(gates * 0.7071067811865476))
    mask = (row < M)[:, None] & (column < COLUMNS)[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * Y_STRIDE + column[None, :], acc.to(y.dtype.element_ty), mask=mask)


def make_launch(
    y: Tensor, x: Tensor, weight: Tensor, sums: Tensor, bias: Tensor, eps: float, gate: bool, allow_tf32: bool,
    processors: int, tile: Tile | None = None,
) -> tuple[Launch, Tile]:  # fmt: skip
    """Return the only launch, also for ahead-of-time compilation (meta tensors suffice)."""
    columns, channels = y.shape[1], x.shape[1]
    unit = unit_of(x.dtype, allow_tf32)
    m = y.numel() // columns
    tile = tile or choose_tile(m, columns, channels, 0, x.itemsize, unit, processors)
    while gate and tile.block_m * tile.block_n > 1024 * tile.num_warps:  # of two accumulators
        tile = replace(tile, block_n=tile.block_n // 2)
    if unit is FMA and tile.block_m * tile.block_n > 64 * 64:
        tile = replace(tile, block_m=64, block_n=64)
    args = {"y": y, "x": x, "weight": weight, "sums": sums, "bias": bias, "M": m, "eps": float(eps)}
    constexprs = {"Y_STRIDE": _stride(y), "X_STRIDE": _stride(x), "C": channels, "COLUMNS": columns, "GATE": gate,
                  "PRECISION": "ieee" if unit is FMA else "tf32", "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                  "BLOCK_K": min(tile.block_k, 64), "GROUP_M": GROUP_M}  # fmt: skip
    options = {"num_stages": min(tile.num_stages, 3), **OPTIONS}
    programs = tile.programs(m, columns)
    return Launch("layer_norm_linear", _layer_norm_linear, programs, args, constexprs, tile.num_warps, options), tile


def _stride(x: Tensor) -> int:
    view = rows(x)
    return 0 if view is None else view.stride(0)


def bind(
    y: Tensor, x: Tensor, weight: Tensor, sums: Tensor, bias: Tensor, eps: float, gate: bool, allow_tf32: bool
) -> Callable[[], object]:
    """Return a function that writes y. Both images have views as rows of adjacent channels; y is not empty."""
    made, tile = make_launch(y, x, weight, sums, bias, eps, gate, allow_tf32, num_processors(x.device))
    if warps_of_64(x.device):
        options = {**made.options, "num_stages": min(tile.num_stages, NUM_STAGES_OF_64)}
        made = replace(made, num_warps=max(tile.num_warps // 2, 1), options=options)
    return partial(run_launches, [made], x)


def aot_variants() -> list[Variant]:
    """Return Stable Diffusion's layers: queries, keys and values, queries alone, and the gated layer."""
    variants = []
    for tag, m, o, c, gate, dtype, allow_tf32 in (
        ("qkv 64x64, batch 2", 8192, 960, 320, False, torch.float16, False),
        ("qkv 64x64, batch 2", 8192, 960, 320, False, torch.bfloat16, False),
        ("qkv 64x64, batch 2", 8192, 960, 320, False, torch.float32, True),
        ("qkv 64x64, batch 2", 8192, 960, 320, False, torch.float32, False),
        ("q 8x8, batch 2", 128, 1280, 1280, False, torch.float16, False),
        ("gated 64x64, batch 2", 8192, 1280, 320, True, torch.float16, False),
        ("gated 64x64, batch 2", 8192, 1280, 320, True, torch.float32, True),
        ("gated 16x16, batch 2", 512, 5120, 1280, True, torch.float16, False),
        ("gated 8x8, batch 2", 128, 5120, 1280, True, torch.float16, False),
        ("tails", 1000, 100, 100, True, torch.float16, False),
    ):
        y, x = (torch.empty(1, 1, m, k, dtype=dtype, device="meta").movedim(-1, 1) for k in (o, c))
        weight = torch.empty((1 + gate) * o, c, dtype=dtype, device="meta")
        vector = torch.empty(len(weight), device="meta")
        made, tile = make_launch(y, x, weight, vector, vector, 1e-5, gate, allow_tf32, 132)
        kind = "tf32" if allow_tf32 else {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        variants.append(
            replace(
                made.variant(f"{kind}, {tag}"),
                num_warps_of_64=max(tile.num_warps // 2, 1),
                num_stages=made.options["num_stages"],
                num_stages_of_64=NUM_STAGES_OF_64,
                options=OPTIONS,
            )
        )
    return variants
