"""Compute the convolutions of a diffusion U-Net in place, with concatenation, upsampling, bias and residual.

    y = conv(upsample(concat(x, x2)), weight) + bias + residual

On the CPU the native backend takes fewer multiplications. It has three algorithms, for weights that are packed once:

    winograd4   3x3, stride 1, padding 1: 36 multiplications for 4x4 outputs, where the definition has 144; after
                upsampling 25 (Lavin & Gray 2016, arXiv:1509.09308)
    winograd2   16 for 2x2 outputs, where the definition has 36
    direct      the definition; after upsampling four 2x2 convolutions, 16 for 2x2 outputs in place of 36

Accuracy: transforms add and subtract, so digits cancel. Tests bound the error by `error_factor` times that of the
definition. Weights are transformed in float64 and rounded once. In bfloat16, on CPUs that multiply it, there is no
winograd4, whose error is too large; winograd2 takes 9 multiplications for 2x2 outputs after upsampling.

Memory traffic: each input and output once. The packed weights of winograd4 are 4 times as large as those of the
convolution, of winograd2 1.8 times. For few pixels this dominates, and `choose_algorithm` weighs both. Where memory is
scarce, weights stay as they are and are transformed at every call (`PackedWeight.tile`), by `likely_tile`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm_kernels.backend import resolve
from fastddpm_kernels.checks import check_operands
from fastddpm_kernels.conv.algorithm import choose_algorithm, likely_algorithm, likely_tile, possible_algorithms
from fastddpm_kernels.conv.formula import conv_by_torch
from fastddpm_kernels.conv.native import bind_conv as bind_native
from fastddpm_kernels.conv.packing import (
    ALGORITHMS,
    PackedWeight,
    error_factor,
    pack,
    packed_values,
    why_not_packed,
    why_not_tile,
)
from fastddpm_kernels.inplace import InPlace
from fastddpm_kernels.layout import not_channels_last
from fastddpm_kernels.native.binding import bind_with_floats

__all__ = [
    "ALGORITHMS",
    "PackedWeight",
    "choose_algorithm",
    "conv_",
    "error_factor",
    "likely_algorithm",
    "likely_tile",
    "pack",
    "packed_values",
    "possible_algorithms",
]


@InPlace
def conv_(
    y: Tensor,
    x: Tensor,
    weight: Tensor | PackedWeight,
    *,
    x2: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    upsample: bool = False,
    backend: str = "auto",
) -> Callable[[], object]:
    """Write the convolution of `concat(x, x2)`, plus bias and residual, to `y`. Not differentiable.

    Args:
        y: `[N, O, H', W']`, overwritten; not the memory of `x` or `x2`. Its size implies the padding
            below and to the right: 0 to k - 1 rows and columns of zeros.
        x: `[N, C, H, W]`, float32 or bfloat16 (also float16 and float64 on `eager` and `reference`). On `native` this,
            `x2`, `residual` and `y` must be channels-last, and C and C2 even in bfloat16 for all but winograd2.
        weight: `[O, C + C2, k, k]`, x's dtype; or, on `native`, a `PackedWeight` (else it is packed at every call).
        x2: `[N, C2, H, W]`: the op acts as if on `torch.cat((x, x2), 1)`.
        bias: `[O]`, any floating dtype.
        residual: `[N, O, H', W']`, x's dtype; may be `y` itself.
        stride: of the convolution.
        padding: rows and columns of zeros above and to the left.
        upsample: convolve the image upsampled by two (nearest neighbour), so that y is [N, O, 2 H, 2 W]; k = 3,
            stride 1 and padding 1 only.
        backend: `"auto"`, `"native"`, `"eager"` or `"reference"`.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: a shape, device, memory format or value that does not fit.
        BackendError: the named backend cannot run here.
    """
    kernel, inner = _check(y, x, weight, x2, bias, residual, stride, padding, upsample)
    packed, channels2, algorithm = False, 0 if x2 is None else x2.shape[1], ""
    if isinstance(weight, PackedWeight):
        _check_packed(weight, x, channels2)
        packed = True

    def unfit() -> str | None:
        nonlocal algorithm
        if reason := not_channels_last(x=x, y=y, x2=x2, residual=residual):
            return reason
        if packed:
            return None
        algorithm = choose_algorithm(
            x.shape[0], x.shape[2], x.shape[3], inner, y.shape[1], kernel=kernel, stride=stride, padding=padding,
            upsample=upsample, dtype=x.dtype,
        )  # fmt: skip
        if y.shape[2:] != x.shape[2:] and not upsample:
            algorithm = "direct"
        return why_not_packed(algorithm, x.shape[1], channels2, x.dtype)

    backend = resolve("conv", "native" if packed and backend == "auto" else backend, x.device.type, x.dtype, unfit)
    if packed and backend != "native":
        raise ValueError(f"weight is packed for the native backend, must be a tensor [O, C, k, k] on {backend}")
    if y.numel() == 0:
        return lambda: None
    if backend == "native":
        if isinstance(weight, Tensor):
            weight = pack(weight, algorithm, upsample, dtype=x.dtype, channels2=channels2)
        own = weight
        return bind_with_floats(lambda bias: bind_native(y, x, own, x2, bias, residual, stride, padding), bias)
    assert isinstance(weight, Tensor)
    plain, dtype = weight, torch.float64 if backend == "reference" else x.dtype
    return torch.no_grad()(
        lambda: y.copy_(conv_by_torch(x, plain, x2, bias, residual, stride, padding, upsample, y.shape, dtype))
    )


def _check_packed(weight: PackedWeight, x: Tensor, channels2: int) -> None:
    if (weight.values.dtype, x.dtype) != (torch.float16, torch.float32) and weight.values.dtype != x.dtype:
        raise TypeError(f"weight is packed for {weight.values.dtype}, must be for x's dtype, {x.dtype}")
    if x.dtype == torch.bfloat16 and weight.channels2 != channels2:
        raise ValueError(f"weight is packed for {weight.channels2} channels of x2, must be for {channels2}")


def _check(
    y: Tensor, x: Tensor, weight: Tensor | PackedWeight, x2: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, stride: int, padding: int, upsample: bool,
) -> tuple[int, int]:  # fmt: skip
    """Check every argument; return the size of the kernel and the number of input channels."""
    if not isinstance(weight, (Tensor, PackedWeight)):
        raise TypeError(f"weight is {type(weight).__name__}, must be a tensor or a PackedWeight")
    plain = weight if isinstance(weight, Tensor) else None
    check_operands(x, {"y": y}, {"weight": plain, "x2": x2, "residual": residual}, {"bias": bias})
    if x.ndim != 4 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [N, C, H, W] with at least one channel")
    inner = x.shape[1]
    if x2 is not None:
        if x2.ndim != 4 or x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:] or x2.shape[1] < 1:
            raise ValueError(f"x2 has shape {tuple(x2.shape)}, must equal x's {tuple(x.shape)} but for the channels")
        inner += x2.shape[1]
    if isinstance(weight, PackedWeight):
        shape: tuple[int, ...] = (weight.out_channels, weight.in_channels, weight.kernel, weight.kernel)
        if weight.upsample != upsample:
            raise ValueError(f"weight is packed for upsample={weight.upsample}, must be for {upsample}")
    else:
        shape = tuple(weight.shape)
    if len(shape) != 4 or shape[0] < 1 or shape[1] != inner or shape[2] < 1 or shape[2] != shape[3]:
        raise ValueError(f"weight has shape {shape}, must be [O, {inner}, k, k]")
    out, kernel = shape[0], shape[2]
    if stride < 1:
        raise ValueError(f"stride is {stride}, must be at least 1")
    if not 0 <= padding < kernel:
        raise ValueError(f"padding is {padding}, must be from 0 to {kernel - 1}")
    if upsample and (kernel, stride, padding) != (3, 1, 1):
        raise ValueError(f"upsample is True with kernel {kernel}, stride {stride}, padding {padding}, must be 3, 1, 1")
    factor = 2 if upsample else 1
    fits = y.ndim == 4 and y.shape[:2] == (x.shape[0], out)
    for a, b in zip(y.shape[2:], x.shape[2:], strict=False):
        more = (a - 1) * stride + kernel - padding - factor * b  # rows that are added below
        fits = fits and (more == 1 if upsample else -stride < more < kernel)
    if not fits:
        raise ValueError(f"y has shape {tuple(y.shape)}, must be x's {tuple(x.shape)} convolved, with {out} channels")
    if isinstance(weight, PackedWeight) and (weight.algorithm != "direct" or weight.tile):
        if weight.tile and (reason := why_not_tile(weight)):
            raise ValueError(f"weight has tile {weight.tile}: {reason}")
        same = upsample or y.shape[2:] == x.shape[2:]
        if (kernel, stride, padding) != (3, 1, 1) or not same:
            raise ValueError(f"weight is packed for {weight.algorithm}, must be for direct: stride or padding is not 1")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, must be [{out}], one per row of weight")
    if residual is not None and residual.shape != y.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, must be y's, {tuple(y.shape)}")
    for name, value in (("x", x), ("x2", x2)):
        if value is not None and y.numel() and value.data_ptr() == y.data_ptr():
            raise ValueError(f"y is {name}, must be other memory, since all of {name} is read for it")
    return kernel, inner
