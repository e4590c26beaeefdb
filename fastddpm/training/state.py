"""Turn the state of a run into the content of a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastddpm.training.checkpoint import Checkpoint
from fastddpm.training.ema import ExponentialAverage
from fastddpm.training.logs import Meter
from fastddpm.training.objective import GaussianDiffusion
from fastddpm.training.step import TrainingStep


def collect(
    diffusion: GaussianDiffusion,
    averages: Sequence[ExponentialAverage],
    training: TrainingStep,
    meter: dict[str, Any],
    random_states: list[dict[str, Any]],
    plain: dict[str, Any],
) -> Checkpoint:
    """Return a checkpoint; `meter` is its state, `random_states` those of all processes, `plain` is for JSON."""
    weights: dict[str, dict[str, Tensor]] = {"diffusion": diffusion.state_dict()}
    weights |= {f"ema-{place}": average.module.state_dict() for place, average in enumerate(averages)}
    state = {
        **training.state_dict(),
        "meter": meter,
        "averaged": [int(average.n_averaged) for average in averages],
        "random": random_states,
    }
    return Checkpoint(weights, state, {**plain, "ema_decays": [average.decay for average in averages]})


def restore(
    saved: Checkpoint,
    where: Path,
    diffusion: GaussianDiffusion,
    averages: Sequence[ExponentialAverage],
    training: TrainingStep,
    meter: Meter,
    process: int,
) -> dict[str, Any]:
    """Set all to what `collect` was given; return the random states of this process.

    Raises:
        ValueError: the checkpoint is of another network or of other averages; nothing but weights has been changed.
    """
    decays = [average.decay for average in averages]
    if averages and saved.state["ema_decays"] != decays:
        raise ValueError(f"ema_decay is {decays}, but {where} has the averages of {saved.state['ema_decays']}")
    try:
        diffusion.load_state_dict(_with_history(saved.weights["diffusion"], diffusion))
        for place, average in enumerate(averages):
            average.module.load_state_dict(saved.weights[f"ema-{place}"])
            average.n_averaged.fill_(saved.training["averaged"][place])
        training.load_state_dict(saved.training)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} is not of this network: {reason[:400]}") from None
    meter.load_state_dict(saved.training["meter"], training.accelerator.device)
    states = saved.training["random"]
    return states[process % len(states)]


def _with_history(weights: dict[str, Tensor], diffusion: GaussianDiffusion) -> dict[str, Tensor]:
    """Return the weights with the history of importance sampling if this diffusion has one, else without."""
    history = {name: value for name, value in diffusion.state_dict().items() if name.startswith("timestep_sampler.")}
    kept = {
        name: value for name, value in weights.items() if name in history or not name.startswith("timestep_sampler.")
    }
    return {**history, **kept}
