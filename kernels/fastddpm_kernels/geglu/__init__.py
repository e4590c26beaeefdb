"""Gate one half of the channels by the GELU of the other, between the two products of a transformer's feed-forward.

    y = x[:, :C] * gelu(x[:, C:])          gelu(g) = g * (1 + erf(g / sqrt(2))) / 2

Device-memory traffic: each input once and each output once, `3 * itemsize` bytes per element of y.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastddpm_kernels.backend import resolve
from fastddpm_kernels.checks import check_operands, not_float64
from fastddpm_kernels.geglu.formula import eager, reference
from fastddpm_kernels.geglu.native import bind_geglu
from fastddpm_kernels.inplace import InPlace
from fastddpm_kernels.layout import not_channels_last, rows


@InPlace
def geglu_(y: Tensor, x: Tensor, *, backend: str = "auto") -> Callable[[], object]:
    """Write GEGLU (Shazeer 2020, arXiv:2002.05202) of `x` to `y`. Not differentiable.

    Args:
        y: `[N, C, ...]`, overwritten; not the memory of `x`.
        x: `[N, 2C, ...]`, values before gates, float32, float16 or bfloat16 (float64 on `eager` and `reference`). On
            `triton` and `native` both must be channels-last.
        backend: `"auto"`, `"triton"`, `"native"`, `"eager"` or `"reference"`.

    Raises:
        TypeError: an argument is not a floating tensor, or has an unsupported dtype.
        ValueError: a shape, device or memory format that does not fit.
        BackendError: the named backend cannot run here.
    """
    check_operands(x, {"y": y})
    if x.ndim < 2 or x.shape[1] < 2 or x.shape[1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [N, 2C, ...] with an even number of channels")
    expected = (x.shape[0], x.shape[1] // 2, *x.shape[2:])
    if y.shape != expected:
        raise ValueError(f"y has shape {tuple(y.shape)}, must have shape {expected}")
    if y.numel() and y.data_ptr() == x.data_ptr():
        raise ValueError("y is x, must be other memory")
    backend = resolve("geglu_", backend, x.device.type, x.dtype, lambda: not_channels_last(x=x, y=y))
    if backend == "triton":
        not_float64(x)
        if rows(x) is None or rows(y) is None:
            raise ValueError(f"x has strides {x.stride()}, must be channels-last on the triton backend, and so must y")
    if y.numel() == 0:
        return lambda: None
    if backend == "native":
        return bind_geglu(y, x)
    if backend == "triton":
        from fastddpm_kernels.geglu.triton import bind

        return bind(y, x)
    return partial(torch.no_grad()(reference if backend == "reference" else eager), y, x)
