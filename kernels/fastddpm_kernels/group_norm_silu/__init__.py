"""Fuse the normalisation, FiLM and SiLU that precede every convolution of a diffusion U-Net.

    group_norm_silu    silu(film(group_norm(concat(x, x2) + time_bias)))       DDPM, guided-diffusion, diffusers
    group_norm_silu_   the same of concat(x + residual, x2), in place, without allocation; it may write the sum too
    rms_norm_silu      silu(film(channel_rms_norm(concat(x, x2))))             denoising_diffusion_pytorch >= 2
    rms_norm_silu_     the same plus a residual, in place

with `film(h) = h * (1 + scale) + shift`; every part in parentheses may be left out. The concatenation of a skip
connection is read through two pointers and never written.

Device-memory traffic of the fused kernels: each input once and each output once, `2 * itemsize` bytes per element
(fp16: 4), where one sample's slab of channels fits the registers of a program (about 32 Ki elements); else x is
read twice, `3 * itemsize` (fp16: 6), the second time from L2 as far as it fits there. A residual and a total are each
moved once, `itemsize` more; in two passes the second reads the total. `rms_norm_silu` always reads once. Backward: x
and the gradient once each and one write (`3 * itemsize`), or `5 * itemsize` for large images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm_kernels.backend import resolve
from fastddpm_kernels.checks import FLOATS as DTYPES
from fastddpm_kernels.device.variant import run_launches
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
)
from fastddpm_kernels.group_norm_silu.formula import (
    group_norm_eager,
    group_norm_eager_,
    group_norm_reference,
    rms_norm_eager,
    rms_norm_input,
    rms_norm_reference,
)
from fastddpm_kernels.group_norm_silu.gradients import group_norm, rms_norm
from fastddpm_kernels.group_norm_silu.native import bind_group_norm, bind_rms_norm
from fastddpm_kernels.group_norm_silu.plan import forward_workspace, in_place_plan
from fastddpm_kernels.inplace import InPlace
from fastddpm_kernels.layout import empty_like, in_format_of, not_channels_last
from fastddpm_kernels.native.binding import bind_with_floats

__all__ = [
    "DTYPES",
    "group_norm_silu",
    "group_norm_silu_",
    "group_norm_silu_launches",
    "group_norm_silu_workspace",
    "rms_norm_silu",
    "rms_norm_silu_",
]


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
    """Return the group norm (Wu & He 2018, arXiv:1803.08494) of x, with the rest of a U-Net's residual block fused.

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
        TypeError: an argument is not a floating tensor, or has an unsupported dtype.
        ValueError: a shape, device or value that does not fit.
        BackendError: the named backend cannot run here.
    """
    rows = {"time_bias": time_bias, "scale": scale, "shift": shift}
    channels = check_tensors(x, x2, {"weight": weight, "bias": bias}, rows)
    check_options(scale, shift, eps, activation)
    check_groups(channels, num_groups)
    backend = resolve("group_norm_silu", backend, x.device.type, x.dtype)
    silu = activation == "silu"
    if backend == "native":
        return group_norm(x, weight, bias, num_groups, float(eps), x2, time_bias, scale, shift, silu, native=True)[0]
    if backend == "triton":
        check_for_triton(x, channels)
        return group_norm(x, weight, bias, num_groups, float(eps), x2, time_bias, scale, shift, silu)[0]
    forward = group_norm_reference if backend == "reference" else group_norm_eager
    return in_format_of(x, forward(x, weight, bias, num_groups, eps, x2, time_bias, scale, shift, silu))


@InPlace
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
) -> Callable[[], object]:
    """Write `group_norm_silu` of `concat(x + residual, x2)` to `y`, `x + residual` to `total`. Not differentiable.

    This op ends one residual block and starts the next, for loops over static buffers. On `triton` it takes one or two
    launches (`group_norm_silu_launches`) that allocate nothing, given a workspace. Every backend rounds the sum to x's
    dtype, as if written and read again, and normalises the rounded sum.

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

    Outputs may not overlap any other tensor, except as stated above.

    Raises:
        TypeError: an argument is not a floating tensor, or has an unsupported dtype.
        ValueError: a shape, device, memory format, overlap or value that does not fit.
        BackendError: the named backend cannot run here.
    """
    rows = {"time_bias": time_bias, "scale": scale, "shift": shift}
    channels = check_tensors(x, x2, {"weight": weight, "bias": bias}, rows)
    check_options(scale, shift, eps, activation)
    check_groups(channels, num_groups)
    check_in_place(y, x, x2, residual, total, workspace, channels)
    check_adjacent({"weight": weight, "bias": bias, **rows})

    def unfit() -> str | None:
        return not_channels_last(x=x, y=y, x2=x2, residual=residual, total=total)

    backend = resolve("group_norm_silu_", backend, x.device.type, x.dtype, unfit)
    silu = activation == "silu"
    if backend == "triton":
        check_for_triton(x, channels)
        if workspace is not None:
            plan = in_place_plan(x, channels, num_groups, workspace.numel())
            if workspace.numel() < (needed := forward_workspace(x, num_groups, plan)):
                raise ValueError(f"workspace has {workspace.numel()} elements, must have {needed} or more")
    if y.numel() == 0:
        return lambda: None
    if backend == "triton":
        from fastddpm_kernels.group_norm_silu.triton import in_place_launches

        launches = in_place_launches(
            y, x, weight, bias, num_groups, float(eps), x2, residual, total, time_bias, scale, shift, silu, workspace
        )
        return lambda: run_launches(launches, x)
    if backend == "native":
        # Where native kernels keep x + residual between their passes.
        between = total
        if residual is not None and total is None:
            between = y if x2 is None else torch.empty_like(x)
        return bind_with_floats(
            lambda weight, bias, time_bias, scale, shift: bind_group_norm(
                y, x, weight, bias, num_groups, eps, x2, residual, between, time_bias, scale, shift, silu
            ),
            weight, bias, time_bias, scale, shift,
        )  # fmt: skip

    @torch.no_grad()
    def run() -> None:
        h = x
        if residual is not None:
            h = x + residual if total is None else torch.add(x, residual, out=total)
        if backend == "reference":
            y.copy_(group_norm_reference(h, weight, bias, num_groups, eps, x2, time_bias, scale, shift, silu))
        else:
            group_norm_eager_(y, h, weight, bias, num_groups, eps, x2, time_bias, scale, shift, silu)

    return run


def group_norm_silu_workspace(x: Tensor, channels: int, num_groups: int) -> int:
    """Return the number of float32 elements that `group_norm_silu_` needs as its `triton` workspace; 0 if none.

    Args:
        x: of the call, but its values do not matter: for one without any (on device `meta`) the answer is that of a
            GPU of 132 multiprocessors.
        channels: C + C2.
        num_groups: divides `channels`.

    Raises:
        ValueError: num_groups does not divide channels.
    """
    check_groups(channels, num_groups)
    return forward_workspace(x, num_groups, in_place_plan(x, channels, num_groups))


def group_norm_silu_launches(x: Tensor, channels: int, num_groups: int) -> int:
    """Return how many kernels `group_norm_silu_` launches on `triton`: 1 or 2, or 0 for an empty batch.

    Args and Raises: see `group_norm_silu_workspace`.
    """
    check_groups(channels, num_groups)
    if x.numel() == 0:
        return 0
    return 1 if in_place_plan(x, channels, num_groups).one_pass else 2


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
    """Return the RMS norm over the channels of each pixel, like denoising_diffusion_pytorch's `RMSNorm`.

    `silu(h / max(|h|_2, eps) * weight * sqrt(C) * (1 + scale) + shift)` with `h = concat(x, x2)` and the norm taken
    over the channels (Zhang & Sennrich 2019, arXiv:1910.07467, without its mean). Differentiable in every tensor.

    Args:
        x: `[N, C, ...]`, as in `group_norm_silu`.
        weight: `[C + C2]`, any floating dtype.
        eps: the smallest divisor.
        x2, scale, shift, activation, backend: as in `group_norm_silu`.

    Returns:
        `[N, C + C2, ...]` in x's dtype and memory format.

    Raises:
        TypeError, ValueError, BackendError: as `group_norm_silu`.
    """
    channels = check_tensors(x, x2, {"weight": weight}, {"scale": scale, "shift": shift})
    check_options(scale, shift, eps, activation)
    backend = resolve("group_norm_silu", backend, x.device.type, x.dtype)
    silu = activation == "silu"
    if backend == "native":
        check_no_gradients(x, weight, x2, scale, shift)
        x, x2 = in_format_of(x, x), None if x2 is None else in_format_of(x, x2)
        y = empty_like(x, channels)
        rms_norm_silu_(y, x, weight, eps=eps, x2=x2, scale=scale, shift=shift, activation=activation, backend="native")
        return y
    if backend == "triton":
        check_for_triton(x, channels)
        return rms_norm(x, weight, float(eps), x2, scale, shift, silu)
    forward = rms_norm_reference if backend == "reference" else rms_norm_eager
    return in_format_of(x, forward(x, weight, eps, x2, scale, shift, silu))


@InPlace
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
) -> Callable[[], object]:
    """Write `rms_norm_silu` of `concat(x, x2) + bias`, plus `residual`, to `y`. Not differentiable.

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

    def unfit() -> str | None:
        return not_channels_last(x=x, y=y, x2=x2, residual=residual)

    backend = resolve("group_norm_silu_", backend, x.device.type, x.dtype, unfit)
    silu = activation == "silu"
    if backend == "triton":
        check_for_triton(x, channels)
    if y.numel() == 0:
        return lambda: None
    if backend == "triton":
        from fastddpm_kernels.group_norm_silu.triton_rms import forward_launches

        launches = forward_launches(y, x, weight, float(eps), x2, scale, shift, silu, bias, residual)
        return lambda: run_launches(launches, x)
    if backend == "native":

        def bind(x: Tensor, x2: Tensor | None) -> Callable[[], object]:
            return bind_with_floats(
                lambda weight, scale, shift: bind_rms_norm(y, x, weight, eps, x2, residual, scale, shift, silu),
                weight, scale, shift,
            )  # fmt: skip

        return bind(x, x2) if bias is None else lambda: bind(*rms_norm_input(x, x2, bias))()

    @torch.no_grad()
    def run() -> None:
        wide = torch.float64 if backend == "reference" else x.dtype
        forward = rms_norm_reference if backend == "reference" else rms_norm_eager
        h, h2 = rms_norm_input(x.to(wide), None if x2 is None else x2.to(wide), bias)
        value = forward(h, weight, eps, h2, scale, shift, silu)
        if residual is None:
            y.copy_(value)
        else:
            torch.add(value, residual, out=y)

    return run
