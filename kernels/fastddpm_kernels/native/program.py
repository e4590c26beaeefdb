"""Run the steps of a loop as calls of the native library without Python, checks or allocation: a CPU's CUDA graph.

A body runs once and is recorded. Its calls of the library become instructions, and so do torch's operations that move a
row, a number or an image from one fixed place to another. Torch repeats its other operations in between, on the same
memory. A body without such operations is one call of the library for any number of steps.
A replay runs the same functions in the same order on the same memory, so it gives the same bits.
"""

from __future__ import annotations

import ctypes
import struct
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm_kernels import native
from fastddpm_kernels.native.binding import THREADS, bind, recording
from fastddpm_kernels.native.machine import threads

_DTYPES = {torch.float32: 4, torch.bfloat16: 2, torch.int64: 8}  # what is copied, and its bytes
_DIMENSIONS = 5  # of a copy


class RecordError(RuntimeError):
    """A body cannot be recorded; the message says why."""


class Program:
    """Instructions of the native library, and between them operations of torch.

    Attributes:
        names: of its steps, in order: functions of the library and torch's operations.
    """

    def __init__(self) -> None:
        """Create an empty program; raise BuildError if there is no native library."""
        self.names: list[str] = []
        self._functions = native.get().functions
        self._handle = self._functions.fastddpm_program_new()
        if not self._handle:
            raise MemoryError("there is no memory for a native program")
        weakref.finalize(self, self._functions.fastddpm_program_delete, self._handle)
        self._kept: list[Any] = []
        self._count = 0
        self._parts: list[tuple[int, int] | Callable[[], object]] = []  # instructions from .. to, or a call

    @property
    def is_native(self) -> bool:
        """Whether torch takes no part, so that any number of steps is one call of the library."""
        return len(self._parts) == 1 and isinstance(self._parts[0], tuple)

    def append(self, name: str, arguments: list[Any], threads_at: int, kept: list[Tensor]) -> None:
        """Add an instruction.

        Args:
            name: of a function of the library that is an instruction.
            arguments: ctypes values, as the function takes them.
            threads_at: which of them is the number of threads, or -1.
            kept: the tensors that own the memory.

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
        last = self._parts[-1] if self._parts else None
        if isinstance(last, tuple):
            self._parts[-1] = (last[0], self._count + 1)
        else:
            self._parts.append((self._count, self._count + 1))
        self._count += 1

    def append_call(self, name: str, call: Callable[[], object]) -> None:
        """Add an operation of torch."""
        self.names.append(name)
        self._parts.append(call)

    def advance(self, times: int) -> None:
        """Run the program `times` times, on as many threads as `threads` says."""
        if self.is_native:
            self._run(0, self._count, times)
            return
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for _ in range(times):
                for part in self._parts:
                    if isinstance(part, tuple):
                        self._run(*part, 1)
                    else:
                        part()

    def seconds(self, times: int) -> list[float]:
        """Run the program `times` times; return the total seconds of each of `names`."""
        taken = (ctypes.c_double * self._count)()
        found = [0.0] * len(self._parts)
        for _ in range(times):
            for index, part in enumerate(self._parts):
                start = time.perf_counter()
                if isinstance(part, tuple):
                    self._run(*part, 1, taken)
                else:
                    part()
                found[index] += time.perf_counter() - start
        result: list[float] = []
        for part, seconds in zip(self._parts, found, strict=True):
            result += taken[part[0] : part[1]] if isinstance(part, tuple) else [seconds]
        return result

    def _run(self, begin: int, end: int, times: int, taken: Any = None) -> None:
        # If torch runs in between, its threads spin while they wait and would compete with others.
        self._functions.fastddpm_program_advance(self._handle, begin, end, times, threads(), self.is_native, taken)


def record(body: Callable[[], object]) -> Program:
    """Record `body` as a program. Afterwards only some of the body's outputs have been written.

    Raises:
        RecordError: the body cannot be repeated: it reads a value of a tensor, or calls a function of the library that
            is not an instruction.
        BuildError: there is no native library.
    """
    program = Program()
    if recording.program is not None:
        raise RecordError("another body is being recorded")
    recording.program = program
    try:
        with _Translation(program):
            body()
    finally:
        recording.program = None
    return program


class _Translation(TorchDispatchMode):
    """Turn torch's operations into instructions where possible; views are not operations."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = program

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True imports torch's compiler, which takes a second; no body here is compiled

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _is_view(func):
            return func(*args, **kwargs)
        if (translate := _TRANSLATED.get(func)) and (found := translate(*args, **kwargs)) is not None:
            call, result = found
            call()
            return result
        result = func(*args, **kwargs)
        results = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, (tuple, list)) else []
        if not results or not all(isinstance(one, Tensor) for one in results):
            raise RecordError(f"{func} gives a {type(result).__name__}, which may be another one in every step")
        if func._schema.is_mutable:  # what it writes stays where it is
            self._program.append_call(str(func), lambda: func(*args, **kwargs))
            return result

        def again() -> None:
            new = func(*args, **kwargs)
            for place, value in zip(results, [new] if isinstance(new, Tensor) else new, strict=True):
                place.copy_(value)

        self._program.append_call(str(func), again)
        return result


def _is_view(func: Any) -> bool:
    returns = [value.alias_info for value in func._schema.returns]
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
    """Return x [n] + alpha * other, which is [n], [1] or a number."""
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
    return all(t.dtype == tensors[0].dtype and t.device.type == "cpu" and t.ndim <= _DIMENSIONS for t in tensors)


def _walk(*tensors: Tensor) -> list[int]:
    """Return the sizes, and the strides of every tensor, with the first one's adjacent elements innermost."""
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


def _word(value: Any) -> int:
    """Return the 64 bits of an argument."""
    if isinstance(value, ctypes.c_float):
        return int.from_bytes(struct.pack("<f", value.value), "little")
    bits = int(value.value or 0)
    return bits - (1 << 64) if bits >= 1 << 63 else bits
