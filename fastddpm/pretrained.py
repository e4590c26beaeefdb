"""Models on disk: diffusers' pipeline folder, read and written.

    model_index.json
    unet/config.json, unet/diffusion_pytorch_model.safetensors
    scheduler/scheduler_config.json

What is saved here, `diffusers.DDPMPipeline.from_pretrained` loads, and the reverse.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastddpm._files import read_json, write_json
from fastddpm.sampler import Sampler
from fastddpm.schedule import NoiseSchedule
from fastddpm.unet import UNet

BUNDLED = Path(__file__).parent / "assets" / "digits"

_COMMON = ("prediction_type", "timestep_spacing", "steps_offset", "thresholding")
_CLIPPING = ("clip_sample", "clip_sample_range")
# Of each of diffusers' schedulers: the method it stands for, and the settings that are also `Sampler`'s.
_SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "DDPMScheduler": ("ddpm", (*_COMMON, *_CLIPPING, "variance_type")),
    "DDIMScheduler": ("ddim", (*_COMMON, *_CLIPPING, "set_alpha_to_one")),
    "DPMSolverMultistepScheduler": (
        "dpmsolver++",
        (*_COMMON, "variance_type", "solver_order", "lower_order_final", "final_sigmas_type"),
    ),
}
# Settings that one method alone has, which are left out when another is asked for.
_OF_ONE_METHOD = {
    "set_alpha_to_one": "ddim",
    "solver_order": "dpmsolver++",
    "lower_order_final": "dpmsolver++",
    "final_sigmas_type": "dpmsolver++",
}
# Defaults of diffusers that are not `Sampler`'s.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "DPMSolverMultistepScheduler": {"timestep_spacing": "linspace", "clip_sample": False},
}
# Settings that have one supported value.
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


@dataclass(frozen=True)
class Pretrained:
    """A model and how it is meant to be sampled.

    Attributes:
        unet: the network.
        schedule: the forward process it was trained on.
        settings: keyword arguments of `Sampler` (prediction_type, clip_sample, ...).
    """

    unet: UNet
    schedule: NoiseSchedule
    settings: dict[str, Any] = field(default_factory=dict)

    def sampler(self, **overrides: Any) -> Sampler:
        """A `Sampler` with the model's settings, save for those in `overrides`."""
        method = overrides.get("method", self.settings.get("method", "ddpm"))
        own = {name: v for name, v in self.settings.items() if _OF_ONE_METHOD.get(name, method) == method}
        return Sampler(self.unet, self.schedule, **{**own, **overrides})


def load_pretrained(
    folder: str | os.PathLike[str] = BUNDLED,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> Pretrained:
    """Loads a pipeline folder; without an argument the bundled model of handwritten digits.

    Nothing in the folder is executed: configurations are JSON, weights safetensors.

    Args:
        folder: a pipeline folder with `unet/` and `scheduler/`, or an old one with all their files in itself.
        dtype: of the network, float32 as in diffusers; None for the one it is stored in.
        device: where to put the network.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is corrupt or states something that is not supported; the message names file and field.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; a model is a folder with unet/ and scheduler/")
    # Models published before pipelines had subfolders, google/ddpm-cat-256 among them, keep all files in one.
    flat = not (folder / "scheduler").is_dir() and (folder / "scheduler_config.json").is_file()
    schedule, settings = load_scheduler((folder if flat else folder / "scheduler") / "scheduler_config.json")
    unet = UNet.from_pretrained(folder if flat else folder / "unet", dtype=dtype, device=device)
    return Pretrained(unet, schedule, settings)


def load_scheduler(path: str | os.PathLike[str]) -> tuple[NoiseSchedule, dict[str, Any]]:
    """Reads diffusers' `scheduler_config.json`: the schedule and the settings of `Sampler` that it states.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is corrupt, of an unsupported class, or has an unsupported setting.
    """
    return scheduler_settings(read_json(path), str(path))


def scheduler_settings(config: Mapping[str, Any], where: str) -> tuple[NoiseSchedule, dict[str, Any]]:
    """As `load_scheduler`, of a configuration at hand; errors begin with `where`."""
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
    if settings.get("thresholding"):  # without it they say nothing
        names = ("dynamic_thresholding_ratio", "sample_max_value")
        settings |= {name: config[name] for name in names if name in config}
    return schedule, {**settings, "method": method}


def save_pretrained(
    folder: str | os.PathLike[str],
    unet: UNet,
    schedule: NoiseSchedule,
    *,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_sample: bool = True,
    clip_sample_range: float = 1.0,
    timestep_spacing: str = "leading",
) -> None:
    """Writes a pipeline folder that `load_pretrained` and diffusers' `DDPMPipeline.from_pretrained` read.

    Args:
        folder: made if it does not exist; files of the same names are replaced.
        unet, schedule: the model; weights are stored in the network's dtype.
        prediction_type, variance_type, clip_sample, clip_sample_range, timestep_spacing: how it is sampled, as for
            `Sampler`.

    Raises:
        ValueError: a setting is not known.
        OSError: a file cannot be written.
    """
    settings: dict[str, Any] = {
        "prediction_type": prediction_type,
        "variance_type": variance_type,
        "clip_sample": clip_sample,
        "clip_sample_range": clip_sample_range,
        "timestep_spacing": timestep_spacing,
    }
    Sampler(unet, schedule, **settings)  # raises what loading would raise
    folder = Path(folder)
    unet.save_pretrained(folder / "unet")
    config: dict[str, Any] = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.30.0",
        "num_train_timesteps": schedule.num_train_timesteps,
        **settings,
        "steps_offset": 0,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
        "trained_betas": None,
    }
    if schedule.beta_schedule == "trained_betas":
        config["trained_betas"] = schedule.betas.tolist()
    else:
        config["beta_schedule"] = schedule.beta_schedule
    if schedule.beta_start is not None:
        config |= {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": "0.30.0",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
    )
