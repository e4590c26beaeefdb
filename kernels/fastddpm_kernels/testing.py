"""What the tests and benchmarks of every op share: one comparison, named hard shapes, poisoned memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Shapes [N, C, H, W] with the number of groups, each here for a reason. Small: the interpreter runs them.
SHAPES: dict[str, tuple[tuple[int, int, int, int], int]] = {
    "plain": ((2, 64, 8, 8), 32),
    "channels_not_a_power_of_two": ((2, 96, 5, 7), 8),
    "twelve_channels_a_group": ((1, 48, 4, 4), 4),
    "one_group": ((2, 24, 3, 5), 1),
    "one_channel_a_group": ((2, 16, 4, 4), 16),
    "one_pixel": ((3, 32, 1, 1), 8),
    "one_row": ((2, 32, 1, 19), 4),
    "one_channel": ((2, 1, 16, 16), 1),
    "wide": ((1, 320, 3, 3), 32),
    "many_pixels": ((1, 8, 33, 31), 2),
    "empty_batch": ((0, 32, 4, 4), 8),
}

# Least relative error that is granted to a result in each dtype: a few units in the last place, since a value
# may be rounded once more than in the reference. [rms, max relative to the largest value]
FLOORS: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (3e-7, 2e-6),
    torch.float16: (5e-4, 2e-3),
    torch.bfloat16: (4e-3, 1.6e-2),
}


def errors(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative rms error and largest error over the largest magnitude, both in float64; `inf` where not finite."""
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    if a.numel() == 0:
        return 0.0, 0.0
    if not bool(torch.isfinite(a).all()):
        return float("inf"), float("inf")
    difference = (a - e).abs()
    tiny = 1e-30
    rms = difference.square().mean().sqrt() / e.square().mean().sqrt().clamp_min(tiny)
    largest = difference.max() / e.abs().max().clamp_min(tiny)
    return float(rms), float(largest)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    eager: Tensor | None = None,
    factor: float = 2.0,
    max_factor: float | None = None,
    dtype: torch.dtype | None = None,
    name: str = "",
) -> None:
    """Asserts that `actual` is as near to the truth `expected` as its dtype allows.

    Both the rms and the maximum error are bounded: by `FLOORS[dtype]`, or, where that is more, by `factor` times
    what `eager` (idiomatic torch in the same dtype, on the same inputs) loses against the same truth.

    Args:
        actual: the result under test.
        expected: the truth, usually computed in float64 from the same inputs.
        eager: what torch itself gives in `actual`'s dtype.
        factor: how many times eager's error is allowed.
        max_factor: the same of the largest error, where that is more: not all elements may lose alike.
        dtype: whose floor applies; `actual.dtype` by default (name it where a float32 output is computed from
            half-precision intermediates).
        name: says in the message which tensor it was.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    got = errors(actual, expected)
    floor = FLOORS[dtype or actual.dtype]
    granted = errors(eager, expected) if eager is not None else (0.0, 0.0)
    factors = (factor, factor if max_factor is None else max_factor)
    bounds = tuple(max(f, k * g) for f, k, g in zip(floor, factors, granted, strict=True))
    if got[0] <= bounds[0] and got[1] <= bounds[1]:
        return
    difference = (actual.detach().double().cpu() - expected.detach().double().cpu()).abs().nan_to_num(float("inf"))
    where = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    raise AssertionError(
        f"{name or 'result'} [{tuple(actual.shape)}, {actual.dtype}]: rms error {got[0]:.3g} (bound {bounds[0]:.3g}), "
        f"max {got[1]:.3g} (bound {bounds[1]:.3g}); worst at {where}: "
        f"{actual[where].item():.8g}, expected {expected[where].item():.8g}; "
        f"{int((difference > bounds[1] * float(expected.abs().max())).sum())} of {difference.numel()} beyond the bound"
    )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, `torch.empty` and its kin return NaN (integers: the largest value), so what is not written shows."""
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic  # a module whose attributes are properties: opaque to type checkers
    was_fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_warn)
        deterministic.fill_uninitialized_memory = was_fill
