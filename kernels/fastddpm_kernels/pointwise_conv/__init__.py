"""Compute the 1x1 convolutions of a diffusion U-Net in place, with concatenation, bias and residual.

    y = weight x + weight2 x2 + bias + residual          at every pixel

`weight x + weight2 x2` is the convolution of a skip connection's concatenation, which is never built. The same op
computes the projections of attention blocks: pixels are rows, channels are columns.

Device-memory traffic of the fused kernel: each input and the output once, so `(C + C2 + O) * itemsize` bytes per
pixel (`O * itemsize` more with a residual), as long as the rows of x that neighbouring programs share stay in L2.
`2 * (C + C2) * O` floating-point operations per pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastddpm_kernels.backend import resolve
from fastddpm_kernels.checks import check_operands, not_float64, same_memory
from fastddpm_kernels.inplace import InPlace
from fastddpm_kernels.layout import rows
from fastddpm_kernels.pointwise_conv.formula import by_matmul, reference


@InPlace
def pointwise_conv_(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> Callable[[], object]:
    """Write the 1x1 convolution of `concat(x, x2)` with `concat(weight, weight2)`, plus bias and residual, to `y`.

    Not differentiable. On `triton` one launch that allocates nothing: all products are summed in float32, and the
    result is rounded once. `eager` rounds after each of its operations.

    Args:
        y: `[N, O, ...]`, overwritten. May not be `x` or `x2`.
        x: `[N, C, ...]`, float32, float16 or bfloat16 (float64 on `eager` and `reference`), any number of spatial
            dimensions. On `triton` this, `x2`, `y` and `residual` must be channels-last, or slices of channels of
            such: channels adjacent, and pixels one stride apart, also from one sample to the next.
        weight: `[O, C]`, x's dtype; contiguous on `triton`, as are `weight2` and `bias`.
        x2, weight2: `[N, C2, ...]` and `[O, C2]`, both or neither.
        bias: `[O]`, any floating dtype.
        residual: `[N, O, ...]`, x's dtype; may be `y` itself.
        allow_tf32: whether float32 products may round their factors to 11 significant bits (TensorFloat-32), on
            `triton`; torch's own setting decides for `eager`.
        backend: `"auto"`, `"triton"`, `"eager"` or `"reference"`.

    Raises:
        TypeError: an argument is not a floating tensor, or has an unsupported dtype.
        ValueError: a shape, device, memory format or value that does not fit.
        BackendError: the named backend cannot run here.
    """
    _check(y, x, weight, x2, weight2, bias, residual)
    backend = resolve("pointwise_conv", backend, x.device.type, x.dtype)
    if backend == "triton":
        _check_for_triton(y, x, weight, x2, weight2, bias, residual)
    if y.numel() == 0:
        return lambda: None
    if backend == "triton":
        from fastddpm_kernels.pointwise_conv.triton import bind

        return bind(y, x, weight, x2, weight2, bias, residual, allow_tf32)
    run = reference if backend == "reference" else by_matmul
    return partial(torch.no_grad()(run), y, x, weight, x2, weight2, bias, residual)


def _check(
    y: Tensor, x: Tensor, weight: Tensor, x2: Tensor | None, weight2: Tensor | None, bias: Tensor | None,
    residual: Tensor | None,
) -> None:  # fmt: skip
    given = {"x2": x2, "weight2": weight2, "residual": residual}
    check_operands(x, {"y": y, "weight": weight}, given, {"bias": bias})
    if x.ndim < 2 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [N, C, ...] with at least one channel")
    if weight.ndim != 2 or weight.shape[0] < 1 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must be [O, {x.shape[1]}], x's channels")
    out = weight.shape[0]
    if (x2 is None) != (weight2 is None):
        missing = "x2" if x2 is None else "weight2"
        raise ValueError(f"{missing} is None, must be given: x2 and weight2 come together")
    if x2 is not None and weight2 is not None:
        if x2.ndim != x.ndim or x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:] or x2.shape[1] < 1:
            raise ValueError(f"x2 has shape {tuple(x2.shape)}, must equal x's {tuple(x.shape)} but for the channels")
        if weight2.shape != (out, x2.shape[1]):
            raise ValueError(f"weight2 has shape {tuple(weight2.shape)}, must be [{out}, {x2.shape[1]}]")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, must be [{out}], one per row of weight")
    shape = (x.shape[0], out, *x.shape[2:])
    for name, value in (("y", y), ("residual", residual)):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be {shape}")
    for name, value in (("x", x), ("x2", x2)):
        if value is not None and y.numel() and same_memory(y, value):
            raise ValueError(f"y is {name}, must be other memory, since all of {name} is read for it")


def _check_for_triton(
    y: Tensor, x: Tensor, weight: Tensor, x2: Tensor | None, weight2: Tensor | None, bias: Tensor | None,
    residual: Tensor | None,
) -> None:  # fmt: skip
    not_float64(x)
    for name, value in (("y", y), ("x", x), ("x2", x2), ("residual", residual)):
        if value is not None and value.numel() and rows(value) is None:
            raise ValueError(f"{name} has strides {value.stride()}, must be channels-last on the triton backend")
    if x.numel() // x.shape[1] >= 2**31 - 128:  # less the rows of the last tile
        raise ValueError(f"x has shape {tuple(x.shape)}, must have fewer than 2^31 - 128 pixels on the triton backend")
    for name, value in (("weight", weight), ("weight2", weight2), ("bias", bias)):
        if value is not None and not value.is_contiguous():
            raise ValueError(f"{name} has strides {value.stride()}, must be contiguous on the triton backend")
