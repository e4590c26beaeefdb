"""Convolve sequences: a tile of positions times output channels, summed over taps and channels.

Rows are the positions of all samples (of one parity, if transposed). With few rows a tile is narrow, so that there are
as many programs as processors, each with its own weights to read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels.conv1d.packing import PackedWeight
from fastddpm_kernels.device.processors import num_processors
from fastddpm_kernels.device.variant import Launch, Variant, run_launches

NUM_WARPS = 4


@triton.jit
def _products(
    acc, x, weight, rows, inside, channels, o, outputs, step, C: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add x[rows, :C] times the weights of one tap, which are `step` apart from one output channel to the next."""
    for first in range(0, C, BLOCK_K):
        k = first + channels
        a = tl.load(x + rows[:, None] * C + k[None, :], mask=inside[:, None] & (k < C)[None, :], other=0.0)
        b = tl.load(weight + o[None, :] * step + k[:, None], mask=(k < C)[:, None] & outputs[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _conv1d(
    y, x, x2, weight, bias, M, rows_each, length, out_length, out_channels, blocks_m, blocks_n, stride, padding,
    C1: tl.constexpr, C2: tl.constexpr, TAPS: tl.constexpr, PHASES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block_m = pid % blocks_m
    block_n = pid // blocks_m % blocks_n
    phase = pid // (blocks_m * blocks_n)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = m // rows_each
    r = m - n * rows_each
    o = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    outputs = o < out_channels
    channels = tl.arange(0, BLOCK_K)
    C: tl.constexpr = C1 + C2
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tap in range(TAPS):
        position = r * stride + (tap - padding)
        if PHASES == 2:
            position = r + (phase - tap)
        inside = (m < M) & (position >= 0) & (position < length)
        rows = (n * length + position).to(tl.int64)
        own = weight + phase.to(tl.int64) * out_channels * TAPS * C + tap * C
        acc = _products(acc, x, own, rows, inside, channels, o, outputs, TAPS * C, C1, BLOCK_K, PRECISION)
        if C2 > 0:
            acc = _products(acc, x2, own + C1, rows, inside, channels, o, outputs, TAPS * C, C2, BLOCK_K, PRECISION)
    if bias is not None:
        acc += tl.load(bias + o, mask=outputs, other=0.0).to(tl.float32)[None, :]
    place = (n * out_length + r * PHASES + phase).to(tl.int64)[:, None] * out_channels + o[None, :]
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=(m < M)[:, None] & outputs[None, :])


def make_launch(
    y: Tensor, x: Tensor, weight: PackedWeight, x2: Tensor | None, bias: Tensor | None, stride: int, padding: int
) -> Launch:
    """Return the only launch, also for ahead-of-time compilation (meta tensors suffice)."""
    phases, taps = (2, 2) if weight.transposed else (1, weight.kernel)
    outputs, out_length = y.shape[1:]
    rows_each = out_length // phases
    m, channels2 = len(x) * rows_each, 0 if x2 is None else x2.shape[1]
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    block_n = 64 if m > 64 else 32
    blocks_m = triton.cdiv(m, block_m)
    while block_n > 16 and blocks_m * phases * triton.cdiv(outputs, block_n) < num_processors(x.device):
        block_n //= 2
    widest = triton.next_power_of_2(max(x.shape[1], channels2))
    block_k = max(16, min((64 if block_n == 64 or x.itemsize == 4 else 128) // (x.itemsize // 2), widest))
    blocks_n = triton.cdiv(outputs, block_n)
    args = {
        "y": y, "x": x, "x2": x2, "weight": weight.values, "bias": bias, "M": m, "rows_each": rows_each,
        "length": x.shape[2], "out_length": out_length, "out_channels": outputs, "blocks_m": blocks_m,
        "blocks_n": blocks_n, "stride": stride, "padding": padding,
    }  # fmt: skip
    constexprs = {
        "C1": x.shape[1], "C2": channels2, "TAPS": taps, "PHASES": phases, "PRECISION": "ieee", "BLOCK_M": block_m,
        "BLOCK_N": block_n, "BLOCK_K": block_k,
    }  # fmt: skip
    return Launch("conv1d", _conv1d, phases * blocks_m * blocks_n, args, constexprs, NUM_WARPS)


def bind(
    y: Tensor, x: Tensor, weight: PackedWeight, x2: Tensor | None, bias: Tensor | None, stride: int, padding: int
) -> Callable[[], object]:
    """Return a function that writes y, which is not empty."""
    launches = [make_launch(y, x, weight, x2, bias, stride, padding)]
    return lambda: run_launches(launches, x)


def aot_variants() -> list[Variant]:
    """Return variants: the layers of a robot's network at its narrowest and widest, and one for many samples."""
    variants = []
    for tag, dtype, n, c, c2, outputs, length, kernel, stride, transposed in (
        ("mid", torch.float16, 1, 2048, 0, 2048, 4, 5, 1, False),
        ("mid", torch.bfloat16, 1, 2048, 0, 2048, 4, 5, 1, False),
        ("mid", torch.float32, 1, 2048, 0, 2048, 4, 5, 1, False),
        ("skip", torch.float16, 1, 2048, 2048, 1024, 16, 5, 1, False),
        ("skip, 1x1", torch.float16, 1, 2048, 2048, 1024, 4, 1, 1, False),
        ("first", torch.float16, 1, 2, 0, 512, 16, 5, 1, False),
        ("last", torch.float16, 1, 512, 0, 2, 16, 1, 1, False),
        ("down", torch.float16, 1, 512, 0, 512, 16, 3, 2, False),
        ("up", torch.float16, 1, 1024, 0, 1024, 4, 4, 2, True),
        ("up", torch.float32, 1, 1024, 0, 1024, 4, 4, 2, True),
        ("many", torch.float16, 64, 1024, 0, 1024, 32, 5, 1, False),
        ("many", torch.bfloat16, 64, 1024, 0, 1024, 32, 5, 1, False),
    ):
        padding = 1 if transposed else kernel // 2
        out_length = 2 * length if transposed else (length + 2 * padding - kernel) // stride + 1

        def sequence(channels: int, size: int, n: int = n, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(n, size, channels, dtype=dtype, device="meta").movedim(-1, 1)

        values = torch.empty(outputs * (c + c2) * kernel, dtype=dtype, device="meta")
        weight = PackedWeight(values, "triton", c + c2, outputs, kernel, transposed, c2)
        made = make_launch(
            sequence(outputs, out_length), sequence(c, length), weight, sequence(c2, length) if c2 else None,
            torch.empty(outputs, device="meta"), stride, padding,
        )  # fmt: skip
        name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        variants.append(replace(made.variant(f"{name}, {tag}"), num_stages_of_64=2))
    return variants
