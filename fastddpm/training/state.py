"""Turn the state and the settings of a run into the content of a checkpoint, and back."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastddpm.interop.pretrained import is_condition_model
from fastddpm.interop.text_encoder import TextEncoder
from fastddpm.networks.unet.model import UNet
from fastddpm.training.checkpoint import Checkpoint
from fastddpm.training.ema import ExponentialAverage
from fastddpm.training.logs import Meter
from fastddpm.training.objective import GaussianDiffusion
from fastddpm.training.settings import TrainerSettings
from fastddpm.training.step import TrainingStep

# The keyword arguments of GaussianDiffusion, with their defaults.
OBJECTIVE = {
    name: parameter.default
    for name, parameter in inspect.signature(GaussianDiffusion.__init__).parameters.items()
    if parameter.kind == parameter.KEYWORD_ONLY
}
# The settings that give the weights their meaning: a run cannot continue with other values.
MEANING = ("prediction_type", "variance_type", "self_condition", "null_class", "schedule", "network", "text_encoder")
# Settings of a Trainer that change neither the weights nor the samples, and those of the order of the data, which are
# compared separately.
WITHOUT_EFFECT = (
    *("results_folder", "num_workers", "cache_bytes", "log_every", "save_every", "keep_last"),
    *("max_bad_steps", "stop_on_save_error", "compile", "channels_last", "device", "tensorboard"),
)
OF_THE_ORDER = ("seed", "train_batch_size", "gradient_accumulate_every")


def settings_of(diffusion: GaussianDiffusion) -> dict[str, Any]:
    """Return the keyword arguments that a diffusion was made with."""
    sampling = {"timestep_sampling": diffusion.timestep_sampler.kind}
    return {name: sampling[name] if name in sampling else getattr(diffusion, name) for name in OBJECTIVE}


def condition_fields(unet: Any) -> dict[str, Any]:
    """Return the fields that a `UNet2DConditionModel` was made with."""
    return {name: value for name, value in unet.config.items() if not name.startswith("_")}


def describe(
    diffusion: GaussianDiffusion,
    settings: TrainerSettings,
    mixed_precision: str,
    text_encoder: TextEncoder | None = None,
) -> dict[str, Any]:
    """Return all settings that change the weights or samples, as JSON values."""
    objective = {name: value for name, value in settings_of(diffusion).items() if name != "backend"}
    betas = diffusion.schedule.betas.numpy().tobytes()
    network: dict[str, Any] | str = type(diffusion.unet).__name__
    if isinstance(diffusion.unet, UNet):  # its null class is that of the diffusion
        network = {name: value for name, value in vars(diffusion.unet.config).items() if name != "null_class"}
        objective["dropout"] = network.pop("dropout")
    elif is_condition_model(diffusion.unet):
        network = condition_fields(diffusion.unet)
        objective["dropout"] = network.pop("dropout")
    if text_encoder is not None:  # its name may change, as where it is installed
        objective |= {"text_encoder": text_encoder.fingerprint, "text_tokens": text_encoder.tokens}
    told = {name: value for name, value in vars(settings).items() if name not in (*WITHOUT_EFFECT, *OF_THE_ORDER)}
    told |= {"mixed_precision": mixed_precision, "ema_decay": settings.ema_decays}
    schedule = f"{len(diffusion.schedule.betas)} betas {hashlib.sha256(betas).hexdigest()[:12]}"
    return json.loads(json.dumps({**told, **objective, "schedule": schedule, "network": network}))


def compare(
    saved: Mapping[str, Any], told: Mapping[str, Any], label_names: Mapping[str, str], where: Path
) -> list[str]:
    """Return the settings that differ from those of a checkpoint, one line each.

    Args:
        saved: the plain values of the checkpoint at `where`; older ones contain fewer.
        told: `describe` of the current run.
        label_names: the labels of the current run.

    Raises:
        ValueError: the weights would mean something else: a setting of `MEANING` or the name of a label differs.
    """
    before: dict[str, Any] = {name: saved[name] for name in ("prediction_type",) if name in saved}
    before |= saved.get("settings", {})
    changed = {name: value for name, value in told.items() if name in before and before[name] != value}
    for name in MEANING:
        if name in changed:
            was, now = _differing(before[name], changed[name])
            raise ValueError(f"{name} is {now}, but {where} has been trained with {was}, must be the same")
    for label, name in saved.get("label_names", {}).items():
        if label in label_names and label_names[label] != name:
            raise ValueError(
                f"data has the class {label_names[label]!r} for label {label}, but {where} has been trained with "
                f"{name!r} there: the classes must be the same"
            )
    return [
        f"{name} was {before[name]!r}, is now {value!r}: from here on the training is another"
        for name, value in changed.items()
    ]


def _differing(before: Any, now: Any) -> tuple[str, str]:
    """Return two values for a message; for two tables only the keys that differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in now if before.get(key) != now[key]]
        before, now = ({key: table.get(key) for key in keys} for table in (before, now))
    return repr(before), repr(now)


def collect(
    diffusion: GaussianDiffusion,
    averages: Sequence[ExponentialAverage],
    training: TrainingStep,
    meter: dict[str, Any],
    random_states: list[dict[str, Any]],
    plain: dict[str, Any],
) -> Checkpoint:
    """Return a checkpoint; `meter` is a state, `random_states` those of all processes, `plain` is for JSON."""
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
    """Restore everything that `collect` was given; return the random states of this process.

    Raises:
        ValueError: the checkpoint belongs to another network or other averages; only weights may have changed.
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
