"""Check what users pass: each error is one line that names the argument, what it was and what it may be.

Where two settings contradict each other the message names both.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def positive(value: Any, name: str) -> int:
    """Return `value` as an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}, must be a positive integer")
    return int(value)


def batch_size(value: Any) -> int | str | None:
    """Return `value` as an int of at least 1, "auto" or None."""
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"batch_size is {value!r}, must be a positive integer, 'auto' or None")
    return int(value)


def sample_shape(value: Any) -> tuple[int, ...]:
    """Return `value` as the sizes of one sample."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) == 0:
        raise ValueError(f"shape is {value!r}, must be the sizes of one sample, such as (3, 32, 32)")
    return tuple(positive(size, "every size of shape") for size in value)


def finite(value: Any, name: str) -> float:
    """Return `value` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, must be a number")
    try:
        number = float(value)
    except OverflowError:  # an integer that no float can hold
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}, must be a finite number")
    return number


def in_range(value: Any, name: str, *, above: float | None = None, most: float = math.inf) -> float:
    """Return `value` as a finite float from 0 to `most` or, if `above` is given, above that."""
    value = finite(value, name)
    if above is not None and value <= above:
        raise ValueError(f"{name} is {value}, must be above {above:g}")
    if above is None and not 0 <= value <= most:
        raise ValueError(f"{name} is {value}, must be {'at least 0' if most == math.inf else f'from 0 to {most:g}'}")
    return value


def floating(value: Any, shape: tuple[int, ...], name: str) -> None:
    """Raise TypeError or ValueError unless `value` is a floating-point tensor of `shape`."""
    _check_floating(value, name)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}, must have {list(shape)}")


def broadcastable(value: Any, shape: tuple[int, ...], name: str, device: torch.device) -> Tensor:
    """Return `value` in float32 on `device`, reshaped so that it broadcasts to `shape`."""
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        value = value.float()
    _check_floating(value, name)
    padded = (1,) * (len(shape) - value.ndim) + tuple(value.shape)
    if len(padded) != len(shape) or any(p not in (1, s) for p, s in zip(padded, shape, strict=True)):
        raise ValueError(
            f"{name} has shape {list(value.shape)} but the samples have {list(shape)}: it must be broadcastable to that"
        )
    return value.to(device, torch.float32).reshape(padded)


def condition(value: Any, shape: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError unless `value` can stand beside samples of `shape` as further channels."""
    _check_floating(value, "condition")
    if value.ndim != len(shape) or value.shape[0] != shape[0] or tuple(value.shape[2:]) != shape[2:]:
        wanted = ["any", *shape[2:]]
        raise ValueError(
            f"condition has shape {list(value.shape)} but the samples have {list(shape)}: they may differ in the "
            f"second dimension alone, must be [{shape[0]}, {', '.join(map(str, wanted))}]"
        )


def labels(value: Any, count: int, num_classes: int | None) -> Tensor:
    """Return one label, or one per sample, as int64 [count] from 0 to `num_classes` - 1 (any, if that is None)."""
    result = torch.as_tensor(value)
    if result.dtype.is_floating_point or result.dtype.is_complex or result.dtype == torch.bool:
        raise TypeError(f"class_labels has dtype {result.dtype}, must be integers")
    if result.ndim == 0:
        result = result.expand(count)
    if result.shape != (count,):
        raise ValueError(f"class_labels has shape {list(result.shape)}, must be one label or one per sample ({count})")
    result = result.to(torch.int64)  # unsigned types cannot be compared
    if num_classes is not None and (int(result.min()) < 0 or int(result.max()) >= num_classes):
        wrong = int(result[(result < 0) | (result >= num_classes)][0])
        raise ValueError(f"class_labels has {wrong}, every label must be from 0 to {num_classes - 1}")
    return result


def real_labels(value: Any, count: int, width: int | None, kind: str) -> Tensor:
    """Return the labels of a network of `class_embed_type` "timestep" or "identity", in float32.

    Args:
        value: one number or [count] for "timestep", [count, width] for "identity".
        count: of samples.
        width: of an embedding; 0 for "timestep", None if it is not known.
        kind: the `class_embed_type`.
    """
    wanted = f"one number or one per sample ({count})" if width == 0 else f"numbers [{count}, {width or 'channels'}]"
    where = f"must be {wanted}: the model's class_embed_type is {kind!r}"
    try:
        result = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"class_labels is {type(value).__name__}, {where}") from None
    if result.dtype.is_complex or result.dtype == torch.bool:
        raise TypeError(f"class_labels has dtype {result.dtype}, {where}")
    if width == 0 and result.ndim == 0:
        result = result.expand(count)
    shape = (count,) if width == 0 else (count, width or result.shape[-1] if result.ndim else 0)
    if tuple(result.shape) != shape:
        raise ValueError(f"class_labels has shape {list(result.shape)}, {where}")
    return result.to(torch.float32)


def scales(value: Any, count: int) -> Tensor:
    """Return one guidance scale, or one per sample, as float32 [1] or [count]."""
    try:
        result = torch.as_tensor(value, dtype=torch.float32).detach()
    except OverflowError:
        raise ValueError("guidance_scale is inf, must be a finite number") from None
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"guidance_scale is {_short(value)}, must be a number or one per sample") from None
    result = result[None] if result.ndim == 0 else result
    if tuple(result.shape) not in ((1,), (count,)):
        raise ValueError(
            f"guidance_scale has shape {list(result.shape)}, must be one number or one per sample ({count})"
        )
    if not bool(result.isfinite().all()):
        wrong = result[~result.isfinite()][0].item()
        raise ValueError(f"guidance_scale has {wrong}, every one must be a finite number")
    return result


def _short(value: object) -> str:
    """Return the repr of `value` for a message, its type where that is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = ""
    return text if 0 < len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"


def _check_floating(value: Any, name: str) -> None:
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} is of {kind}, must be a floating-point tensor")


def listed(names: Iterable[str], most: int = 32) -> str:
    """Return names for a message in order: the first `most`, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
