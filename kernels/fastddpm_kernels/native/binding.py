"""Call the native library on tensors whose memory does not move, converting the arguments only once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastddpm_kernels import native
from fastddpm_kernels.native.machine import threads

if TYPE_CHECKING:
    from fastddpm_kernels.native.program import Program

THREADS = object()  # stands for the number of threads at the launch


class Recording(threading.local):
    """The program that records the calls of this thread, or None."""

    program: Program | None = None


recording = Recording()


def bind(name: str, *arguments: Any) -> Callable[[], None]:
    """Return a function without arguments that calls `name` of the library.

    Args:
        name: of a function of the library.
        arguments: tensors, for their addresses, which the returned function keeps alive; None for no tensor; numbers;
            and `THREADS` once, or not at all.
    """
    function = getattr(native.get().functions, name)
    at = next((i for i, value in enumerate(arguments) if value is THREADS), -1)  # == would ask the tensors
    converted = [
        kind(0) if value is THREADS else kind(value.data_ptr() if isinstance(value, Tensor) else value)
        for kind, value in zip(function.argtypes, arguments, strict=True)
    ]
    before, after = converted[:at], converted[at + 1 :]
    kept = [value for value in arguments if isinstance(value, Tensor)]

    def run() -> None:
        if recording.program is not None:
            recording.program.append(name, converted, at, kept)
        elif at < 0:
            function(*converted)
        else:
            function(*before, threads(), *after)

    return run


def row_stride(row: Tensor | None) -> int:
    """Return the elements from one row of [N, C] to the next; 0 for no tensor."""
    return 0 if row is None else row.stride(0)


def bind_with_floats(make: Callable[..., Callable[[], None]], *vectors: Tensor | None) -> Callable[[], None]:
    """Return `make(*vectors)`, where native kernels read the vectors as float32.

    Vectors of another dtype are converted at every run, since their values may change between runs.
    """
    if all(vector is None or vector.dtype == torch.float32 for vector in vectors):
        return make(*vectors)
    return lambda: make(*(None if vector is None else vector.float() for vector in vectors))()
