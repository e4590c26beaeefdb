"""Define the norms as custom ops with gradients, by triton or native kernels: shapes, launches, gradient formulas.

The fake of an op allocates the results in x's memory format; the op itself calls the fake and launches kernels.
`triton` modules are imported at the first launch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.device.variant import run_launches
from fastddpm_kernels.group_norm_silu.native import bind_group_norm, group_norm_gradient
from fastddpm_kernels.layout import channels_last, empty_channels_last, empty_like, in_format_of


def _empty_gradients(dy: Tensor, x: Tensor, x2: Tensor | None, sums: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty dx, dx2 and `sums` sums over the pixels. Without x2, dx2 is empty: an op cannot return None."""
    dx2 = x.new_empty(0) if x2 is None else empty_like(x, x2.shape[1])
    return empty_like(x, x.shape[1]), dx2, x.new_empty(sums, *dy.shape[:2], dtype=torch.float32)


def _dense(x: Tensor, x2: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return both in x's format, or contiguous if x is neither contiguous nor channels-last."""
    return in_format_of(x, x), None if x2 is None else in_format_of(x, x2)


def _for_native(x: Tensor, x2: Tensor | None, *vectors: Tensor | None) -> tuple[Any, ...]:
    """Convert for native kernels: x and x2 to channels-last, vectors and rows to float32 with adjacent channels."""
    dense = [None if v is None else v.float() if v.stride(-1) == 1 else v.float().contiguous() for v in vectors]
    return channels_last(x), None if x2 is None else channels_last(x2), *dense


def _affine_gradients(
    sums: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return gradients of weight, bias, scale and shift from `sums[0] = sum dv` and `sums[1] = sum dv * u`, [N, C]."""
    sum_dv, sum_dvu = sums[0], sums[1]
    dscale = dshift = None
    if scale is not None and shift is not None:
        dscale, dshift = sum_dvu * weight.float(), sum_dv.to(shift.dtype)
        if bias is not None:
            dscale = dscale + sum_dv * bias.float()
        dscale = dscale.to(scale.dtype)
        factor = 1 + scale.float()
        sum_dv, sum_dvu = sum_dv * factor, sum_dvu * factor
    dbias = None if bias is None else sum_dv.sum(0).to(bias.dtype)
    return sum_dvu.sum(0).to(weight.dtype), dbias, dscale, dshift


@torch.library.custom_op(
    "fastddpm::group_norm_silu",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, Tensor? x2, Tensor? time_bias, "
    "Tensor? scale, Tensor? shift, bool silu, bool native=False) -> (Tensor, Tensor, Tensor)",
)
def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, x2: Tensor | None,
    time_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool, native: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, and the mean and 1 / standard deviation [N, num_groups] that its gradient needs."""
    y, mean, rstd = _group_norm_fake(x, weight, bias, num_groups, eps, x2, time_bias, scale, shift, silu, native)
    if native:
        if y.numel():
            x, x2, weight, bias, time_bias, scale, shift = _for_native(x, x2, weight, bias, time_bias, scale, shift)
            bind_group_norm(
                y, x, weight, bias, num_groups, eps, x2, None, None, time_bias, scale, shift, silu, mean=mean, rstd=rstd
            )()
        return y, mean, rstd
    from fastddpm_kernels.group_norm_silu.triton import forward_launches

    x, x2 = _dense(x, x2)
    if y.numel():
        run_launches(forward_launches(y, mean, rstd, x, weight, bias, eps, x2, time_bias, scale, shift, silu), x)
    return y, mean, rstd


@group_norm.register_fake
def _group_norm_fake(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, x2: Tensor | None,
    time_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool, native: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mean = x.new_empty(x.shape[0], num_groups, dtype=torch.float32)
    y = empty_channels_last(x, weight.shape[0]) if native else empty_like(x, weight.shape[0])
    return y, mean, torch.empty_like(mean)


@torch.library.custom_op(
    "fastddpm::group_norm_silu_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, Tensor? x2, "
    "Tensor? time_bias, Tensor? scale, Tensor? shift, bool silu, bool native=False) -> (Tensor, Tensor, Tensor)",
)
def group_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, x2: Tensor | None,
    time_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool, native: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, dx2 and the sums [3, N, C] over the pixels from which every other gradient follows."""
    dx, dx2, sums = _group_norm_backward_fake(
        dy, x, weight, bias, mean, rstd, x2, time_bias, scale, shift, silu, native
    )
    if not dy.numel():
        return dx, dx2, sums.zero_()
    if native:
        x, x2, weight, bias, time_bias, scale, shift = _for_native(x, x2, weight, bias, time_bias, scale, shift)
        second, dy = None if x2 is None else dx2, channels_last(dy)
        group_norm_gradient(dx, second, sums, dy, x, x2, weight, bias, mean, rstd, time_bias, scale, shift, silu)
        return dx, dx2, sums
    from fastddpm_kernels.group_norm_silu.triton_backward import backward_launches

    x, x2 = _dense(x, x2)
    dy = in_format_of(x, dy)
    run_launches(
        backward_launches(
            dx, dx2, sums, dy, x, weight, bias, mean, rstd, x2, time_bias, scale, shift, silu
        ), x,
    )  # fmt: skip
    return dx, dx2, sums


@group_norm_backward.register_fake
def _group_norm_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, x2: Tensor | None,
    time_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool, native: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not native:
        return _empty_gradients(dy, x, x2, 3)
    dx2 = x.new_empty(0) if x2 is None else empty_channels_last(x, x2.shape[1])
    return empty_channels_last(x, x.shape[1]), dx2, x.new_empty(3, *dy.shape[:2], dtype=torch.float32)


def _group_norm_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, x2, time_bias, scale, shift, ctx.silu, ctx.native = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, *output[1:], x2, time_bias, scale, shift)


def _group_norm_gradients(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd, x2, time_bias, scale, shift = ctx.saved_tensors
    dx, dx2, sums = group_norm_backward(
        dy, x, weight, bias, mean, rstd, x2, time_bias, scale, shift, ctx.silu, ctx.native
    )
    dtime_bias = None
    if time_bias is not None:  # dx summed over the pixels, in closed form
        a = weight.float() if scale is None else weight.float() * (1 + scale.float())
        groups = (mean.shape[1], -1)
        over_pixels, sum_u = (a * sums[:2]).unflatten(2, groups), sums[2].unflatten(1, groups)
        mean_dv, mean_dvu = over_pixels.mean(3, keepdim=True)
        dtime_bias = over_pixels[0] - mean_dv - sum_u * (mean_dvu / max(math.prod(x.shape[2:]), 1))
        dtime_bias = (rstd[:, :, None] * dtime_bias).flatten(1).to(time_bias.dtype)
    dweight, dbias, dscale, dshift = _affine_gradients(sums, weight, bias, scale, shift)
    return dx, dweight, dbias, None, None, None if x2 is None else dx2, dtime_bias, dscale, dshift, None, None


group_norm.register_autograd(_group_norm_gradients, setup_context=_group_norm_save)


@torch.library.custom_op(
    "fastddpm::rms_norm_silu",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, float eps, Tensor? x2, Tensor? scale, Tensor? shift, bool silu) -> Tensor",
)
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, x2: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool
) -> Tensor:
    from fastddpm_kernels.group_norm_silu.triton_rms import forward_launches

    y = empty_like(x, weight.shape[0])
    x, x2 = _dense(x, x2)
    if y.numel():
        run_launches(forward_launches(y, x, weight, eps, x2, scale, shift, silu), x)
    return y


@rms_norm.register_fake
def _rms_norm_fake(
    x: Tensor, weight: Tensor, eps: float, x2: Tensor | None, scale: Tensor | None, shift: Tensor | None, silu: bool
) -> Tensor:
    return empty_like(x, weight.shape[0])


@torch.library.custom_op(
    "fastddpm::rms_norm_silu_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, float eps, Tensor? x2, Tensor? scale, Tensor? shift, bool silu) "
    "-> (Tensor, Tensor, Tensor)",
)
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, x2: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, dx2 and the sums [2, N, C] over the pixels from which every other gradient follows."""
    from fastddpm_kernels.group_norm_silu.triton_rms import backward_launches

    dx, dx2, sums = _empty_gradients(dy, x, x2, 2)
    x, x2 = _dense(x, x2)
    if not dy.numel():
        return dx, dx2, sums.zero_()
    launches, partial = backward_launches(dx, dx2, in_format_of(x, dy), x, weight, eps, x2, scale, shift, silu)
    run_launches(launches, x)
    return dx, dx2, partial.sum(2)


@rms_norm_backward.register_fake
def _rms_norm_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, x2: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_gradients(dy, x, x2, 2)


def _rms_norm_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, x2, scale, shift, ctx.silu = inputs
    ctx.save_for_backward(x, weight, x2, scale, shift)


def _rms_norm_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, x2, scale, shift = ctx.saved_tensors
    dx, dx2, sums = rms_norm_backward(dy, x, weight, ctx.eps, x2, scale, shift, ctx.silu)
    dweight, _, dscale, dshift = _affine_gradients(sums, weight, None, scale, shift)
    return dx, dweight, None, None if x2 is None else dx2, dscale, dshift, None


rms_norm.register_autograd(_rms_norm_gradients, setup_context=_rms_norm_save)
