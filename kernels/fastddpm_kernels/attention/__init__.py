"""Compute self-attention over pixels in place, from queries, keys and values that one product wrote side by side.

    y = softmax(q k^T / sqrt(head_dim)) v          for every head

On a GPU torch's own kernels are hard to beat, and run. On a CPU the native one takes half of torch's time in float32
and a quarter in bfloat16 for the wide heads of a DDPM U-Net: a block of queries meets all keys while its scores are in
the cache. `training` has attention with gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm_kernels.attention.formula import attention_by_torch, parts
from fastddpm_kernels.attention.native import bind_attention as bind_native
from fastddpm_kernels.backend import resolve
from fastddpm_kernels.checks import check_operands
from fastddpm_kernels.inplace import InPlace
from fastddpm_kernels.layout import not_channels_last

__all__ = ["attention_", "attention_by_torch"]


@InPlace
def attention_(y: Tensor, qkv: Tensor, heads: int, head_dim: int, *, backend: str = "auto") -> Callable[[], object]:
    """Write self-attention to `y`. Not differentiable.

    Args:
        y: `[N, heads * value_dim, H, W]`, overwritten.
        qkv: `[N, heads * (2 * head_dim + value_dim), H, W]`: the queries of all heads, then their keys, then their
            values. float32 or bfloat16 (also float16 and float64 on `eager` and `reference`). On `native` both must be
            channels-last, and in bfloat16 `head_dim` even.
        heads: number of heads.
        head_dim: channels of a query and of a key.
        backend: `"auto"`, `"native"`, `"eager"` (torch's `scaled_dot_product_attention`) or `"reference"`.

    Raises:
        TypeError: an argument is not a tensor, or has an unsupported dtype.
        ValueError: a shape, device or memory format that does not fit.
        BackendError: the named backend cannot run here.
    """
    _check(y, qkv, heads, head_dim)

    def unfit() -> str | None:
        if qkv.dtype == torch.bfloat16 and (head_dim % 2 or qkv.shape[1] % 2):
            return f"head_dim is {head_dim} of {qkv.shape[1]} channels, both must be even in bfloat16"
        return not_channels_last(y=y, qkv=qkv)

    backend = resolve("attention", backend, qkv.device.type, qkv.dtype, unfit)
    if y.numel() == 0:
        return lambda: None
    if backend == "native":
        q, k, v = parts(qkv, heads, head_dim)
        return bind_native(y.permute(0, 2, 3, 1).view(len(y), q.shape[1], -1), q, k, v, heads, head_dim**-0.5)
    wide = backend == "reference"
    return torch.no_grad()(lambda: y.copy_(attention_by_torch(qkv.double() if wide else qkv, heads, head_dim, backend)))


def _check(y: Tensor, qkv: Tensor, heads: int, head_dim: int) -> None:
    check_operands(qkv, {"y": y}, name="qkv")
    for name, value in (("qkv", qkv), ("y", y)):
        if value.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be [N, C, H, W]")
    if heads < 1 or head_dim < 1:
        raise ValueError(f"heads is {heads} and head_dim {head_dim}, must be at least 1")
    values = qkv.shape[1] - 2 * heads * head_dim
    if values < heads or values % heads:
        raise ValueError(
            f"qkv has {qkv.shape[1]} channels, must have {2 * heads * head_dim} for queries and keys and a multiple of "
            f"{heads} for values"
        )
    if y.shape != (qkv.shape[0], values, *qkv.shape[2:]):
        expected = (qkv.shape[0], values, *qkv.shape[2:])
        raise ValueError(f"y has shape {tuple(y.shape)}, must have shape {expected}")
    if y.numel() and y.data_ptr() == qkv.data_ptr():
        raise ValueError("y is qkv, must be other memory")
