"""Normalisation, FiLM and SiLU in one op: what stands before every convolution of a diffusion U-Net.

    group_norm_silu    silu(film(group_norm(concat(x, x2) + time_bias)))       DDPM, guided-diffusion, diffusers
    group_norm_silu_   the same of concat(x + residual, x2), which it may also write, in place and without allocation
    rms_norm_silu      silu(film(channel_rms_norm(concat(x, x2))))             denoising_diffusion_pytorch >= 2

with `film(h) = h * (1 + scale) + shift`; every part in parentheses may be left out. The concatenation of a skip
connection is read through two pointers and never written.

Device-memory traffic of the fused kernels: each input once and each output once, `2 * itemsize` bytes per element
(fp16: 4), where one sample's slab of channels fits the registers of a program (about 32 Ki elements); else x is
read twice, `3 * itemsize` (fp16: 6), the second time from L2 as far as it holds. A residual and a total are each
moved once, `itemsize` more; in two passes the second reads the total. `rms_norm_silu` always reads once. Backward: x
and the gradient once each and one write (`3 * itemsize`), or `5 * itemsize` for large images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastddpm_kernels import _backend, _norm_plan
from fastddpm_kernels._norm_formula import (
    group_norm_eager,
    group_norm_eager_,
    group_norm_reference,
    rms_norm_eager,
    rms_norm_reference,
)
from fastddpm_kernels._norm_ops import group_norm, group_norm_, in_format_of, is_channels_last, rms_norm

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
    _check_groups(channels, num_groups)
    backend = _backend.resolve("group_norm_silu", backend, x.device.type, x.dtype)
    silu = activation == "silu"
    if backend == "triton":
        _check_for_triton(x, channels)
        return group_norm(x, weight, bias, num_groups, float(eps), x2, time_bias, scale, shift, silu)[0]
    forward = group_norm_reference if backend == "reference" else group_norm_eager
    return in_format_of(x, forward(x, weight, bias, num_groups, eps, x2, time_bias, scale, shift, silu))


@torch.no_grad()
def group_norm_silu_(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    eps: float = 1e-5,
    x2: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    time_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
    workspace: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """`group_norm_silu` of `concat(x + residual, x2)`, written to `y`; `x + residual` to `total`. Not differentiable.

    The end of one residual block and the start of the next, for loops over static buffers: on `triton` one or two
    launches (`group_norm_silu_launches`) that allocate nothing, given a workspace. On every backend the sum is
    rounded to x's dtype, as if written and read again, and it is the rounded sum that is normalised.

    Args:
        y: `[N, C + C2, ...]`, overwritten. May be `x` or `residual` itself where there is no `x2`.
        x: `[N, C, ...]` as in `group_norm_silu`, but contiguous or channels-last; so are `y`, `x2`, `residual` and
            `total`, which are of x's dtype and memory format (where x is of both, contiguous).
        weight, bias: `[C + C2]`, any floating dtype, contiguous.
        num_groups, eps, x2, activation: as in `group_norm_silu`.
        residual: `[N, C, ...]`, added to `x`.
        total: `[N, C, ...]`, overwritten with the sum; only with `residual`. May be `x` or `residual` itself.
        time_bias, scale, shift: as in `group_norm_silu`, neighbouring channels adjacent. `total` has no part of them.
        workspace: float32, of at least `group_norm_silu_workspace` elements, overwritten; may serve one call after
            another. Without it a call that needs one allocates it.
        backend: `"auto"`, `"triton"`, `"eager"` or `"reference"`.

    Apart from what is named above, nothing that is written may overlap anything else.

    Raises:
        TypeError: an argument is not a floating tensor, or of a dtype that is not taken.
        ValueError: a shape, device, memory format, overlap or value that does not fit.
        BackendError: the backend that was named cannot run here.
    """
    rows = {"time_bias": time_bias, "scale": scale, "shift": shift}
    channels = _check(x, x2, {"weight": weight, "bias": bias}, rows)
    _check_options(scale, shift, eps, activation)
    _check_groups(channels, num_groups)
    _check_in_place(y, x, x2, residual, total, workspace, channels)
    _check_adjacent({"weight": weight, "bias": bias, **rows})
    backend = _backend.resolve("group_norm_silu", backend, x.device.type, x.dtype)
    silu = activation == "silu"
    if backend == "triton":
        _check_for_triton(x, channels)
        if workspace is not None and workspace.numel() < (needed := group_norm_silu_workspace(x, channels, num_groups)):
            raise ValueError(f"workspace has {workspace.numel()} elements, must have {needed} or more")
    if y.numel() == 0:
        return
    if backend == "triton":
        group_norm_(
            y, x, weight, bias, num_groups, float(eps), x2, residual, total, time_bias, scale, shift, silu, workspace
        )
        return
    if residual is not None:
        x = x + residual if total is None else torch.add(x, residual, out=total)
    if backend == "reference":
        y.copy_(group_norm_reference(x, weight, bias, num_groups, eps, x2, time_bias, scale, shift, silu))
    else:
        group_norm_eager_(y, x, weight, bias, num_groups, eps, x2, time_bias, scale, shift, silu)


def group_norm_silu_workspace(x: Tensor, channels: int, num_groups: int) -> int:
    """How many float32 elements a call of `group_norm_silu_` on `triton` needs as its workspace; 0 if it needs none.

    Args:
        x: of the call, but its values do not matter: for one without any (on device `meta`) the answer is that of a
            GPU of 132 multiprocessors.
        channels: C + C2.
        num_groups: divides `channels`.

    Raises:
        ValueError: num_groups does not divide channels.
    """
    _check_groups(channels, num_groups)
    return _norm_plan.forward_workspace(x, num_groups, _norm_plan.in_place_plan(x, channels, num_groups))


def group_norm_silu_launches(x: Tensor, channels: int, num_groups: int) -> int:
    """How many kernels a call of `group_norm_silu_` launches on `triton`: 1 or 2, or 0 if there is nothing to do.

    Args and raises: as `group_norm_silu_workspace`.
    """
    _check_groups(channels, num_groups)
    if x.numel() == 0:
        return 0
    return 1 if _norm_plan.in_place_plan(x, channels, num_groups).one_pass else 2


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
    forward = rms_norm_reference if backend == "reference" else rms_norm_eager
    return in_format_of(x, forward(x, weight, eps, x2, scale, shift, silu))


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


def _check_groups(channels: int, num_groups: int) -> None:
    if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}, must divide the number of channels, {channels}")


def _check_in_place(
    y: Tensor,
    x: Tensor,
    x2: Tensor | None,
    residual: Tensor | None,
    total: Tensor | None,
    workspace: Tensor | None,
    channels: int,
) -> None:
    """Checks what `group_norm_silu_` takes and `group_norm_silu` does not."""
    if total is not None and residual is None:
        raise ValueError("total is given without residual, must be None: it is x itself")
    dtype, device, shape, last = x.dtype, x.device, x.shape, is_channels_last(x)
    shapes = {"y": (shape[0], channels, *shape[2:]), "residual": shape, "total": shape}
    if not last and not x.is_contiguous():
        raise ValueError(f"x has strides {x.stride()}, must be contiguous or channels-last")
    for name, value in {"y": y, "residual": residual, "total": total, "x2": x2}.items():
        if value is None and name != "y":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, must be a tensor")
        if value.dtype != dtype:
            raise TypeError(f"{name} is {value.dtype}, must be of x's dtype, {dtype}")
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}, must be on x's device, {device}")
        if name != "x2" and value.shape != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be {tuple(shapes[name])}")
        if not (is_channels_last(value, or_both=True) if last else value.is_contiguous()):
            format = "channels-last" if last else "contiguous"
            raise ValueError(f"{name} has strides {value.stride()}, must be {format}, as x is")
    if total is not None:
        _check_apart("y", y, "total", total)
    if x2 is not None:  # else an element of y is written by whoever has read the same element of x and residual
        for name, value in {"x": x, "residual": residual, "x2": x2}.items():
            if value is not None:
                _check_apart("y", y, name, value)
        if total is not None:
            _check_apart("total", total, "x2", x2)
    if workspace is not None:
        if not isinstance(workspace, Tensor) or workspace.dtype != torch.float32:
            what = getattr(workspace, "dtype", type(workspace).__name__)
            raise TypeError(f"workspace is {what}, must be a float32 tensor")
        if workspace.device != x.device:
            raise ValueError(f"workspace is on {workspace.device}, must be on x's device, {x.device}")
        if not workspace.is_contiguous():
            raise ValueError(f"workspace has strides {workspace.stride()}, must be contiguous")


def _check_apart(written: str, value: Tensor, read: str, other: Tensor) -> None:
    if value.data_ptr() == other.data_ptr() != 0:  # 0 where there are no elements, or none that have values
        raise ValueError(f"{written} is in the memory of {read}, must be in its own")


def _check_adjacent(values: dict[str, Tensor | None]) -> None:
    """Raises ValueError where neighbouring channels are not adjacent, for a copy would allocate."""
    for name, value in values.items():
        if value is not None and value.stride(-1) != 1 and value.shape[-1] > 1:
            raise ValueError(f"{name} has strides {value.stride()}, must be 1 from channel to channel")


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
