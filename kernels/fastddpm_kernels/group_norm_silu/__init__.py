"""Normalisation, FiLM and SiLU in one op: what stands before every convolution of a diffusion U-Net.

    group_norm_silu    silu(film(group_norm(concat(x, x2) + time_bias)))       DDPM, guided-diffusion, diffusers
    group_norm_silu_   the same of concat(x + residual, x2), which it may also write, in place and without allocation
    rms_norm_silu      silu(film(channel_rms_norm(concat(x, x2))))             denoising_diffusion_pytorch >= 2
    rms_norm_silu_     the same plus a residual, in place

with `film(h) = h * (1 + scale) + shift`; every part in parentheses may be left out. The concatenation of a skip
connection is read through two pointers and never written.

Device-memory traffic of the fused kernels: each input once and each output once, `2 * itemsize` bytes per element
(fp16: 4), where one sample's slab of channels fits the registers of a program (about 32 Ki elements); else x is
read twice, `3 * itemsize` (fp16: 6), the second time from L2 as far as it holds. A residual and a total are each
moved once, `itemsize` more; in two passes the second reads the total. `rms_norm_silu` always reads once. Backward: x
and the gradient once each and one write (`3 * itemsize`), or `5 * itemsize` for large images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm_kernels import backend as _backend
from fastddpm_kernels import native as _native
from fastddpm_kernels.group_norm_silu import plan as _norm_plan
from fastddpm_kernels.group_norm_silu.checks import DTYPES as DTYPES
from fastddpm_kernels.group_norm_silu.checks import (
    check_adjacent,
    check_apart,
    check_for_triton,
    check_groups,
    check_in_place,
    check_like,
    check_no_gradients,
    check_options,
    check_tensors,
    fits_native,
)
from fastddpm_kernels.group_norm_silu.formula import (
    group_norm_eager,
    group_norm_eager_,
    group_norm_reference,
    per_channel,
    rms_norm_eager,
    rms_norm_reference,
)
from fastddpm_kernels.group_norm_silu.ops import empty_like, group_norm, group_norm_, in_format_of, rms_norm, rms_norm_


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
        backend: `"auto"`, `"triton"`, `"native"`, `"eager"` or `"reference"`.

    Returns:
        `[N, C + C2, ...]` in x's dtype and memory format; from `native` always channels-last.

    Raises:
        TypeError: an argument is not a floating tensor, or of a dtype that is not taken.
        ValueError: a shape, device or value that does not fit.
        BackendError: the backend that was named cannot run here.
    """
    rows = {"time_bias": time_bias, "scale": scale, "shift": shift}
    channels = check_tensors(x, x2, {"weight": weight, "bias": bias}, rows)
    check_options(scale, shift, eps, activation)
    check_groups(channels, num_groups)
    backend = _backend.resolve("group_norm_silu", backend, x.device.type, x.dtype)
    silu = activation == "silu"
    if backend == "native":
        return group_norm(x, weight, bias, num_groups, float(eps), x2, time_bias, scale, shift, silu, native=True)[0]
    if backend == "triton":
        check_for_triton(x, channels)
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
        backend: `"auto"`, `"triton"`, `"native"`, `"eager"` or `"reference"`.

    Apart from what is named above, nothing that is written may overlap anything else.

    Raises:
        TypeError: an argument is not a floating tensor, or of a dtype that is not taken.
        ValueError: a shape, device, memory format, overlap or value that does not fit.
        BackendError: the backend that was named cannot run here.
    """
    rows = {"time_bias": time_bias, "scale": scale, "shift": shift}
    channels = check_tensors(x, x2, {"weight": weight, "bias": bias}, rows)
    check_options(scale, shift, eps, activation)
    check_groups(channels, num_groups)
    check_in_place(y, x, x2, residual, total, workspace, channels)
    check_adjacent({"weight": weight, "bias": bias, **rows})
    named, backend = backend, _backend.resolve("group_norm_silu_", backend, x.device.type, x.dtype)
    if backend == "native" and not fits_native(named, x, y, x2, residual, total):
        backend = "eager"
    silu = activation == "silu"
    if backend == "triton":
        check_for_triton(x, channels)
        if workspace is not None:
            plan = _norm_plan.in_place_plan(x, channels, num_groups, workspace.numel())
            if workspace.numel() < (needed := _norm_plan.forward_workspace(x, num_groups, plan)):
                raise ValueError(f"workspace has {workspace.numel()} elements, must have {needed} or more")
    if y.numel() == 0:
        return
    if backend == "triton":
        group_norm_(
            y, x, weight, bias, num_groups, float(eps), x2, residual, total, time_bias, scale, shift, silu, workspace
        )
        return
    if backend == "native":
        total = _place_of_sum(y, x, x2, residual, total)
        vectors = (weight.float(), bias.float())
        rows_of = (_float(time_bias), _float(scale), _float(shift))
        _native.group_norm(y, x, *vectors, num_groups, eps, x2, residual, total, *rows_of, silu)
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
    check_groups(channels, num_groups)
    return _norm_plan.forward_workspace(x, num_groups, _norm_plan.in_place_plan(x, channels, num_groups))


def group_norm_silu_launches(x: Tensor, channels: int, num_groups: int) -> int:
    """How many kernels a call of `group_norm_silu_` launches on `triton`: 1 or 2, or 0 if there is nothing to do.

    Args and raises: as `group_norm_silu_workspace`.
    """
    check_groups(channels, num_groups)
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
    channels = check_tensors(x, x2, {"weight": weight}, {"scale": scale, "shift": shift})
    check_options(scale, shift, eps, activation)
    backend = _backend.resolve("group_norm_silu", backend, x.device.type, x.dtype)
    silu = activation == "silu"
    if backend == "native":
        check_no_gradients(x, weight, x2, scale, shift)
        x, x2 = in_format_of(x, x), None if x2 is None else in_format_of(x, x2)
        y = empty_like(x, channels)
        rms_norm_silu_(
            y, x, weight, eps=eps, x2=x2, scale=scale, shift=shift, activation=activation, backend="native"
        )
        return y
    if backend == "triton":
        check_for_triton(x, channels)
        return rms_norm(x, weight, float(eps), x2, scale, shift, silu)
    forward = rms_norm_reference if backend == "reference" else rms_norm_eager
    return in_format_of(x, forward(x, weight, eps, x2, scale, shift, silu))


@torch.no_grad()
def rms_norm_silu_(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-12,
    x2: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> None:
    """`rms_norm_silu` of `concat(x, x2) + bias`, plus `residual`, written to `y`. Not differentiable.

    One pass on `triton` and (without `bias`) on `native`, in which the sum is rounded once.

    Args:
        y: `[N, C + C2, ...]`, overwritten. May be `residual`, or `x` where there is no `x2`.
        x, x2: as in `group_norm_silu_`.
        weight, eps, scale, shift, activation: as in `rms_norm_silu`, neighbouring channels adjacent.
        bias: `[C + C2]`, any floating dtype, contiguous: the convolution's, added to every pixel before the norm.
        residual: `[N, C + C2, ...]`, x's dtype and memory format, added last.
        backend: `"auto"`, `"triton"`, `"native"`, `"eager"` or `"reference"`.

    Raises:
        TypeError, ValueError, BackendError: as `group_norm_silu_`.
    """
    rows = {"scale": scale, "shift": shift}
    vectors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    channels = check_tensors(x, x2, vectors, rows)
    check_options(scale, shift, eps, activation)
    whole = (x.shape[0], channels, *x.shape[2:])
    check_like(x, {"y": whole, "residual": whole}, {"y": y, "residual": residual, "x2": x2})
    if x2 is not None:
        check_apart("y", y, "x", x)
        check_apart("y", y, "x2", x2)
    check_adjacent({**vectors, **rows})
    named, backend = backend, _backend.resolve("group_norm_silu_", backend, x.device.type, x.dtype)
    if backend == "native" and not fits_native(named, x, y, x2, residual):
        backend = "eager"
    if backend == "triton":
        check_for_triton(x, channels)
    if y.numel() == 0:
        return
    if backend == "triton":
        rms_norm_(y, x, weight, float(eps), x2, bias, residual, scale, shift, activation == "silu")
        return
    if backend == "reference":
        x, x2 = x.double(), None if x2 is None else x2.double()
    if bias is not None:
        own = per_channel(bias.to(x.dtype), x)
        x, x2 = x + own[: x.shape[1]], None if x2 is None else x2 + own[x.shape[1] :]
    if backend == "native":
        _native.rms_norm(
            y, x, weight.float(), eps, x2, residual, _float(scale), _float(shift), activation == "silu"
        )
        return
    value = rms_norm_silu(x, weight, eps=eps, x2=x2, **rows, activation=activation, backend=backend)
    if residual is None:
        y.copy_(value)
    else:
        torch.add(value, residual, out=y)


def _place_of_sum(
    y: Tensor, x: Tensor, x2: Tensor | None, residual: Tensor | None, total: Tensor | None
) -> Tensor | None:
    """Where native kernels keep x + residual between their passes."""
    if residual is None or total is not None:
        return total
    return y if x2 is None else torch.empty_like(x)


def _float(row: Tensor | None) -> Tensor | None:
    return row if row is None else row.float()
