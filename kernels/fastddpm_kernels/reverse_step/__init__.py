"""Compute the reverse step x_t -> x_{t-1} in one kernel for every sampler that is linear in its inputs.

    x0   = clip(A*x_t + B*out, -clip_range, clip_range)
    next = C*x0 + D*x_t + E*out + F*x0_prev + S*z            [A B C D E F S] = table[step],  z ~ N(0, I)

The ancestral sampler of DDPM (Ho et al. 2020, eq. 7 and 11), DDIM (Song et al. 2021, eq. 12) and DPM-Solver++(2M)
(Lu et al. 2022), for every prediction type, differ only in their rows. Options:

- learned variance (Nichol & Dhariwal 2021, eq. 15): the second half v of out's channels, in [-1, 1], places the
  standard deviation between those of two log-variances: S * exp((f*log_max + (1-f)*log_min) / 2), f = (v + 1) / 2;
- classifier-free guidance (Ho & Salimans 2021): out is a doubled batch, first the unconditional half u, then the
  conditional half c; u + scale * (c - u) takes out's place. The learned variance is read from c;
- inpainting (Lugmayr et al. 2022, eq. 8): where mask is 1, next is the known image, noised to the next level:
  next = mask * (signal*known + sigma*z2) + (1 - mask) * next;
- multistep: x0_prev is the x0 of the step before; a history of up to three more adds F2, F3, F4 times the x0 of two,
  three and four steps before (DPM-Solver++(3M), UniPC, LMS, PLMS), the columns after S;
- dynamic thresholding (Saharia et al. 2022, section 2.3): x0 is clipped to a threshold of its sample, and divided by
  it, in place of clip_range.

Coefficients, step index, keys and scales are read from device memory, so that nothing but the step counter changes
between replays of a CUDA graph. z is not made where S is 0, nor is x0_prev read where F is 0.

Memory traffic of the fused kernel, per element of x: read 4 (x) + b (out of b bytes; 2b with a learned variance or
guidance, 3b with both), write 4 (x), and 4 for x0 and b for net_in where asked for; noise made in registers moves
nothing. Multistep reads 4 more, a history of k x0 reads and writes 4k more. For float16 and an ancestral sampler that
is 12 bytes.
"""

from __future__ import annotations

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
from fastddpm_kernels.native.binding import recording
from fastddpm_kernels.reverse_step import op as _reverse_step_op  # noqa: F401  (registers the custom ops)
from fastddpm_kernels.reverse_step.formula import Options, torch_step
from fastddpm_kernels.reverse_step.native import bind_reverse_step, why_not_native


def reverse_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor,
    *,
    keys: Tensor | None = None,
    noise: Tensor | None = None,
    x0_prev: Tensor | None = None,
    clip_range: float | None = None,
    log_variance: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    known: Tensor | None = None,
    known_mask: Tensor | None = None,
    known_table: Tensor | None = None,
    known_noise: Tensor | None = None,
    threshold: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run one reverse step; return (x_next, x0), both like `x`. Differentiable in `x`, `out`, `x0_prev` and `noise`.

    Args:
        x: float32 (float64 too, but on triton) [N, C, ...], contiguous: the state x_t.
        out: the network's output, [N, C, ...] in float32, float16 or bfloat16, any strides; [2N, ...] with
            guidance, [.., 2C, ...] with a learned variance. The arithmetic is in `x`'s dtype.
        table: float32 [steps, 7], rows [A B C D E F S].
        step: int64 [1], the row. On a GPU its value is not checked, since that would wait for the device: a row
            out of range gives NaN on triton, a device-side assertion on the other backends.
        keys: int64 [N, 2] from `philox.sample_keys`: z is made from Philox's stream STREAM_STEP, whose step is `step`.
        noise: [N, C, ...] floating point, z itself. With neither, the term S*z is left out.
        x0_prev: like `x`, for rows with F != 0. None leaves the term out.
        clip_range: > 0, the bound of x0; None does not clip.
        log_variance: float32 [steps, 2], rows (log_min, log_max) = (log beta_tilde, log beta); S is then 1, or 0
            where no noise is added.
        guidance_scale: float32 [1] or [N].
        known, known_mask: float32, broadcastable to `x`; mask 1 keeps the known image.
        known_table: float32 [steps, 2], rows (signal, sigma) of the level after the step.
        known_noise: [N, C, ...] floating point, z2 itself; if None it is made from `keys`, stream STREAM_KNOWN.
        threshold: float32 [N], positive: x0 becomes clip(x0, -threshold, threshold) / threshold.
        backend: "auto", "triton", "eager" or "reference".

    Raises:
        TypeError, ValueError: an argument is wrong.
        BackendError: the named backend cannot run here.
    """
    o = Options(
        keys,
        noise,
        x0_prev,
        clip_range,
        log_variance,
        guidance_scale,
        known,
        known_mask,
        known_table,
        known_noise,
        threshold,
    )
    _validate(x, out, table, step, o)
    backend = resolve("reverse_step", backend, x.device.type, x.dtype)
    if backend == "triton":
        _check_triton(x, table, o)
        return torch.ops.fastddpm.reverse_step(x, out, table, step, *o)
    return torch_step(x, out, table, step, o, torch.float64 if backend == "reference" else x.dtype)


@torch.no_grad()
def reverse_step_(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    step: Tensor,
    *,
    x0: Tensor | None = None,
    net_in: Tensor | None = None,
    multistep: bool = False,
    history: Tensor | None = None,
    keys: Tensor | None = None,
    noise: Tensor | None = None,
    clip_range: float | None = None,
    log_variance: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    known: Tensor | None = None,
    known_mask: Tensor | None = None,
    known_table: Tensor | None = None,
    known_noise: Tensor | None = None,
    threshold: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Run one reverse step in place, for sampling loops: `x` becomes x_next. Not differentiable.

    Allocates nothing on triton, provided that the spatial dimensions of `out`, `known` and `known_mask` can be
    walked with one stride (contiguous, channels-last, slices of channels, broadcast in whole).

    Args:
        x0: like `x`, overwritten with the new x0. With `multistep` it is first read as x0_prev; if the row's F is 0,
            its content does not matter.
        net_in: overwritten with x_next in its own dtype: the network's next input. [N, C, ...], or with guidance
            [2N, C, ...], of which both halves are written; contiguous, channels-last or a slice of channels.
        multistep: whether `x0` is read as x0_prev.
        history: float32 [k, N, C, ...], contiguous, k from 1 to 3, with `multistep`: the x0 before x0_prev, the newest
            first. It is read with the columns after S, [steps, 7 + k], and moves on by one: x0_prev becomes the first.
            Where a row's factor is 0 it may hold anything.
        backend: "auto", "triton", "native" (`out` and `net_in` in float32 or bfloat16, all else in float32), "eager"
            or "reference".
        others: see `reverse_step`.

    Raises:
        TypeError, ValueError: an argument is wrong.
        BackendError: the named backend cannot run here.
    """
    if multistep and x0 is None:
        raise ValueError("x0 is None, must be given with multistep=True")
    if history is not None and not multistep:
        raise ValueError("multistep is False but a history is given, must be True with it")
    o = Options(
        keys,
        noise,
        x0 if multistep else None,
        clip_range,
        log_variance,
        guidance_scale,
        known,
        known_mask,
        known_table,
        known_noise,
        threshold,
    )
    _validate(x, out, table, step, o, 7 if history is None else 7 + _check_history(history, x))
    if x0 is not None:
        _check_like("x0", x0, x)
        if not x0.is_contiguous():
            raise ValueError(f"x0 has strides {x0.stride()}, must be contiguous")
    if net_in is not None:
        batch = x.shape[0] * (1 if guidance_scale is None else 2)
        check_tensor("net_in", net_in, (batch, *x.shape[1:]), x.device)
    backend = resolve(
        "reverse_step_", backend, x.device.type, x.dtype, lambda: why_not_native(x, out, table, step, net_in, o)
    )
    if backend == "native":
        bind_reverse_step(x, out, table, step, x0, net_in, multistep, o, history)()
        return
    if backend == "triton":
        _check_triton(x, table, o)
        given = o._replace(x0_prev=None)
        torch.ops.fastddpm.reverse_step_inplace(x, out, table, step, x0, net_in, multistep, history, *given)
        return
    x_next, new_x0 = torch_step(x, out, table, step, o, torch.float64 if backend == "reference" else x.dtype, history)
    x.copy_(x_next)
    if history is not None and x0 is not None:
        for age in range(len(history) - 1, 0, -1):
            history[age].copy_(history[age - 1])
        history[0].copy_(x0)
    if x0 is not None:
        x0.copy_(new_x0)
    if net_in is not None:
        net_in.copy_(x_next if guidance_scale is None else torch.cat([x_next, x_next]))


def _check_triton(x: Tensor, table: Tensor, o: Options) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"x is {x.dtype}, must be torch.float32 on the triton backend")
    check_constant("table", table)
    for name in ("log_variance", "guidance_scale", "known", "known_mask", "known_table", "known_noise", "threshold"):
        check_constant(name, getattr(o, name))


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    check_tensor(name, tensor, tuple(x.shape), x.device)
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, must be {x.dtype}, as x")


def _check_history(history: Tensor, x: Tensor) -> int:
    """Check a history and return the number of its x0."""
    k = len(history) if history.ndim == x.ndim + 1 else 0
    if not 1 <= k <= 3 or tuple(history.shape[1:]) != tuple(x.shape):
        raise ValueError(f"history has shape {list(history.shape)}, must be [1 to 3, {', '.join(map(str, x.shape))}]")
    if history.dtype != x.dtype:
        raise TypeError(f"history is {history.dtype}, must be {x.dtype}, as x")
    check_device("history", history, x.device)
    if not history.is_contiguous():
        raise ValueError(f"history has strides {history.stride()}, must be contiguous")
    return k


def _validate(x: Tensor, out: Tensor, table: Tensor, step: Tensor, o: Options, columns: int = 7) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x is {x.dtype}, must be torch.float32 (or torch.float64)")
    if x.ndim < 2:
        raise ValueError(f"x has shape {list(x.shape)}, must be [N, C, ...]")
    if not x.is_contiguous():
        raise ValueError(f"x has strides {x.stride()}, must be contiguous")
    n, c = x.shape[:2]
    out_shape = (n if o.guidance_scale is None else 2 * n, c if o.log_variance is None else 2 * c, *x.shape[2:])
    check_tensor("out", out, out_shape, x.device)
    check_table("table", table, None, columns, x.device)
    check_step(step, x.device)
    steps = table.shape[0]
    if values_are_at_hand(step) and recording.program is None and not 0 <= int(step) < steps:
        raise ValueError(f"step is {int(step)}, must be in [0, {steps}), a row of the table")
    if o.keys is not None:
        check_keys(o.keys, n, x.device)
    if o.noise is not None:
        check_tensor("noise", o.noise, tuple(x.shape), x.device)
    if o.noise is not None and o.keys is not None and o.known is None:
        raise ValueError("both noise and keys given, must be one of them (keys with noise serve known alone)")
    if o.x0_prev is not None:
        _check_like("x0_prev", o.x0_prev, x)
    if o.clip_range is not None and not 0 < o.clip_range < float("inf"):
        raise ValueError(f"clip_range is {o.clip_range}, must be positive and finite, or None")
    if o.threshold is not None:
        if o.clip_range is not None:
            raise ValueError("both clip_range and threshold given, must be one of them")
        if o.threshold.dtype != torch.float32:
            raise TypeError(f"threshold is {o.threshold.dtype}, must be torch.float32")
        if o.threshold.shape != (n,):
            raise ValueError(f"threshold has shape {list(o.threshold.shape)}, must be [{n}]")
        check_device("threshold", o.threshold, x.device)
    if o.log_variance is not None:
        check_table("log_variance", o.log_variance, steps, 2, x.device)
    if o.guidance_scale is not None:
        if o.guidance_scale.dtype != torch.float32:
            raise TypeError(f"guidance_scale is {o.guidance_scale.dtype}, must be torch.float32")
        if o.guidance_scale.shape != (1,) and o.guidance_scale.shape != (n,):
            raise ValueError(f"guidance_scale has shape {list(o.guidance_scale.shape)}, must be [1] or [{n}]")
        check_device("guidance_scale", o.guidance_scale, x.device)
    _validate_known(x, steps, o)


def _validate_known(x: Tensor, steps: int, o: Options) -> None:
    given = {"known": o.known, "known_mask": o.known_mask, "known_table": o.known_table}
    missing = [name for name, tensor in given.items() if tensor is None]
    if len(missing) == 3 and o.known_noise is None:
        return
    if missing:
        raise ValueError(f"{missing[0]} is None, must be given along with the other known arguments")
    assert o.known is not None
    assert o.known_mask is not None
    assert o.known_table is not None
    for name, tensor in (("known", o.known), ("known_mask", o.known_mask)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} is {tensor.dtype}, must be torch.float32")
        shape = list(tensor.shape)
        padded = [1] * (x.ndim - len(shape)) + shape
        if len(padded) != x.ndim or any(p not in (1, s) for p, s in zip(padded, x.shape, strict=True)):
            raise ValueError(f"{name} has shape {shape}, must be broadcastable to {list(x.shape)}, as x")
        check_device(name, tensor, x.device)
    check_table("known_table", o.known_table, steps, 2, x.device)
    if o.known_noise is not None:
        check_tensor("known_noise", o.known_noise, tuple(x.shape), x.device)
    elif o.keys is None:
        raise ValueError("known_noise is None, must be given where keys are not")
