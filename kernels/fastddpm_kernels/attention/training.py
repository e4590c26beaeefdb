"""Compute attention with gradients; on the CPU by the native kernels of `attention_`.

    attention    softmax(q k^T / sqrt(head_dim)) v          for every head

Scores are not stored: the gradient computes them again from q, k and each query's largest score and sum of
exponentials (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.attention.formula import softmax_attention
from fastddpm_kernels.attention.native import attention_gradient, bind_attention
from fastddpm_kernels.backend import check_backend, resolve
from fastddpm_kernels.checks import mixed

BACKENDS = ("native", "eager", "reference")


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, *, backend: str = "auto") -> Tensor:
    """Return the attention of every pixel to all pixels, differentiable in every tensor.

    Args:
        q, k: `[N, P, heads * head_dim]`.
        v: `[N, P, heads * value_dim]`, q's dtype.
        heads: number of heads.
        backend: `"native"`: float32, or bfloat16 with even `head_dim` and `value_dim`, on the CPU; it can be
            differentiated once, not twice. `"eager"`: torch's `scaled_dot_product_attention`. `"reference"`: in
            float64. `"auto"`: `native` where it can run and is not slower, else `eager`.

    Returns:
        `[N, P, heads * value_dim]` in q's dtype.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape that does not fit, or an unknown backend.
        BackendError: `backend` is "native" and cannot run here.
    """
    _check(q, k, v, heads)
    if backend != "auto":
        check_backend(backend, BACKENDS)
    backend = resolve_attention(q, k, v, heads, backend)
    if backend == "native":
        return _attention(q, k, v, heads)[0]
    wide = (q.double(), k.double(), v.double()) if backend == "reference" else (q, k, v)
    q_, k_, v_ = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in wide)
    return softmax_attention(q_, k_, v_, backend).to(q.dtype).transpose(1, 2).flatten(2)


def resolve_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, backend: str = "auto") -> str:
    """Return the backend that `attention` takes for these tensors."""

    def unfit() -> str | None:
        if q.dtype == torch.bfloat16 and (q.shape[2] // heads % 2 or v.shape[2] // heads % 2):
            return "heads have an odd number of channels, must be even in bfloat16"
        return mixed(q, k, v)

    return resolve("attention", backend, q.device.type, q.dtype, unfit)


@torch.library.custom_op(
    "fastddpm::attention", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, int heads) -> (Tensor, Tensor)"
)
def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return the result and the statistics of the scores [N, heads, 2, P] that its gradient needs."""
    y, statistics = _attention_fake(q, k, v, heads)
    if y.numel():
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        bind_attention(y, q, k, v, heads, (q.shape[2] // heads) ** -0.5, statistics)()
    return y, statistics


@_attention.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), q.new_empty(q.shape[0], heads, 2, q.shape[1], dtype=torch.float32)


@torch.library.custom_op(
    "fastddpm::attention_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor statistics, int heads) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, statistics: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv."""
    found = _attention_backward_fake(dy, q, k, v, statistics, heads)
    if dy.numel():
        dy, q, k, v = (each.contiguous() for each in (dy, q, k, v))
        scale = (q.shape[2] // heads) ** -0.5
        attention_gradient(found[0], found[1], found[2], dy, q, k, v, statistics, heads, scale)
    return found


@_attention_backward.register_fake
def _attention_backward_fake(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, statistics: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.heads = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, output[1])


def _gradients(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_attention_backward(dy, *ctx.saved_tensors, ctx.heads), None


_attention.register_autograd(_gradients, setup_context=_save)


def _check(q: Tensor, k: Tensor, v: Tensor, heads: int) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, must be a tensor")
    if q.ndim != 3:
        raise ValueError(f"q has shape {tuple(q.shape)}, must be [N, P, heads * head_dim]")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}, must be q's, {tuple(q.shape)}")
    if v.ndim != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v has shape {tuple(v.shape)}, must equal q's {tuple(q.shape)} but for the channels")
    for name, channels in (("q", q.shape[2]), ("v", v.shape[2])):
        if heads < 1 or channels < heads or channels % heads:
            raise ValueError(f"heads is {heads}, must be at least 1 and divide the {channels} channels of {name}")
