"""How a run ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class DivergedError(ArithmeticError):
    """The gradient was not finite for too many steps in a row."""


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
