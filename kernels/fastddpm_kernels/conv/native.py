"""Call the native convolutions. All tensors are channels-last, all float32 or all bfloat16, biases float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm_kernels.conv.packing import TILE, PackedWeight
from fastddpm_kernels.native.binding import THREADS, bind


def bind_conv(
    y: Tensor, x: Tensor, weight: PackedWeight, x2: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    stride: int, padding: int,
) -> Callable[[], None]:  # fmt: skip
    """Return a function that writes the convolution of concat(x, x2), plus bias and residual, to `y`.

    In bfloat16 "direct" takes even numbers of channels, and there is no "winograd4".
    """
    n, channels, height, width = x.shape
    kind = 1 if x.dtype == torch.bfloat16 else 2 if weight.values.dtype == torch.float16 else 0
    tensors = (y, x, x2, weight.values, bias, residual)
    channels2, outputs = _channels(x2), y.shape[1]
    if weight.algorithm == "direct" and not weight.tile:
        return bind(
            "fastddpm_conv_direct", *tensors, n, height, width, channels, channels2, *y.shape[2:], outputs,
            weight.kernel, stride, padding, weight.upsample, kind, THREADS,
        )  # fmt: skip
    return bind(
        "fastddpm_conv3x3_winograd", *tensors, n, *y.shape[2:], channels, channels2, outputs,
        weight.tile or TILE[weight.algorithm], weight.upsample, weight.tile > 0, kind, THREADS,
    )  # fmt: skip


def conv3x3(
    y: Tensor, x: Tensor, x2: Tensor | None, weight: Tensor, bias: Tensor | None, tile: int, *, adjoint: bool = False
) -> None:
    """Write the 3x3 convolution of concat(x, x2) to `y`, packing `weight` [O, C + C2, 3, 3], of any strides, each time.

    Args:
        tile: output pixels of a tile's side.
        adjoint: apply the adjoint of the convolution, from its O channels `x` to its C channels `y`.
    """
    out, inner, row, column = weight.stride()
    if adjoint:
        weight, strides = weight[:, :, 2, 2], (inner, out, -row, -column)
    else:
        strides = (out, inner, row, column)
    n, outputs, height, width = y.shape
    bind(
        "fastddpm_conv3x3_unpacked", y, x, x2, weight, *strides, bias, n, height, width, x.shape[1], _channels(x2),
        outputs, tile, x.dtype == torch.bfloat16, THREADS,
    )()  # fmt: skip


def conv3x3_weight_gradient(dweight: Tensor, dbias: Tensor | None, dy: Tensor, x: Tensor, x2: Tensor | None) -> None:
    """Write the gradients `dweight` [O, C + C2, 3, 3], of any strides, and `dbias` [O], both float32."""
    n, outputs, height, width = dy.shape
    bind(
        "fastddpm_conv3x3_weight_gradient", dweight, *dweight.stride(), dbias, dy, x, x2, n, height, width, x.shape[1],
        _channels(x2), outputs, x.dtype == torch.bfloat16, THREADS,
    )()  # fmt: skip


def _channels(x2: Tensor | None) -> int:
    return 0 if x2 is None else x2.shape[1]
