"""Check the arguments of a `GaussianDiffusion`, and that its settings are consistent."""

from __future__ import annotations

import importlib.util
import numbers
from typing import TYPE_CHECKING, Any

import torch
from fastddpm_kernels.backend import BACKENDS
from torch import Tensor, nn

from fastddpm.networks.unet.model import UNet
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.training.objective.losses import LOSSES, POINTWISE

if TYPE_CHECKING:
    from fastddpm.training.objective.gaussian import GaussianDiffusion


def check_arguments(
    unet: Any,
    schedule: Any,
    *,
    loss: str,
    immiscible: Any,
    null_class: Any,
    self_condition: Any,
    clip_sample: Any,
    seed: Any,
    backend: str,
) -> None:
    """Check each argument by itself; the remaining ones are checked where they are used.

    Raises:
        TypeError, ValueError: one is wrong.
        ModuleNotFoundError: `immiscible` without scipy.
    """
    if not isinstance(unet, nn.Module):
        raise TypeError(f"unet is a {type(unet).__name__}, must be an nn.Module")
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule is a {type(schedule).__name__}, must be a NoiseSchedule")
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}, must be one of {', '.join(LOSSES)}")
    for name, value in (("immiscible", immiscible), ("clip_sample", clip_sample)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, must be True or False")
    if not isinstance(self_condition, bool | None):
        raise TypeError(f"self_condition is {self_condition!r}, must be True, False or None")
    if null_class is not None and (not isinstance(null_class, numbers.Integral) or isinstance(null_class, bool)):
        raise TypeError(f"null_class is {null_class!r}, must be a label or None")
    labels = getattr(getattr(unet, "config", None), "num_class_embeds", None)
    if null_class is not None and not 0 <= int(null_class) < (2**63 if labels is None else labels):
        raise ValueError(
            f"null_class is {null_class}, must be "
            + ("at least 0" if labels is None else f"one of the network's labels, 0 to {labels - 1}")
        )
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, must be 'auto' or one of {', '.join(BACKENDS)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}, must be an integer from 0 to 2^64 - 1")
    if immiscible and importlib.util.find_spec("scipy") is None:
        raise ModuleNotFoundError("immiscible is True, which needs scipy: pip install scipy")


def check_settings(diffusion: GaussianDiffusion, *, concatenated: bool, takes_text: bool) -> None:
    """Raise ValueError if two settings contradict each other or the network's channels do not fit them.

    Args:
        concatenated: whether the network receives its own prediction before the channels of its input.
        takes_text: whether it takes embeddings of texts.
    """
    learned = diffusion.variance_type == "learned_range"
    if learned and diffusion.loss in POINTWISE:
        raise ValueError(
            f"loss is {diffusion.loss!r}, which trains no variance, but variance_type is 'learned_range': "
            "must be 'hybrid', 'rescaled_mse', 'kl' or 'rescaled_kl'"
        )
    if diffusion.loss == "hybrid" and not learned:
        raise ValueError(
            f"loss is 'hybrid', which trains a variance, but variance_type is {diffusion.variance_type!r}, must be "
            "'learned_range'"
        )
    if diffusion.weighting != "uniform" and diffusion.loss in ("kl", "rescaled_kl"):
        raise ValueError(f"weighting is {diffusion.weighting!r}, must be 'uniform' with loss {diffusion.loss!r}")
    if diffusion.label_dropout and diffusion.null_class is None and not takes_text:
        raise ValueError(
            f"label_dropout is {diffusion.label_dropout} but there is no null_class: give it, or a U-Net with one"
        )
    if isinstance(diffusion.unet, UNet):
        c = diffusion.unet.config
        if diffusion.label_dropout and not c.has_classes:
            raise ValueError(f"label_dropout is {diffusion.label_dropout}, must be 0: the U-Net has no classes")
        if concatenated and c.in_channels % 2:
            raise ValueError(
                f"self_condition is True but the U-Net has {c.in_channels} channels of input, must have twice those of "
                "the data: it is given its own prediction of x0 before them"
            )
        check_channels(diffusion.variance_type, c.out_channels, c.in_channels // 2 if concatenated else c.in_channels)


def check_channels(variance_type: str, out_channels: int, channels: int) -> None:
    """Raise ValueError if a network returns another number of channels than data of `channels` need."""
    wanted = 2 * channels if variance_type == "learned_range" else channels
    if out_channels != wanted:
        raise ValueError(
            f"variance_type is {variance_type!r} but the network returns {out_channels} channels for data of "
            f"{channels}, must return {wanted}"
        )


def check_batch(x0: Any, labels: Any) -> None:
    """Raise TypeError or ValueError unless the data of a step form a batch."""
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 is a {type(x0).__name__}, must be a tensor [N, C, ...]")
    if len(x0) == 0:
        raise ValueError(f"x0 has shape {list(x0.shape)}, must hold at least one sample")
    if labels is not None and not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {type(labels).__name__}, must be an int64 tensor [{len(x0)}]")


def check_timesteps(t: Any, x: Tensor, num_train_timesteps: int) -> None:
    """Raise TypeError or ValueError unless t is int64 [N] for x [N, ...] and, on the CPU, in range."""
    if not isinstance(t, Tensor) or t.dtype != torch.int64:
        raise TypeError(f"t is {getattr(t, 'dtype', type(t).__name__)}, must be an int64 tensor [{len(x)}]")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t has shape {list(t.shape)}, must have [{len(x)}], one timestep per sample")
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and len(t):
        low, high = int(t.min()), int(t.max())
        if low < 0 or high >= num_train_timesteps:
            raise ValueError(f"t goes from {low} to {high}, must be from 0 to {num_train_timesteps - 1}")
