"""Compute the attention block in plain torch, and fold the projections of one head into its two matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm_kernels.conv.formula import apply_norm, statistics_by_torch
from fastddpm_kernels.conv.statistics import Norm, statistics_shape, statistics_unit


def fold(
    qkv: Tensor, qkv_bias: Tensor, out: Tensor, out_bias: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scores, scores_bias, values and values_bias in float64, exact algebra on the projections of one head.

    (h Wq + bq) (h Wk + bk)^T is h (Wq Wk^T) h^T + bq Wk^T h^T and terms that are the same for all keys, which a softmax
    does not see. The weights of the softmax sum to one, so the biases of the values pass through it.

    Args:
        qkv, qkv_bias: `[2 * head_dim + V, C]` and its bias: queries, keys and values.
        out, out_bias: `[C, V]` and its bias: the output projection.
        head_dim: channels of a query.
    """
    q, k, v = qkv.double().split([head_dim, head_dim, len(qkv) - 2 * head_dim])
    q_bias, _, v_bias = qkv_bias.double().split([head_dim, head_dim, len(v)])
    scale = head_dim**-0.5
    return scale * q.mT @ k, scale * q_bias @ k, out.double() @ v, out.double() @ v_bias + out_bias.double()


def reference(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scores: Tensor,
    scores_bias: Tensor, values: Tensor, values_bias: Tensor, given: Tensor | None = None,
    statistics: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the definition, in float64, to `y`."""
    norm = _norm(x.double(), weight, bias, num_groups, eps, given)
    h = apply_norm(x.double(), norm, x.shape[1]).flatten(2).mT
    q = h @ scores.double() + scores_bias.double()
    attended = torch.softmax(q @ h.mT, dim=2) @ h
    y.copy_(x.double() + (attended @ values.double().mT + values_bias.double()).mT.view(x.shape))
    if statistics is not None:
        statistics_by_torch(statistics, y)


def eager(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scores: Tensor,
    scores_bias: Tensor, values: Tensor, values_bias: Tensor, given: Tensor | None = None,
    statistics: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the result of torch's own norm, products and attention, each in x's dtype, to `y`."""
    if given is None:
        h = F.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps).flatten(2).mT
    else:
        h = apply_norm(x, _norm(x, weight, bias, num_groups, eps, given), x.shape[1]).flatten(2).mT
    q = h @ scores + scores_bias.to(x.dtype)
    attended = F.scaled_dot_product_attention(q[:, None], h[:, None], h[:, None], scale=1.0)[:, 0]
    torch.add(x, F.linear(attended, values, values_bias.to(x.dtype)).mT.view(x.shape), out=y)
    if statistics is not None:
        statistics_by_torch(statistics, y)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, given: Tensor | None) -> Norm:
    """Return the norm with its statistics, computed from x if they are not given."""
    if given is None:
        unit = statistics_unit(x.shape[1], (x.shape[1] // num_groups, 0))
        given = torch.empty(statistics_shape(x, unit), dtype=x.dtype, device=x.device)
        statistics_by_torch(given, x)
    return Norm(weight, bias, num_groups, given, eps=eps, activation=None)
