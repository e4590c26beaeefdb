"""Compute the attention block: a program makes some pixels of a sample, reading all of them.

1. Statistics: all pixels of the sample, in blocks, as in the first pass of the norm.
2. Queries: the normalised own pixels times `scores`, times the norm's scale.
3. Attention, with an online softmax (Dao et al. 2022, arXiv:2205.14135): raw pixels are keys and values.
4. The norm's scale and shift, the product with `values`, the bias and the residual.

The raw pixels' means add one number to all scores of a query, which the softmax does not see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels.conv.statistics import statistics_shape
from fastddpm_kernels.conv.triton import finish_launch
from fastddpm_kernels.conv.triton_parts import finish, write_coefficients
from fastddpm_kernels.device.processors import num_processors
from fastddpm_kernels.device.variant import Launch, Variant, run_launches
from fastddpm_kernels.group_norm_silu.triton_tile import membership, row, to_channels, to_groups

OPTIONS = {"enable_fp_fusion": True}
TARGETS = ("sm_80", "sm_90", "sm_100")  # a plan for AMD has no whole blocks, whose tiles spill there
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attention_block(
    y, x, weight, bias, scores, scores_bias, values, values_bias, given, table, statistics, blocks,
    arrivals, N, P, eps, units, plane_in, plane,
    C: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
    UNIT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = C // GROUPS
    n = tl.program_id(0) // tl.cdiv(P, BLOCK_M)
    block = tl.program_id(0) % tl.cdiv(P, BLOCK_M)
    whole = x
    x += n.to(tl.int64) * P * C
    c = tl.arange(0, BLOCK_C)
    mask_c = c < C
    key = tl.arange(0, BLOCK_N)

    coefficients = table
    if given is not None:
        coefficients += tl.program_id(0).to(tl.int64) * (2 * (C + GROUPS))
        write_coefficients(
            coefficients, given, plane_in, units, None, 0, 0, weight, bias, None, None, 0, 0, eps, n, P, 0, GROUPS,
            SIZE, C, 0, BLOCK_G, COLUMNS, 128,
        )  # fmt: skip
        a = tl.load(coefficients + c, mask=mask_c, other=0.0)
        b = tl.load(coefficients + C + c, mask=mask_c, other=0.0)
    else:
        mean = tl.zeros([BLOCK_C], tl.float32)
        squares = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, P, BLOCK_N):
            mask = (start + key < P)[:, None] & mask_c[None, :]
            tile = tl.load(x + (start + key)[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
            seen = tl.cast(start, tl.float32)
            new = tl.minimum(P - start, BLOCK_N).to(tl.float32)
            tile_mean = tl.sum(tile, axis=0) / new
            tile = tl.where(mask, tile - tile_mean[None, :], 0.0)
            delta = tile_mean - mean
            mean += delta * (new / (seen + new))
            squares += tl.sum(tile * tile, axis=0) + delta * delta * (seen * new / (seen + new))
        member = membership(SIZE, BLOCK_C, BLOCK_G)
        group_mean = to_channels(to_groups(mean, member) / SIZE, member)
        delta = tl.where(mask_c, mean - group_mean, 0.0)
        variance = to_groups(squares / P + delta * delta, member) / SIZE
        a = row(weight, 0, 0, c, mask_c) * to_channels(tl.rsqrt(variance + eps), member)
        b = row(bias, 0, 0, c, mask_c) - group_mean * a

    p = block * BLOCK_M + tl.arange(0, BLOCK_M)
    own = tl.minimum(p, P - 1)  # pixels beyond the end are computed from the last one, and not stored
    k = tl.arange(0, BLOCK_K)
    q = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(0, C, BLOCK_K):
        inside = first + k < C
        h = tl.load(x + own[:, None] * C + (first + k)[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        if given is not None:
            h = h * tl.load(coefficients + first + k, mask=inside, other=0.0)[None, :]
            h += tl.load(coefficients + C + first + k, mask=inside, other=0.0)[None, :]
        else:
            h = h * tl.gather(a, first + k, 0)[None, :] + tl.gather(b, first + k, 0)[None, :]
        at = scores + (first + k)[:, None] * C + c[None, :]
        q = tl.dot(
            h.to(x.dtype.element_ty), tl.load(at, mask=inside[:, None] & mask_c[None, :], other=0.0), q,
            input_precision=PRECISION,
        )  # fmt: skip
    steepest = tl.maximum(
        tl.max(tl.abs(a), axis=0), 1e-30
    )  # kept apart: the norm of a flat image scales beyond float16
    q = (q + row(scores_bias, 0, 0, c, mask_c)[None, :]) * (a / steepest)[None, :]
    q = q.to(x.dtype.element_ty)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_N):
        mask = (start + key < P)[:, None] & mask_c[None, :]
        tile = tl.load(x + (start + key)[:, None] * C + c[None, :], mask=mask, other=0.0)
        s = tl.dot(q, tile.T, input_precision=PRECISION) * (steepest * LOG2_E)
        s = tl.where((start + key < P)[None, :], s, float("-inf"))
        higher = tl.maximum(largest, tl.max(s, axis=1))
        factor = tl.exp2(largest - higher)
        s = tl.exp2(s - higher[:, None]).to(x.dtype.element_ty)
        total = total * factor + tl.sum(s.to(tl.float32), axis=1)  # of what is multiplied: the means then cancel
        sums = tl.dot(s, tile, sums * factor[:, None], input_precision=PRECISION)
        largest = higher
    sums = sums / total[:, None] * a[None, :] + b[None, :]
    sums = sums.to(x.dtype.element_ty)

    o = tl.arange(0, BLOCK_O)
    for first in range(0, C, BLOCK_O):
        inside = first + o < C
        at = values + (first + o)[None, :] * C + c[:, None]
        out = tl.dot(
            sums, tl.load(at, mask=mask_c[:, None] & inside[None, :], other=0.0), input_precision=PRECISION
        )  # fmt: skip
        finish(
            out, y, values_bias, None, 0, whole, statistics, blocks, arrivals, plane, n, own * 0, block * BLOCK_M,
            p < P, p, first, N, P, C, block, tl.cdiv(P, BLOCK_M), P, False, BLOCK_M, UNIT,
        )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """Own pixels, keys, and channels of a step of the first and of the last product. Warps are of 32 threads."""

    block_m: int
    block_n: int
    block_k: int
    block_o: int
    num_warps: int
    num_stages: int


def choose_tile(pixels: int, channels: int, itemsize: int, programs_of_64: int, processors: int, unit: int = 0) -> Tile:
    """Return tiles that fit shared memory: a stage of a loop holds at most 32 KiB of pixels or of a matrix.

    All programs of a sample read as much, so 64 own pixels are best where that leaves no processor idle. A tile
    of the result has `unit` channels or more, those of a block of statistics. A block has no
    more keys than pixels, and a step no more channels than twice its own pixels: otherwise blocks of 16 own pixels
    spill for sm_80 or sm_100. The keys do not depend on the batch, so the softmax has the same steps in every batch.
    """
    width = max(triton.next_power_of_2(channels), 16)
    wide = 32 * 1024 // (width * itemsize)
    step = min(max(wide, 16), 64, width)
    block_m = min(max(triton.next_power_of_2(pixels), 16), 64 if itemsize == 2 else 32)
    while block_m > 16 and 2 * programs_of_64 * (64 // block_m) <= processors:
        block_m //= 2
    block_n = min(step, max(triton.next_power_of_2(pixels), 16))
    return Tile(block_m, block_n, min(step, 2 * block_m), max(step, unit), 8 if width >= 256 else 4, 2)


def make_launch(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scores: Tensor,
    scores_bias: Tensor, values: Tensor, values_bias: Tensor, allow_tf32: bool, processors: int,
    given: Tensor | None = None, statistics: Tensor | None = None,
) -> tuple[Launch, Tile]:  # fmt: skip
    """Return the only launch, also for ahead-of-time compilation (meta tensors suffice)."""
    n, channels, height, width = x.shape
    pixels = height * width
    unit = 0 if statistics is None else channels // statistics.shape[2]
    tile = choose_tile(pixels, channels, x.itemsize, n * triton.cdiv(pixels, 64), processors, unit)
    programs, table, columns = n * triton.cdiv(pixels, tile.block_m), None, 1
    if given is not None:
        table = torch.empty(programs * 2 * (channels + num_groups), dtype=torch.float32, device=x.device)
        columns = min(triton.next_power_of_2(given.shape[2] // num_groups), 32)
    blocks = arrivals = None
    parts = triton.cdiv(pixels, tile.block_m)
    if statistics is not None and parts > 1:
        blocks = torch.empty(2 * n * parts * statistics.shape[2], dtype=torch.float32, device=x.device)
        arrivals = torch.zeros(n * triton.cdiv(channels, tile.block_o), dtype=torch.int32, device=x.device)
    args = {"y": y, "x": x, "weight": weight, "bias": bias, "scores": scores, "scores_bias": scores_bias,
            "values": values, "values_bias": values_bias, "given": given, "table": table, "statistics": statistics,
            "blocks": blocks, "arrivals": arrivals,
            "N": n, "P": pixels, "eps": float(eps), "units": 0 if given is None else given.shape[2],
            "plane_in": 0 if given is None else given[0].numel(),
            "plane": 0 if statistics is None else statistics[0].numel()}  # fmt: skip
    precise = x.dtype == torch.float32 and not allow_tf32
    constexprs = {"C": channels, "GROUPS": num_groups, "PRECISION": "ieee" if precise else "tf32",
                  "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_O": tile.block_o,
                  "BLOCK_C": max(triton.next_power_of_2(channels), 16),
                  "BLOCK_G": triton.next_power_of_2(num_groups),
                  "UNIT": max(unit, 1), "COLUMNS": columns}  # fmt: skip
    options = {"num_stages": tile.num_stages, **OPTIONS}
    return Launch("attention_block", _attention_block, programs, args, constexprs, tile.num_warps, options), tile


def leaves_statistics(x: Tensor) -> bool:
    """Return whether the kernel itself leaves the statistics of its result: larger tiles would spill registers."""
    return x.shape[1] <= 256 and x.itemsize == 2


def bind(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scores: Tensor,
    scores_bias: Tensor, values: Tensor, values_bias: Tensor, allow_tf32: bool, given: Tensor | None,
    statistics: Tensor | None,
) -> Callable[[], object]:  # fmt: skip
    """Return a function that writes y. Images are channels-last and not empty."""
    own = statistics if leaves_statistics(x) else None
    made, _ = make_launch(
        y, x, weight, bias, num_groups, eps, scores, scores_bias, values, values_bias, allow_tf32,
        num_processors(x.device), given, own,
    )  # fmt: skip
    launches = [made]
    if statistics is not None and own is None:
        launches.append(finish_launch(y, y, None, None, None, statistics, 1))
    return partial(run_launches, launches, x)


def aot_variants() -> list[Variant]:
    """Return the attention levels of DDPM's published U-Nets, and tails; for the GPUs whose plans use the kernel."""
    variants = []
    for tag, n, channels, side, groups, dtype, allow_tf32 in (
        ("16x16, batch 1", 1, 256, 16, 32, torch.float16, False),
        ("16x16, batch 64", 64, 256, 16, 32, torch.float16, False),
        ("16x16, batch 64", 64, 256, 16, 32, torch.bfloat16, False),
        ("16x16, batch 64", 64, 256, 16, 32, torch.float32, True),
        ("16x16, batch 64", 64, 256, 16, 32, torch.float32, False),
        ("4x4, batch 1", 1, 256, 4, 32, torch.float16, False),
        ("16x16, batch 8", 8, 512, 16, 32, torch.float16, False),
        ("16x16, batch 8", 8, 512, 16, 32, torch.float32, True),
        ("tails", 2, 100, 9, 10, torch.float16, False),
        ("16x16, batch 1, statistics", 1, 256, 16, 32, torch.float16, False),
        ("16x16, batch 64, statistics", 64, 256, 16, 32, torch.float16, False),
        ("4x4, batch 1, statistics", 1, 256, 4, 32, torch.float16, False),
        ("16x16, batch 8, statistics", 8, 512, 16, 32, torch.float16, False),
    ):
        x = torch.empty(n, side, side, channels, dtype=dtype, device="meta").permute(0, 3, 1, 2)
        vector = torch.empty(channels, device="meta")
        matrix = torch.empty(channels, channels, dtype=dtype, device="meta")
        operands = (vector, vector, groups, 1e-6, matrix, vector, matrix, vector, allow_tf32)
        blocks = torch.empty(statistics_shape(x, channels // groups), device="meta") if "statistics" in tag else None
        left = blocks if leaves_statistics(x) else None
        made, tile = make_launch(x, x, *operands, num_processors(x.device), blocks, left)
        kind = "tf32" if allow_tf32 else {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        made_for = made.variant(f"{kind}, {channels} channels, {tag}")
        variants += [
            replace(made_for, num_stages=tile.num_stages, options=OPTIONS, target=target) for target in TARGETS
        ]
    return variants
