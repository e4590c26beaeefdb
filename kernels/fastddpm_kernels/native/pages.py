"""Allocate memory in huge pages, for weights that are read from memory in every step."""

from __future__ import annotations

import ctypes
import math
import sys

import torch
from torch import Tensor

_PAGE = 1 << 21  # bytes of a huge page
_BLOCK = 1 << 25  # bytes asked for at once; what is never written takes no memory
_LINE = 64
_MADV_HUGEPAGE = 14


class HugePages:
    """Memory for tensors that live about as long as each other: they lie one behind another in huge pages.

    Reading memory in pages of 4 kB takes a CPU up to twice as long: it translates every page's address and does not
    read ahead over its end. Where the system has no huge pages this is ordinary memory.
    """

    def __init__(self) -> None:
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor on the CPU that begins with a line of the cache."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._block):
            self._block, self._used = _huge(max(size, _BLOCK)), 0
        start, self._used = self._used, -(-(self._used + size) // _LINE) * _LINE
        return self._block[start : start + size].view(dtype).view(shape)


def _huge(size: int) -> Tensor:
    """Return `size` bytes that begin with a huge page."""
    memory = torch.empty(size + _PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % _PAGE
    block = memory[start : start + size]
    if sys.platform == "linux":  # if it fails, the pages are small
        ctypes.CDLL(None).madvise(ctypes.c_void_p(block.data_ptr()), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return block
