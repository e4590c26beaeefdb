"""Check arguments for several ops. An error is one line: the argument, its value and the allowed values.

Checks look at dtypes, shapes and devices, never at values on a GPU, since reading them would wait.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def values_are_at_hand(tensor: Tensor) -> bool:
    """Return whether values can be read without synchronisation, and no compiler is tracing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_operands(
    x: Tensor,
    like: Mapping[str, Tensor],
    optional: Mapping[str, Tensor | None] | None = None,
    any_dtype: Mapping[str, Tensor | None] | None = None,
    *,
    name: str = "x",
) -> None:
    """Raise unless all are floating tensors on x's device, and all but those of `any_dtype` have x's dtype.

    None stands for an argument that is not given, except in `like`. `name` is the op's name for `x`.

    Raises:
        TypeError: a value is not a tensor, or of another dtype.
        ValueError: a tensor is on another device.
    """
    given = {name: value for name, value in {**(optional or {}), **(any_dtype or {})}.items() if value is not None}
    for own, value in {name: x, **like, **given}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{own} is {type(value).__name__}, must be a tensor")
        if value.dtype not in FLOATS:
            raise TypeError(f"{own} is {value.dtype}, must be float32, float16, bfloat16 or float64")
        if value.dtype != x.dtype and own not in (any_dtype or ()):
            raise TypeError(f"{own} is {value.dtype}, must be of {name}'s dtype, {x.dtype}")
        if value.device != x.device:
            raise ValueError(f"{own} is on {value.device}, must be on {name}'s device, {x.device}")


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors begin at one address; False for tensors without values, on device meta."""
    return a is b or (a.device.type != "meta" and a.data_ptr() == b.data_ptr())


def mixed(*tensors: Tensor | None) -> str | None:
    """Return why native kernels do not take these tensors together (devices or dtypes differ); None if they do."""
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given[1:]:
        if tensor.device != given[0].device:
            return f"native kernels run on the CPU, not on device type {tensor.device.type!r}"
        if tensor.dtype != given[0].dtype:
            return f"native kernels compute in torch.float32 or torch.bfloat16, not {tensor.dtype} with others"
    return None


def not_float64(x: Tensor) -> None:
    """Raise TypeError if `x` is float64, which the triton backend does not compute."""
    if x.dtype == torch.float64:
        raise TypeError("x is torch.float64, must be float32, float16 or bfloat16 on the triton backend")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise TypeError or ValueError unless `tensor` is floating point, of `shape`, on `device`."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}, must be floating point")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, must be {list(shape)}")
    check_device(name, tensor, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless `tensor` is on `device`."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, must be on {device}")


def check_table(name: str, table: Tensor, rows: int | None, columns: int, device: torch.device) -> None:
    """Raise TypeError or ValueError unless `table` is float32 [rows, columns] on `device` (any rows >= 1 if None)."""
    if table.dtype != torch.float32:
        raise TypeError(f"{name} is {table.dtype}, must be torch.float32")
    if table.ndim != 2 or table.shape[1] != columns or table.shape[0] == 0 or rows not in (None, table.shape[0]):
        raise ValueError(
            f"{name} has shape {list(table.shape)}, must be [{'rows' if rows is None else rows}, {columns}]"
        )
    check_device(name, table, device)


def check_keys(keys: Tensor, batch: int | None = None, device: torch.device | None = None) -> None:
    """Raise TypeError or ValueError unless `keys` is int64 [N, 2] (N = `batch`, on `device`, where given)."""
    if not isinstance(keys, Tensor) or keys.dtype != torch.int64:
        raise TypeError(f"keys is {getattr(keys, 'dtype', type(keys).__name__)}, must be an int64 tensor [N, 2]")
    if keys.ndim != 2 or keys.shape[1] != 2 or (batch is not None and keys.shape[0] != batch):
        raise ValueError(f"keys has shape {list(keys.shape)}, must be [{'N' if batch is None else batch}, 2]")
    if device is not None:
        check_device("keys", keys, device)


def check_step(step: Tensor, device: torch.device) -> None:
    """Raise TypeError or ValueError unless `step` is an int64 tensor [1] on `device`."""
    if not isinstance(step, Tensor) or step.dtype != torch.int64:
        raise TypeError(f"step is {getattr(step, 'dtype', type(step).__name__)}, must be an int64 tensor [1]")
    if step.shape != (1,):
        raise ValueError(f"step has shape {list(step.shape)}, must be [1]")
    check_device("step", step, device)


def check_constant(name: str, tensor: Tensor | None) -> None:
    """Raise ValueError if a gradient is wanted of a tensor that the triton backend takes as a constant."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, which the triton backend does not give: use 'eager', or detach it"
        )
