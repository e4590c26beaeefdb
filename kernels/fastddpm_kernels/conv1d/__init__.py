"""Compute the convolutions of a sequence's U-Net in place, with concatenation and bias.

    y = conv1d(concat(x, x2), weight) + bias            any stride; or transposed, of kernel 4, stride 2 and padding 1

A robot's plan has 4 to 64 positions and its network 250 million weights: each of them is multiplied with few values, so
reading the weights is the cost. The native kernel reads them once, packed in the order in which it needs them, every
thread its own part; the Triton kernel gives each program its own output channels.

Memory traffic: the weights once, each input and output once. Per output channel and position
2 * (C + C2) * taps floating-point operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm_kernels.backend import resolve
from fastddpm_kernels.checks import check_operands, not_float64, same_memory
from fastddpm_kernels.conv1d.formula import conv1d_by_torch
from fastddpm_kernels.conv1d.native import bind_conv1d
from fastddpm_kernels.conv1d.packing import TRANSPOSED, PackedWeight, pack, packed_values
from fastddpm_kernels.inplace import InPlace
from fastddpm_kernels.layout import is_channels_last
from fastddpm_kernels.native.binding import bind_with_floats

__all__ = ["PackedWeight", "conv1d_", "pack", "packed_values"]

MOST_TAPS = 64  # of the native kernel


@InPlace
def conv1d_(
    y: Tensor,
    x: Tensor,
    weight: Tensor | PackedWeight,
    *,
    x2: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    transposed: bool = False,
    backend: str = "auto",
) -> Callable[[], object]:
    """Write the convolution of `concat(x, x2)` along the sequence, plus bias, to `y`. Not differentiable.

    Products are summed in float32 on `native` and `triton`, and the result is rounded once.

    Args:
        y: `[N, O, L']`, overwritten; not the memory of `x` or `x2`.
        x: `[N, C, L]`, float32, or float16 (not on `native`), bfloat16, float64 (on `eager` and `reference`). On
            `native` and `triton` this, `x2` and `y` must be channels-last: channels adjacent, then positions.
        weight: `[O, C + C2, k]` (`[C + C2, O, 4]` if `transposed`), x's dtype; or a `PackedWeight` for the backend
            (else `native` and `triton` pack it at every call).
        x2: `[N, C2, L]`: the op acts as if on `torch.cat((x, x2), 1)`.
        bias: `[O]`, any floating dtype.
        stride, padding: of the convolution; zeros on both sides.
        transposed: compute the transposed convolution, whose L' is 2 L; only of kernel 4, stride 2 and padding 1.
        backend: `"auto"`, `"triton"`, `"native"`, `"eager"` or `"reference"`.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: a shape, device, memory format or value that does not fit.
        BackendError: the named backend cannot run here.
    """
    packed = weight if isinstance(weight, PackedWeight) else None
    kernel = _check(y, x, weight, x2, bias, stride, padding, transposed)

    def unfit() -> str | None:
        for name, value in (("x", x), ("y", y), ("x2", x2)):
            if value is not None and value.numel() and not is_channels_last(value, or_both=True):
                return f"{name} has strides {value.stride()}, must be channels-last"
        return f"kernel is {kernel}, must be at most {MOST_TAPS}" if kernel > MOST_TAPS else None

    wanted = packed.backend if packed is not None and backend == "auto" else backend
    backend = resolve("conv1d", wanted, x.device.type, x.dtype, unfit)
    if packed is not None and packed.backend != backend:
        raise ValueError(f"weight is packed for {packed.backend!r}, must be a tensor on {backend!r}")
    if backend == "triton":
        not_float64(x)
        if reason := unfit():
            raise ValueError(f"{reason} on the triton backend")
    if y.numel() == 0:
        return lambda: None
    if backend in ("native", "triton"):
        if packed is None:
            assert isinstance(weight, Tensor)
            channels2 = 0 if x2 is None else x2.shape[1]
            packed = pack(weight, backend, transposed=transposed, dtype=x.dtype, channels2=channels2)
        own = packed
        if backend == "native":
            return bind_with_floats(lambda bias: bind_conv1d(y, x, own, x2, bias, stride, padding), bias)
        from fastddpm_kernels.conv1d.triton import bind

        return bind(y, x, own, x2, bias, stride, padding)
    assert isinstance(weight, Tensor)
    plain, dtype = weight, torch.float64 if backend == "reference" else x.dtype
    return torch.no_grad()(lambda: y.copy_(conv1d_by_torch(x, plain, x2, bias, stride, padding, transposed, dtype)))


def _check(
    y: Tensor, x: Tensor, weight: Tensor | PackedWeight, x2: Tensor | None, bias: Tensor | None, stride: int,
    padding: int, transposed: bool,
) -> int:  # fmt: skip
    """Check every argument; return the size of the kernel."""
    if not isinstance(weight, (Tensor, PackedWeight)):
        raise TypeError(f"weight is {type(weight).__name__}, must be a tensor or a PackedWeight")
    plain = weight if isinstance(weight, Tensor) else None
    check_operands(x, {"y": y}, {"weight": plain, "x2": x2}, {"bias": bias})
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [N, C, L] with at least one channel")
    (n, inner, length), channels2 = x.shape, 0
    if x2 is not None:
        if x2.ndim != 3 or x2.shape[0] != n or x2.shape[2] != length or x2.shape[1] < 1:
            raise ValueError(f"x2 has shape {tuple(x2.shape)}, must equal x's {tuple(x.shape)} but for the channels")
        channels2 = x2.shape[1]
        inner += channels2
    if isinstance(weight, PackedWeight):
        out, channels, kernel = weight.out_channels, weight.in_channels, weight.kernel
        if weight.transposed != transposed:
            raise ValueError(f"weight is packed for transposed={weight.transposed}, must be for {transposed}")
        if weight.values.dtype != x.dtype:
            raise TypeError(f"weight is packed for {weight.values.dtype}, must be for x's dtype, {x.dtype}")
        if weight.channels2 != channels2:
            raise ValueError(f"weight is packed for {weight.channels2} channels of x2, must be for {channels2}")
    else:
        if weight.ndim != 3:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, must have three dimensions")
        out, channels = weight.shape[:2][::-1] if transposed else weight.shape[:2]
        kernel = weight.shape[2]
    if channels != inner or out < 1 or kernel < 1:
        raise ValueError(f"weight is for {channels} channels to {out}, of kernel {kernel}, must be for {inner}")
    if stride < 1:
        raise ValueError(f"stride is {stride}, must be at least 1")
    if padding < 0:
        raise ValueError(f"padding is {padding}, must be at least 0")
    if transposed and (kernel, stride, padding) != TRANSPOSED:
        raise ValueError(
            f"kernel, stride and padding are {kernel}, {stride}, {padding}, must be "
            f"{', '.join(map(str, TRANSPOSED))} if transposed"
        )
    fitting = 2 * length if transposed else (length + 2 * padding - kernel) // stride + 1
    if tuple(y.shape) != (n, out, fitting):
        raise ValueError(f"y has shape {tuple(y.shape)}, must be {(n, out, fitting)}")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, must be [{out}], one per output channel")
    for name, value in (("x", x), ("x2", x2)):
        if value is not None and y.numel() and same_memory(y, value):
            raise ValueError(f"y is {name}, must be other memory, since all of {name} is read for it")
    return kernel
