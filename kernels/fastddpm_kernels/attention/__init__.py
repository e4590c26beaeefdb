"""Self-attention over pixels in place, from queries, keys and values that one product has made side by side.

    y = softmax(q k^T / sqrt(head_dim)) v          for every head

On a GPU torch's own kernels are hard to beat, and run. On a CPU the native one takes half of torch's time in float32
and a quarter in bfloat16 for the wide heads of a DDPM U-Net: a block of queries meets all keys while its scores are in
the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm_kernels import backend as _backend
from fastddpm_kernels import native as _native
from fastddpm_kernels.group_norm_silu.ops import is_channels_last

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@torch.no_grad()
def attention_(y: Tensor, qkv: Tensor, heads: int, head_dim: int, *, backend: str = "auto") -> None:
    """Self-attention written to `y`. Not differentiable.

    Args:
        y: `[N, heads * value_dim, H, W]`, overwritten.
        qkv: `[N, heads * (2 * head_dim + value_dim), H, W]`: the queries of all heads, then their keys, then their
            values. float32 or bfloat16 (also float16 and float64 on `eager` and `reference`). On `native` both must be
            channels-last, and in bfloat16 `head_dim` even.
        heads: how many.
        head_dim: channels of a query and of a key.
        backend: `"auto"`, `"native"`, `"eager"` (torch's `scaled_dot_product_attention`) or `"reference"`.

    Raises:
        TypeError: an argument is not a tensor, or of a dtype that is not taken.
        ValueError: a shape, device or memory format that does not fit.
        BackendError: the backend that was named cannot run here.
    """
    _check(y, qkv, heads, head_dim)
    named, backend = backend, _backend.resolve("attention", backend, qkv.device.type, qkv.dtype)
    if backend == "native" and (reason := _why_not_native(y, qkv, head_dim)) is not None:
        if named == "native":
            raise ValueError(reason)
        backend = "eager"
    if y.numel() == 0:
        return
    if backend == "native":
        q, k, v = _parts(qkv, heads, head_dim)
        _native.attention(y.permute(0, 2, 3, 1).view(len(y), q.shape[1], -1), q, k, v, heads, head_dim**-0.5)
        return
    y.copy_(attention_by_torch(qkv.double() if backend == "reference" else qkv, heads, head_dim, backend))


def attention_by_torch(qkv: Tensor, heads: int, head_dim: int, backend: str = "eager") -> Tensor:
    """As `attention_`, unchecked, into new memory, channels-last: torch's attention has no given place."""
    n, _, height, width = qkv.shape
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in _parts(qkv, heads, head_dim))
    if backend == "reference":
        out = torch.softmax(q @ k.transpose(2, 3) * head_dim**-0.5, dim=3) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(n, height, width, -1).permute(0, 3, 1, 2)


def _parts(qkv: Tensor, heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, [N, P, heads * ..]."""
    rows, inner = qkv.permute(0, 2, 3, 1).flatten(1, 2), heads * head_dim
    return rows.split([inner, inner, rows.shape[2] - 2 * inner], dim=2)


def _why_not_native(y: Tensor, qkv: Tensor, head_dim: int) -> str | None:
    for name, value in (("y", y), ("qkv", qkv)):
        if value.numel() and not is_channels_last(value, or_both=True):
            return f"{name} has strides {value.stride()}, must be channels-last on the native backend"
    if qkv.dtype == torch.bfloat16 and (head_dim % 2 or qkv.shape[1] % 2):
        return f"head_dim is {head_dim} of {qkv.shape[1]} channels, both must be even in bfloat16 on the native backend"
    return None


def _check(y: Tensor, qkv: Tensor, heads: int, head_dim: int) -> None:
    for name, value in (("qkv", qkv), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, must be a tensor")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} is {value.dtype}, must be float32, float16, bfloat16 or float64")
        if value.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be [N, C, H, W]")
    if y.dtype != qkv.dtype:
        raise TypeError(f"y is {y.dtype}, must be of qkv's dtype, {qkv.dtype}")
    if y.device != qkv.device:
        raise ValueError(f"y is on {y.device}, must be on qkv's device, {qkv.device}")
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
