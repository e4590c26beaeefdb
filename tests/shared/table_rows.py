"""What a row of a `StepTable` means, in float64: shared by the tests that compare rows with a library's step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from fastddpm.process.tables import StepTable

SHAPE = (2, 3, 4, 4)


def execute(
    table: StepTable,
    index: int,
    x: Tensor,
    out: Tensor,
    *,
    x0_prev: Tensor | None = None,
    z: Tensor | None = None,
    clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(next, x0) by the definition of the row."""
    a, b, c, d, e, f, s = table.rows[index].tolist()  # of at most one earlier x0
    std: Tensor | float = s
    if table.log_variance is not None:
        out, v = out.chunk(2, dim=1)
        low, high = table.log_variance[index].tolist()
        v = v.log() if table.learned == "variance" else v
        std = s * torch.exp(0.5 * ((v + 1) / 2 * high + (1 - v) / 2 * low))
    x0 = a * x + b * out
    x0 = x0 if clip is None else x0.clamp(-clip, clip)
    following = c * x0 + d * x + e * out
    if f != 0:
        assert x0_prev is not None
        following = following + f * x0_prev
    return following if z is None else following + std * z, x0


def compare(
    table: StepTable,
    step: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    *,
    clip: float | None = None,
    channels: int = 3,
    variance: bool = False,
    rows: Iterable[int] | None = None,
) -> None:
    """Every row (or those named) is `step(row, x, out, z)`, for the same random numbers and the same past.

    `channels` of the network's output; `variance`: the second half of them is one, and positive.
    """
    x0_prev = None
    for index in range(len(table)) if rows is None else sorted(set(rows)):
        x, z = torch.randn(2, *SHAPE, dtype=torch.float64)
        out = torch.randn(SHAPE[0], channels, *SHAPE[2:], dtype=torch.float64)
        if variance:
            out[:, 3:] = out[:, 3:].exp()
        following, x0_prev = execute(table, index, x, out, x0_prev=x0_prev, z=z, clip=clip)
        torch.testing.assert_close(following, step(index, x, out, z), rtol=1e-9, atol=1e-9)


def walk(
    table: StepTable, x: np.ndarray, network: Callable[[int, np.ndarray], np.ndarray], noises: np.ndarray
) -> list[np.ndarray]:
    """Return the states before every row and after the last, by the definition of the rows."""
    states, seen = [x], list[np.ndarray]()
    for row, (a, b, c, d, e, f, s, *older) in enumerate(table.rows.tolist()):
        out = network(row, x)
        stored = a * x + b * out
        x = c * stored + d * x + e * out + s * noises[row]
        for factor, past in zip((f, *older), seen[::-1], strict=False):
            x = x + factor * past
        seen.append(stored)
        states.append(x)
    return states
