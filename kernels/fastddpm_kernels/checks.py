"""Checks of arguments that several ops make: one line each, naming the argument, what it was, what it may be.

They look at dtypes, shapes and devices, never at the values of a tensor on a GPU, which would wait for it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def values_are_at_hand(tensor: Tensor) -> bool:
    """Whether looking at values costs no synchronisation, and no compiler is tracing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises TypeError or ValueError unless `tensor` is floating point, of `shape`, on `device`."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}, must be floating point")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, must be {list(shape)}")
    check_device(name, tensor, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError unless `tensor` is on `device`."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, must be on {device}")


def check_table(name: str, table: Tensor, rows: int | None, columns: int, device: torch.device) -> None:
    """Raises TypeError or ValueError unless `table` is float32 [rows, columns] on `device` (any rows >= 1 if None)."""
    if table.dtype != torch.float32:
        raise TypeError(f"{name} is {table.dtype}, must be torch.float32")
    if table.ndim != 2 or table.shape[1] != columns or table.shape[0] == 0 or rows not in (None, table.shape[0]):
        raise ValueError(
            f"{name} has shape {list(table.shape)}, must be [{'rows' if rows is None else rows}, {columns}]"
        )
    check_device(name, table, device)


def check_keys(keys: Tensor, batch: int | None = None, device: torch.device | None = None) -> None:
    """Raises TypeError or ValueError unless `keys` is int64 [N, 2] (N = `batch`, on `device`, where given)."""
    if not isinstance(keys, Tensor) or keys.dtype != torch.int64:
        raise TypeError(f"keys is {getattr(keys, 'dtype', type(keys).__name__)}, must be an int64 tensor [N, 2]")
    if keys.ndim != 2 or keys.shape[1] != 2 or (batch is not None and keys.shape[0] != batch):
        raise ValueError(f"keys has shape {list(keys.shape)}, must be [{'N' if batch is None else batch}, 2]")
    if device is not None:
        check_device("keys", keys, device)


def check_step(step: Tensor, device: torch.device) -> None:
    """Raises TypeError or ValueError unless `step` is an int64 tensor [1] on `device`."""
    if not isinstance(step, Tensor) or step.dtype != torch.int64:
        raise TypeError(f"step is {getattr(step, 'dtype', type(step).__name__)}, must be an int64 tensor [1]")
    if step.shape != (1,):
        raise ValueError(f"step has shape {list(step.shape)}, must be [1]")
    check_device("step", step, device)


def check_constant(name: str, tensor: Tensor | None) -> None:
    """Raises ValueError if a gradient is wanted of a tensor that the triton backend takes as a constant."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, which the triton backend does not give: use 'eager', or detach it"
        )
