"""Compute the convolution in plain torch: `eager` in x's dtype, `reference` in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm_kernels.conv.statistics import Norm, span_of, span_sizes


def conv_by_torch(
    x: Tensor, weight: Tensor, x2: Tensor | None, bias: Tensor | None, residual: Tensor | None, stride: int,
    padding: int, upsample: bool, shape: torch.Size, dtype: torch.dtype, norm: Norm | None = None,
    time_bias: Tensor | None = None, shortcut: Tensor | None = None, shortcut2: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return conv(upsample(norm(concat(x, x2))), weight) + bias + time_bias + residual + conv1x1(shortcut), of `shape`.

    Computed in `dtype`, the norm in float32 or more.
    """
    h = (x if x2 is None else torch.cat((x, x2), 1)).to(dtype)
    if norm is not None:
        h = apply_norm(h, norm, x.shape[1])
    if weight.ndim == 5:
        value = _of_phases(h, weight.to(dtype), None if bias is None else bias.to(dtype))
        return add(value, None, time_bias, residual)
    if upsample:
        h = F.interpolate(h, scale_factor=2, mode="nearest")
    kernel = weight.shape[2]
    below, right = ((a - 1) * stride + kernel - padding - b for a, b in zip(shape[2:], h.shape[2:], strict=True))
    if (below, right) != (padding, padding):
        h, padding = F.pad(h, (padding, right, padding, below)), 0
    value = F.conv2d(h, weight.to(dtype), None if bias is None else bias.to(dtype), stride, padding)
    if shortcut is not None and shortcut_weight is not None:
        whole = shortcut if shortcut2 is None else torch.cat((shortcut, shortcut2), 1)
        value = value + F.conv2d(whole.to(dtype), shortcut_weight.to(dtype)[:, :, None, None])
    return add(value, None, time_bias, residual)


def _of_phases(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution of `h` upsampled by two, from the phases [4, O, 2, 2, C] of its weight."""
    n, _, height, width = h.shape
    phases = [
        F.conv2d(F.pad(h, (1 - q, q, 1 - p, p)), weight[2 * p + q].permute(0, 3, 1, 2), bias)
        for p in (0, 1)
        for q in (0, 1)
    ]
    return torch.stack(phases, 2).view(n, -1, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3).reshape(
        n, -1, 2 * height, 2 * width
    )  # fmt: skip


def add(value: Tensor, bias: Tensor | None, time_bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Return value + bias + time_bias + residual in value's dtype."""
    if bias is not None:
        value = value + bias.to(value.dtype)[:, None, None]
    if time_bias is not None:
        value = value + time_bias.to(value.dtype)[:, :, None, None]
    return value if residual is None else value + residual.to(value.dtype)


def apply_norm(h: Tensor, norm: Norm, channels: int) -> Tensor:
    """Return silu(film(group_norm(h))) by the statistics of h's first `channels` and of the others."""
    wide = torch.promote_types(h.dtype, torch.float32)
    mean, rstd = moments(norm, channels, h.shape[1], *h.shape[2:], dtype=wide)
    size = h.shape[1] // norm.num_groups
    mean, rstd = (value.repeat_interleave(size, 1)[:, :, None, None] for value in (mean, rstd))
    v = (h.to(wide) - mean) * rstd * norm.weight.to(wide)[:, None, None] + norm.bias.to(wide)[:, None, None]
    if norm.scale is not None and norm.shift is not None:
        v = v * (1 + norm.scale.to(wide)[:, :, None, None]) + norm.shift.to(wide)[:, :, None, None]
    return (F.silu(v) if norm.activation == "silu" else v).to(h.dtype)


def moments(
    norm: Norm, channels: int, total: int, height: int, width: int, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the mean and 1 / sqrt(variance + eps) of every group, [N, groups] each, merged from blocks."""
    blocks = [(norm.statistics, channels)]
    if norm.statistics2 is not None:
        blocks.append((norm.statistics2, total - channels))
    means, deviations = [], []  # of every channel of every span, [N, spans, C]
    for values, count in blocks:
        unit = count // values.shape[3]
        mean, deviation = values.to(dtype)
        means.append(mean.repeat_interleave(unit, 2))
        deviations.append(deviation.repeat_interleave(unit, 2) / unit)
    mean, deviation = (torch.cat(parts, 2).unflatten(2, (norm.num_groups, -1)) for parts in (means, deviations))
    pixels = span_sizes(height, width, mean.device).to(dtype)[:, None, None]
    count = height * width * mean.shape[3]
    centre = (mean * pixels).sum((1, 3), keepdim=True) / count
    variance = (deviation + pixels * (mean - centre).square()).sum((1, 3)) / count
    return centre[:, 0, :, 0], (variance + norm.eps).rsqrt()


def statistics_by_torch(values: Tensor, y: Tensor) -> None:
    """Write the statistics of `y` [N, C, H, W] to `values`, computed in float32 or more."""
    channels, height, width = y.shape[1:]
    span, unit = span_of(height, width), channels // values.shape[3]
    flat = y.flatten(2).to(torch.promote_types(y.dtype, torch.float32))
    for index, start in enumerate(range(0, height * width, span)):
        block = flat[:, :, start : start + span].unflatten(1, (-1, unit))  # [N, units, unit, pixels]
        mean = block.mean((2, 3), keepdim=True)
        values[0, :, index] = mean[:, :, 0, 0]
        values[1, :, index] = (block - mean).square().sum((2, 3))
