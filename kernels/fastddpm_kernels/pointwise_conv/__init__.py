"""1x1 convolutions of a diffusion U-Net, with what surrounds them, in place: a matrix product over the channels.

    y = weight x + weight2 x2 + bias + residual          at every pixel

`weight x + weight2 x2` is the convolution of a skip connection's concatenation, which is never built. The same op
is the projections of attention blocks: pixels are rows, channels are columns.

Device-memory traffic of the fused kernel: each input and the output once, so `(C + C2 + O) * itemsize` bytes per
pixel (`O * itemsize` more with a residual), as long as the rows of x that neighbouring programs share stay in L2.
`2 * (C + C2) * O` floating-point operations per pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm_kernels import backend as _backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@torch.no_grad()
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
) -> None:
    """1x1 convolution of `concat(x, x2)` with `concat(weight, weight2)`, plus bias and residual, written to `y`.

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
        TypeError: an argument is not a floating tensor, or of a dtype that is not taken.
        ValueError: a shape, device, memory format or value that does not fit.
        BackendError: the backend that was named cannot run here.
    """
    _check(y, x, weight, x2, weight2, bias, residual)
    backend = _backend.resolve("pointwise_conv", backend, x.device.type, x.dtype)
    if backend == "triton":
        _check_for_triton(y, x, weight, x2, weight2, bias, residual)
    if y.numel() == 0:
        return
    if backend == "triton":
        from fastddpm_kernels.pointwise_conv.triton import launch

        launch(y, x, weight, x2, weight2, bias, residual, allow_tf32)
    elif backend == "reference":
        _reference(y, x, weight, x2, weight2, bias, residual)
    else:
        by_matmul(y, x, weight, x2, weight2, bias, residual)


def rows(x: Tensor) -> Tensor | None:
    """`x` [N, C, ...] as a view [N * pixels, C] of adjacent channels; None where its strides do not allow that."""
    stride, expected = None, 1
    for size, step in zip(reversed(x.shape[:1] + x.shape[2:]), reversed(x.stride()[:1] + x.stride()[2:]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride, expected = step, step
        if step != expected:
            return None
        expected = step * size
    channels = x.shape[1]
    if stride is None:
        stride = channels  # a single row
    if (channels > 1 and x.stride(1) != 1) or stride < channels:
        return None
    return x.as_strided((x.numel() // channels, channels), (stride, 1))


# Plain torch.


def _reference(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    x2: Tensor | None,
    weight2: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    value = torch.einsum("oc,nc...->no...", weight.double(), x.double())
    if x2 is not None and weight2 is not None:
        value = value + torch.einsum("oc,nc...->no...", weight2.double(), x2.double())
    if bias is not None:
        value = value + bias.double().reshape(-1, *(1,) * (x.ndim - 2))
    if residual is not None:
        value = value + residual.double()
    y.copy_(value)


def by_matmul(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    x2: Tensor | None,
    weight2: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Torch's matrix products, which write to `y` and add to it, on views; other memory formats are copied first."""
    out = rows(y)
    if out is None:
        dense = y.new_empty(y.shape[0], *y.shape[2:], y.shape[1]).movedim(-1, 1)
        by_matmul(dense, x, weight, x2, weight2, bias, residual)
        y.copy_(dense)
        return
    if bias is not None:
        bias = bias.to(y.dtype)
    a = _rows_of(x)
    if residual is None and bias is None:
        torch.mm(a, weight.t(), out=out)
    elif residual is None and bias is not None:
        torch.addmm(bias, a, weight.t(), out=out)
    elif residual is not None:
        if _same_memory(residual, y):
            out.addmm_(a, weight.t())
        else:
            torch.addmm(_rows_of(residual), a, weight.t(), out=out)
        if bias is not None:
            out.add_(bias)
    if x2 is not None and weight2 is not None:
        out.addmm_(_rows_of(x2), weight2.t())


def _rows_of(x: Tensor) -> Tensor:
    view = rows(x)
    return x.movedim(1, -1).reshape(-1, x.shape[1]) if view is None else view


# Validation.


def _check(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    x2: Tensor | None,
    weight2: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    given = {"x": x, "y": y, "weight": weight, "x2": x2, "weight2": weight2, "bias": bias, "residual": residual}
    for name, value in given.items():
        if value is None and name not in ("x", "y", "weight"):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, must be a tensor")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} is {value.dtype}, must be float32, float16, bfloat16 or float64")
        if name != "bias" and value.dtype != x.dtype:
            raise TypeError(f"{name} is {value.dtype}, must be of x's dtype, {x.dtype}")
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, must be on x's device, {x.device}")
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
        if value is not None and y.numel() and _same_memory(y, value):
            raise ValueError(f"y is {name}, must be other memory, since all of {name} is read for it")


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.device.type != "meta" and a.data_ptr() == b.data_ptr())


def _check_for_triton(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    x2: Tensor | None,
    weight2: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    if x.dtype == torch.float64:
        raise TypeError("x is torch.float64, must be float32, float16 or bfloat16 on the triton backend")
    for name, value in (("y", y), ("x", x), ("x2", x2), ("residual", residual)):
        if value is not None and value.numel() and rows(value) is None:
            raise ValueError(f"{name} has strides {value.stride()}, must be channels-last on the triton backend")
    if x.numel() // x.shape[1] >= 2**31 - 128:  # less the rows of the last tile
        raise ValueError(f"x has shape {tuple(x.shape)}, must have fewer than 2^31 - 128 pixels on the triton backend")
    for name, value in (("weight", weight), ("weight2", weight2), ("bias", bias)):
        if value is not None and not value.is_contiguous():
            raise ValueError(f"{name} has strides {value.stride()}, must be contiguous on the triton backend")
