"""Compute a 3x3 convolution of an image upsampled by two on GPUs: in two steps, or as one transposed convolution."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a 4x4 transposed convolution of stride 2, in rows of a 3x3 convolution of the upsampled image: output row 2i
# sees input rows i - 1 (weight row 0) and i (rows 1 and 2), output row 2i + 1 sees i (0 and 1) and i + 1.
_TAPS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
# For cuDNN: benchmark the algorithms when a shape first occurs, and exclude nondeterministic ones.
_BENCHMARK = _DETERMINISTIC = True


def transposed_weight(weight: Tensor) -> Tensor:
    """Return the weight of the transposed convolution (stride 2, padding 1) that upsamples by two and convolves.

    It takes 16 multiplications per input pixel and pair of channels instead of 36.

    Args:
        weight: [O, I, 3, 3], of the convolution.

    Returns:
        [I, O, 4, 4] in float64, as `conv_transpose2d` takes it.
    """
    taps = torch.tensor(_TAPS, dtype=torch.float64, device=weight.device)
    return torch.einsum("ak,bl,oikl->ioab", taps, taps, weight.double())


def double_(y: Tensor, x: Tensor) -> None:
    """Write `x` [N, C, H, W], upsampled by two (nearest neighbour), to `y`, both channels-last, in one copy."""
    x, y = (image.permute(0, 2, 3, 1) for image in (x, y))
    if x.shape[3] * x.itemsize % 8 == 0 and x.itemsize < 8:  # several channels at once: they stay adjacent
        x, y = x.view(torch.int64), y.view(torch.int64)
    n, h, w, c = x.shape
    y.view(n, h, 2, w, 2, c).copy_(x[:, :, None, :, None].expand(n, h, 2, w, 2, c))


def cudnn_conv(x: Tensor, weight: Tensor, stride: int, padding: int, allow_tf32: bool, out: Tensor) -> None:
    """Write `F.conv2d` to `out` by the fastest deterministic algorithm."""
    torch.ops.aten.cudnn_convolution.out(
        x, weight, [padding] * 2, [stride] * 2, [1, 1], 1, _BENCHMARK, _DETERMINISTIC, allow_tf32, out=out
    )


def cudnn_conv_transpose(x: Tensor, weight: Tensor, allow_tf32: bool) -> Tensor:
    """Return `F.conv_transpose2d` of stride 2 and padding 1, deterministic; torch's op has no `out` argument."""
    return torch.ops.aten.cudnn_convolution_transpose.default(
        x, weight, [1, 1], [0, 0], [2, 2], [1, 1], 1, _BENCHMARK, _DETERMINISTIC, allow_tf32
    )
