"""Check and convert arrays, tensors and labels of images from any source."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHANNELS = (1, 3, 4)  # grey, colour, colour with opacity
MOST_LABELS = 1 << 16  # labels are from 0 to below it; ImageNet-21k has 21,841 classes
FREE_BYTES = 1 << 30  # up to here nothing is asked about an expansion
MOST_EXPANSION = 100  # of what a file or a view holds; PNG and deflate make pictures 2 to 50 times smaller
OTHER_RANGE = 10.0  # samples may overshoot [-1, 1]; values beyond this are of another range
_PIECE = 1 << 26  # values that are converted at once


def to_uint8(images: Tensor) -> np.ndarray:
    """Return images float [N, C, H, W] in [-1, 1] (clipped to it) as uint8 [N, H, W, C], rounded as in diffusers."""
    scaled = (images.detach().float() / 2 + 0.5).clamp(0, 1).mul(255).round()
    return scaled.permute(0, 2, 3, 1).to("cpu").numpy().astype(np.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Return uint8 values as float32 in [-1, 1]; other values as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def check_size(needed: int, held: int, name: str) -> None:
    """Raise ValueError before memory is taken for images that are larger than the machine, or than they can be.

    Args:
        needed: bytes of the images.
        held: bytes of the file or of the memory that they come from.
        name: for the message.
    """
    if needed > FREE_BYTES and needed > MOST_EXPANSION * max(held, 1):
        raise ValueError(
            f"{name} would take {needed / 1e9:.3g} GB, expanded from {held / 1e6:.3g} MB; images may be expanded at "
            f"most {MOST_EXPANSION} times"
        )
    check_memory(needed, name)


def check_memory(needed: int, name: str) -> None:
    """Raise ValueError if `needed` bytes are more than the memory of this machine."""
    memory = _memory()
    if memory is not None and needed > memory:
        raise ValueError(f"{name} would take {needed / 1e9:.3g} GB, of {memory / 1e9:.3g} GB of memory")


def pixels_of_array(images: Any, name: str, *, channels: Collection[int] | None = CHANNELS) -> np.ndarray:
    """Return an array or tensor uint8 [N, H, W, C], or [N, H, W] of grey images, as uint8 [N, H, W, C].

    Args:
        images: of any strides.
        name: for messages.
        channels: the numbers of channels that it may have; None for any.

    Raises:
        ValueError: another dtype or layout; the message says which it must be.
    """
    shape = tuple(images.shape)
    told = f"{name} has {str(images.dtype).removeprefix('torch.')} {list(shape)}"
    wanted = "uint8 [N, H, W, C]" + (" with 1, 3 or 4 channels" if channels == CHANNELS else "")
    if str(images.dtype).removeprefix("torch.") != "uint8":
        raise ValueError(f"{told}, must be {wanted}, or a floating-point tensor [N, C, H, W] in [-1, 1]")
    if len(shape) == 3 and shape[2] not in CHANNELS:
        shape = (*shape, 1)
    if len(shape) != 4 or 0 in shape:
        hint = ": images[None], or images[..., None] of narrow grey ones" if len(shape) == 3 else ""
        raise ValueError(f"{told}, must be {wanted} or [N, H, W]{hint}")
    if shape[3] > max(CHANNELS) >= shape[1]:
        raise ValueError(f"{told}, must be {wanted}: it looks like [N, C, H, W], transpose it by (0, 2, 3, 1)")
    if channels is not None and shape[3] not in channels:
        raise ValueError(f"{told}, must be {wanted}")
    held = images.untyped_storage().nbytes() if isinstance(images, Tensor) else _base(images).nbytes
    check_size(math.prod(shape), held, name)
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else images
    array = np.ascontiguousarray(array).reshape(shape)  # also of negative strides
    return array if array.flags.writeable else array.copy()  # torch warns of what it cannot write


def pixels_of_tensor(images: Tensor, name: str, *, channels: Collection[int] = CHANNELS) -> np.ndarray:
    """Return a floating-point tensor [N, C, H, W] in [-1, 1], and what samples overshoot it, as uint8 [N, H, W, C].

    Raises:
        ValueError: another layout; values that are not finite; values of another range: none below 0, or some beyond
            `OTHER_RANGE`.
    """
    shape = tuple(images.shape)
    if len(shape) != 4 or 0 in shape or shape[1] not in channels:
        hint = ": permute it by (0, 3, 1, 2)" if len(shape) == 4 and shape[3] in channels else ""
        raise ValueError(f"{name} has shape {list(shape)}, must have [N, C, H, W] with 1, 3 or 4 channels{hint}")
    check_size(math.prod(shape), images.untyped_storage().nbytes(), name)
    size = max(1, _PIECE // math.prod(shape[1:]))
    pieces = images.detach().split(size)
    ranges = [check_range(piece, name, far=OTHER_RANGE) for piece in pieces]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if low >= 0 and high > low:
        raise ValueError(
            f"{name} has values from {low:g} to {high:g} and none below 0, must be in [-1, 1]: scale it by 2 x - 1"
        )
    return np.concatenate([to_uint8(piece) for piece in pieces])


def check_range(images: Tensor, name: str, *, far: float = 1.001) -> tuple[float, float]:
    """Return the least and greatest value of a floating-point tensor.

    Raises:
        ValueError: a value is not finite, or beyond [-`far`, `far`].
    """
    low, high = (float(value) for value in torch.aminmax(images))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} has values that are not finite, must have none")
    if low < -far or high > far:
        raise ValueError(f"{name} has values from {low:g} to {high:g}, must be in [-1, 1], or uint8")
    return low, high


def check_ids(labels: np.ndarray, count: int, name: str) -> Tensor:
    """Return integer labels [count] as int64.

    Raises:
        ValueError: another shape or dtype, or a label that is negative or too large.
    """
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{name} is {labels.dtype} {list(labels.shape)}, must be integer labels [{count}], one for each image"
        )
    if count and (wrong := next((x for x in (int(labels.min()), int(labels.max())) if not 0 <= x < MOST_LABELS), None)):
        raise ValueError(f"{name} has the label {wrong}, every label must be from 0 to {MOST_LABELS - 1}")
    return torch.from_numpy(labels.astype(np.int64))


def _base(array: np.ndarray) -> np.ndarray:
    """Return the array that owns the memory of a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _memory() -> int | None:
    """Return the bytes of memory that this machine has; None where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
