"""Fuse what follows every convolution of a diffusion policy's network.

    y = mish(group_norm(x)) * scale + shift + residual

FiLM comes after the activation and its factor is `scale` itself, not `1 + scale`; every part after the activation may
be left out. Mish(v) = v tanh(log(1 + e^v)) (Misra 2019, arXiv:1908.08681).

Device-memory traffic: each input once and the output once, where a group fits the registers of a program (about
16 Ki elements); else x is read three times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastddpm_kernels.backend import resolve
from fastddpm_kernels.checks import check_operands, not_float64
from fastddpm_kernels.group_norm_mish.formula import eager, reference
from fastddpm_kernels.group_norm_mish.native import bind_group_norm_mish
from fastddpm_kernels.inplace import InPlace
from fastddpm_kernels.layout import is_channels_last
from fastddpm_kernels.native.binding import bind_with_floats

__all__ = ["group_norm_mish_"]


@InPlace
def group_norm_mish_(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Callable[[], object]:
    """Write `mish(group_norm(x)) * scale + shift + residual` to `y`. Not differentiable.

    On `native` and `triton` one pass, statistics and arithmetic in float32; `eager` rounds after each operation.

    Args:
        y: `[N, C, ...]`, overwritten. May be `x` or `residual` itself.
        x: `[N, C, ...]`, float32, or float16 (not on `native`), bfloat16, float64 (on `eager` and `reference`). On
            `native` and `triton` this, `y` and `residual` must be channels-last.
        weight, bias: `[C]`, any floating dtype.
        num_groups: divides C.
        eps: added to the variance.
        scale, shift: `[N, C]`, any floating dtype, either may be left out. Rows may be strided or expanded, their
            channels are adjacent.
        residual: `[N, C, ...]`, x's dtype, added last.
        backend: `"auto"`, `"triton"`, `"native"`, `"eager"` or `"reference"`.

    Raises:
        TypeError: an argument is not a floating tensor, or has an unsupported dtype.
        ValueError: a shape, device, memory format or value that does not fit.
        BackendError: the named backend cannot run here.
    """
    _check(y, x, weight, bias, num_groups, eps, scale, shift, residual)

    def unfit() -> str | None:
        for name, value in (("x", x), ("y", y), ("residual", residual)):
            if value is not None and value.numel() and not is_channels_last(value, or_both=True):
                return f"{name} has strides {value.stride()}, must be channels-last"
        return None

    backend = resolve("group_norm_mish_", backend, x.device.type, x.dtype, unfit)
    if backend == "triton":
        not_float64(x)
        if reason := unfit():
            raise ValueError(f"{reason} on the triton backend")
    if y.numel() == 0:
        return lambda: None
    if backend == "native":
        bound = partial(bind_group_norm_mish, y, x, num_groups, float(eps), residual)
        return bind_with_floats(bound, weight, bias, scale, shift)
    if backend == "triton":
        from fastddpm_kernels.group_norm_mish.triton import bind

        return bind(y, x, weight, bias, num_groups, float(eps), scale, shift, residual)
    run = reference if backend == "reference" else eager
    return partial(torch.no_grad()(run), y, x, weight, bias, num_groups, eps, scale, shift, residual)


def _check(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scale: Tensor | None,
    shift: Tensor | None, residual: Tensor | None,
) -> None:  # fmt: skip
    vectors = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    check_operands(x, {"y": y}, {"residual": residual}, vectors)
    if x.ndim < 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [N, C, ...] with at least one channel")
    for name, value in (("y", y), ("residual", residual)):
        if value is not None and value.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be x's, {tuple(x.shape)}")
    n, channels = x.shape[:2]
    for name, value in vectors.items():
        wanted = (n, channels) if name in ("scale", "shift") else (channels,)
        if value is not None and tuple(value.shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be {wanted}")
        if value is not None and channels > 1 and value.stride(-1) != 1:
            raise ValueError(f"{name} has strides {value.stride()}, must have adjacent channels")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}, must divide x's {channels} channels")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, must be at least 0")
