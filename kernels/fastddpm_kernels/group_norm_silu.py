"""Normalisation, FiLM and SiLU in one op: what stands before every convolution of a diffusion U-Net.

    group_norm_silu    silu(film(group_norm(concat(x, x2) + time_bias)))       DDPM, guided-diffusion, diffusers
    rms_norm_silu      silu(film(channel_rms_norm(concat(x, x2))))             denoising_diffusion_pytorch >= 2

with `film(h) = h * (1 + scale) + shift`; every part in parentheses may be left out. The concatenation of a skip
connection is read through two pointers and never written.

Device-memory traffic of the fused kernels: each input once and each output once, `2 * itemsize` bytes per element
(fp16: 4), where one sample's slab of channels fits the registers of a program (about 32 Ki elements); else x is
read twice, `3 * itemsize` (fp16: 6), the second time from L2 as far as it holds. `rms_norm_silu` always reads
once. Backward: x and the gradient once each and one write (`3 * itemsize`), or `5 * itemsize` for large images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm_kernels import _backend
from fastddpm_kernels._norm_ops import group_norm, in_format_of, rms_norm

ACTIVATIONS = ("silu", None)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    eps: float = 1e-5,
    x2: Tensor | None = None,
    time_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """Group normalisation (Wu & He 2018, arXiv:1803.08494) with what surrounds it in a U-Net's residual block.

    `silu(group_norm(concat(x, x2) + time_bias) * (1 + scale) + shift)`, statistics and arithmetic in float32 (the
    `triton` backend; `eager` is torch in x's dtype, `reference` float64). Differentiable in every tensor.

    Args:
        x: `[N, C, ...]`, float32, float16 or bfloat16 (float64 on `eager` and `reference`), any number of spatial
            dimensions, contiguous or channels-last (any other layout is copied first).
        weight, bias: `[C + C2]`, any floating dtype.
        num_groups: divides `C + C2`; a group may straddle x and x2.
        eps: added to the variance.
        x2: `[N, C2, ...]`, x's dtype and spatial shape: the op acts as if on `torch.cat((x, x2), 1)`.
        time_bias: `[N, C + C2]`, added to every pixel before the statistics.
        scale, shift: `[N, C + C2]`, both or neither (FiLM, Perez et al. 2018). Rows may be strided or expanded.
        activation: `"silu"` or None.
        backend: `"auto"`, `"triton"`, `"eager"` or `"reference"`.

    Returns:
        `[N, C + C2, ...]` in x's dtype and memory format.

    Raises:
        TypeError: an argument is not a floating tensor, or of a dtype that is not taken.
        ValueError: a shape, device or value that does not fit.
        BackendError: the backend that was named cannot run here.
    """
    channels = _check(x, x2, {"weight": weight, "bias": bias}, {"time_bias": time_bias, "scale": scale, "shift": shift})
    _check_options(scale, shift, eps, activation)
    if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}, must divide the number of channels, {channels}")
    backend = _backend.resolve("group_norm_silu", backend, x.device.type, x.dtype)
    silu = activation == "silu"
    if backend == "triton":
        _check_for_triton(x, channels)
        return group_norm(x, weight, bias, num_groups, float(eps), x2, time_bias, scale, shift, silu)[0]
    forward = _group_norm_reference if backend == "reference" else _group_norm_eager
    return in_format_of(x, forward(x, weight, bias, num_groups, eps, x2, time_bias, scale, shift, silu))


def rms_norm_silu(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-12,
    x2: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """RMS normalisation over the channels of each pixel, as in denoising_diffusion_pytorch's `RMSNorm`.

    `silu(h / max(|h|_2, eps) * weight * sqrt(C) * (1 + scale) + shift)` with `h = concat(x, x2)` and the norm taken
    over the channels (Zhang & Sennrich 2019, arXiv:1910.07467, without its mean). Differentiable in every tensor.

    Args:
        x: `[N, C, ...]`, as in `group_norm_silu`.
        weight: `[C + C2]`, any floating dtype.
        eps: the least norm that is divided by.
        x2, scale, shift, activation, backend: as in `group_norm_silu`.

    Returns:
        `[N, C + C2, ...]` in x's dtype and memory format.

    Raises:
        TypeError, ValueError, BackendError: as `group_norm_silu`.
    """
    channels = _check(x, x2, {"weight": weight}, {"scale": scale, "shift": shift})
    _check_options(scale, shift, eps, activation)
    backend = _backend.resolve("group_norm_silu", backend, x.device.type, x.dtype)
    silu = activation == "silu"
    if backend == "triton":
        _check_for_triton(x, channels)
        return rms_norm(x, weight, float(eps), x2, scale, shift, silu)
    forward = _rms_norm_reference if backend == "reference" else _rms_norm_eager
    return in_format_of(x, forward(x, weight, eps, x2, scale, shift, silu))


# Plain torch.


def _group_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    x2: Tensor | None,
    time_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    h = x.double() if x2 is None else torch.cat((x, x2), 1).double()
    if time_bias is not None:
        h = h + _per_channel(time_bias.double(), h)
    groups = h.unflatten(1, (num_groups, -1))
    over = tuple(range(2, groups.ndim))
    centred = groups - groups.mean(over, keepdim=True)
    variance = centred.square().mean(over, keepdim=True)
    h = (centred / (variance + eps).sqrt()).flatten(1, 2)
    h = h * _per_channel(weight.double(), h) + _per_channel(bias.double(), h)
    return _film_silu(h, scale, shift, silu).to(x.dtype)


def _group_norm_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    x2: Tensor | None,
    time_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    h = x if x2 is None else torch.cat((x, x2), 1)
    if time_bias is not None:
        h = h + _per_channel(time_bias.to(h.dtype), h)
    h = torch.group_norm(h, num_groups, weight.to(h.dtype), bias.to(h.dtype), eps)
    return _film_silu(h, scale, shift, silu)


def _rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, x2: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool
) -> Tensor:
    h = x.double() if x2 is None else torch.cat((x, x2), 1).double()
    h = F.normalize(h, dim=1, eps=eps) * _per_channel(weight.double(), h) * math.sqrt(h.shape[1])
    return _film_silu(h, scale, shift, silu).to(x.dtype)


def _rms_norm_eager(
    x: Tensor, weight: Tensor, eps: float, x2: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool
) -> Tensor:
    h = x if x2 is None else torch.cat((x, x2), 1)
    # F.normalize would take the norm in h's dtype, where an eps of 1e-12 is zero in fp16 and a black pixel NaN.
    wide = torch.promote_types(h.dtype, torch.float32)
    norm = torch.linalg.vector_norm(h, dim=1, keepdim=True, dtype=wide).clamp_min(eps)
    h = (h * (math.sqrt(h.shape[1]) / norm)).to(h.dtype) * _per_channel(weight.to(h.dtype), h)
    return _film_silu(h, scale, shift, silu)


def _film_silu(h: Tensor, scale: Tensor | None, shift: Tensor | None, silu: bool) -> Tensor:
    if scale is not None and shift is not None:
        h = h * (1 + _per_channel(scale.to(h.dtype), h)) + _per_channel(shift.to(h.dtype), h)
    return F.silu(h) if silu else h


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    """`[C]` or `[N, C]`, so shaped that it broadcasts against `[N, C, ...]`."""
    return value.reshape(*value.shape, *(1,) * (x.ndim - 2))


# Validation.


def _check(x: Tensor, x2: Tensor | None, vectors: dict[str, Tensor], rows: dict[str, Tensor | None]) -> int:
    """Checks every tensor; returns the number of channels of x and x2 together."""
    for name, value in {"x": x, "x2": x2, **vectors, **rows}.items():
        if value is None and name not in vectors and name != "x":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, must be a tensor")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} is {value.dtype}, must be float32, float16, bfloat16 or float64")
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, must be on x's device, {x.device}")
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [N, C, ...]")
    channels = x.shape[1]
    if x2 is not None:
        if x2.dtype != x.dtype:
            raise TypeError(f"x2 is {x2.dtype}, must be of x's dtype, {x.dtype}")
        if x2.ndim != x.ndim or x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:]:
            raise ValueError(f"x2 has shape {tuple(x2.shape)}, must equal x's {tuple(x.shape)} but for the channels")
        channels += x2.shape[1]
    if channels < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, must have at least one channel")
    for name, value in vectors.items():
        if value.shape != (channels,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be [{channels}], one per channel")
    for name, row in rows.items():
        if row is not None and row.shape != (x.shape[0], channels):
            raise ValueError(f"{name} has shape {tuple(row.shape)}, must be [{x.shape[0]}, {channels}]")
    return channels


def _check_options(scale: Tensor | None, shift: Tensor | None, eps: float, activation: str | None) -> None:
    if (scale is None) != (shift is None):
        missing = "scale" if scale is None else "shift"
        raise ValueError(f"{missing} is None, must be given: scale and shift come together")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, must be >= 0")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, must be 'silu' or None")


def _check_for_triton(x: Tensor, channels: int) -> None:
    if x.dtype == torch.float64:
        raise TypeError("x is torch.float64, must be float32, float16 or bfloat16 on the triton backend")
    if channels * math.prod(x.shape[2:]) >= 2**31:
        raise ValueError(f"x has shape {tuple(x.shape)}, must have fewer than 2^31 elements a sample on triton")
