"""What the classes of EDM and PhysicsNeMo mean, by their names and attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SONG = ("SongUNet", "SongUNetPosEmbd", "SongUNetPosLtEmbd")
_PHYSICSNEMO = ("physicsnemo", "modulus")


def is_of_edm(kind: type) -> bool:
    """Return whether a class is from EDM's `training.networks`, from one of EDM's pickles, or from PhysicsNeMo."""
    module = kind.__module__
    return module == "training.networks" or module.startswith("_imported_module_") or _is_of_physicsnemo(kind)


def is_dhariwal(unet: Any) -> bool:
    """Return whether the layers of a U-Net are those of `DhariwalUNet`."""
    return hasattr(unet, "out_norm")


def has_biased_variance(norm: Any) -> bool:
    """Return whether a norm divides by the number of values; PhysicsNeMo's divides by one less outside training."""
    return not _is_of_physicsnemo(type(norm))


def attention_of(block: Any) -> tuple[int, Any, Any, Any]:
    """Return the number of heads of a `UNetBlock` (0 without attention), its norm, and its layers in and out."""
    if (own := getattr(block, "attn", None)) is not None:
        return own.num_heads, own.norm, own.qkv, own.proj
    if not block.num_heads or not hasattr(block, "qkv"):
        return 0, None, None, None
    return block.num_heads, block.norm2, block.qkv, block.proj


def is_mean(layer: Any) -> bool:
    """Return whether a convolution resamples by the mean of 2x2 pixels, or by repeating a pixel."""
    taps = layer.resample_filter
    return taps.shape[-1] == 2 and (taps.is_meta or bool((taps == 0.25).all()))


def positions(unet: Any, lead_time_label: Tensor | None = None) -> Tensor | None:
    """Return the channels [1 or N, C, H, W] that PhysicsNeMo's U-Nets append to their input, or None for the others.

    Args:
        unet: any U-Net.
        lead_time_label: integers [N] (or [1]), which `SongUNetPosLtEmbd` needs.

    Raises:
        ValueError: a lead time is missing, or not taken.
    """
    fixed, by_lead_time = (getattr(unet, name, None) for name in ("pos_embd", "lt_embd"))
    if by_lead_time is None and lead_time_label is not None:
        raise ValueError(f"lead_time_label is given but the network, a {type(unet).__name__}, takes none: must be None")
    parts = [] if fixed is None else [fixed[None]]
    if by_lead_time is not None:
        if lead_time_label is None:
            raise ValueError(f"lead_time_label is None, must be from 0 to {len(by_lead_time) - 1}, one per sample")
        parts.append(by_lead_time[lead_time_label.int()])
        parts = [part.expand(len(parts[-1]), -1, -1, -1) for part in parts]
    return torch.cat([part.detach() for part in parts], dim=1) if parts else None


def probability_channels(unet: Any) -> list[int]:
    """Return the output channels of which a U-Net with lead times makes probabilities."""
    return list(unet.prob_channels) if getattr(unet, "lead_time_mode", False) else []


def with_probabilities(unet: Any, out: Tensor) -> Tensor:
    """Return the output of a U-Net with lead times after its softmax over some channels."""
    channels = probability_channels(unet)
    if channels:
        out = out.clone()
        out[:, channels] = (out[:, channels] * unet.scalar.to(out.dtype)).softmax(dim=1)
    return out


def _is_of_physicsnemo(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _PHYSICSNEMO
