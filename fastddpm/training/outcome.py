"""How a run ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DivergedError(ArithmeticError):
    """The gradient was not finite for too many steps in a row."""


def check_finite(bad: int, most: int, step: int, latest: Callable[[], int | None]) -> None:
    """Raises DivergedError where the last `bad` steps, up to number `step`, are `most` or more without a gradient.

    `latest`: says of which step the last checkpoint is.
    """
    if bad < most:
        return
    last = latest()
    kept = "there is no checkpoint yet" if last is None else f"the checkpoint of step {last} is as it was"
    raise DivergedError(
        f"loss or gradient is not finite for {bad} steps in a row, from step {step - bad + 1} on; {kept}"
    )


def is_better(value: float, best: Mapping[str, Any] | None, mode: str) -> bool:
    """Whether a metric is better than the best so far, whose "value" is there if there was one; `mode`: min or max."""
    if math.isnan(value):
        return False
    return best is None or (value < best["value"] if mode == "min" else value > best["value"])


@dataclass(frozen=True)
class TrainResult:
    """How a call of `Trainer.train` ended that came to its end.

    Attributes:
        step: how many steps are done, in all.
        model: the folder of the averaged model.
        loss: mean of the last record; None if there was none.
        metrics: the last ones; empty if there were none.
    """

    step: int
    model: Path
    loss: float | None
    metrics: dict[str, float]
