"""Call the native reverse step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm_kernels.layout import walk
from fastddpm_kernels.native.binding import THREADS, bind
from fastddpm_kernels.reverse_step.formula import Options


def why_not_native(
    x: Tensor, out: Tensor, table: Tensor, step: Tensor, net_in: Tensor | None, o: Options
) -> str | None:
    """Return why the native kernel does not take these operands, already checked by `reverse_step_`, or None."""
    if x.dtype != torch.float32:
        return f"x is {x.dtype}, must be torch.float32 for native kernels"
    for name, value in (("out", out), ("net_in", net_in)):
        if value is not None and value.dtype not in (torch.float32, torch.bfloat16):
            return f"{name} is {value.dtype}, must be torch.float32 or torch.bfloat16 for native kernels"
    for name, value in (("noise", o.noise), ("known_noise", o.known_noise)):
        if value is not None and value.dtype != torch.float32:
            return f"{name} is {value.dtype}, must be torch.float32 for native kernels"
    whole = (
        ("table", table), ("step", step), ("keys", o.keys), ("log_variance", o.log_variance),
        ("known_table", o.known_table), ("threshold", o.threshold), ("guidance_scale", o.guidance_scale),
    )  # fmt: skip
    for name, value in whole:
        if value is not None and not value.is_contiguous():
            return f"{name} has strides {value.stride()}, must be contiguous for native kernels"
    walked = (out, net_in, o.noise, _like(o.known, x), _like(o.known_mask, x), o.known_noise)
    for value in walked:
        if value is not None and value.numel() and walk(value) is None:
            return f"a tensor of {list(value.shape)} has strides {value.stride()}, must have one between pixels"
    return None


def bind_reverse_step(
    x: Tensor, out: Tensor, table: Tensor, step: Tensor, x0: Tensor | None, net_in: Tensor | None, multistep: bool,
    o: Options, history: Tensor | None = None,
) -> Callable[[], None]:  # fmt: skip
    """Return a function that runs `reverse_step_` on operands that `why_not_native` accepts."""
    if x.numel() == 0:
        return lambda: None
    known, mask = _like(o.known, x), _like(o.known_mask, x)
    strides = [
        stride
        for tensor in (out, net_in, o.noise, known, mask, o.known_noise)
        for stride in ((0, 0, 0) if tensor is None else _strides(tensor))
    ]
    guidance = 0 if o.guidance_scale is None or len(o.guidance_scale) == 1 else 1
    n, channels, pixels = len(x), x.shape[1], math.prod(x.shape[2:])
    return bind(
        "fastddpm_reverse_step", x, out, table, step, x0, net_in, o.keys, o.noise, o.log_variance, o.guidance_scale,
        known, mask, o.known_table, o.known_noise, o.threshold, history, n, channels, pixels, len(table), guidance,
        0 if history is None else len(history), *strides,
        o.clip_range or 0.0, multistep, out.dtype == torch.bfloat16,
        net_in is not None and net_in.dtype == torch.bfloat16, THREADS,
    )  # fmt: skip


def _like(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.expand(x.shape)


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    strides = walk(tensor)
    assert strides is not None
    return strides.sample, strides.channel, strides.pixel
