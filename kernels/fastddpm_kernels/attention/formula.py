"""Compute attention in plain torch: `eager` is torch's own, `reference` the definition in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Return softmax(q k^T / sqrt(head_dim)) v of [N, heads, P, ..]; `backend` is "eager" or "reference"."""
    if backend != "reference":
        return F.scaled_dot_product_attention(q, k, v)
    return torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, dim=3) @ v


def attention_by_torch(qkv: Tensor, heads: int, head_dim: int, backend: str = "eager") -> Tensor:
    """Return the result of `attention_`, unchecked, in new channels-last memory: torch has no `out` argument here."""
    n, _, height, width = qkv.shape
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts(qkv, heads, head_dim))
    out = softmax_attention(q, k, v, backend)
    return out.transpose(1, 2).reshape(n, height, width, -1).permute(0, 3, 1, 2)


def parts(qkv: Tensor, heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Return queries, keys and values as views [N, P, heads * ..] of [N, channels, H, W]."""
    rows, inner = qkv.permute(0, 2, 3, 1).flatten(1, 2), heads * head_dim
    return rows.split([inner, inner, rows.shape[2] - 2 * inner], dim=2)
