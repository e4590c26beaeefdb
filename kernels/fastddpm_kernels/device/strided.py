"""Share code among element-wise kernels: walks over tensors of any memory format, and launches.

A sample [C, ...] is walked in its logical order, element = channel * P + pixel, 4 consecutive elements to a thread
(one Philox counter). A tensor is given by its strides of sample, channel and pixel, so contiguous, channels-last,
a slice of channels and a broadcast mask are the same kernel; LINEAR says at compile time that element is the
offset, so that accesses are wide. FOURS says that 4 consecutive elements are of one channel, so one division finds it.

A thread with several fours computes once what they share: the keys of the noise's rounds, the row of the table, the
division that finds the sample. Where a call has few elements more programs matter more, and each has one.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastddpm_kernels import tuned
from fastddpm_kernels.device.processors import num_processors
from fastddpm_kernels.device.variant import Launch
from fastddpm_kernels.layout import Strides, walk

# The choice without a table.
BLOCK = 512  # elements to a program, at least
MOST_BLOCK = 2048
NUM_WARPS = 4  # of 32 threads

# Wanted multiply-adds are explicit: results have the same bits wherever a compiler would fuse others.
OPTIONS = {"enable_fp_fusion": False}


def aot(num_warps: int = NUM_WARPS) -> dict[str, Any]:
    """Return the options of every launch as fields of a Variant."""
    return {"num_warps": num_warps, "num_warps_of_64": max(num_warps // 2, 1), "options": OPTIONS}


AOT = aot()


@triton.jit
def elements(first, BLOCK: tl.constexpr):
    """Return `first`, a multiple of 4, and the BLOCK - 1 elements after it, fours of them to a thread.

    Without the hint, accesses of 16 bits would be by eights, which the noise is not, and pass through shared memory.
    """
    return tl.max_contiguous(first + tl.arange(0, BLOCK), 4)


@triton.jit
def offsets(
    n, first, sample_stride, channel_stride, pixel_stride, P,
    LINEAR: tl.constexpr, FOURS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the offsets of `elements(first, BLOCK)` of sample `n` (int64)."""
    element = elements(first, BLOCK)
    if LINEAR:
        return n * sample_stride + element
    if FOURS:
        element = first + 4 * tl.arange(0, BLOCK // 4)
    channel = element // P
    at = channel * channel_stride + (element - channel * P) * pixel_stride
    if FOURS:
        even = tl.interleave(at, at + 2 * pixel_stride)
        at = tl.interleave(even, even + pixel_stride)
    return n * sample_stride + at


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
    if numel > 2**31 - MOST_BLOCK:
        raise ValueError(f"a sample has {numel} elements, must have at most 2^31 - {MOST_BLOCK} on the triton backend")
    return batch * triton.cdiv(numel, block)


def block_and_warps(
    choice: tuned.Choice | None, batch: int, numel: int, device: torch.device, most: int = MOST_BLOCK
) -> tuple[int, int]:
    """Return the elements of a program and the warps, of 32 threads, of a choice for samples of `numel` elements.

    Without a choice, or where its programs would count beyond the largest integer, they are the defaults: the largest
    block, at most `most`, with two programs to a processor. Every element is computed by itself, so results are the
    same bits.
    """
    if choice is not None and numel <= 2**31 - choice["block"]:
        return choice["block"], choice["num_warps"]
    block, wanted = most, 2 * num_processors(device)
    while block > BLOCK and (batch * triton.cdiv(numel, block) < wanted or numel > 2**31 - block):
        block //= 2
    return block, NUM_WARPS


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
