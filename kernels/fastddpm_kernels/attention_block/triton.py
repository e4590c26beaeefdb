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

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels.device.strided import on_device_of
from fastddpm_kernels.device.variant import Launch, Variant
from fastddpm_kernels.group_norm_silu.plan import num_processors
from fastddpm_kernels.group_norm_silu.triton_tile import membership, row, to_channels, to_groups

OPTIONS = {"enable_fp_fusion": True}
TARGETS = ("sm_80", "sm_90", "sm_100")  # a plan for AMD has no whole blocks, whose tiles spill there
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attention_block(
    y, x, weight, bias, scores, scores_bias, values, values_bias, P, eps,
    C: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = C // GROUPS
    blocks = tl.cdiv(P, BLOCK_M)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    x += n * P * C
    y += n * P * C
    c = tl.arange(0, BLOCK_C)
    mask_c = c < C
    key = tl.arange(0, BLOCK_N)

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

    p = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = tl.minimum(p, P - 1)  # pixels beyond the end are computed from the last one, and not stored
    k = tl.arange(0, BLOCK_K)
    q = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(0, C, BLOCK_K):
        inside = first + k < C
        h = tl.load(x + own[:, None] * C + (first + k)[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
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
        mask = (p < P)[:, None] & inside[None, :]
        place = p[:, None] * C + (first + o)[None, :]
        out += tl.load(values_bias + first + o, mask=inside, other=0.0).to(tl.float32)[None, :]
        out += tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + place, out.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Tile:
    """Own pixels, keys, and channels of a step of the first and of the last product. Warps are of 32 threads."""

    block_m: int
    block_n: int
    block_k: int
    block_o: int
    num_warps: int
    num_stages: int


def choose_tile(pixels: int, channels: int, itemsize: int, programs_of_64: int, processors: int) -> Tile:
    """Return tiles that fit shared memory: a stage of a loop holds at most 32 KiB of pixels or of a matrix.

    All programs of a sample read as much, so 64 own pixels are best where that leaves no processor idle.
    """
    width = max(triton.next_power_of_2(channels), 16)
    wide = 32 * 1024 // (width * itemsize)
    step = min(max(wide, 16), 64, width)
    block_m = min(max(triton.next_power_of_2(pixels), 16), 64 if itemsize == 2 else 32)
    while block_m > 16 and 2 * programs_of_64 * (64 // block_m) <= processors:
        block_m //= 2
    return Tile(block_m, step, step, step, 8 if width >= 256 else 4, 2)


def make_launch(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scores: Tensor,
    scores_bias: Tensor, values: Tensor, values_bias: Tensor, allow_tf32: bool, processors: int,
) -> tuple[Launch, Tile]:  # fmt: skip
    """Return the only launch, also for ahead-of-time compilation (meta tensors suffice)."""
    n, channels, height, width = x.shape
    pixels = height * width
    tile = choose_tile(pixels, channels, x.itemsize, n * triton.cdiv(pixels, 64), processors)
    args = {"y": y, "x": x, "weight": weight, "bias": bias, "scores": scores, "scores_bias": scores_bias,
            "values": values, "values_bias": values_bias, "P": pixels, "eps": float(eps)}  # fmt: skip
    precise = x.dtype == torch.float32 and not allow_tf32
    constexprs = {"C": channels, "GROUPS": num_groups, "PRECISION": "ieee" if precise else "tf32",
                  "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_O": tile.block_o,
                  "BLOCK_C": max(triton.next_power_of_2(channels), 16),
                  "BLOCK_G": triton.next_power_of_2(num_groups)}  # fmt: skip
    programs = n * triton.cdiv(pixels, tile.block_m)
    return Launch("attention_block", _attention_block, programs, args, constexprs, tile.num_warps), tile


def bind(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scores: Tensor,
    scores_bias: Tensor, values: Tensor, values_bias: Tensor, allow_tf32: bool,
) -> Callable[[], object]:  # fmt: skip
    """Return a function that writes y. Images are channels-last and not empty."""
    made, tile = make_launch(
        y, x, weight, bias, num_groups, eps, scores, scores_bias, values, values_bias, allow_tf32,
        num_processors(x.device),
    )  # fmt: skip

    def run() -> None:
        with on_device_of(x):
            made.kernel[(made.programs,)](
                **made.args, **made.constexprs, num_warps=made.num_warps, num_stages=tile.num_stages, **OPTIONS
            )

    return run


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
    ):
        x = torch.empty(n, side, side, channels, dtype=dtype, device="meta").permute(0, 3, 1, 2)
        vector = torch.empty(channels, device="meta")
        matrix = torch.empty(channels, channels, dtype=dtype, device="meta")
        operands = (vector, vector, groups, 1e-6, matrix, vector, matrix, vector, allow_tf32)
        made, tile = make_launch(x, x, *operands, num_processors(x.device))
        kind = "tf32" if allow_tf32 else {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        made_for = made.variant(f"{kind}, {channels} channels, {tag}")
        variants += [
            replace(made_for, num_stages=tile.num_stages, options=OPTIONS, target=target) for target in TARGETS
        ]
    return variants
