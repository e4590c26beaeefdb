"""Compute 3x3 convolutions of stride 1 and padding 1 with gradients; on the CPU with fewer multiplications.

    conv3x3    conv2d(concat(x, x2), weight, bias, padding=1)

On the native backend the convolution and both of its gradients take 36 multiplications for 4x4 pixels in float32, 16
for 2x2 pixels in bfloat16, where the definition has 144 and 36 (Winograd's minimal filtering, see `conv`):

    y = A^T [(G w G^T) . (B^T x B)] A            the convolution
    dx                                           the same of dy, with channels of w exchanged and its taps turned round
    dw = G^T [sum (A dy A^T)^T . (B^T x B)] G    its exact adjoint, summed over tiles
    db = sum (A dy A^T)[1, 1]                    at point 1, A^T takes plain sums

`conv.error_factor` bounds the error of each (of the third with sums over transforms and taps exchanged). In bfloat16
tiles are 2x2, where that factor is 1.7; for 4x4 it is 10. Transformed values are rounded to bfloat16, the weights once
from float32; products are summed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm_kernels.backend import check_backend, resolve
from fastddpm_kernels.checks import mixed
from fastddpm_kernels.conv import native
from fastddpm_kernels.conv.algorithm import choose_algorithm
from fastddpm_kernels.layout import channels_last, empty_channels_last

BACKENDS = ("native", "eager", "reference")


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, x2: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Return `F.conv2d(torch.cat((x, x2), 1), weight, bias, padding=1)`, differentiable in every tensor.

    Args:
        x: `[N, C, H, W]`.
        weight: `[O, C + C2, 3, 3]`, x's dtype (under autocast, any; on `native` float32, whatever x is).
        bias: `[O]`, as weight.
        x2: `[N, C2, H, W]`: as if concatenated to `x`; on `native` it is read where it is.
        backend: `"native"`: x and x2 both float32 or both bfloat16, on the CPU; it can be differentiated once, not
            twice. `"eager"`: torch's own. `"reference"`: in float64. `"auto"`: `native` where it can run and is not
            slower, else `eager`.

    Returns:
        `[N, O, H, W]` in x's dtype (`eager` under autocast: in autocast's); on `native` channels-last.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape that does not fit, or an unknown backend.
        BackendError: `backend` is "native" and cannot run here.
    """
    _check(x, weight, bias, x2)
    if backend != "auto":
        check_backend(backend, BACKENDS)
    backend = resolve_conv3x3(x, weight, bias, x2, backend)
    if backend == "native":
        return _conv3x3(x, weight, bias, x2)
    whole = x if x2 is None else torch.cat((x, x2), 1)
    if backend == "reference":
        bias = None if bias is None else bias.double()
        return F.conv2d(whole.double(), weight.double(), bias, padding=1).to(x.dtype)
    return F.conv2d(whole, weight, bias, padding=1)


def resolve_conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, x2: Tensor | None = None, backend: str = "auto"
) -> str:
    """Return the backend that `conv3x3` takes for these tensors."""

    def unfit() -> str | None:
        for parameter in (weight, bias):
            if parameter is not None and parameter.dtype != torch.float32:
                return f"native kernels take parameters in torch.float32, not {parameter.dtype}"
        return mixed(x, x2)

    return resolve("conv3x3", backend, x.device.type, x.dtype, unfit)


@torch.library.custom_op(
    "fastddpm::conv3x3", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? x2) -> Tensor"
)
def _conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, x2: Tensor | None) -> Tensor:
    """Return the convolution by native kernels; x and x2 are float32 or bfloat16, weight and bias float32."""
    y = empty_channels_last(x, len(weight))
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        native.conv3x3(y, channels_last(x), None if x2 is None else channels_last(x2), weight, bias, _tile(x, weight))
    return y


@_conv3x3.register_fake
def _conv3x3_fake(x: Tensor, weight: Tensor, bias: Tensor | None, x2: Tensor | None) -> Tensor:
    return empty_channels_last(x, weight.shape[0])


@torch.library.custom_op(
    "fastddpm::conv3x3_input_gradient", mutates_args=(), schema="(Tensor dy, Tensor weight) -> Tensor"
)
def _input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """Return dx [N, C, H, W] from dy [N, O, H, W] and a weight [O, C, 3, 3] of any strides."""
    dx = empty_channels_last(dy, weight.shape[1])
    if dx.numel():
        native.conv3x3(dx, channels_last(dy), None, weight, None, _tile(dy, weight), adjoint=True)
    return dx


@_input_gradient.register_fake
def _input_gradient_fake(dy: Tensor, weight: Tensor) -> Tensor:
    return empty_channels_last(dy, weight.shape[1])


@torch.library.custom_op(
    "fastddpm::conv3x3_weight_gradient",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? x2, bool last) -> (Tensor, Tensor)",
)
def _weight_gradient(dy: Tensor, x: Tensor, x2: Tensor | None, last: bool) -> tuple[Tensor, Tensor]:
    """Return dw [O, C + C2, 3, 3] and db [O]."""
    dweight, dbias = _weight_gradient_fake(dy, x, x2, last)
    if not x.numel():
        return dweight.zero_(), dbias.zero_()
    second = None if x2 is None else channels_last(x2)
    native.conv3x3_weight_gradient(dweight, dbias, channels_last(dy), channels_last(x), second)
    return dweight, dbias


@_weight_gradient.register_fake
def _weight_gradient_fake(dy: Tensor, x: Tensor, x2: Tensor | None, last: bool) -> tuple[Tensor, Tensor]:
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    layout = torch.channels_last if last else torch.contiguous_format
    dweight = torch.empty(dy.shape[1], channels, 3, 3, dtype=torch.float32, device=dy.device, memory_format=layout)
    return dweight, dy.new_empty(dy.shape[1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, x2 = inputs
    ctx.save_for_backward(x, weight, x2)
    ctx.has_bias = bias is not None


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, x2 = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dweight = dbias = None
    if wanted[1] or wanted[2]:
        last = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        dweight, dbias = _weight_gradient(dy, x, x2, last)
    parts = weight.split([x.shape[1], 0 if x2 is None else x2.shape[1]], dim=1)
    dx = _input_gradient(dy, parts[0]) if wanted[0] else None
    dx2 = _input_gradient(dy, parts[1]) if x2 is not None and wanted[3] else None
    return dx, dweight if wanted[1] else None, dbias if ctx.has_bias and wanted[2] else None, dx2


_conv3x3.register_autograd(_gradients, setup_context=_save)


def _tile(x: Tensor, weight: Tensor) -> int:
    """Return the output pixels of a tile's side: 2 for few pixels, where packing the weights is the cost."""
    if x.dtype == torch.bfloat16:
        return 2
    algorithm = choose_algorithm(x.shape[0], x.shape[2], x.shape[3], weight.shape[1], weight.shape[0])
    return 4 if algorithm == "winograd4" else 2


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, x2: Tensor | None) -> None:
    for name, value in (("x", x), ("weight", weight), ("bias", bias), ("x2", x2)):
        if not isinstance(value, Tensor) and (value is not None or name in ("x", "weight")):
            raise TypeError(f"{name} is {type(value).__name__}, must be a tensor")
    if x.ndim != 4 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [N, C, H, W] with at least one channel")
    channels = x.shape[1]
    if x2 is not None:
        if x2.ndim != 4 or x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:] or x2.shape[1] < 1:
            raise ValueError(f"x2 has shape {tuple(x2.shape)}, must equal x's {tuple(x.shape)} but for the channels")
        channels += x2.shape[1]
    if weight.ndim != 4 or weight.shape[0] < 1 or weight.shape[1:] != (channels, 3, 3):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must be [O, {channels}, 3, 3]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, must be [{weight.shape[0]}], one per row of weight")
