"""Describe the statistics that a convolution leaves for the norms that read its result.

They are those of blocks: `unit` neighbouring channels by `span` neighbouring pixels of one sample, in row-major order.
Each block has its mean and the sum of squared deviations from that mean, so that nothing cancels when a norm merges
blocks (Chan, Golub & LeVeque 1979). One program writes each block: results are the same bits at every run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SPAN = 64  # pixels of a block, in larger images
UNITS = tuple(2**k for k in range(7))  # the channels that a block may have


class Norm(NamedTuple):
    """The group norm, FiLM and SiLU before a convolution: `silu(film(group_norm(concat(x, x2))))`.

    Attributes:
        weight, bias: `[C + C2]`, any floating dtype, contiguous.
        num_groups: divides C + C2; a group may straddle x and x2.
        statistics: of `x`, float32 `statistics_shape(x, unit)`, as `conv_` wrote them.
        statistics2: of `x2`, with x2; its unit may be another.
        eps: added to the variance.
        scale, shift: `[N, C + C2]`, both or neither: `h * (1 + scale) + shift`. Neighbouring channels are adjacent.
        activation: `"silu"` or None.
    """

    weight: Tensor
    bias: Tensor
    num_groups: int
    statistics: Tensor
    statistics2: Tensor | None = None
    eps: float = 1e-5
    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: str | None = "silu"


def span_of(height: int, width: int) -> int:
    """Return the pixels of a block: `SPAN`, or the power of two that holds a smaller image."""
    return min(SPAN, 1 << max(height * width - 1, 0).bit_length())


def statistics_shape(x: Tensor | tuple[int, ...], unit: int) -> tuple[int, int, int, int]:
    """Return the shape of the statistics of `x` [N, C, H, W]: [2 (means, squared deviations), N, spans, C / unit].

    Raises:
        ValueError: `unit` is not one of `UNITS`, or does not divide the channels.
    """
    n, channels, height, width = x if isinstance(x, tuple) else x.shape
    if unit not in UNITS or channels % unit:
        raise ValueError(f"unit is {unit}, must be a power of two up to {UNITS[-1]} that divides {channels} channels")
    return 2, n, -(-height * width // span_of(height, width)), channels // unit


def statistics_unit(channels: int, *norms: tuple[int, int]) -> int:
    """Return the most channels that a block of a tensor may have.

    Args:
        channels: of the tensor.
        norms: for every norm that reads the tensor, the channels of its groups and the channel of the concatenation at
            which the tensor begins (0 for `x`, C for `x2`).
    """
    return math.gcd(UNITS[-1], channels, *(value for norm in norms for value in norm))


def span_sizes(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the number of pixels in each span, int64."""
    span = span_of(height, width)
    starts = torch.arange(0, height * width, span, device=device)
    return (height * width - starts).clamp_max(span)
