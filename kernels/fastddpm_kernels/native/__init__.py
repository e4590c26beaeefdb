"""Build and load the native backend, C++ for the CPU. Only this package knows the library's functions.

The library depends on neither Python nor torch: it takes addresses and sizes, checked by the ops. An op runs on the
threads of the OpenMP runtime that torch has loaded, a program on as many threads of the library's own. Python's global
lock is released meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import threading

import torch
from torch import Tensor

from fastddpm_kernels.native.build import BuildError, library
from fastddpm_kernels.native.machine import threads

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "fastddpm_conv3x3_winograd": [_P] * 6 + [_L] * 6 + [_I] * 5,
    "fastddpm_conv3x3_unpacked": [_P] * 4 + [_L] * 4 + [_P] + [_L] * 6 + [_I] * 3,
    "fastddpm_conv_pack": [_P] * 3 + [_L] * 10 + [_I] * 4,
    "fastddpm_conv3x3_weight_gradient": [_P] + [_L] * 4 + [_P] * 4 + [_L] * 6 + [_I] * 2,
    "fastddpm_conv_direct": [_P] * 6 + [_L] * 11 + [_I] * 3,
    "fastddpm_conv1d": [_P] * 5 + [_L] * 9 + [_I] * 3,
    "fastddpm_group_norm_mish": [_P] * 7 + [_L] * 6 + [_F] + [_I] * 2,
    "fastddpm_attention": [_P] * 4 + [_L] * 9 + [_F] + [_I] * 2 + [_P],
    "fastddpm_cross_attention": [_P] * 5 + [_L] * 10 + [_F] + [_I] * 2,
    "fastddpm_attention_gradient": [_P] * 8 + [_L] * 5 + [_F] + [_I] * 2,
    "fastddpm_group_norm": [_P] * 10 + [_L] * 8 + [_F] + [_I] * 3 + [_P] * 2,
    "fastddpm_group_norm_gradient": [_P] * 13 + [_L] * 8 + [_I] * 3,
    "fastddpm_layer_norm": [_P] * 6 + [_L] * 2 + [_F] + [_I] * 2,
    "fastddpm_geglu": [_P] * 2 + [_L] * 2 + [_I] * 2,
    "fastddpm_checksums": [_P] * 3 + [_L, _I],
    "fastddpm_rms_norm": [_P] * 7 + [_L] * 6 + [_F] + [_I] * 3,
    "fastddpm_normal": [_P] * 3 + [_L] * 3 + [_I],
    "fastddpm_reverse_step": [_P] * 16 + [_L] * 24 + [_F] + [_I] * 4,
    "fastddpm_copy": [_P] * 2 + [_L] * 15 + [_I] * 3,
    "fastddpm_add": [_P] * 4 + [_F] + [_I] * 2,
    "fastddpm_look_up": [_P] * 3 + [_L] * 2,
    "fastddpm_add_int64": [_P] * 3 + [_L] * 3,
    "fastddpm_program_delete": [_P],
    "fastddpm_program_append": [_P] * 3 + [_L] * 2,
    "fastddpm_program_advance": [_P] + [_L] * 3 + [_I] * 2 + [_P],
}
_lock = threading.Lock()
log = logging.getLogger("fastddpm.kernels")


class _Library:
    """The loaded library.

    Attributes:
        panel: output channels of a panel of packed weights.
        bfloat16: support for bfloat16 products: 0 none, 1 yes, 2 yes, but oneDNN is faster (AMX).
        half: whether convolutions in float32 read weights that are stored in float16.
    """

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise BuildError(f"it is made for Linux, this is {sys.platform}")
        try:
            functions = self._open(anew=False)
        except OSError as error:
            log.info("the native library does not load and is built anew: %s", error)
            try:
                functions = self._open(anew=True)
            except OSError as second:
                raise BuildError(f"the library does not load: {second}") from None
        # Look up symbols in the dependencies of torch's own extension: that finds the runtime whose threads torch uses.
        parallel = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
        functions.fastddpm_start.argtypes = [_P]
        self.panel: int = functions.fastddpm_start(None if parallel is None else ctypes.cast(parallel, _P))
        self.bfloat16: int = functions.fastddpm_bfloat16()
        self.half = bool(functions.fastddpm_half())
        self.functions = functions

    @staticmethod
    def _open(*, anew: bool) -> ctypes.CDLL:
        """Load the library and declare the argument types of its functions.

        Raises:
            OSError: it does not load, or a function is not in it.
        """
        with library(anew=anew) as path:
            functions = ctypes.CDLL(str(path))
        try:
            for name, types in _ARGUMENTS.items():
                function = getattr(functions, name)
                function.argtypes, function.restype = types, None
            functions.fastddpm_program_new.restype = _P
        except AttributeError as error:
            raise OSError(str(error)) from None
        return functions


@functools.lru_cache(maxsize=1)
def _load() -> _Library | str:
    try:
        return _Library()
    except BuildError as error:
        return str(error)


def why_not() -> str | None:
    """Return why the library cannot run here, or None; the first call builds it. `torch.compile` asks once."""
    with _lock:
        loaded = _load()
    return loaded if isinstance(loaded, str) else None


# Same effect as torch.compiler.assume_constant_result, which would import torch._dynamo and take seconds.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_loaded() -> bool:
    """Return whether the library is already loaded, so that using it builds nothing."""
    return _load.cache_info().currsize > 0 and why_not() is None


def get() -> _Library:
    """Return the loaded library.

    Raises:
        BuildError: `why_not` says why.
    """
    with _lock:
        loaded = _load()
    if isinstance(loaded, str):
        raise BuildError(loaded)
    return loaded


def why_not_bfloat16(*, slower: bool = False) -> str | None:
    """Return why the library cannot multiply bfloat16 here (unless `slower`, faster than oneDNN), or None."""
    reason = why_not()
    if reason is None:
        kind = get().bfloat16
        if kind == 0:
            reason = "this CPU, or what its compiler knows of it, has no AVX512-BF16"
        elif kind == 2 and not slower:
            reason = "this CPU has AMX, with which torch is faster"
    return reason


why_not_bfloat16._dynamo_marked_constant = True  # type: ignore[attr-defined]


def checksums(tensors: list[Tensor]) -> list[int]:
    """Return an order-independent sum over the memory of each tensor. Tensors are dense, in any order of dimensions."""
    places = (_P * len(tensors))(*(t.data_ptr() for t in tensors))
    sizes = (ctypes.c_int64 * len(tensors))(*(t.numel() * t.element_size() for t in tensors))
    sums = (ctypes.c_uint64 * len(tensors))()
    get().functions.fastddpm_checksums(sums, places, sizes, len(tensors), threads())
    return list(sums)
