"""Exact algebra on weights that kinds of U-Net share, done once before sampling, in float64."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# The rows of a 3x3 convolution of the upsampled image that each row of a 4x4 transposed convolution of stride 2 adds
# up: output row 2i sees input rows i - 1 (weight row 0) and i (rows 1 and 2), row 2i + 1 sees i (0 and 1) and i + 1.
_TAPS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


def upsample_conv(weight: Tensor) -> Tensor:
    """Return nearest-neighbour upsampling by two and a 3x3 convolution as one transposed convolution.

    It has stride 2 and padding 1, and takes 16 multiplications per input pixel and pair of channels in place of 36.

    Args:
        weight: [O, I, 3, 3], of the convolution.

    Returns:
        float64 [I, O, 4, 4], as `conv_transpose2d` takes it.
    """
    taps = torch.tensor(_TAPS, dtype=torch.float64, device=weight.device)
    return torch.einsum("ak,bl,oikl->ioab", taps, taps, weight.double())


def side_by_side(layers: Iterable[tuple[str, Tensor, Tensor]]) -> tuple[Tensor, Tensor, dict[str, slice]]:
    """Join linear layers of one input into one.

    Args:
        layers: the name, weight [C, E] and bias [C] of each.

    Returns:
        weight [sum C, E] and bias [sum C] in float64, and the rows of each layer by its name.
    """
    weights, biases, rows, start = [], [], {}, 0
    for name, weight, bias in layers:
        weights.append(weight.double())
        biases.append(bias.double())
        rows[name] = slice(start, start + len(bias))
        start += len(bias)
    return torch.cat(weights), torch.cat(biases), rows
