"""Compute the noising step: x_t and the training target from x_0, in one pass.

    x_t    = signal * x_0 + sigma * z            (signal, sigma) = table[t[n]] for sample n
    target = z                                   prediction_type "epsilon"
           = x_0                                 "sample"
           = signal * z - sigma * x_0            "v_prediction"

With rows (sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)) that is eq. 4 of Ho, Jain, Abbeel, "Denoising diffusion
probabilistic models", 2020 (v: Salimans, Ho, "Progressive distillation", 2022); with rows
(sqrt(1 - beta_t), sqrt(beta_t)) it is the one-step chain q(x_t | x_{t-1}).

Memory traffic of the fused kernel, per element, with b bytes of x_0's dtype: read b, write 2b where the noise is
made in registers (b for "sample", whose target is x_0 itself); a given noise tensor is read once more, and then
"epsilon", whose target it is, writes b only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.backend import resolve
from fastddpm_kernels.checks import (
    check_constant,
    check_device,
    check_keys,
    check_step,
    check_table,
    check_tensor,
    values_are_at_hand,
)
from fastddpm_kernels.philox import STREAM_Q_SAMPLE, torch_normal

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def q_sample(
    x0: Tensor,
    table: Tensor,
    t: Tensor,
    *,
    noise: Tensor | None = None,
    keys: Tensor | None = None,
    step: Tensor | None = None,
    prediction_type: str = "epsilon",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Noise `x0` to the levels `t`; return (x_t, target), both in `x0`'s shape, dtype and memory format.

    Differentiable in `x0` and `noise`. The arithmetic is float32 (float64 for float64 input).

    Args:
        x0: [N, ...], any rank, float32, float16 or bfloat16 (and float64, but on triton).
        table: float32 [T, 2], rows (signal, sigma).
        t: int64 [N], the row of each sample, 0 <= t < T. On a GPU values are not checked, since that would wait for
            the device: there a row out of range gives NaN on triton, a device-side assertion on the others.
        noise: [N, ...] floating point, z itself. Exactly one of `noise` and `keys`.
        keys: int64 [N, 2] from `philox.sample_keys`: z is made from Philox's stream STREAM_Q_SAMPLE.
        step: int64 [1] on the device, the step of that stream (the training iteration); 0 if None. Used with `keys`.
        prediction_type: "epsilon", "sample" or "v_prediction". The target of "sample" is `x0` itself, that of
            "epsilon" is `noise` itself where that is given in `x0`'s dtype and memory format.
        backend: "auto", "triton", "eager" or "reference".

    Raises:
        TypeError, ValueError: an argument is wrong.
        BackendError: the named backend cannot run here.
    """
    _validate(x0, table, t, noise, keys, step, prediction_type)
    backend = resolve("q_sample", backend, x0.device.type, x0.dtype)
    if backend == "triton":
        if x0.dtype == torch.float64:
            raise TypeError("x0 is torch.float64, must be float32, float16 or bfloat16 on the triton backend")
        check_constant("table", table)
        x_t, target = torch.ops.fastddpm.q_sample(x0, table, t, noise, keys, step, prediction_type)
    else:
        work = torch.float64 if backend == "reference" or x0.dtype == torch.float64 else torch.float32
        if keys is not None:
            step = torch.zeros(1, dtype=torch.int64, device=x0.device) if step is None else step
            z = torch_normal(keys, x0.shape[1:], step, STREAM_Q_SAMPLE, work)
        else:
            assert noise is not None
            z = noise.to(work)
        signal, sigma = _coefficients(table, t, x0.ndim, work)
        x_t = _like(x0, signal * x0.to(work) + sigma * z)
        target = z if prediction_type == "epsilon" else signal * z - sigma * x0.to(work)
        target = _like(x0, target)
    if prediction_type == "sample":
        target = x0
    elif prediction_type == "epsilon" and noise is not None:
        target = _like(x0, noise)
    return x_t, target


def _validate(
    x0: Tensor, table: Tensor, t: Tensor, noise: Tensor | None, keys: Tensor | None, step: Tensor | None, kind: str
) -> None:
    if not x0.is_floating_point():
        raise TypeError(f"x0 is {x0.dtype}, must be floating point")
    if x0.ndim < 1:
        raise ValueError("x0 has no dimensions, must be [N, ...]")
    check_table("table", table, None, 2, x0.device)
    if t.dtype != torch.int64:
        raise TypeError(f"t is {t.dtype}, must be torch.int64")
    if t.shape != x0.shape[:1]:
        raise ValueError(f"t has shape {list(t.shape)}, must be [{x0.shape[0]}], one row of the table per sample")
    check_device("t", t, x0.device)
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {kind!r}, must be one of {', '.join(PREDICTION_TYPES)}")
    if (noise is None) == (keys is None):
        raise ValueError(f"{'neither' if noise is None else 'both'} of noise and keys given, must be exactly one")
    if noise is not None:
        check_tensor("noise", noise, tuple(x0.shape), x0.device)
    if keys is not None:
        check_keys(keys, x0.shape[0], x0.device)
    if step is not None:
        check_step(step, x0.device)
    if values_are_at_hand(t) and bool(((t < 0) | (t >= len(table))).any()):
        raise ValueError(f"t is {t.tolist()}, must be in [0, {len(table)}), rows of the table")


def _coefficients(table: Tensor, t: Tensor, ndim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    signal, sigma = table.index_select(0, t).to(dtype).view(-1, 2, *[1] * (ndim - 1)).unbind(1)
    return signal, sigma


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of outputs like `x`: contiguous, or channels-last (2-D, 3-D) if `x` is that alone."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.ndim == 5 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def _like(x0: Tensor, value: Tensor) -> Tensor:
    return value.to(x0.dtype).contiguous(memory_format=memory_format(x0))


# The triton backend. A custom op may not return its inputs, so a target that is x0 or the given noise is an empty
# tensor here, which the public function replaces.


def _writes_target(noise: Tensor | None, prediction_type: str) -> bool:
    return prediction_type == "v_prediction" or (prediction_type == "epsilon" and noise is None)


@torch.library.custom_op(
    "fastddpm::q_sample",
    mutates_args=(),
    schema="(Tensor x0, Tensor table, Tensor t, Tensor? noise, Tensor? keys, Tensor? step, str prediction_type)"
    " -> (Tensor, Tensor)",
)
def _q_sample_op(
    x0: Tensor,
    table: Tensor,
    t: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    step: Tensor | None,
    prediction_type: str,
) -> tuple[Tensor, Tensor]:
    from fastddpm_kernels.q_sample.triton import launch

    x_t, target = _empty_outputs(x0, noise, prediction_type)
    launch(x0, table, t, noise, keys, step, prediction_type, x_t, target if target.shape == x_t.shape else None)
    return x_t, target


def _empty_outputs(x0: Tensor, noise: Tensor | None, prediction_type: str) -> tuple[Tensor, Tensor]:
    x_t = torch.empty_like(x0, memory_format=memory_format(x0))
    return x_t, torch.empty_like(x_t) if _writes_target(noise, prediction_type) else x0.new_empty(0)


@_q_sample_op.register_fake
def _(
    x0: Tensor,
    table: Tensor,
    t: Tensor,
    noise: Tensor | None,
    keys: Tensor | None,
    step: Tensor | None,
    prediction_type: str,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(x0, noise, prediction_type)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x0, table, t, noise, _, _, ctx.prediction_type = inputs
    ctx.save_for_backward(table, t)
    ctx.x0_dtype, ctx.noise_dtype = x0.dtype, None if noise is None else noise.dtype


def _backward(ctx: Any, grad_x_t: Tensor, grad_target: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate in torch, not fused: x_0 and the noise are data, and rarely need gradients."""
    table, t = ctx.saved_tensors
    signal, sigma = _coefficients(table, t, grad_x_t.ndim, torch.float32)
    grad_x_t = grad_x_t.float()
    grad_x0, grad_noise = signal * grad_x_t, sigma * grad_x_t
    if ctx.prediction_type == "v_prediction":
        grad_target = grad_target.float()
        grad_x0, grad_noise = grad_x0 - sigma * grad_target, grad_noise + signal * grad_target
    made = ctx.noise_dtype is None
    return grad_x0.to(ctx.x0_dtype), None, None, None if made else grad_noise.to(ctx.noise_dtype), None, None, None


_q_sample_op.register_autograd(_backward, setup_context=_setup_context)
