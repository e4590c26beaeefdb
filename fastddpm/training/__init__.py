"""Train a model on a folder of images, without losing a step."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastddpm.training.ema import ExponentialAverage
    from fastddpm.training.logs import read_log
    from fastddpm.training.metrics import ComponentDistance
    from fastddpm.training.outcome import DivergedError, TrainResult
    from fastddpm.training.settings import TrainerSettings
    from fastddpm.training.trainer import Metric, Trainer

__all__ = [
    "ComponentDistance",
    "DivergedError",
    "ExponentialAverage",
    "Metric",
    "TrainResult",
    "Trainer",
    "TrainerSettings",
    "read_log",
]

_PLACES = {
    "ComponentDistance": "metrics",
    "DivergedError": "outcome",
    "ExponentialAverage": "ema",
    "Metric": "trainer",
    "TrainResult": "outcome",
    "Trainer": "trainer",
    "TrainerSettings": "settings",
    "read_log": "logs",
}


def __getattr__(name: str) -> Any:
    # `import fastddpm` imports the objective, and with it this package, but neither PIL nor rich.
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
