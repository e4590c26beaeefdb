"""Compute a 1x1 convolution over two sources as one matrix product: rows are pixels, columns are channels.

One program makes a tile of the output, `[BLOCK_M, BLOCK_N]`, in one float32 accumulator: first over the channels of
x, then over those of x2, then bias and residual, then one store. Programs that share rows of x run next to each
other, so that x comes from device memory once; the weights are small and stay in L2.

Without a choice from a table, a model of the time chooses the tile (`choose_tile`): the work of the busiest processor,
and the latency of each program's loop. A table may also choose the vendor's matrix product for 16-bit values, which has
the same factors but rounds after each source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels import tuned
from fastddpm_kernels.device.processors import num_processors
from fastddpm_kernels.device.tensor_float import to_tf32
from fastddpm_kernels.device.variant import Launch, Variant, packaged_variants
from fastddpm_kernels.group_norm_silu.plan import LARGEST_TILE
from fastddpm_kernels.layout import rows
from fastddpm_kernels.pointwise_conv.formula import by_matmul

NUM_STAGES_OF_64 = 2  # on GPUs with 64 threads to a warp: one tile in registers, one in 64 KiB of shared memory
GROUP_M = 8  # tiles of rows that run side by side for all columns
# Float32 products without tensor cores use fused multiply-adds. Nothing else in the kernel could be fused.
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def _accumulate(
    acc, x, weight, row, column,
    STRIDE: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return acc + x[row, :] weight[column, :]^T. All rows and columns must be inside."""
    k = tl.arange(0, BLOCK_K)
    a_pointers = x + row[:, None] * STRIDE + k[None, :]
    b_pointers = weight + column[None, :] * C + k[:, None]
    for start in range(0, C, BLOCK_K):
        if C % BLOCK_K == 0:
            a = tl.load(a_pointers)
            b = tl.load(b_pointers)
        else:
            inside = start + k < C
            a = tl.load(a_pointers, mask=inside[None, :], other=0.0)
            b = tl.load(b_pointers, mask=inside[:, None], other=0.0)
        if PRECISION == "tf32" and a.dtype == tl.float32:
            a = to_tf32(a)
            b = to_tf32(b)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_pointers += BLOCK_K
        b_pointers += BLOCK_K
    return acc


@triton.jit
def _pointwise_conv(
    y, x, weight, x2, weight2, bias, residual,
    M, Y_STRIDE: tl.constexpr, X_STRIDE: tl.constexpr, X2_STRIDE: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr,
    C: tl.constexpr, C2: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_n: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    row = (group * GROUP_M + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)

    # Entries beyond the end are computed from the last row or column, and not stored.
    row_in = tl.minimum(row, M - 1).to(tl.int64)
    column_in = column if COLUMNS % BLOCK_N == 0 else tl.minimum(column, COLUMNS - 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = _accumulate(acc, x, weight, row_in, column_in, X_STRIDE, C, PRECISION, BLOCK_K)
    if x2 is not None:
        acc = _accumulate(acc, x2, weight2, row_in, column_in, X2_STRIDE, C2, PRECISION, BLOCK_K)
    if bias is not None:
        acc += tl.load(bias + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[None, :]
    row_out = row.to(tl.int64)[:, None]
    mask = (row < M)[:, None] & (column < COLUMNS)[None, :]
    if residual is not None:
        acc += tl.load(residual + row_out * RESIDUAL_STRIDE + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row_out * Y_STRIDE + column[None, :], acc.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Tile:
    """The division of a call into programs, and their compilation. `num_warps` counts warps of 32 threads."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def programs(self, m: int, o: int) -> int:
        return -(-m // self.block_m) * -(-o // self.block_n)


@dataclass(frozen=True)
class Unit:
    """A multiplying unit of a GPU: its speed and tiles.

    Attributes:
        rate: multiply-adds per cycle of one processor.
        depth: bytes of K in a step of the loop, for tiles of 128 rows or columns and for smaller ones.
        shapes: `(block_m, block_n, num_warps)`, large ones first.
    """

    rate: int
    depth: tuple[int, int]
    shapes: tuple[tuple[int, int, int], ...]


_TENSOR_SHAPES = (
    (128, 128, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4), (128, 32, 4), (64, 32, 4), (32, 64, 4), (32, 32, 4),
    (64, 16, 4), (16, 64, 4), (32, 16, 4), (16, 32, 4), (16, 16, 2),
)  # fmt: skip
_FMA_SHAPES = (
    (128, 128, 8), (128, 64, 8), (64, 128, 8), (64, 64, 4), (64, 32, 4), (32, 64, 4), (32, 32, 4), (32, 16, 4),
    (16, 32, 4), (16, 16, 2),
)  # fmt: skip
# Cycles are those of Hopper; on other GPUs the ratios differ less than neighbouring tiles do.
HALF = Unit(2048, (128, 256), _TENSOR_SHAPES)
TF32 = Unit(1024, (128, 256), _TENSOR_SHAPES)
FMA = Unit(128, (64, 64), _FMA_SHAPES)
BYTES_PER_CYCLE = 64  # from L2 to one processor
SHARED = 96 * 1024  # bytes a program may fill: two fit a data-centre GPU's processor, one that of a smaller GPU


@lru_cache
def choose_tile(m: int, o: int, c: int, c2: int, itemsize: int, unit: Unit, processors: int) -> Tile:
    """Return the tile of least predicted time; among equals the largest, whose programs read the least.

    The prediction is the cycles of the processor with the most programs. For each of its K channels a program
    multiplies `block_m * block_n` pairs and reads `block_m + block_n` values from L2 (which overlap, but never
    wholly); then it moves its result. So a large call gets large tiles, and a small one tiles so small that it fills
    the chip. Splitting K over programs would fill it further, but costs a second launch, or a sum whose order changes
    from run to run.

    Args:
        m, o: rows (pixels of the whole batch) and columns (output channels).
        c, c2: channels of x and of x2 (0 if there is none).
        itemsize: bytes of a value.
        unit: the multiplying unit.
        processors: the number to fill.
    """
    best, least = None, float("inf")
    for block_m, block_n, num_warps in unit.shapes:
        tile = Tile(block_m, block_n, 0, num_warps, 0)
        multiply = block_m * block_n / unit.rate
        read = (block_m + block_n) * itemsize / BYTES_PER_CYCLE
        result = block_m * block_n * itemsize / BYTES_PER_CYCLE
        cycles = -(-tile.programs(m, o) // processors) * ((c + c2) * (multiply + read) + result)
        if cycles < least:
            best, least = tile, cycles
    assert best is not None
    block_k = _depth(c, c2, unit.depth[max(best.block_m, best.block_n) < 128] // itemsize)
    stage = (best.block_m + best.block_n) * block_k * itemsize
    return replace(best, block_k=block_k, num_stages=min(max(SHARED // stage, 2), 4))


def _depth(c: int, c2: int, deepest: int) -> int:
    """Return the largest power of two that divides both; if it is far below `deepest`, one with masked loads."""
    block_k = deepest
    while block_k > max(deepest // 4, 16) and (c % block_k or c2 % block_k):
        block_k //= 2
    if c % block_k == 0 and c2 % block_k == 0:
        return block_k
    return min(deepest, max(triton.next_power_of_2(max(c, c2)), 16))


def make_launch(
    y: Tensor, x: Tensor, weight: Tensor, x2: Tensor | None, weight2: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, allow_tf32: bool, processors: int, tile: Tile | None = None,
) -> tuple[Launch, Tile]:  # fmt: skip
    """Return the only launch, also for ahead-of-time compilation (meta tensors suffice).

    `tile`: overrides the one predicted to be the fastest."""
    (o, c), c2 = weight.shape, 0 if weight2 is None else weight2.shape[1]
    unit = unit_of(x.dtype, allow_tf32)
    m = y.numel() // o
    tile = tile or choose_tile(m, o, c, c2, x.itemsize, unit, processors)
    args = {"y": y, "x": x, "weight": weight, "x2": x2, "weight2": weight2, "bias": bias,
            "residual": residual, "M": m}  # fmt: skip
    # Known at compile time, a stride that is a multiple of 8 and not of 16 still gives accesses of 16 bytes.
    constexprs = {"Y_STRIDE": _row_stride(y), "X_STRIDE": _row_stride(x), "X2_STRIDE": _row_stride(x2),
                  "RESIDUAL_STRIDE": _row_stride(residual), "C": c, "C2": c2, "COLUMNS": o,
                  "PRECISION": "ieee" if unit is FMA else "tf32", "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                  "BLOCK_K": tile.block_k, "GROUP_M": GROUP_M}  # fmt: skip
    launch = Launch("pointwise_conv", _pointwise_conv, tile.programs(m, o), args, constexprs, tile.num_warps)
    return launch, tile


def unit_of(dtype: torch.dtype, allow_tf32: bool) -> Unit:
    """Return the unit that multiplies values of a dtype."""
    return HALF if dtype.itemsize == 2 else TF32 if allow_tf32 else FMA


def _row_stride(x: Tensor | None) -> int:
    view = None if x is None else rows(x)
    return 0 if view is None else view.stride(0)


def bind(
    y: Tensor, x: Tensor, weight: Tensor, x2: Tensor | None, weight2: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, allow_tf32: bool,
) -> Callable[[], object]:  # fmt: skip
    """Return a function that writes y. All images have views as rows of adjacent channels (`rows`); y is not empty."""
    (columns, channels), second = weight.shape, 0 if weight2 is None else weight2.shape[1]
    shape = (y.numel() // columns, columns, channels, second, int(residual is not None), int(allow_tf32))
    choice = tuned.choice("pointwise_conv", x.device, x.dtype, shape)
    return bind_choice(choice, y, x, weight, x2, weight2, bias, residual, allow_tf32)


def bind_choice(
    choice: tuned.Choice | None, y: Tensor, x: Tensor, weight: Tensor, x2: Tensor | None, weight2: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, allow_tf32: bool,
) -> Callable[[], object]:  # fmt: skip
    """Return a function that writes y by a choice; None for the heuristic one."""
    if choice == MATMUL and x.itemsize == 2:  # torch's own switch, not `allow_tf32`, would decide for float32
        return torch.no_grad()(lambda: by_matmul(y, x, weight, x2, weight2, bias, residual))
    tile, processors = tile_of(choice), num_processors(x.device)
    made, tile = make_launch(y, x, weight, x2, weight2, bias, residual, allow_tf32, processors, tile)
    wide = warps_of_64(x.device)
    num_warps = max(tile.num_warps // 2, 1) if wide else tile.num_warps
    num_stages = min(tile.num_stages, NUM_STAGES_OF_64) if wide else tile.num_stages

    def run() -> None:
        with torch.cuda.device_of(x):
            made.kernel[(made.programs,)](
                **made.args, **made.constexprs, num_warps=num_warps, num_stages=num_stages, **OPTIONS
            )

    return run


MATMUL = {"implementation": "addmm"}


def tile_of(choice: tuned.Choice | None) -> Tile | None:
    """Return the tile of a choice, or None if it names no tile that a kernel can hold."""
    if choice is None or choice == MATMUL or choice["block_m"] * choice["block_n"] > LARGEST_TILE:
        return None
    return Tile(**choice)


def warps_of_64(device: torch.device) -> bool:
    """Return whether the GPU has 64 threads to a warp."""
    if device.type != "cuda" or torch.version.hip is None:
        return False
    return torch.cuda.get_device_properties(device).warp_size == 64


def aot_variants() -> list[Variant]:
    """Return every precision at a large call, and the tiles and tails of small ones."""
    variants = []
    for tag, m, o, c, c2, bias, residual, dtype, allow_tf32 in (
        ("32x32", 262144, 128, 256, 0, True, False, torch.float16, False),
        ("32x32", 262144, 128, 256, 0, True, False, torch.bfloat16, False),
        ("32x32", 262144, 128, 256, 0, True, False, torch.float32, True),
        ("32x32", 262144, 128, 256, 0, True, False, torch.float32, False),
        ("32x32 concat residual", 262144, 256, 384, 128, True, True, torch.float16, False),
        ("32x32 concat residual", 262144, 256, 384, 128, True, True, torch.float32, True),
        ("32x32 concat residual", 262144, 256, 384, 128, True, True, torch.float32, False),
        ("qkv 16x16", 65536, 768, 256, 0, True, False, torch.float16, False),
        ("32x32 batch 4", 4096, 256, 256, 0, True, True, torch.float16, False),
        ("32x32 batch 1", 1024, 128, 256, 128, True, False, torch.float16, False),
        ("32x32 batch 1", 1024, 128, 256, 128, True, False, torch.float32, True),
        ("32x32 batch 1", 1024, 128, 256, 128, True, False, torch.float32, False),
        ("16x16 batch 1", 256, 256, 256, 0, True, True, torch.float16, False),
        ("4x4 batch 1", 16, 256, 512, 0, True, True, torch.float16, False),
        ("4x4 batch 1", 16, 256, 512, 0, True, True, torch.float32, True),
        ("4x4 batch 1", 16, 256, 512, 0, True, True, torch.float32, False),
        ("one row", 1, 512, 128, 0, True, False, torch.float16, False),
        ("tails", 1000, 100, 3, 0, False, False, torch.float16, False),
        ("tails", 70001, 100, 100, 8, False, False, torch.float16, False),
    ):
        y, x, weight, x2, weight2 = (
            torch.empty(size, dtype=dtype, device="meta") for size in ((m, o), (m, c), (o, c), (m, c2), (o, c2))
        )
        made, tile = make_launch(
            y, x, weight, x2 if c2 else None, weight2 if c2 else None,
            torch.empty(o, device="meta") if bias else None, y if residual else None, allow_tf32, 132,
        )  # fmt: skip
        kind = "tf32" if allow_tf32 else {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        variants.append(
            replace(
                made.variant(f"{kind}, {tag}, {tile.block_m}x{tile.block_n}x{tile.block_k}"),
                num_warps_of_64=max(tile.num_warps // 2, 1),
                num_stages=tile.num_stages,
                num_stages_of_64=NUM_STAGES_OF_64,
                options=OPTIONS,
            )
        )
    return variants + packaged_variants(("pointwise_conv",), tuned_variants)


def tuned_variants(key: tuned.Key, choice: tuned.Choice) -> list[Variant]:
    """Return the kernel of a tuned choice; none if it is the vendor's."""
    tile = tile_of(choice)
    if tile is None:
        return []
    m, o, c, c2, residual, allow_tf32 = key.shape
    y, x, weight, x2, weight2 = (
        torch.empty(size, dtype=key.dtype, device="meta") for size in ((m, o), (m, c), (o, c), (m, c2), (o, c2))
    )
    bias = torch.empty(o, device="meta")
    made, _ = make_launch(
        y, x, weight, x2 if c2 else None, weight2 if c2 else None, bias, y if residual else None, bool(allow_tf32), 132,
        tile,
    )  # fmt: skip
    return [
        replace(
            made.variant(f"tuned, {key.dtype}, {key.shape}"), num_warps_of_64=max(tile.num_warps // 2, 1),
            num_stages=tile.num_stages, num_stages_of_64=min(tile.num_stages, NUM_STAGES_OF_64), options=OPTIONS,
        )
    ]  # fmt: skip
