"""Compute attention with separate keys and values in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pixels(x: Tensor) -> Tensor:
    """Return [N, C, H, W] as a view [N, H * W, C], which channels-last images have."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def cross_attention_by_torch(
    y: Tensor, q: Tensor, kv: Tensor, heads: int, own: Tensor | None, mask: Tensor | None, backend: str
) -> None:
    """Write softmax(q k^T / sqrt(head_dim) + mask) v to `y`: by torch's own, or by the definition for "reference"."""
    rows = pixels(kv) if own is None else torch.cat([pixels(kv), pixels(own)], dim=1)
    queries, keys, values = (
        part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (pixels(q), *rows.chunk(2, dim=2))
    )
    bias = None if mask is None else mask[:, None, None, :]
    if backend == "reference":
        queries, keys, values = queries.double(), keys.double(), values.double()
        scores = queries @ keys.transpose(2, 3) * queries.shape[3] ** -0.5
        out = torch.softmax(scores if bias is None else scores + bias.double(), dim=3) @ values
    else:
        out = F.scaled_dot_product_attention(queries, keys, values, None if bias is None else bias.to(q.dtype))
    n, channels, height, width = y.shape
    y.permute(0, 2, 3, 1).copy_(out.transpose(1, 2).reshape(n, height, width, channels))
