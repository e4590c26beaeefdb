"""The instruction that only EDM's U-Nets need."""

from __future__ import annotations

from collections.abc import Callable

from fastddpm.networks.frozen.instructions import Machine


def add_doubled(m: Machine, source: int, target: int) -> Callable[[], object]:
    """Add source [N, C, H, W], every pixel repeated in both directions, to target [N, C, 2 H, 2 W], in place."""

    def run() -> None:
        x, y = m.slots[source].permute(0, 2, 3, 1), m.slots[target].permute(0, 2, 3, 1)
        n, height, width, channels = x.shape
        small = x.view(n * height, 1, width, 1, channels)
        y.view(n * height, 2, width, 2, channels).add_(small.expand(-1, 2, -1, 2, -1))

    return run
