"""Call the native GEGLU. Images are channels-last, both float32 or both bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastddpm_kernels.native.binding import THREADS, bind


def bind_geglu(y: Tensor, x: Tensor) -> Callable[[], None]:
    """Return a function that writes `y`."""
    channels = y.shape[1]
    return bind("fastddpm_geglu", y, x, y.numel() // channels, channels, x.dtype == torch.bfloat16, THREADS)
