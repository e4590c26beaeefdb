"""Describe the statistics that a convolution leaves for the norms that read its result.

They are those of blocks: `unit` neighbouring channels of one sample, all its pixels. Each block has its mean and the
sum of squared deviations from that mean, so that nothing cancels when a norm merges blocks (Chan, Golub & LeVeque
1979). Where several programs write a block, the last one merges the statistics of all, in order: results are the same
bits at every run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

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


def statistics_shape(x: Tensor | tuple[int, ...], unit: int) -> tuple[int, int, int]:
    """Return the shape of the statistics of `x` [N, C, H, W]: [2 (means, squared deviations), N, C / unit].

    Raises:
        ValueError: `unit` is not one of `UNITS`, or does not divide the channels.
    """
    n, channels = (x if isinstance(x, tuple) else x.shape)[:2]
    if unit not in UNITS or channels % unit:
        raise ValueError(f"unit is {unit}, must be a power of two up to {UNITS[-1]} that divides {channels} channels")
    return 2, n, channels // unit


def statistics_unit(channels: int, *norms: tuple[int, int]) -> int:
    """Return the most channels that a block of a tensor may have.

    Args:
        channels: of the tensor.
        norms: for every norm that reads the tensor, the channels of its groups and the channel of the concatenation at
            which the tensor begins (0 for `x`, C for `x2`).
    """
    return math.gcd(UNITS[-1], channels, *(value for norm in norms for value in norm))
