"""Checkpoints of denoising_diffusion_pytorch's trainers: `model-N.pt`, with the weights and their moving average."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Where each kind of weights is: the entry of the file, and what its keys begin with.
_WEIGHTS = {"ema": ("ema", "ema_model."), "model": ("model", "")}


def load_trainer_checkpoint(
    path: str | os.PathLike[str],
    diffusion: nn.Module | Mapping[str, Any],
    *,
    weights: str = "ema",
    device: torch.device | str = "cpu",
    **diffusion_kwargs: Any,
) -> nn.Module:
    """The diffusion of a checkpoint that a `Trainer` or `Trainer1D` saved, for `accelerate`.

    The noise schedule comes from the file, whatever the diffusion has. Nothing in the file is executed.

    Args:
        path: the file, such as results/model-10.pt.
        diffusion: a diffusion as the trainer had it, which stays as it is; or the arguments of the `Unet`, to build a
            `GaussianDiffusion` of.
        weights: "ema", the moving average of the weights, which the trainer samples from; or "model", the weights.
        device: where the diffusion is put.
        **diffusion_kwargs: with arguments of the `Unet`, those of the `GaussianDiffusion`: `image_size`, and what else
            it was trained with; `timesteps` and `objective` are those of the file.

    Returns:
        A new diffusion, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such checkpoint, or not of this diffusion: the message names keys, shapes or objective.
        TypeError: `diffusion` is neither, or arguments are missing.
    """
    state = _read(Path(path), weights)
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


def _read(path: Path, weights: str) -> dict[str, Tensor]:
    """The state dict of the diffusion."""
    if weights not in _WEIGHTS:
        raise ValueError(f"weights is {weights!r}, must be one of {', '.join(_WEIGHTS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; the trainers save model-N.pt in their results_folder")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, all of which mean the same
        raise ValueError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from None
    entry, prefix = _WEIGHTS[weights]
    if not isinstance(data, dict) or not isinstance(data.get(entry), dict):
        held = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path} has {held}, must have {entry!r}, as the checkpoints of Trainer have")
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
    """What was predicted, as the weights of the loss tell; None where they do not.

    With weights cut by the signal-to-noise ratio (Hang et al. 2023) they are still those of the objective where that
    ratio is low.
    """
    weight, bar = state.get("loss_weight"), state.get("alphas_cumprod")
    if weight is None or bar is None or weight.shape != bar.shape:
        return None
    snr = bar.double() / (1 - bar.double())
    low = (snr <= 1) & (snr > 1e-6)
    by_objective = {"pred_noise": torch.ones_like(snr), "pred_x0": snr, "pred_v": snr / (snr + 1)}
    fitting = [name for name, v in by_objective.items() if torch.allclose(v[low], weight.double()[low], rtol=1e-3)]
    return fitting[0] if len(fitting) == 1 else None


def _check_objective(path: Any, diffusion: Any, state: Mapping[str, Tensor]) -> None:
    """A wrong objective loads without complaint and gives noise."""
    stored = _objective(state)
    if stored is not None and stored != diffusion.objective:
        raise ValueError(f"objective is {diffusion.objective!r} but {path} was trained with {stored!r}")


def _check_keys(path: Any, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    if missing or unknown:
        lists = (f"{what} {_few(names)}" for what, names in (("lacks", missing), ("also has", unknown)) if names)
        raise ValueError(f"{path} {' and '.join(lists)}: the diffusion has other layers than the one that was trained")
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{path} has {name} of shape {list(value.shape)}, the diffusion has {list(expected[name].shape)}"
            )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
