"""Get memory in huge pages, for weights that every step reads from end to end."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 2 * 2**20  # bytes


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised contiguous tensor on the CPU, in huge pages if it fills one and the system has them.

    The processor then looks up one address for 512 of the usual pages, and its prefetching does not stop at their ends.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < PAGE or sys.platform != "linux":
        return torch.empty(tuple(shape), dtype=dtype)
    block = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data = torch.frombuffer(block, dtype=torch.uint8)  # keeps the block
    first = -data.data_ptr() % PAGE
    with contextlib.suppress(OSError):  # a kernel without huge pages
        block.madvise(mmap.MADV_HUGEPAGE, first, size // PAGE * PAGE)  # the rest would fill a whole one
    return data[first : first + size].view(dtype).view(tuple(shape))


def give_back() -> None:
    """Return memory to the system that was freed but that the C library keeps."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
