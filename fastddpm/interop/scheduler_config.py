"""Read configurations of diffusers' schedulers: the noise schedule, and the settings of `Sampler` that they state."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from fastddpm.common.files import read_json
from fastddpm.process.schedule import NoiseSchedule

# What diffusers has no word for; it ignores names with an underscore.
SELF_CONDITION = "_self_condition"

_COMMON = ("prediction_type", "timestep_spacing", "steps_offset", "thresholding")
_CLIPPING = ("clip_sample", "clip_sample_range")
# For each of diffusers' schedulers: its method, and the settings that `Sampler` shares.
_SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "DDPMScheduler": ("ddpm", (*_COMMON, *_CLIPPING, "variance_type")),
    "DDIMScheduler": ("ddim", (*_COMMON, *_CLIPPING, "set_alpha_to_one")),
    "DPMSolverMultistepScheduler": (
        "dpmsolver++",
        (*_COMMON, "variance_type", "solver_order", "lower_order_final", "final_sigmas_type"),
    ),
}
# Defaults of diffusers that differ from `Sampler`'s.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "DPMSolverMultistepScheduler": {"timestep_spacing": "linspace", "clip_sample": False},
}
# Settings with one supported value.
_REQUIRED: dict[str, Any] = {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "euler_at_final": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "lambda_min_clipped": -math.inf,
}


def load_scheduler(path: str | os.PathLike[str]) -> tuple[NoiseSchedule, dict[str, Any]]:
    """Read diffusers' `scheduler_config.json`: the schedule and the settings of `Sampler` that it states.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is corrupt, of an unsupported class, or has an unsupported setting.
    """
    return scheduler_settings(read_json(path), str(path))


def scheduler_settings(config: Mapping[str, Any], where: str) -> tuple[NoiseSchedule, dict[str, Any]]:
    """Do the same for a configuration that is already read; errors begin with `where`."""
    kind = config.get("_class_name", "DDPMScheduler")
    if kind not in _SETTINGS:
        raise ValueError(f"{where}: _class_name is {kind!r}, must be one of {', '.join(_SETTINGS)}")
    for name, supported in _REQUIRED.items():
        if config.get(name) not in (None, supported):
            raise ValueError(f"{where}: {name} is {config[name]!r}, only {supported!r} is supported")
    try:
        if config.get("trained_betas") is not None:
            schedule = NoiseSchedule.from_betas(config["trained_betas"])
        else:
            schedule = NoiseSchedule.from_name(
                config.get("beta_schedule", "linear"),
                config.get("num_train_timesteps", 1000),
                config.get("beta_start", 1e-4),
                config.get("beta_end", 0.02),
            )
        if config.get("rescale_betas_zero_snr"):
            schedule = schedule.rescale_zero_terminal_snr()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    method, names = _SETTINGS[kind]
    settings = {**_DEFAULTS.get(kind, {}), **{name: v for name in names if (v := config.get(name)) is not None}}
    for name in ("clip_sample", "thresholding"):
        if not isinstance(settings.get(name, False), bool):
            raise ValueError(f"{where}: {name} is {settings[name]!r}, must be true or false")
    if not isinstance(own := config.get(SELF_CONDITION, False), bool):
        raise ValueError(f"{where}: {SELF_CONDITION} is {own!r}, must be true or false")
    if own:
        settings["self_condition"] = True
    if settings.get("thresholding"):  # without it they have no meaning
        names = ("dynamic_thresholding_ratio", "sample_max_value")
        settings |= {name: config[name] for name in names if name in config}
    return schedule, {**settings, "method": method}
