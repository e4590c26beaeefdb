"""Exact algebra on weights that several kinds of U-Net use, done once before sampling, in float64."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def side_by_side(layers: Iterable[tuple[str, Tensor, Tensor]]) -> tuple[Tensor, Tensor, dict[str, slice]]:
    """Join linear layers that read the same input into one.

    Args:
        layers: the name, weight [C, E] and bias [C] of each.

    Returns:
        The weight [sum C, E] and bias [sum C] in float64, and the rows of each layer by its name.
    """
    weights, biases, rows, start = [], [], {}, 0
    for name, weight, bias in layers:
        weights.append(weight.double())
        biases.append(bias.double())
        rows[name] = slice(start, start + len(bias))
        start += len(bias)
    return torch.cat(weights), torch.cat(biases), rows
