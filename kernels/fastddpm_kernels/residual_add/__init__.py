"""The sum that ends a residual block, where no other kernel takes it in: one pass, with a border left for padding.

    y[:, :, :H, :W] = total = x + residual + bias

Before a convolution of stride 2 that pads on one side only, `y` is the padded image itself: its border is written
once, as zeros, and stays.

Device-memory traffic: each input once and each output once, `3 * itemsize` bytes per element (fp16: 6), or
`4 * itemsize` with `total`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm_kernels import backend as _backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@torch.no_grad()
def residual_add_(
    y: Tensor,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    total: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """`x + residual + bias`, written to the first pixels of `y` and, where given, to `total`. Not differentiable.

    On `triton` one launch that allocates nothing, summed in float32 and rounded once; accesses are of 16 bytes where
    all tensors are channels-last (or all contiguous). `eager` rounds after each of its operations.

    Args:
        y: `[N, C, H', W']` with `H' >= H` and `W' >= W` (so for any number of spatial dimensions); `y[:, :, :H, :W]`
            is overwritten, the rest of it left alone. May be `x` or `residual` where it has their shape.
        x: `[N, C, H, W]`, float32, float16 or bfloat16 (float64 on `eager` and `reference`).
        residual: `[N, C, H, W]`, x's dtype.
        bias: `[C]`, any floating dtype.
        total: `[N, C, H, W]`, x's dtype, overwritten with the same values; may be `x` or `residual` itself.
        backend: `"auto"`, `"triton"`, `"eager"` or `"reference"`.

    Raises:
        TypeError: an argument is not a floating tensor, or of a dtype that is not taken.
        ValueError: a shape, device, memory format or value that does not fit.
        BackendError: the backend that was named cannot run here.
    """
    _check(y, x, residual, bias, total)
    backend = _backend.resolve("residual_add", backend, x.device.type, x.dtype)
    if backend == "triton" and x.dtype == torch.float64:
        raise TypeError("x is torch.float64, must be float32, float16 or bfloat16 on the triton backend")
    if x.numel() == 0:
        return
    pixels = (slice(None), slice(None), *(slice(size) for size in x.shape[2:]))
    inner = y[pixels]
    bias = None if bias is None else bias.reshape(-1, *(1,) * (x.ndim - 2))
    if backend == "triton":
        from fastddpm_kernels.residual_add.triton import launch

        launch(inner, x, residual, bias, total)
    elif backend == "reference":
        value = x.double()
        for term in (residual, bias):
            value = value if term is None else value + term.double()
        inner.copy_(value)
        if total is not None:
            total.copy_(value)
    else:
        _eager(inner, x, residual, bias, total)


def _eager(y: Tensor, x: Tensor, residual: Tensor | None, bias: Tensor | None, total: Tensor | None) -> None:
    if bias is not None:
        bias = bias.to(x.dtype)
    if residual is not None:
        torch.add(x, residual, out=y)
        if bias is not None:
            y.add_(bias)
    elif bias is not None:
        torch.add(x, bias, out=y)
    elif y is not x:
        y.copy_(x)
    if total is not None:
        total.copy_(y)


def _check(y: Tensor, x: Tensor, residual: Tensor | None, bias: Tensor | None, total: Tensor | None) -> None:
    for name, value in {"x": x, "y": y, "residual": residual, "bias": bias, "total": total}.items():
        if value is None and name not in ("x", "y"):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, must be a tensor")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} is {value.dtype}, must be float32, float16, bfloat16 or float64")
        if name != "bias" and value.dtype != x.dtype:
            raise TypeError(f"{name} is {value.dtype}, must be of x's dtype, {x.dtype}")
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, must be on x's device, {x.device}")
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
