"""Normalise some pixels per program: their channels are in registers, so each is read once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels.device.variant import Launch, Variant, run_launches

ELEMENTS = 2048  # of a program, or one pixel if it has more
WARP_ELEMENTS = 512


@triton.jit
def _layer_norm(
    y, total, x, residual, weight, bias, pixels, channels, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if WIDE:
        row = row.to(tl.int64)
    channel = tl.arange(0, BLOCK)
    present = channel < channels
    mask = (row < pixels)[:, None] & present[None, :]
    at = row[:, None] * channels + channel[None, :]
    h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        rounded = (h + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=mask)
        h = rounded.to(tl.float32)
    mean = tl.sum(h, 1) / channels
    centred = tl.where(present[None, :], h - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / channels + eps)
    factor = tl.load(weight + channel, mask=present, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=present, other=0.0).to(tl.float32)
    value = centred * inverse[:, None] * factor[None, :] + offset[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


def make_launch(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, total: Tensor | None
) -> Launch:
    """Return the only launch, also for ahead-of-time compilation (meta tensors suffice)."""
    channels = x.shape[1]
    pixels = x.numel() // channels
    block = triton.next_power_of_2(channels)
    rows = max(ELEMENTS // block, 1)
    args = {
        "y": y, "total": total, "x": x, "residual": residual, "weight": weight, "bias": bias, "pixels": pixels,
        "channels": channels, "eps": float(eps),
    }  # fmt: skip
    constexprs = {"ROWS": rows, "BLOCK": block, "WIDE": x.numel() + rows * channels >= 2**31}
    warps = min(max(rows * block // WARP_ELEMENTS, 1), 16)
    return Launch("layer_norm", _layer_norm, triton.cdiv(pixels, rows), args, constexprs, warps)


def bind(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, total: Tensor | None
) -> Callable[[], object]:
    """Return a function that writes y, and with a residual total. Images are channels-last and not empty."""
    return partial(run_launches, [make_launch(y, x, weight, bias, eps, residual, total)], x)


def aot_variants() -> list[Variant]:
    """Return variants of Stable Diffusion's widths, with and without a residual, and of very large images."""
    variants = []
    for dtype, channels, pixels, residual in (
        (torch.float16, 320, 8192, True),
        (torch.float16, 320, 8192, False),
        (torch.bfloat16, 1280, 512, True),
        (torch.float32, 640, 2048, True),
        (torch.float16, 2048, 154, False),
        (torch.float16, 320, 2**23, True),
    ):
        x = torch.empty(1, 1, pixels, channels, dtype=dtype, device="meta").movedim(-1, 1)
        vector = torch.empty(channels, device="meta")
        launch = make_launch(x, x, vector, vector, 1e-5, x if residual else None, x if residual else None)
        tag = f"{str(dtype).removeprefix('torch.')}, {channels} x {pixels}{', residual' if residual else ''}"
        variants.append(launch.variant(tag))
    return variants
