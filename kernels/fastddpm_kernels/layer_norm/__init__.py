"""Normalise the channels of every pixel, as a transformer does before each of its layers, and add its residual.

    y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias,    h = total = x + residual

Device-memory traffic: each input once and each output once, `2 * itemsize` bytes per element, or `4 * itemsize` with a
residual.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastddpm_kernels.backend import resolve
from fastddpm_kernels.checks import check_operands, not_float64, same_memory
from fastddpm_kernels.inplace import InPlace
from fastddpm_kernels.layer_norm.formula import eager, reference
from fastddpm_kernels.layer_norm.native import bind_layer_norm
from fastddpm_kernels.layout import not_channels_last, rows
from fastddpm_kernels.native.binding import bind_with_floats


@InPlace
def layer_norm_(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    backend: str = "auto",
) -> Callable[[], object]:
    """Write the layer norm (Ba et al. 2016, arXiv:1607.06450) of `x + residual` over its channels to `y`.

    Statistics and arithmetic are float32 on `triton` and `native`; `eager` is torch in x's dtype. Not differentiable.

    Args:
        y: `[N, C, ...]`, overwritten; may be `x` without a residual.
        x: `[N, C, ...]`, float32, float16 or bfloat16 (float64 on `eager` and `reference`). On `triton` and `native` all
            images must be channels-last.
        weight, bias: `[C]`, any floating dtype.
        eps: added to the variance.
        residual: `[N, C, ...]`, x's dtype; only with `total`.
        total: `[N, C, ...]`, x's dtype, gets `x + residual`; may be either of them.
        backend: `"auto"`, `"triton"`, `"native"`, `"eager"` or `"reference"`.

    Raises:
        TypeError: an argument is not a floating tensor, or has an unsupported dtype.
        ValueError: a shape, device, memory format or value that does not fit.
        BackendError: the named backend cannot run here.
    """
    _check(y, x, weight, bias, eps, residual, total)
    images = {"x": x, "y": y, "residual": residual, "total": total}
    backend = resolve("layer_norm_", backend, x.device.type, x.dtype, lambda: not_channels_last(**images))
    if backend == "triton":
        not_float64(x)
        if any(image is not None and rows(image) is None for image in images.values()):
            raise ValueError(f"x has strides {x.stride()}, must be channels-last on the triton backend, as all images")
    if x.numel() == 0:
        return lambda: None
    if backend == "native":
        return bind_with_floats(partial(bind_layer_norm, y, x, eps, residual, total), weight, bias)
    if backend == "triton":
        from fastddpm_kernels.layer_norm.triton import bind

        return bind(y, x, weight, bias, eps, residual, total)
    run = reference if backend == "reference" else eager
    return partial(torch.no_grad()(run), y, x, weight, bias, eps, residual, total)


def _check(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, total: Tensor | None
) -> None:
    check_operands(x, {"y": y}, {"residual": residual, "total": total}, {"weight": weight, "bias": bias})
    if x.ndim < 2 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [N, C, ...] with at least one channel")
    for name, image in (("y", y), ("residual", residual), ("total", total)):
        if image is not None and image.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(image.shape)}, must be x's, {tuple(x.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != x.shape[1:2]:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, must be [{x.shape[1]}], one per channel")
    if not eps > 0:
        raise ValueError(f"eps is {eps}, must be positive")
    if (residual is None) != (total is None):
        raise ValueError("residual and total must be given together: the sum is kept for the next residual")
    if residual is not None and y.numel() and (same_memory(y, x) or same_memory(y, residual)):
        raise ValueError("y is x or residual, must be other memory when there is a residual")
    if total is not None and y.numel() and same_memory(y, total):
        raise ValueError("y is total, must be other memory")
