"""Check the arguments of the convolutions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastddpm_kernels.checks import check_device, check_operands, not_float64, same_memory
from fastddpm_kernels.conv.packing import PackedWeight, why_not_tile
from fastddpm_kernels.conv.statistics import UNITS, Norm, statistics_shape
from fastddpm_kernels.layout import is_channels_last


def check_conv(
    y: Tensor, x: Tensor, weight: Tensor | PackedWeight, x2: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, stride: int, padding: int, upsample: bool,
) -> tuple[int, int]:  # fmt: skip
    """Check the operands of the convolution; return the size of the kernel and the number of input channels."""
    if not isinstance(weight, (Tensor, PackedWeight)):
        raise TypeError(f"weight is {type(weight).__name__}, must be a tensor or a PackedWeight")
    plain = weight if isinstance(weight, Tensor) else None
    check_operands(x, {"y": y}, {"weight": plain, "x2": x2, "residual": residual}, {"bias": bias})
    if x.ndim != 4 or x.shape[1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [N, C, H, W] with at least one channel")
    inner = x.shape[1]
    if x2 is not None:
        _check_second("x2", x2, "x", x)
        inner += x2.shape[1]
    if isinstance(weight, PackedWeight):
        shape: tuple[int, ...] = (weight.out_channels, weight.in_channels, weight.kernel, weight.kernel)
        if weight.upsample != upsample:
            raise ValueError(f"weight is packed for upsample={weight.upsample}, must be for {upsample}")
    else:
        shape = tuple(weight.shape)
        if upsample and len(shape) == 5 and (shape[0], *shape[2:4]) == (4, 2, 2):  # from `phase_weight`
            shape = (shape[1], shape[4], 3, 3)
    if len(shape) != 4 or shape[0] < 1 or shape[1] != inner or shape[2] < 1 or shape[2] != shape[3]:
        raise ValueError(f"weight has shape {shape}, must be [O, {inner}, k, k]")
    out, kernel = shape[0], shape[2]
    if stride < 1:
        raise ValueError(f"stride is {stride}, must be at least 1")
    if not 0 <= padding < kernel:
        raise ValueError(f"padding is {padding}, must be from 0 to {kernel - 1}")
    if upsample and (kernel, stride, padding) != (3, 1, 1):
        raise ValueError(f"upsample is True with kernel {kernel}, stride {stride}, padding {padding}, must be 3, 1, 1")
    factor = 2 if upsample else 1
    fits = y.ndim == 4 and y.shape[:2] == (x.shape[0], out)
    for a, b in zip(y.shape[2:], x.shape[2:], strict=False):
        more = (a - 1) * stride + kernel - padding - factor * b  # rows that are added below
        fits = fits and (more == 1 if upsample else -stride < more < kernel)
    if not fits:
        raise ValueError(f"y has shape {tuple(y.shape)}, must be x's {tuple(x.shape)} convolved, with {out} channels")
    if isinstance(weight, PackedWeight) and (weight.algorithm != "direct" or weight.tile):
        if weight.tile and (reason := why_not_tile(weight)):
            raise ValueError(f"weight has tile {weight.tile}: {reason}")
        same = upsample or y.shape[2:] == x.shape[2:]
        if (kernel, stride, padding) != (3, 1, 1) or not same:
            raise ValueError(f"weight is packed for {weight.algorithm}, must be for direct: stride or padding is not 1")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, must be [{out}], one per row of weight")
    if residual is not None and residual.shape != y.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, must be y's, {tuple(y.shape)}")
    check_apart(y, {"x": x, "x2": x2})
    return kernel, inner


def check_packed(weight: PackedWeight, x: Tensor, channels2: int) -> None:
    """Check that a weight is packed for x and the channels of x2."""
    if (weight.values.dtype, x.dtype) != (torch.float16, torch.float32) and weight.values.dtype != x.dtype:
        raise TypeError(f"weight is packed for {weight.values.dtype}, must be for x's dtype, {x.dtype}")
    if x.dtype == torch.bfloat16 and weight.channels2 != channels2:
        raise ValueError(f"weight is packed for {weight.channels2} channels of x2, must be for {channels2}")


def check_fused(
    y: Tensor, x: Tensor, x2: Tensor | None, norm: Norm | None, time_bias: Tensor | None, shortcut: Tensor | None,
    shortcut2: Tensor | None, shortcut_weight: Tensor | None, statistics: Tensor | None, workspace: Tensor | None,
) -> None:  # fmt: skip
    """Check what a convolution computes besides: norm, time row, shortcut and statistics."""
    if norm is not None:
        check_norm(norm, x, x2)
    check_added(y, time_bias, statistics)
    if (shortcut is None) != (shortcut_weight is None):
        missing = "shortcut" if shortcut is None else "shortcut_weight"
        raise ValueError(f"{missing} is None, must be given: shortcut and shortcut_weight come together")
    if shortcut is None and shortcut2 is not None:
        raise ValueError("shortcut is None, must be given with shortcut2")
    if shortcut is not None and shortcut_weight is not None:
        given = {"shortcut": shortcut, "shortcut_weight": shortcut_weight}
        check_operands(x, given, {"shortcut2": shortcut2})
        if shortcut.ndim != 4 or shortcut.shape[0] != y.shape[0] or shortcut.shape[2:] != y.shape[2:]:
            raise ValueError(f"shortcut has shape {tuple(shortcut.shape)}, must equal y's but for the channels")
        channels = shortcut.shape[1]
        if shortcut2 is not None:
            _check_second("shortcut2", shortcut2, "shortcut", shortcut)
            channels += shortcut2.shape[1]
        if shortcut_weight.shape != (y.shape[1], channels):
            wanted = [y.shape[1], channels]
            raise ValueError(f"shortcut_weight has shape {list(shortcut_weight.shape)}, must be {wanted}")
        check_apart(y, {"shortcut": shortcut, "shortcut2": shortcut2})
    check_workspace(workspace, x.device)


def check_workspace(workspace: Tensor | None, device: torch.device) -> None:
    """Check the dtype, form and device of a workspace."""
    if workspace is None:
        return
    if not isinstance(workspace, Tensor) or workspace.dtype != torch.float32:
        raise TypeError(f"workspace is {getattr(workspace, 'dtype', type(workspace).__name__)}, must be float32")
    if workspace.ndim != 1 or not workspace.is_contiguous():
        raise ValueError(f"workspace has shape {tuple(workspace.shape)}, must be one-dimensional and contiguous")
    check_device("workspace", workspace, device)


def check_added(y: Tensor, time_bias: Tensor | None, statistics: Tensor | None) -> None:
    """Check the time row that is added to y, and the statistics of y."""
    if time_bias is not None:
        check_rows("time_bias", time_bias, y, y.shape[1])
    if statistics is not None:
        check_statistics("statistics", statistics, y)


def check_rows(name: str, value: Tensor, x: Tensor, channels: int) -> None:
    """Check that a value has a row for every sample, with adjacent channels."""
    check_operands(x, {}, {}, {name: value})
    if value.shape != (x.shape[0], channels):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, must be [{x.shape[0]}, {channels}]")
    if value.shape[1] > 1 and value.stride(1) != 1:
        raise ValueError(f"{name} has strides {value.stride()}, must have adjacent channels")


def check_statistics(name: str, statistics: Tensor, x: Tensor) -> int:
    """Check the statistics of `x`; return their unit."""
    if not isinstance(statistics, Tensor) or statistics.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} is {getattr(statistics, 'dtype', type(statistics).__name__)}, must be float32")
    units = statistics.shape[3] if statistics.ndim == 4 else 0
    unit = x.shape[1] // units if units else 0
    if unit not in UNITS or x.shape[1] % unit or tuple(statistics.shape) != statistics_shape(x, unit):
        wanted = f"statistics_shape({tuple(x.shape)}, unit)"
        raise ValueError(f"{name} has shape {tuple(statistics.shape)}, must be {wanted}")
    if not statistics.is_contiguous():
        raise ValueError(f"{name} has strides {statistics.stride()}, must be contiguous")
    check_device(name, statistics, x.device)
    return unit


def check_norm(norm: Norm, x: Tensor, x2: Tensor | None) -> None:
    """Check the norm of concat(x, x2)."""
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    vectors = {"norm.weight": norm.weight, "norm.bias": norm.bias}
    check_operands(x, {}, {}, vectors)
    for name, value in vectors.items():
        if value.shape != (channels,) or not value.is_contiguous():
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be [{channels}], contiguous")
    if norm.num_groups < 1 or channels % norm.num_groups:
        raise ValueError(f"norm.num_groups is {norm.num_groups}, must divide {channels} channels")
    size, begin = channels // norm.num_groups, 0
    if (x2 is None) != (norm.statistics2 is None):
        raise ValueError(f"norm.statistics2 is {'not ' if x2 is None else ''}None, must be given with x2 alone")
    for name, values, image in (("statistics", norm.statistics, x), ("statistics2", norm.statistics2, x2)):
        if values is not None and image is not None:
            unit = check_statistics(f"norm.{name}", values, image)
            if size % unit or begin % unit:
                raise ValueError(f"norm.{name} has units of {unit} channels, which straddle groups of {size}")
            begin += image.shape[1]
    if not norm.eps > 0:
        raise ValueError(f"norm.eps is {norm.eps}, must be positive")
    if norm.activation not in ("silu", None):
        raise ValueError(f"norm.activation is {norm.activation!r}, must be 'silu' or None")
    if (norm.scale is None) != (norm.shift is None):
        raise ValueError(f"norm.{'scale' if norm.scale is None else 'shift'} is None, must be given with the other")
    for name, row in (("norm.scale", norm.scale), ("norm.shift", norm.shift)):
        if row is not None:
            check_rows(name, row, x, channels)


def check_apart(y: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Check that y is not the memory of an operand that is read whole."""
    for name, value in others.items():
        if value is not None and y.numel() and same_memory(value, y):
            raise ValueError(f"y is {name}, must be other memory, since all of {name} is read for it")


def check_for_triton(x: Tensor, images: Mapping[str, Tensor | None], weights: Mapping[str, Tensor | None]) -> None:
    """Check what only the triton backend asks: channels-last images, weights whose channels are adjacent."""
    not_float64(x)
    for name, value in images.items():
        if value is None or not value.numel():
            continue
        if not is_channels_last(value, or_both=True):
            raise ValueError(f"{name} has strides {value.stride()}, must be channels-last on the triton backend")
        if (
            value.numel() // max(value.shape[0], 1) >= 2**31 - 2**20
            or value.shape[0] * value.shape[2] * value.shape[3] >= 2**31
        ):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must have fewer than 2^31 - 2^20 values a sample")
    for name, value in weights.items():
        if value is not None and not value.is_contiguous() and not is_channels_last(value):
            raise ValueError(f"{name} has strides {value.stride()}, must be contiguous or channels-last")


def _check_second(name: str, value: Tensor, first: str, x: Tensor) -> None:
    if value.ndim != 4 or value.shape[0] != x.shape[0] or value.shape[2:] != x.shape[2:] or value.shape[1] < 1:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, must equal {first}'s {tuple(x.shape)} but for the channels"
        )
