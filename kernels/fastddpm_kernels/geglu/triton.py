"""Gate channels: a program takes a part of y's rows, whose gates lie one row of values further on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels.device.variant import Launch, Variant, run_launches

BLOCK = 1024  # elements to a program
NUM_WARPS = 4


@triton.jit
def _geglu(y, x, numel, channels, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    if WIDE:
        first = tl.program_id(0).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    mask = element < numel
    at = element + element // channels * channels  # a row of x is twice as long
    value = tl.load(x + at, mask=mask).to(tl.float32)
    gate = tl.load(x + at + channels, mask=mask).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + element, (value * gelu).to(y.dtype.element_ty), mask=mask)


def make_launch(y: Tensor, x: Tensor) -> Launch:
    """Return the only launch, also for ahead-of-time compilation (meta tensors suffice)."""
    numel = y.numel()
    args = {"y": y, "x": x, "numel": numel, "channels": y.shape[1]}
    constexprs = {"WIDE": 2 * numel + BLOCK >= 2**31, "BLOCK": BLOCK}
    return Launch("geglu", _geglu, triton.cdiv(numel, BLOCK), args, constexprs, NUM_WARPS)


def bind(y: Tensor, x: Tensor) -> Callable[[], object]:
    """Return a function that writes y. Both are channels-last, and y is not empty."""
    return partial(run_launches, [make_launch(y, x)], x)


def aot_variants() -> list[Variant]:
    """Return variants of Stable Diffusion's widths, and of very large images."""
    variants = []
    for dtype, channels, pixels in (
        (torch.float16, 1280, 8192),
        (torch.bfloat16, 5120, 512),
        (torch.float32, 2560, 2048),
        (torch.float16, 1280, 2**20),
    ):
        y, x = (torch.empty(1, 1, pixels, k * channels, dtype=dtype, device="meta").movedim(-1, 1) for k in (1, 2))
        variants.append(make_launch(y, x).variant(f"{str(dtype).removeprefix('torch.')}, {channels} x {pixels}"))
    return variants
