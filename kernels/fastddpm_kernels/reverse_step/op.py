"""Define the triton backend of `reverse_step` as custom ops, functional and in place: schemas, fakes, gradient.

Both launch the same kernel, which is imported at the first launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.philox import STREAM_STEP
from fastddpm_kernels.reverse_step.formula import (
    Options,
    given_or_made,
    guide,
    learned_std,
    per_sample,
    split_out,
    table_row,
)

_OPTIONS_SCHEMA = (
    "Tensor? keys, Tensor? noise, Tensor? x0_prev, float? clip_range, Tensor? log_variance, Tensor? guidance_scale, "
    "Tensor? known, Tensor? known_mask, Tensor? known_table, Tensor? known_noise, "
    "Tensor? threshold=None"
)


@torch.library.custom_op(
    "fastddpm::reverse_step",
    mutates_args=(),
    schema=f"(Tensor x, Tensor out, Tensor table, Tensor step, {_OPTIONS_SCHEMA}) -> (Tensor, Tensor)",
)
def _reverse_step_op(x: Tensor, out: Tensor, table: Tensor, step: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    from fastddpm_kernels.reverse_step.triton import launch

    x_next, x0 = torch.empty_like(x), torch.empty_like(x)
    launch(x_next, x0, None, x, out, table, step, Options(*options))
    return x_next, x0


@_reverse_step_op.register_fake
def _(x: Tensor, out: Tensor, table: Tensor, step: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op(
    "fastddpm::reverse_step_inplace",
    mutates_args=("x", "x0", "net_in", "history"),
    schema="(Tensor(a!) x, Tensor out, Tensor table, Tensor step, Tensor(b!)? x0, Tensor(c!)? net_in, bool multistep, "
    f"Tensor(d!)? history, {_OPTIONS_SCHEMA}) -> ()",
)
def _reverse_step_inplace_op(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor,
    x0: Tensor | None,
    net_in: Tensor | None,
    multistep: bool,
    history: Tensor | None,
    *options: Any,
) -> None:
    from fastddpm_kernels.reverse_step.triton import launch

    o = Options(*options)._replace(x0_prev=x0 if multistep else None)
    launch(x, x0, net_in, x, out, table, step, o, history)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, out, table, step, *options = inputs
    o = Options(*options)
    ctx.clip_range, ctx.has_x0_prev = o.clip_range, o.x0_prev is not None
    ctx.save_for_backward(
        x, out, table, step, o.keys, o.noise, o.log_variance, o.guidance_scale, o.known_mask, o.threshold
    )


def _backward(ctx: Any, grad_next: Tensor, grad_x0: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate in closed form, in unfused torch, making the noise again. Such gradients are rare."""
    x, out, table, step, keys, noise, log_variance, scale, mask, threshold = ctx.saved_tensors
    a, b, c, d, e, f, s = table_row(table, step, x.dtype)[:7]
    unconditional, conditional, v = split_out(x, out, scale is not None)
    if mask is not None:
        grad_next = (1 - mask) * grad_next
    grad_x0 = grad_x0 + c * grad_next
    bound = ctx.clip_range
    if threshold is not None:
        bound = per_sample(threshold, x)
        grad_x0 = grad_x0 / bound
    if bound is not None:
        x0 = torch.addcmul(a * x, b, guide(unconditional, conditional, scale))
        grad_x0 = grad_x0 * (x0.abs() <= bound)  # at the bound itself versions of torch.clamp differ
    grad_x = a * grad_x0 + d * grad_next
    grad_prediction = b * grad_x0 + e * grad_next

    grad_v = torch.zeros_like(v)
    grad_noise = None
    if noise is not None or keys is not None:
        std = s
        if log_variance is not None:
            std = s * learned_std(v, log_variance, step)
            log_min, log_max = table_row(log_variance, step, x.dtype)
            slope = 0.25 * (log_max - log_min) * std  # of the standard deviation, in v
            grad_v = slope * given_or_made(noise, keys, x, step, STREAM_STEP) * grad_next
        if noise is not None:
            grad_noise = (std * grad_next).to(noise.dtype)

    if scale is None:
        grad_out = torch.cat([grad_prediction, grad_v], 1)
    else:
        grad_conditional = per_sample(scale, x) * grad_prediction
        grad_out = torch.cat(
            [
                torch.cat([grad_prediction - grad_conditional, torch.zeros_like(v)], 1),
                torch.cat([grad_conditional, grad_v], 1),
            ]
        )
    grad_x0_prev = f * grad_next if ctx.has_x0_prev else None
    return grad_x, grad_out.to(out.dtype), None, None, None, grad_noise, grad_x0_prev, *[None] * 8


_reverse_step_op.register_autograd(_backward, setup_context=_setup_context)
