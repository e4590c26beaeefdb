"""Instructions that only denoising_diffusion_pytorch's U-Nets need: RMS norm, linear attention, learned keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastddpm_kernels.group_norm_silu import rms_norm_silu, rms_norm_silu_
from torch import Tensor

from fastddpm.networks.frozen.instructions import Machine, bound_once, channels_last


class Projections(NamedTuple):
    """The weights that make queries, keys and values of linear attention.

    Attributes:
        query, key, value: [C, heads * head_dim].
        memory_key, memory_value: [M, heads * head_dim], learned; they precede the keys and values of the pixels.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    memory_key: Tensor
    memory_value: Tensor

    def of(self, x: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write the queries [N, P, I], keys and values [N, M + P, I] of pixels [N, P, C]."""
        torch.mm(x.flatten(0, 1), self.query, out=queries.flatten(0, 1))
        for out, memory, weight in ((keys, self.memory_key, self.key), (values, self.memory_value, self.value)):
            if count := len(memory):
                out[:, :count] = memory
            torch.bmm(x, weight.expand(len(x), -1, -1), out=out[:, count:])


class Scratch(NamedTuple):
    """Slots for the intermediate results of linear attention, [N, I, H, W] or, for keys and values, [N, I, M + P, 1].

    `queries2` and `keys2` hold the softmax of queries and keys.
    """

    queries: int
    keys: int
    values: int
    queries2: int
    keys2: int


def linear_attention(
    m: Machine, source: int, target: int, projections: Projections, scratch: Scratch, heads: int, mask: Tensor | None,
    weight: Tensor, bias: Tensor | None,
) -> Callable[[], object]:  # fmt: skip
    """Compute linear attention (Shen et al. 2018, arXiv:1812.01243) and the projection of its result.

    The softmax of the queries is over their features, that of the keys over the positions. The values are multiplied
    with the output projection before the queries: softmax(q) (softmax(k)^T v Wo) has no product over heads and
    positions.

    Args:
        mask: [I, I], 1 where two features belong to the same head. With a mask all samples are computed at once, by
            products over all features; the mask then zeroes those of different heads. None: one sample after another,
            which stays in the processor's cache and whose heads are matrices without a copy.
        weight: [I, O], the output projection, scaled.
        bias: [O], the bias of the projection, or None if it is not added here.
    """

    def run() -> None:
        x = m.slots[source]
        pixels, (inner, width), count = _pixels(x), weight.shape, len(projections.memory_key)
        total = pixels.shape[1] + count
        q, q2 = (_pixels(m.place(slot, x, inner)) for slot in (scratch.queries, scratch.queries2))
        k, k2, v = (_place(m, slot, x, total, inner) for slot in (scratch.keys, scratch.keys2, scratch.values))
        y = _pixels(m.place(target, x, width))
        at_once = 1 if mask is None else max(len(x), 1)
        q, q2, k, k2, v = (part[:at_once] for part in (q, q2, k, k2, v))
        for some, out in zip(pixels.split(at_once), y.split(at_once), strict=True):
            projections.of(some, q, k, v)
            torch.softmax(q.unflatten(2, (heads, -1)), 3, out=q2.unflatten(2, (heads, -1)))
            torch.softmax(k, 1, out=k2)
            if mask is None:
                keys, values = (part[0].unflatten(1, (heads, -1)).transpose(0, 1) for part in (k2, v))
                context = torch.bmm(keys.transpose(1, 2), values)
                context = torch.bmm(context, weight.view(heads, -1, width)).view(1, inner, width)
            else:
                context = torch.matmul(torch.bmm(k2.transpose(1, 2), v).mul_(mask), weight)
            if bias is None:
                torch.bmm(q2, context, out=out)
            else:
                torch.baddbmm(bias, q2, context, out=out)

    return run


def attention(
    m: Machine, source: int, target: int, scratch: int, weight: Tensor, memory: Tensor, heads: int
) -> Callable[[], object]:
    """Compute softmax(q k / sqrt(head_dim)) v, before its projection.

    Args:
        scratch: slot of [N, 3 I, M + P, 1] for queries, keys and values, the learned ones first.
        weight: [C, 3 I].
        memory: [M, 2 I], learned keys and values.
    """
    count, inner = len(memory), memory.shape[1] // 2

    def run() -> None:
        x = m.slots[source]
        pixels = _pixels(x)
        rows = _place(m, scratch, x, pixels.shape[1] + count, 3 * inner)
        if count:
            rows[:, :count, inner:] = memory
        torch.bmm(pixels, weight.expand(len(x), -1, -1), out=rows[:, count:])
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in rows.split(inner, dim=2))
        out = F.scaled_dot_product_attention(q[:, :, count:], k, v)
        _pixels(m.place(target, x, inner)).unflatten(2, (heads, -1)).copy_(out.transpose(1, 2))

    return run


def _pixels(x: Tensor) -> Tensor:
    """Return [N, C, H, W], channels-last, as [N, H * W, C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _place(m: Machine, slot: int, like: Tensor, pixels: int, channels: int) -> Tensor:
    """Return a slot as [N, pixels, channels]."""
    if not m.static:
        m.slots[slot] = like.new_empty(len(like), pixels, 1, channels).permute(0, 3, 1, 2)
    return _pixels(m.slots[slot])


def rms_norm(
    m: Machine,
    source: int,
    target: int,
    residual: int | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> Callable[[], object]:
    """Apply RMS norm, FiLM and SiLU to source + bias, and add residual."""

    def bind() -> Callable[[], object]:
        x = m.slots[source]
        return rms_norm_silu_.bind(
            m.place(target, x, len(weight)), x, weight, bias=bias,
            residual=None if residual is None else m.slots[residual], scale=scale, shift=shift, activation=activation,
            backend=m.backend,
        )  # fmt: skip

    def run() -> None:
        x = m.slots[source]
        y = rms_norm_silu(x, weight, scale=scale, shift=shift, activation=activation, backend=m.backend)
        m.slots[target] = y if residual is None else y.add_(m.slots[residual])

    return bound_once(m, (source, target, residual), bind) if m.fused else run


def conv_of_sequence(
    m: Machine, source: int, target: int, weight: Tensor, bias: Tensor, stride: int, padding: int
) -> Callable[[], object]:
    """Convolve along the width, by [O, I, 1, K], with bias."""

    def run() -> None:
        y = F.conv2d(m.slots[source], weight, bias, (1, stride), (0, padding))
        if m.static:
            m.slots[target].copy_(y)
        else:
            m.slots[target] = channels_last(y)

    return run


def concatenate(m: Machine, first: int, second: int, target: int) -> Callable[[], object]:
    """Concatenate the channels of first and second."""

    def run() -> None:
        x, y = m.slots[first], m.slots[second]
        torch.cat([x, y], dim=1, out=m.place(target, x, x.shape[1] + y.shape[1]))

    return run
