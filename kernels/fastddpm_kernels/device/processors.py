"""Count what a device computes with, without triton."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=64)
def num_processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors (compute units on AMD)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    # An H100's for ahead-of-time compilation; few for the interpreter, which runs programs one by one.
    return 132 if device.type == "meta" else 4
