"""Describe how a run ends: its result, divergence, and the best step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DivergedError(ArithmeticError):
    """The gradient was not finite for too many steps in a row."""


def check_finite(bad: int, most: int, step: int, latest: Callable[[], int | None]) -> None:
    """Raise DivergedError if the last `bad` steps, up to number `step`, were `most` or more without a gradient.

    `latest`: returns the step of the last checkpoint.
    """
    if bad < most:
        return
    last = latest()
    kept = "there is no checkpoint yet" if last is None else f"the checkpoint of step {last} is as it was"
    raise DivergedError(
        f"loss or gradient is not finite for {bad} steps in a row, from step {step - bad + 1} on; {kept}"
    )


def is_better(value: float, best: Mapping[str, Any] | None, mode: str) -> bool:
    """Return whether a metric is better than the best so far ({"value": ...} or None); `mode` is "min" or "max"."""
    if math.isnan(value):
        return False
    return best is None or (value < best["value"] if mode == "min" else value > best["value"])


@dataclass(frozen=True)
class TrainResult:
    """The result of `Trainer.train`.

    Attributes:
        step: the total number of steps done.
        model: the folder of the averaged model.
        loss: mean of the last record; None if there was none.
        metrics: the last ones; empty if there were none.
    """

    step: int
    model: Path
    loss: float | None
    metrics: dict[str, float]
