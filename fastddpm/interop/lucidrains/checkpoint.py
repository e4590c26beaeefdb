"""Load checkpoints of denoising_diffusion_pytorch's trainers: `model-N.pt`, with weights and their moving average."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.common.checks import listed
from fastddpm.common.files import check_weights, read_tensors
from fastddpm.interop.lucidrains.shapes import unet_arguments
from fastddpm.interop.lucidrains.tables import OBJECTIVES
from fastddpm.process.schedule import NoiseSchedule

# The entry of the file that holds each kind of weights, and the prefix of its keys.
_WEIGHTS = {"ema": ("ema", "ema_model."), "model": ("model", "")}


def load_trainer_checkpoint(
    path: str | os.PathLike[str],
    diffusion: nn.Module | Mapping[str, Any],
    *,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    **diffusion_kwargs: Any,
) -> nn.Module:
    """Load the diffusion of a checkpoint that a `Trainer` or `Trainer1D` saved, for `accelerate`.

    The noise schedule comes from the file, not from `diffusion`. Nothing in the file is executed.

    Args:
        path: the file, such as results/model-10.pt.
        diffusion: a diffusion like the trainer's, which is not changed; or the arguments of the `Unet`, from which a
            `GaussianDiffusion` is built.
        weights: "ema", the moving average of the weights, with which the trainer samples; or "model", the weights.
        device: the device of the new diffusion.
        **diffusion_kwargs: if `diffusion` holds arguments of the `Unet`, the arguments of the `GaussianDiffusion`:
            `image_size` and the others used in training; `timesteps` and `objective` come from the file.

    Returns:
        A new diffusion, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such checkpoint, or belongs to another diffusion: the message names keys, shapes or
            objective.
        TypeError: `diffusion` is neither, or arguments are missing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file; the trainers save model-N.pt in their results_folder")
    state = _state(read_tensors(path), path, weights)
    if isinstance(diffusion, nn.Module):
        if diffusion_kwargs:
            raise TypeError(f"{next(iter(diffusion_kwargs))} is given along with a diffusion, which is built already")
        result = copy.deepcopy(diffusion)
        _check_timesteps(path, result.state_dict(), state)
    elif isinstance(diffusion, Mapping):
        result = _built(path, diffusion, diffusion_kwargs, state)
    else:
        raise TypeError(
            f"diffusion is a {type(diffusion).__name__}, must be a GaussianDiffusion or the arguments of a Unet"
        )
    _check_objective(path, result, state)
    _check_keys(path, result.state_dict(), state)
    result.load_state_dict(state)
    return result.to(device).eval()


@dataclass(frozen=True)
class ImageConfig:
    """The config that samplers and commands read from such a network, named as in diffusers' UNet2DModel.

    Attributes:
        sample_size: (height, width) of an image, in pixels.
        out_channels: of the images.
    """

    sample_size: tuple[int, int]
    out_channels: int
    num_class_embeds: int | None = None
    null_class: int | None = None


def is_trainer_checkpoint(data: Any) -> bool:
    """Return whether the content of a file is a trainer's checkpoint."""
    return isinstance(data, Mapping) and any(isinstance(data.get(entry), Mapping) for entry, _ in _WEIGHTS.values())


def network_of_checkpoint(
    data: Mapping[str, Any],
    where: str,
    *,
    ema: bool = True,
    image_size: int | str | tuple[int, int] | None = None,
    objective: str | None = None,
    sinusoidal_pos_emb_theta: float | str = 10000,
) -> tuple[nn.Module, NoiseSchedule, dict[str, Any]]:
    """Return the `Unet` of a trainer's checkpoint, in eval mode, its schedule, and the matching `Sampler` settings.

    The arguments of the `Unet` follow from its weights; the schedule and usually the objective follow from the
    diffusion's buffers. The network has a `config`, an `ImageConfig`. Arguments may be strings.

    Args:
        data: the content of the file.
        where: its name, for messages.
        ema: take the moving average of the weights, with which the trainer samples, instead of the weights.
        image_size: of an image in pixels, one number or (height, width); as a string "64" or "64,32".
        objective: "pred_noise", "pred_x0" or "pred_v"; it must agree with the file if the file records it.
        sinusoidal_pos_emb_theta: that of the trained `Unet`.

    Raises:
        ModuleNotFoundError: denoising_diffusion_pytorch is not installed.
        ValueError: it does not hold a `Unet` for images, or an argument is missing, wrong or contradicts the file.
    """
    state = _state(data, where, "ema" if ema else "model")
    weights = {name.removeprefix("model."): v for name, v in state.items() if name.startswith("model.")}
    arguments = unet_arguments(weights, where)
    size = _image_size(image_size, 2 ** (len(arguments["dim_mults"]) - 1), where)
    known = _objective(state)
    if objective is None and known is None:
        raise ValueError(f"objective is missing, must be given: {where} does not tell which of {', '.join(OBJECTIVES)}")
    if objective is not None and objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}, must be one of {', '.join(OBJECTIVES)}")
    if None not in (objective, known) and objective != known:
        raise ValueError(f"objective is {objective!r} but {where} was trained with {known!r}")
    try:
        theta = float(sinusoidal_pos_emb_theta)
    except ValueError:
        raise ValueError(f"sinusoidal_pos_emb_theta is {sinusoidal_pos_emb_theta!r}, must be a number") from None
    schedule = NoiseSchedule.from_betas(state["betas"].double().tolist())
    try:
        from denoising_diffusion_pytorch import Unet
    except ImportError:
        raise ModuleNotFoundError(
            f"{where} is of denoising_diffusion_pytorch, whose Unet it needs: "
            "pip install 'fastddpm[denoising-diffusion-pytorch]'"
        ) from None
    # Omit arguments equal to the library's defaults: some versions lack them.
    try:
        network = Unet(**arguments, **({} if theta == 10000 else {"sinusoidal_pos_emb_theta": theta}))
    except Exception as error:  # the library checks little
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{where} has weights of no Unet of denoising_diffusion_pytorch ({reason})") from None
    _check_keys(where, network.state_dict(), weights)
    network.load_state_dict(weights)
    network.config = ImageConfig(size, arguments["channels"])
    settings = {
        "method": "ddpm",
        "prediction_type": OBJECTIVES[objective or known or ""],
        "timestep_spacing": "denoising_diffusion_pytorch",
        "convention": "denoising_diffusion_pytorch",
        "use_clipped_model_output": True,  # its DDIM derives the noise from the clipped x0
        "self_condition": arguments["self_condition"],
    }
    return network.eval(), schedule, settings


def _image_size(given: int | str | tuple[int, int] | None, factor: int, where: str) -> tuple[int, int]:
    if given is None:
        raise ValueError(f"image_size is missing, must be given: {where} does not say how large its images are")
    sizes: Any = given.split(",") if isinstance(given, str) else given
    try:
        sizes = [int(size) for size in sizes] if isinstance(sizes, (list, tuple)) else [int(sizes)]
    except (TypeError, ValueError):
        sizes = []
    if len(sizes) not in (1, 2) or any(size < 1 or size % factor for size in sizes):
        raise ValueError(f"image_size is {given!r}, must be one or two multiples of {factor}, such as 64 or 64,32")
    return sizes[0], sizes[-1]


def _state(data: Any, path: str | os.PathLike[str], weights: str) -> dict[str, Tensor]:
    """Return the state dict of the diffusion."""
    if weights not in _WEIGHTS:
        raise ValueError(f"weights is {weights!r}, must be one of {', '.join(_WEIGHTS)}")
    entry, prefix = _WEIGHTS[weights]
    if not isinstance(data, dict) or not isinstance(data.get(entry), dict):
        held = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path} has {held}, must have {entry!r}, as the checkpoints of Trainer have")
    check_weights(data[entry], f"{path}: {entry!r}")
    state = {name.removeprefix(prefix): v for name, v in data[entry].items() if name.startswith(prefix)}
    if "betas" not in state:
        raise ValueError(f"{path} has no {prefix}betas in {entry!r}, must have, as the checkpoints of Trainer have")
    return state


def _built(
    path: Any, unet: Mapping[str, Any], diffusion_kwargs: dict[str, Any], state: Mapping[str, Tensor]
) -> nn.Module:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    if "image_size" not in diffusion_kwargs:
        raise TypeError("image_size is missing, must be given along with the arguments of a Unet: no file says it")
    own: dict[str, Any] = {"timesteps": len(state["betas"])}
    if objective := _objective(state):
        own["objective"] = objective
    elif "objective" not in diffusion_kwargs:
        raise ValueError(f"objective is missing, must be given: loss_weight in {path} is of none that is known")
    return GaussianDiffusion(Unet(**unet), **{**own, **diffusion_kwargs})


def _check_timesteps(path: Any, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    if "betas" not in expected:
        raise ValueError("diffusion has no betas, must be a GaussianDiffusion of denoising_diffusion_pytorch")
    stored, held = len(state["betas"]), len(expected["betas"])
    if stored != held:
        raise ValueError(f"{path} is of {stored} timesteps but the diffusion has {held}, must have as many")


def _objective(state: Mapping[str, Tensor]) -> str | None:
    """Return the objective that the weights of the loss imply; None if they do not determine it.

    Weights clipped by the signal-to-noise ratio (Hang et al. 2023) still equal those of the objective where that ratio
    is low.
    """
    weight, bar = state.get("loss_weight"), state.get("alphas_cumprod")
    if weight is None or bar is None or weight.shape != bar.shape or bar.ndim != 1:
        return None
    snr = bar.double() / (1 - bar.double())
    low = (snr <= 1) & (snr > 1e-6)
    by_objective = {"pred_noise": torch.ones_like(snr), "pred_x0": snr, "pred_v": snr / (snr + 1)}
    fitting = [name for name, v in by_objective.items() if torch.allclose(v[low], weight.double()[low], rtol=1e-3)]
    return fitting[0] if len(fitting) == 1 else None


def _check_objective(path: Any, diffusion: Any, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a wrong objective, which would load without an error and produce noise."""
    stored = _objective(state)
    if stored is not None and stored != diffusion.objective:
        raise ValueError(f"objective is {diffusion.objective!r} but {path} was trained with {stored!r}")


def _check_keys(path: Any, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    if missing or unknown:
        lists = (f"{what} {listed(names)}" for what, names in (("lacks", missing), ("also has", unknown)) if names)
        raise ValueError(f"{path} {' and '.join(lists)}: the diffusion has other layers than the one that was trained")
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{path} has {name} of shape {list(value.shape)}, the diffusion has {list(expected[name].shape)}"
            )
