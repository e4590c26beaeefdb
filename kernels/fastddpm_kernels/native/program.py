"""Steps of a loop as one call of the native library, the CPU's answer to a CUDA graph.

A body is run once and recorded: what it calls of the library becomes an instruction, and so do torch's operations that
move a row, a number or an image from one fixed place to another. A body that does anything else is refused, by the name
of the operation. Replayed, the same functions of the library run on the same memory in the same order: the same bits.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm_kernels import native
from fastddpm_kernels.native.binding import THREADS, bind, recording

_DTYPES = {torch.float32: 4, torch.bfloat16: 2, torch.int64: 8}  # what is copied, and its bytes
_DIMENSIONS = 5  # of a copy


class RecordError(RuntimeError):
    """A body cannot be recorded; the message says why."""


class Program:
    """Instructions of the native library. `advance` runs them without Python, allocation or checks.

    Attributes:
        names: of the functions, in order.
    """

    def __init__(self) -> None:
        """Raises BuildError where there is no native library."""
        self.names: list[str] = []
        self._functions = native.get().functions
        self._handle = self._functions.fastddpm_program_new()
        if not self._handle:
            raise MemoryError("there is no memory for a native program")
        self._kept: list[list[Tensor]] = []
        weakref.finalize(self, self._functions.fastddpm_program_delete, self._handle)

    def append(self, name: str, arguments: list[Any], threads_at: int, kept: list[Tensor]) -> None:
        """Add an instruction.

        Args:
            name: of a function of the library that is an instruction.
            arguments: ctypes values, as the function takes them.
            threads_at: which of them is the number of threads, or -1.
            kept: the tensors whose memory they are.

        Raises:
            RecordError: the function is no instruction.
        """
        try:
            run = getattr(self._functions, f"{name}_words")
        except AttributeError:
            raise RecordError(f"{name} is no instruction of a native program") from None
        words = (ctypes.c_int64 * len(arguments))(*map(_word, arguments))
        self._functions.fastddpm_program_append(
            self._handle, ctypes.cast(run, ctypes.c_void_p), words, len(words), threads_at
        )
        self.names.append(name)
        self._kept.append(kept)

    def advance(self, times: int) -> None:
        """Run all instructions, `times` times, on as many threads as torch has."""
        self._functions.fastddpm_program_advance(
            self._handle, 0, len(self.names), times, torch.get_num_threads(), None
        )

    def seconds(self, times: int) -> list[float]:
        """Run as `advance`, and return the seconds that each instruction took in all."""
        taken = (ctypes.c_double * len(self.names))()
        self._functions.fastddpm_program_advance(
            self._handle, 0, len(self.names), times, torch.get_num_threads(), taken
        )
        return list(taken)


def record(body: Callable[[], object]) -> Program:
    """Return the program of what `body` does, which is not done meanwhile.

    Raises:
        RecordError: the body does something that is no instruction.
        BuildError: there is no native library.
    """
    program = Program()
    if recording.program is not None:
        raise RecordError("another body is being recorded")
    recording.program = program
    try:
        with _Translation():
            body()
    finally:
        recording.program = None
    return program


class _Translation(TorchDispatchMode):
    """Makes instructions of torch's operations: views do nothing, some move data, others are refused."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_view(func):
            return func(*args, **kwargs)
        translate = _TRANSLATED.get(func)
        run = None if translate is None else translate(*args, **kwargs)
        if run is None:
            raise RecordError(f"{func} of {_described(args, kwargs)} is no instruction of a native program")
        call, result = run
        call()
        return result


def _is_view(func: Any) -> bool:
    schema = func._schema
    returns = [value.alias_info for value in schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


_Translated = tuple[Callable[[], None], Tensor] | None


def _index_select(table: Tensor, dim: int, index: Tensor, *, out: Tensor) -> _Translated:
    rows = (table, out)
    if dim != 0 or any(t.ndim != 2 or t.dtype != torch.float32 or not t.is_contiguous() for t in rows):
        return None
    if not index.is_contiguous() or out.shape != (len(index), table.shape[1]):
        return None
    return bind("fastddpm_look_up", out, table, index, len(index), table.shape[1]), out


def _add_in_place(x: Tensor, other: Any, *, alpha: Any = 1) -> _Translated:
    return _add(x, other, alpha=alpha, out=x)


def _add(x: Tensor, other: Any, *, alpha: Any = 1, out: Tensor) -> _Translated:
    if out.dtype == torch.int64:
        return _add_int64(x, other, alpha, out)
    if not isinstance(other, Tensor) or not _alike(out, x, other) or out.dtype not in (torch.float32, torch.bfloat16):
        return None
    layout = torch.tensor(_walk(out, x.expand(out.shape), other.expand(out.shape)))
    return bind("fastddpm_add", out, x, other, layout, float(alpha), out.dtype == torch.bfloat16, THREADS), out


def _add_int64(x: Tensor, other: Any, alpha: int, out: Tensor) -> _Translated:
    """x [n] + alpha * other, which is [n], [1] or a number."""
    tensors = [t for t in (x, other, out) if isinstance(t, Tensor)]
    if any(t.dtype != torch.int64 or t.ndim != 1 or not t.is_contiguous() for t in tensors) or x.shape != out.shape:
        return None
    if isinstance(other, Tensor):
        if len(other) not in (1, len(x)):
            return None
        return bind("fastddpm_add_int64", out, x, other, len(x), int(len(other) > 1), alpha), out
    return bind("fastddpm_add_int64", out, x, None, len(x), 0, int(other) * alpha), out


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> _Translated:
    if target.dtype not in _DTYPES or source.dtype not in _DTYPES or target.ndim > _DIMENSIONS:
        return None
    if target.dtype != source.dtype and torch.int64 in (target.dtype, source.dtype):
        return None
    if target.device.type != "cpu" or source.device.type != "cpu":
        return None
    shape = _walk(target, source.expand(target.shape))
    call = bind("fastddpm_copy", target, source, *shape, _DTYPES[target.dtype], _DTYPES[source.dtype], THREADS)
    return call, target


def _alike(*tensors: Tensor) -> bool:
    return all(
        t.dtype == tensors[0].dtype and t.device.type == "cpu" and t.ndim <= _DIMENSIONS for t in tensors
    )


def _walk(*tensors: Tensor) -> list[int]:
    """The sizes, and the strides of every tensor, with the first one's adjacent elements innermost."""
    missing = _DIMENSIONS - tensors[0].ndim
    sizes = [1] * missing + list(tensors[0].shape)
    strides = [[0] * missing + list(t.stride()) for t in tensors]
    order = sorted(range(_DIMENSIONS), key=lambda d: (sizes[d] != 1, -strides[0][d]))
    return [values[d] for values in (sizes, *strides) for d in order]


_aten = torch.ops.aten
_TRANSLATED: dict[Any, Callable[..., _Translated]] = {
    _aten.index_select.out: _index_select,
    _aten.add_.Tensor: _add_in_place,
    _aten.add.out: _add,
    _aten.copy_.default: _copy,
}


def _described(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    shapes = [f"{list(t.shape)} {t.dtype}" for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    return ", ".join(shapes) or "no tensor"


def _word(value: Any) -> int:
    """The 64 bits of an argument."""
    if isinstance(value, ctypes.c_float):
        return int.from_bytes(struct.pack("<f", value.value), "little")
    bits = int(value.value or 0)
    return bits - (1 << 64) if bits >= 1 << 63 else bits
