"""Handle the memory formats of activations: contiguous [N, C, ...] or channels-last, of any rank."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: Tensor, *, or_both: bool = False) -> bool:
    """Return whether `x`, of any rank, is channels-last; with `or_both` also if it is contiguous as well."""
    if x.is_contiguous() and not or_both:
        return False
    if x.ndim in _LAST:  # the same, without a view
        return x.is_contiguous(memory_format=_LAST[x.ndim])
    return x.movedim(1, -1).is_contiguous()


def not_channels_last(**tensors: Tensor | None) -> str | None:
    """Return which of the named tensors is not channels-last, as native kernels require; None if all are."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() and not is_channels_last(tensor, or_both=True):
            return f"{name} has strides {tensor.stride()}, must be channels-last on the native backend"
    return None


def channels_last(x: Tensor) -> Tensor:
    """Return `x`, copied unless it is channels-last."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def empty_channels_last(x: Tensor, channels: int) -> Tensor:
    """Return uninitialised `[N, channels, ...]`, channels-last."""
    return x.new_empty(x.shape[0], *x.shape[2:], channels).movedim(-1, 1)


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """Return `y`, copied if need be, channels-last if `x` is, else contiguous."""
    return channels_last(y) if is_channels_last(x) else y.contiguous()


def empty_like(x: Tensor, channels: int) -> Tensor:
    """Return uninitialised `[N, channels, ...]`, in the format that `in_format_of(x, ...)` gives."""
    if is_channels_last(x):
        return empty_channels_last(x, channels)
    return x.new_empty(x.shape[0], channels, *x.shape[2:])


def rows(x: Tensor) -> Tensor | None:
    """Return `x` [N, C, ...] as a view [N * pixels, C] of adjacent channels; None if its strides forbid it."""
    stride, expected = None, 1
    for size, step in zip(reversed(x.shape[:1] + x.shape[2:]), reversed(x.stride()[:1] + x.stride()[2:]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride, expected = step, step
        if step != expected:
            return None
        expected = step * size
    channels = x.shape[1]
    if stride is None:
        stride = channels  # a single row
    if (channels > 1 and x.stride(1) != 1) or stride < channels:
        return None
    return x.as_strided((x.numel() // channels, channels), (stride, 1))


class Strides(NamedTuple):
    """The strides by which kernels walk a tensor [N, C, ...]."""

    sample: int
    channel: int
    pixel: int
    linear: bool


def walk(tensor: Tensor) -> Strides | None:
    """Return the strides of `tensor` [N, C, ...]; None if its pixels have no single stride or span more than 2^31."""
    size, stride = list(tensor.shape), list(tensor.stride())
    pixels = [(n, s) for n, s in zip(size[2:], stride[2:], strict=True) if n != 1]
    if any(s != n_next * s_next for (_, s), (n_next, s_next) in itertools.pairwise(pixels)):
        return None
    num_pixels, pixel_stride = math.prod(size[2:]), pixels[-1][1] if pixels else 1
    channel_stride = stride[1] if size[1] != 1 else num_pixels * pixel_stride
    if (size[1] - 1) * channel_stride + (num_pixels - 1) * pixel_stride >= 2**31:
        return None
    linear = pixel_stride == 1 and channel_stride == num_pixels
    return Strides(stride[0] if size[0] != 1 else 0, channel_stride, pixel_stride, linear)
