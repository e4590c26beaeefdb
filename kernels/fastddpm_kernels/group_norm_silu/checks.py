"""Check the arguments of the norms. An error is one line: the argument, its value and the allowed values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastddpm_kernels.checks import check_operands, not_float64
from fastddpm_kernels.layout import is_channels_last

ACTIVATIONS = ("silu", None)


def check_tensors(x: Tensor, x2: Tensor | None, vectors: dict[str, Tensor], rows: dict[str, Tensor | None]) -> int:
    """Check every tensor; return the number of channels of x and x2 together."""
    check_operands(x, vectors, {"x2": x2}, {**vectors, **rows})
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be [N, C, ...]")
    channels = x.shape[1]
    if x2 is not None:
        if x2.ndim != x.ndim or x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:]:
            raise ValueError(f"x2 has shape {tuple(x2.shape)}, must equal x's {tuple(x.shape)} but for the channels")
        channels += x2.shape[1]
    if channels < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, must have at least one channel")
    for name, value in vectors.items():
        if value.shape != (channels,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be [{channels}], one per channel")
    for name, row in rows.items():
        if row is not None and row.shape != (x.shape[0], channels):
            raise ValueError(f"{name} has shape {tuple(row.shape)}, must be [{x.shape[0]}, {channels}]")
    return channels


def check_groups(channels: int, num_groups: int) -> None:
    if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}, must divide the number of channels, {channels}")


def check_like(x: Tensor, shapes: dict[str, tuple[int, ...]], values: dict[str, Tensor | None]) -> None:
    """Check that y and the other `values`, if given, have x's dtype, device and memory format, and their `shapes`."""
    if values["y"] is None:
        raise TypeError("y is a NoneType, must be a tensor to write to")
    last = is_channels_last(x)
    if not last and not x.is_contiguous():
        raise ValueError(f"x has strides {x.stride()}, must be contiguous or channels-last")
    check_operands(x, {}, values)
    for name, value in values.items():
        if value is None:
            continue
        if name in shapes and value.shape != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be {shapes[name]}")
        if not (is_channels_last(value, or_both=True) if last else value.is_contiguous()):
            format = "channels-last" if last else "contiguous"
            raise ValueError(f"{name} has strides {value.stride()}, must be {format}, as x is")


def check_in_place(
    y: Tensor,
    x: Tensor,
    x2: Tensor | None,
    residual: Tensor | None,
    total: Tensor | None,
    workspace: Tensor | None,
    channels: int,
) -> None:
    """Check the arguments that only `group_norm_silu_` takes."""
    if total is not None and residual is None:
        raise ValueError("total is given without residual, must be None: it is x itself")
    own = tuple(x.shape)
    shapes = {"y": (own[0], channels, *own[2:]), "residual": own, "total": own}
    check_like(x, shapes, {"y": y, "residual": residual, "total": total, "x2": x2})
    if total is not None:
        check_apart("y", y, "total", total)
    if x2 is not None:  # else the program that writes an element of y has read the same element of x and residual
        for name, value in {"x": x, "residual": residual, "x2": x2}.items():
            if value is not None:
                check_apart("y", y, name, value)
        if total is not None:
            check_apart("total", total, "x2", x2)
    if workspace is not None:
        if not isinstance(workspace, Tensor) or workspace.dtype != torch.float32:
            what = getattr(workspace, "dtype", type(workspace).__name__)
            raise TypeError(f"workspace is {what}, must be a float32 tensor")
        if workspace.device != x.device:
            raise ValueError(f"workspace is on {workspace.device}, must be on x's device, {x.device}")
        if not workspace.is_contiguous():
            raise ValueError(f"workspace has strides {workspace.stride()}, must be contiguous")


def check_apart(written: str, value: Tensor, read: str, other: Tensor) -> None:
    if value.data_ptr() == other.data_ptr() != 0:  # 0 where there are no elements, or none that have values
        raise ValueError(f"{written} is in the memory of {read}, must be in its own")


def check_adjacent(values: dict[str, Tensor | None]) -> None:
    """Raise ValueError where neighbouring channels are not adjacent, since a copy would allocate."""
    for name, value in values.items():
        if value is not None and value.stride(-1) != 1 and value.shape[-1] > 1:
            raise ValueError(f"{name} has strides {value.stride()}, must be 1 from channel to channel")


def check_options(scale: Tensor | None, shift: Tensor | None, eps: float, activation: str | None) -> None:
    if (scale is None) != (shift is None):
        missing = "scale" if scale is None else "shift"
        raise ValueError(f"{missing} is None, must be given: scale and shift come together")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, must be >= 0")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, must be 'silu' or None")


def check_for_triton(x: Tensor, channels: int) -> None:
    not_float64(x)
    if channels * math.prod(x.shape[2:]) >= 2**31:
        raise ValueError(f"x has shape {tuple(x.shape)}, must have fewer than 2^31 elements a sample on triton")


def check_no_gradients(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError("a gradient is required, which the native backend does not give: use 'eager'")
