"""Add up the sum that ends a residual block, if no other kernel does: one pass, with a border left for padding.

    y[:, :, :H, :W] = total = x + residual + bias

Before a convolution of stride 2 that pads on one side only, `y` is the padded image itself. Its border is set to zero
once and stays zero.

Device-memory traffic: each input once and each output once, `3 * itemsize` bytes per element (fp16: 6), or
`4 * itemsize` with `total`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastddpm_kernels.backend import resolve
from fastddpm_kernels.checks import check_operands, not_float64
from fastddpm_kernels.inplace import InPlace
from fastddpm_kernels.residual_add.formula import eager, reference


@InPlace
def residual_add_(
    y: Tensor,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    total: Tensor | None = None,
    backend: str = "auto",
) -> Callable[[], object]:
    """Write `x + residual + bias` to the first pixels of `y` and to `total`, if given. Not differentiable.

    On `triton` one launch that allocates nothing, summed in float32 and rounded once; accesses are of 16 bytes where
    all tensors are channels-last (or all contiguous). `eager` rounds after each of its operations.

    Args:
        y: `[N, C, H', W']` with `H' >= H` and `W' >= W` (so for any number of spatial dimensions); `y[:, :, :H, :W]`
            is overwritten, the rest is not changed. May be `x` or `residual` if it has their shape.
        x: `[N, C, H, W]`, float32, float16 or bfloat16 (float64 on `eager` and `reference`).
        residual: `[N, C, H, W]`, x's dtype.
        bias: `[C]`, any floating dtype.
        total: `[N, C, H, W]`, x's dtype, overwritten with the same values; may be `x` or `residual` itself.
        backend: `"auto"`, `"triton"`, `"eager"` or `"reference"`.

    Raises:
        TypeError: an argument is not a floating tensor, or has an unsupported dtype.
        ValueError: a shape, device, memory format or value that does not fit.
        BackendError: the named backend cannot run here.
    """
    _check(y, x, residual, bias, total)
    backend = resolve("residual_add", backend, x.device.type, x.dtype)
    if backend == "triton":
        not_float64(x)
    if x.numel() == 0:
        return lambda: None
    pixels = (slice(None), slice(None), *(slice(size) for size in x.shape[2:]))
    inner = y if y.shape == x.shape else y[pixels]
    bias = None if bias is None else bias.reshape(-1, *(1,) * (x.ndim - 2))
    if backend == "triton":
        from fastddpm_kernels.residual_add.triton import bind

        return bind(inner, x, residual, bias, total)
    run = reference if backend == "reference" else eager
    return partial(torch.no_grad()(run), inner, x, residual, bias, total)


def _check(y: Tensor, x: Tensor, residual: Tensor | None, bias: Tensor | None, total: Tensor | None) -> None:
    check_operands(x, {"y": y}, {"residual": residual, "total": total}, {"bias": bias})
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [N, C, ...]")
    for name, value in (("residual", residual), ("total", total)):
        if value is not None and value.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be x's, {tuple(x.shape)}")
    if bias is not None and bias.shape != x.shape[1:2]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, must be [{x.shape[1]}], one per channel")
    fits = y.ndim == x.ndim and y.shape[:2] == x.shape[:2]
    if not fits or any(big < small for big, small in zip(y.shape[2:], x.shape[2:], strict=True)):
        raise ValueError(f"y has shape {tuple(y.shape)}, must be x's {tuple(x.shape)} or larger in space")
