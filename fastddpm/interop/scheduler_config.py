"""Read the noise schedule and the settings of `Sampler` from configurations of diffusers' schedulers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastddpm.common.files import read_json
from fastddpm.process.schedule import NoiseSchedule

# A setting that diffusers does not have; it ignores names with an underscore.
SELF_CONDITION = "_self_condition"

_SPACED = ("prediction_type", "timestep_spacing", "steps_offset")
_CLIPPING = ("clip_sample", "clip_sample_range")
_ORDER = ("solver_order", "lower_order_final", "variance_type", "thresholding")
_MULTISTEP = (*_SPACED, *_ORDER, "flow_shift")
_SIGMAS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "lu",
    "use_flow_sigmas": "flow",
}
# Settings with one supported value.
_REQUIRED: dict[str, Any] = {
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "solver_p": None,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
}


class _Kind(NamedTuple):
    """How to read the configuration of a scheduler.

    Attributes:
        method: the sampling method of the scheduler, or a function of the configuration that returns it.
        settings: fields that are also settings of `Sampler`.
        defaults: diffusers' defaults that differ from those of `Sampler` or `NoiseSchedule`.
    """

    method: str | Callable[[Mapping[str, Any]], str]
    settings: tuple[str, ...]
    defaults: Mapping[str, Any] = {}


def _algorithm(*known: str, ending: str = "") -> Callable[[Mapping[str, Any]], str]:
    """Return how to read the method of DPM-Solver: one of `known`, with what the method's name ends in."""

    def method(config: Mapping[str, Any]) -> str:
        algorithm = config["algorithm_type"]
        if ending and algorithm == "sde-dpmsolver++" and config.get("solver_order") == 1:
            return algorithm  # of order 1 both are the same
        if algorithm not in known:
            raise ValueError(f"algorithm_type is {algorithm!r}, must be one of {', '.join(map(repr, known))}")
        return f"{algorithm}{ending}"

    return method


def _plms(config: Mapping[str, Any]) -> str:
    if not config["skip_prk_steps"]:
        raise ValueError("skip_prk_steps is False, only True is supported: PLMS without Runge-Kutta steps")
    return "plms"


_LINSPACE = {"timestep_spacing": "linspace"}
_NARROW = {"beta_start": 0.00085, "beta_end": 0.012}
_KINDS: dict[str, _Kind] = {
    "DDPMScheduler": _Kind("ddpm", (*_SPACED, *_CLIPPING, "thresholding", "variance_type")),
    "DDIMScheduler": _Kind("ddim", (*_SPACED, *_CLIPPING, "thresholding", "set_alpha_to_one")),
    "DPMSolverMultistepScheduler": _Kind(
        _algorithm("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"),
        (*_MULTISTEP, "solver_type", "euler_at_final", "final_sigmas_type", "lambda_min_clipped"),
        {**_LINSPACE, "algorithm_type": "dpmsolver++"},
    ),
    "DPMSolverSinglestepScheduler": _Kind(
        _algorithm("dpmsolver++", "dpmsolver", ending="_singlestep"),
        (*_MULTISTEP, "solver_type", "final_sigmas_type", "lambda_min_clipped"),
        {**_LINSPACE, "algorithm_type": "dpmsolver++", "lower_order_final": False},
    ),
    "DEISMultistepScheduler": _Kind("deis", _MULTISTEP, _LINSPACE),
    "UniPCMultistepScheduler": _Kind(
        "unipc",
        (*_MULTISTEP, "solver_type", "predict_x0", "disable_corrector", "final_sigmas_type", "sigma_min", "sigma_max"),
        _LINSPACE,
    ),
    "PNDMScheduler": _Kind(_plms, (*_SPACED, "set_alpha_to_one"), {"skip_prk_steps": False}),
    "LCMScheduler": _Kind(
        "lcm",
        (*_SPACED, *_CLIPPING, "thresholding", "timestep_scaling", "original_inference_steps"),
        {**_NARROW, "beta_schedule": "scaled_linear"},
    ),
    "EulerDiscreteScheduler": _Kind("euler", (*_SPACED, "sigma_min", "sigma_max", "final_sigmas_type"), _LINSPACE),
    "EulerAncestralDiscreteScheduler": _Kind("euler_a", _SPACED, _LINSPACE),
    "HeunDiscreteScheduler": _Kind("heun", (*_SPACED, *_CLIPPING), {**_LINSPACE, **_NARROW}),
    "KDPM2DiscreteScheduler": _Kind("dpm2", _SPACED, {**_LINSPACE, **_NARROW}),
    "KDPM2AncestralDiscreteScheduler": _Kind("dpm2_a", _SPACED, {**_LINSPACE, **_NARROW}),
    "LMSDiscreteScheduler": _Kind("lms", _SPACED, _LINSPACE),
}


def load_scheduler(path: str | os.PathLike[str]) -> tuple[NoiseSchedule, dict[str, Any]]:
    """Read the schedule and the settings of `Sampler` from diffusers' `scheduler_config.json`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is corrupt, of an unsupported class, or has an unsupported setting.
    """
    config = read_json(path)
    for name, supported in _REQUIRED.items():
        if config.get(name) not in (None, supported):
            raise ValueError(f"{path}: {name} is {config[name]!r}, only {supported!r} is supported")
    return scheduler_settings(config, str(path))


def scheduler_settings(config: Mapping[str, Any], where: str) -> tuple[NoiseSchedule, dict[str, Any]]:
    """Return what `load_scheduler` does, from a configuration in memory; errors begin with `where`."""
    name = config.get("_class_name", "DDPMScheduler")
    if name not in _KINDS:
        raise ValueError(f"{where}: _class_name is {name!r}, must be one of {', '.join(_KINDS)}")
    kind = _KINDS[name]
    config = {**kind.defaults, **{field: value for field, value in config.items() if value is not None}}
    try:
        method = kind.method if isinstance(kind.method, str) else kind.method(config)
        schedule = noise_schedule(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    settings = {field: config[field] for field in kind.settings if field in config}
    for field in ("clip_sample", "thresholding"):
        if not isinstance(settings.get(field, False), bool):
            raise ValueError(f"{where}: {field} is {settings[field]!r}, must be true or false")
    if not isinstance(own := config.get(SELF_CONDITION, False), bool):
        raise ValueError(f"{where}: {SELF_CONDITION} is {own!r}, must be true or false")
    if own:
        settings["self_condition"] = True
    if settings.get("thresholding"):  # its ratio and range mean nothing without it
        names = ("dynamic_thresholding_ratio", "sample_max_value")
        settings |= {field: config[field] for field in names if field in config}
    if "disable_corrector" in settings:
        settings["disable_corrector"] = tuple(settings["disable_corrector"])
    chosen = [field for field in _SIGMAS if config.get(field)]
    if len(chosen) > 1:
        raise ValueError(f"{where}: {chosen[0]} and {chosen[1]} are both true, must be one of them")
    if chosen:
        settings["sigma_schedule"] = _SIGMAS[chosen[0]]
        if name.startswith("KDPM2") and chosen[0] == "use_karras_sigmas":
            settings["round_timesteps"] = True
    return schedule, {**settings, "method": method}


def noise_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """Return the schedule of a configuration.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range.
    """
    if config.get("trained_betas") is not None:
        schedule = NoiseSchedule.from_betas(config["trained_betas"])
    else:
        schedule = NoiseSchedule.from_name(
            config.get("beta_schedule", "linear"),
            config.get("num_train_timesteps", 1000),
            config.get("beta_start", 1e-4),
            config.get("beta_end", 0.02),
        )
    return schedule.rescale_zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule
