"""Call the native library on tensors whose memory stays where it is: arguments are converted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels import native

THREADS = object()  # stands for torch's number of threads at the launch


def bind(name: str, *arguments: Any) -> Callable[[], None]:
    """Return a function without arguments that calls `name` of the library.

    Args:
        name: of a function of the library.
        arguments: tensors, for their addresses, which the returned function keeps alive; None for no tensor; numbers;
            and `THREADS` once.
    """
    function = getattr(native.get().functions, name)
    at = arguments.index(THREADS)
    converted = [
        None if value is THREADS else kind(value.data_ptr() if isinstance(value, Tensor) else value)
        for kind, value in zip(function.argtypes, arguments, strict=True)
    ]
    before, after = converted[:at], converted[at + 1 :]
    threads, kept = torch.get_num_threads, [value for value in arguments if isinstance(value, Tensor)]

    def run(_: Any = kept) -> None:
        function(*before, threads(), *after)

    return run


def row_stride(row: Tensor | None) -> int:
    """Return the elements from one row of [N, C] to the next; 0 for no tensor."""
    return 0 if row is None else row.stride(0)


def bind_with_floats(
    make: Callable[..., Callable[[], None]], *vectors: Tensor | None
) -> Callable[[], None]:
    """Return `make(*vectors)`, where native kernels read the vectors as float32.

    Vectors of another dtype are converted at every run, since their values may change between runs.
    """
    if all(vector is None or vector.dtype == torch.float32 for vector in vectors):
        return make(*vectors)
    return lambda: make(*(None if vector is None else vector.float() for vector in vectors))()
