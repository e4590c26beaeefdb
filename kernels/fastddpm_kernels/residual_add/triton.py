"""Add up to three tensors in one pass and write the sum to one or two others, of any strides.

All tensors are walked in the order of y's memory; dimensions that every tensor walks with one stride are merged. An
unpadded channels-last image leaves pixels times channels, a padded one rows, pixels and channels
(the bias has stride 0 along pixels). A thread's elements are adjacent, so its accesses are of 16 bytes where the
innermost dimension is adjacent in all tensors and a multiple of 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels import tuned
from fastddpm_kernels.device.strided import AOT, NUM_WARPS, aot, run
from fastddpm_kernels.device.variant import Launch, Variant, packaged_variants

MAX_DIMS = 4
THREAD_BYTES = 16  # of each tensor


@triton.jit
def _dot(i0, i1, i2, i3, s0, s1, s2, s3):
    return i0 * s0 + i1 * s1 + i2 * s2 + i3 * s3


@triton.jit
def _residual_add(
    y, total, x, residual, bias,
    numel, size1, size2, size3,
    y0, y1, y2, y3, total0, total1, total2, total3, x0, x1, x2, x3,
    residual0, residual1, residual2, residual3, bias0, bias1, bias2, bias3,
    DIMS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK
    if WIDE:
        first = tl.program_id(0).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    mask = element < numel
    # Indices, innermost last; a missing dimension has index 0.
    i3 = element
    i2 = tl.zeros_like(element)
    i1 = tl.zeros_like(element)
    i0 = tl.zeros_like(element)
    if DIMS > 1:
        i2 = element // size3
        i3 = element - i2 * size3
    if DIMS > 2:
        i1 = i2 // size2
        i2 = i2 - i1 * size2
    if DIMS > 3:
        i0 = i1 // size1
        i1 = i1 - i0 * size1

    value = tl.load(x + _dot(i0, i1, i2, i3, x0, x1, x2, x3), mask=mask).to(tl.float32)
    if residual is not None:
        at = _dot(i0, i1, i2, i3, residual0, residual1, residual2, residual3)
        value += tl.load(residual + at, mask=mask).to(tl.float32)
    if bias is not None:
        at = _dot(i0, i1, i2, i3, bias0, bias1, bias2, bias3)
        value += tl.load(bias + at, mask=mask).to(tl.float32)
    rounded = value.to(y.dtype.element_ty)
    tl.store(y + _dot(i0, i1, i2, i3, y0, y1, y2, y3), rounded, mask=mask)
    if total is not None:
        tl.store(total + _dot(i0, i1, i2, i3, total0, total1, total2, total3), rounded, mask=mask)


class Walk(NamedTuple):
    """A common walk of tensors of one shape: sizes, innermost last, and the strides of each tensor."""

    sizes: list[int]
    strides: list[list[int]]


def make_walk(tensors: list[Tensor]) -> Walk:
    """Order the dimensions by the first tensor's strides and merge those that have one stride in all tensors."""
    shape = tensors[0].shape
    views = [tensor.expand(shape) for tensor in tensors]
    order = sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: -views[0].stride(d))
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in views]
    for d in order:
        steps = [view.stride(d) for view in views]
        if sizes and all(outer[-1] == step * shape[d] for outer, step in zip(strides, steps, strict=True)):
            sizes[-1] *= shape[d]
            for outer, step in zip(strides, steps, strict=True):
                outer[-1] = step
        else:
            sizes.append(shape[d])
            for outer, step in zip(strides, steps, strict=True):
                outer.append(step)
    return Walk(sizes or [1], [outer or [1] for outer in strides])


def make_launch(
    y: Tensor, x: Tensor, residual: Tensor | None, bias: Tensor | None, total: Tensor | None,
    choice: tuned.Choice | None = None,
) -> Launch:  # fmt: skip
    """Return the only launch, also for ahead-of-time compilation (meta tensors suffice).

    `choice`: overrides the tables and heuristics.

    Raises:
        ValueError: more dimensions than the kernel walks.
    """
    given = {"y": y, "total": total, "x": x, "residual": residual, "bias": bias}
    walk = make_walk([tensor for tensor in given.values() if tensor is not None])
    dims, numel = len(walk.sizes), math.prod(walk.sizes)
    if dims > MAX_DIMS:
        raise ValueError(
            f"x has strides {x.stride()} and y {y.stride()}, must be such that {MAX_DIMS} strides walk all tensors on "
            "the triton backend: of one memory format, with at most two spatial dimensions"
        )
    absent = [0] * (MAX_DIMS - dims)
    args: dict[str, Tensor | int | None] = {**given, "numel": numel}
    args |= {f"size{d}": size for d, size in enumerate([1, *absent, *walk.sizes][-MAX_DIMS:]) if d}
    strides, extent = iter(walk.strides), numel
    for name, tensor in given.items():
        steps = [0] * dims if tensor is None else next(strides)
        args |= {f"{name}{d}": step for d, step in enumerate(absent + steps)}
        extent = max(extent, sum(step * (size - 1) for step, size in zip(steps, walk.sizes, strict=True)))
    if choice is None:
        given_too = (int(tensor is not None) for tensor in (residual, bias, total))
        shape = (x.shape[0], x.shape[1], math.prod(x.shape[2:-1]), math.prod(x.shape[2:][-1:]),
                 int(not x.is_contiguous()), int(y.stride() != x.stride()), *given_too)  # fmt: skip
        choice = tuned.choice("residual_add", x.device, x.dtype, shape)
    own = heuristic_choice(x.itemsize) if choice is None else choice
    block, num_warps = own["block"], own["num_warps"]
    constexprs = {"DIMS": dims, "WIDE": extent >= 2**31 - block, "BLOCK": block}
    return Launch("residual_add", _residual_add, triton.cdiv(numel, block), args, constexprs, num_warps)


def heuristic_choice(itemsize: int) -> tuned.Choice:
    """Return the choice without a table: a thread's accesses are as wide as possible."""
    return {"block": NUM_WARPS * 32 * THREAD_BYTES // itemsize, "num_warps": NUM_WARPS}


def bind(
    y: Tensor, x: Tensor, residual: Tensor | None, bias: Tensor | None, total: Tensor | None
) -> Callable[[], object]:
    """Return a function that writes y, of x's shape, and total. `bias` is broadcastable to x, which is not empty."""
    return partial(run, make_launch(y, x, residual, bias, total), x)


def aot_variants() -> list[Variant]:
    """Return variants, channels-last: a plain sum, with everything, and into a padded image; contiguous; very large."""
    variants = []
    for tag, dtype, n, side, pad, channels_last, residual, bias, total in (
        ("plain", torch.float16, 64, 32, 0, True, True, False, False),
        ("plain", torch.float32, 64, 32, 0, True, True, False, False),
        ("all", torch.float16, 64, 32, 0, True, True, True, True),
        ("all", torch.bfloat16, 64, 32, 0, True, True, True, True),
        ("all", torch.float32, 64, 32, 0, True, True, True, True),
        ("padded", torch.float16, 64, 32, 1, True, True, True, True),
        ("padded", torch.bfloat16, 64, 32, 1, True, True, True, True),
        ("padded", torch.float32, 64, 32, 1, True, True, True, True),
        ("padded copy", torch.float16, 64, 32, 1, True, False, False, False),
        ("padded, contiguous", torch.float16, 64, 32, 1, False, True, True, False),
        ("padded, 2^31 elements", torch.float16, 512, 256, 1, True, True, True, True),
    ):
        x, y = _image(n, side, dtype, channels_last), _image(n, side + pad, dtype, channels_last)[..., :side, :side]
        vector = torch.empty(128, 1, 1, device="meta") if bias else None
        made = make_launch(y, x, x if residual else None, vector, x if total else None)
        name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        variants.append(replace(made.variant(f"{name}, {tag}"), **AOT))
    return variants + packaged_variants(("residual_add",), tuned_variants)


def tuned_variants(key: tuned.Key, choice: tuned.Choice) -> list[Variant]:
    """Return the kernel of a tuned choice."""
    n, channels, height, width, last, padded, residual, bias, total = key.shape
    x = _image(n, (height, width), key.dtype, bool(last), channels)
    y = _image(n, (height + padded, width + padded), key.dtype, bool(last), channels)[..., :height, :width]
    vector = torch.empty(channels, 1, 1, device="meta") if bias else None
    made = make_launch(y, x, x if residual else None, vector, x if total else None, choice)
    return [replace(made.variant(f"tuned, {key.dtype}, {key.shape}"), **aot(made.num_warps))]


def _image(n: int, size: int | tuple[int, int], dtype: torch.dtype, channels_last: bool, channels: int = 128) -> Tensor:
    size = (size, size) if isinstance(size, int) else size
    shape = (n, *size, channels) if channels_last else (n, channels, *size)
    return torch.empty(shape, dtype=dtype, device="meta").movedim(-1 if channels_last else 1, 1)
