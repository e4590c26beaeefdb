"""Share code among element-wise kernels: walks over tensors of any memory format, and launches.

A sample [C, ...] is walked in its logical order, element = channel * P + pixel, 4 consecutive elements to a thread
(one Philox counter). A tensor is given by its strides of sample, channel and pixel, so contiguous, channels-last,
a slice of channels and a broadcast mask are the same kernel; LINEAR says at compile time that element is the
offset, so that accesses are wide.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels import tuned
from fastddpm_kernels.device.variant import Launch
from fastddpm_kernels.layout import Strides, walk

# The choice without a table.
BLOCK = 512  # elements to a program
NUM_WARPS = 4  # of 32 threads, so 4 elements to each: with more or fewer, accesses of 16 bytes need shared memory

# Wanted multiply-adds are explicit: results have the same bits wherever a compiler would fuse others.
OPTIONS = {"enable_fp_fusion": False}


def aot(num_warps: int = NUM_WARPS) -> dict[str, Any]:
    """Return the options of every launch as fields of a Variant."""
    return {"num_warps": num_warps, "num_warps_of_64": max(num_warps // 2, 1), "options": OPTIONS}


AOT = aot()


@triton.jit
def offsets(n, element, sample_stride, channel_stride, pixel_stride, P, LINEAR: tl.constexpr):
    """Return the offsets of `element` of sample `n` (int64)."""
    if LINEAR:
        return n * sample_stride + element
    channel = element // P
    return n * sample_stride + (channel * channel_stride + (element - channel * P) * pixel_stride)


def walkable(tensor: Tensor) -> tuple[Tensor, Strides]:
    """Return `tensor` [N, C, ...] and its strides, or a contiguous copy if its own strides cannot be walked."""
    if tensor.ndim == 1:
        tensor = tensor[:, None]
    strides = walk(tensor)
    if strides is None:
        tensor = tensor.contiguous()
        strides = walk(tensor)
        assert strides is not None
    return tensor, strides


def num_programs(batch: int, numel: int, block: int = BLOCK) -> int:
    """Return the programs for `batch` samples of `numel` elements, on one grid axis: the others end at 65535.

    Raises:
        ValueError: more elements than the kernels can count.
    """
    if numel > 2**31 - BLOCK:
        raise ValueError(f"a sample has {numel} elements, must have at most 2^31 - {BLOCK} on the triton backend")
    return batch * triton.cdiv(numel, block)


def block_and_warps(choice: tuned.Choice | None, numel: int) -> tuple[int, int]:
    """Return the elements of a program and the warps, of 32 threads, of a choice.

    Without a choice, or where its programs would count beyond the largest integer, they are the defaults. Every element
    is computed by itself, so results are the same bits.
    """
    if choice is None or numel > 2**31 - choice["block"]:
        return BLOCK, NUM_WARPS
    return choice["block"], choice["num_warps"]


def launch_options(device: torch.device, num_warps: int = NUM_WARPS) -> dict[str, Any]:
    """Return the options of every launch: `num_warps`, or the warps with as many threads on a GPU of 64 to a warp."""
    hip = device.type == "cuda" and torch.version.hip is not None
    threads = torch.cuda.get_device_properties(device).warp_size if hip else 32
    return {"num_warps": max(num_warps * 32 // threads, 1), **OPTIONS}


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Make the tensor's device current, since Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def run(launch: Launch, tensor: Tensor) -> None:
    """Launch an element-wise kernel on the device of `tensor`."""
    with on_device_of(tensor):
        launch.kernel[(launch.programs,)](
            **launch.args, **launch.constexprs, **launch_options(tensor.device, launch.num_warps)
        )
