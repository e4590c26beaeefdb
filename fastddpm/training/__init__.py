"""Training: from a folder of images to a model, without losing a step."""

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
