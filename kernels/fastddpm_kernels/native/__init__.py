"""The native backend: C++ for the CPU, float32. The only place that builds, loads and calls the library.

The library knows neither Python nor torch: it takes addresses and sizes, checked by the ops, and runs on the threads
of the OpenMP runtime that torch has loaded. Python's global lock is not held meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import sys
import threading

import torch
from torch import Tensor

from fastddpm_kernels.native.build import BuildError, library

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "fastddpm_conv3x3_winograd": [_P] * 6 + [_L] * 6 + [_I] * 4,
    "fastddpm_conv3x3_unpacked": [_P] * 4 + [_L] * 4 + [_P] + [_L] * 6 + [_I] * 3,
    "fastddpm_conv3x3_pack": [_P] * 2 + [_L] * 7 + [_I] * 3,
    "fastddpm_conv3x3_weight_gradient": [_P] + [_L] * 4 + [_P] * 4 + [_L] * 6 + [_I] * 2,
    "fastddpm_conv_direct": [_P] * 6 + [_L] * 11 + [_I] * 3,
    "fastddpm_attention": [_P] * 4 + [_L] * 9 + [_F] + [_I] * 2 + [_P],
    "fastddpm_attention_gradient": [_P] * 8 + [_L] * 5 + [_F] + [_I] * 2,
    "fastddpm_group_norm": [_P] * 10 + [_L] * 8 + [_F] + [_I] * 3 + [_P] * 2,
    "fastddpm_group_norm_gradient": [_P] * 13 + [_L] * 8 + [_I] * 3,
    "fastddpm_checksums": [_P] * 3 + [_L, _I],
    "fastddpm_rms_norm": [_P] * 7 + [_L] * 6 + [_F] + [_I] * 3,
}
_lock = threading.Lock()
log = logging.getLogger("fastddpm.kernels")


class _Library:
    """The loaded library.

    Attributes:
        panel: output channels of a panel of packed weights.
        bfloat16: whether there are products of bfloat16: 0 none, 1 yes, 2 yes, but oneDNN has faster ones (AMX).
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
        self.panel: int = functions.fastddpm_panel()
        self.bfloat16: int = functions.fastddpm_bfloat16()
        self.functions = functions

    @staticmethod
    def _open(*, anew: bool) -> ctypes.CDLL:
        """Load the library and say what its functions take.

        Raises:
            OSError: it does not load, or a function is not in it.
        """
        with library(anew=anew) as path:
            functions = ctypes.CDLL(str(path))
        try:
            for name, types in _ARGUMENTS.items():
                function = getattr(functions, name)
                function.argtypes, function.restype = types, None
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
    """Why the library cannot run here, or None; builds and loads it the first time. `torch.compile` asks once."""
    with _lock:
        loaded = _load()
    return loaded if isinstance(loaded, str) else None


# As torch.compiler.assume_constant_result does, which would import torch._dynamo, and seconds with it.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_loaded() -> bool:
    """Whether the library is here already, so that to use it builds nothing."""
    return _load.cache_info().currsize > 0 and why_not() is None


def get() -> _Library:
    """The library.

    Raises:
        BuildError: `why_not` says why.
    """
    with _lock:
        loaded = _load()
    if isinstance(loaded, str):
        raise BuildError(loaded)
    return loaded


def why_not_bfloat16(*, slower: bool = False) -> str | None:
    """Why the library does not multiply bfloat16 here (if not `slower`: faster than oneDNN), or None."""
    reason = why_not()
    if reason is None:
        kind = get().bfloat16
        if kind == 0:
            reason = "this CPU, or what its compiler knows of it, has no AVX512-BF16"
        elif kind == 2 and not slower:
            reason = "this CPU has AMX, with which torch is faster"
    return reason


why_not_bfloat16._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _row_stride(row: Tensor | None) -> int:
    return 0 if row is None else row.stride(0)


def conv3x3_winograd(
    y: Tensor, x: Tensor, x2: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None, m: int,
    upsample: bool,
) -> None:  # fmt: skip
    """Tiles of `m` x `m`. All are float32 and channels-last or contiguous; `weight` is packed for `m`.

    y, x, x2 and residual may be bfloat16, for `m` = 2 and a weight packed for that.
    """
    n, out_channels, height, width = y.shape
    get().functions.fastddpm_conv3x3_winograd(
        _at(y), _at(x), _at(x2), _at(weight), _at(bias), _at(residual), n, height, width, x.shape[1],
        0 if x2 is None else x2.shape[1], out_channels, m, upsample, x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip


def conv3x3_unpacked(
    y: Tensor, x: Tensor, x2: Tensor | None, weight: Tensor, bias: Tensor | None, m: int, *, transposed: bool = False
) -> None:
    """As `conv3x3_winograd`, for a weight [O, C + C2, 3, 3] of any strides, float32, packed for this call.

    `transposed`: the adjoint of the convolution, from its O channels `x` to its C channels `y`.
    """
    place, strides = _taps(weight, transposed)
    n, out_channels, height, width = y.shape
    get().functions.fastddpm_conv3x3_unpacked(
        _at(y), _at(x), _at(x2), place, *strides, _at(bias), n, height, width, x.shape[1],
        0 if x2 is None else x2.shape[1], out_channels, m, x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip


def conv3x3_pack(
    packed: Tensor, weight: Tensor, m: int, *, channels2: int = 0, bfloat16: bool = False, transposed: bool = False
) -> None:
    """Into `packed`, for `conv3x3_winograd`; `weight` as in `conv3x3_unpacked`, its last `channels2` for x2."""
    place, strides = _taps(weight, transposed)
    outs, ins = weight.shape[:2][:: -1 if transposed else 1]
    get().functions.fastddpm_conv3x3_pack(
        _at(packed), place, *strides, outs, ins - channels2, channels2, m, bfloat16, torch.get_num_threads()
    )


def conv3x3_weight_gradient(
    dweight: Tensor, dbias: Tensor | None, dy: Tensor, x: Tensor, x2: Tensor | None
) -> None:
    """Into `dweight` [O, C + C2, 3, 3] of any strides, and `dbias` [O], float32.

    `dy`, `x` and `x2` are channels-last, all float32 or all bfloat16.
    """
    n, out_channels, height, width = dy.shape
    get().functions.fastddpm_conv3x3_weight_gradient(
        _at(dweight), *dweight.stride(), _at(dbias), _at(dy), _at(x), _at(x2), n, height, width, x.shape[1],
        0 if x2 is None else x2.shape[1], out_channels, x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip


def _taps(weight: Tensor, transposed: bool) -> tuple[int, tuple[int, int, int, int]]:
    """The address of a 3x3 weight's first tap and its strides; `transposed`, of the one that is its adjoint."""
    out, inner, row, column = weight.stride()
    if not transposed:
        return weight.data_ptr(), (out, inner, row, column)
    return weight[:, :, 2, 2].data_ptr(), (inner, out, -row, -column)


def conv_direct(
    y: Tensor, x: Tensor, x2: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None, kernel: int,
    stride: int, padding: int, upsample: bool,
) -> None:  # fmt: skip
    """As `conv3x3_winograd`, for any kernel; in bfloat16 for even numbers of channels."""
    n, channels, height, width = x.shape
    get().functions.fastddpm_conv_direct(
        _at(y), _at(x), _at(x2), _at(weight), _at(bias), _at(residual), n, height, width, channels,
        0 if x2 is None else x2.shape[1], y.shape[2], y.shape[3], y.shape[1], kernel, stride, padding, upsample,
        x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip


def attention(
    y: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, statistics: Tensor | None = None
) -> None:
    """Into `y` and, for gradients, `statistics` [N, heads, 2, P], float32.

    y, q, k and v are [N, P, heads * ..], channels adjacent and pixels one stride apart, also from one sample to the
    next; all float32, or all bfloat16 with strides and channels of a head even.
    """
    n, pixels, _ = q.shape
    get().functions.fastddpm_attention(
        _at(y), _at(q), _at(k), _at(v), y.stride(1), q.stride(1), k.stride(1), v.stride(1), n, pixels, heads,
        q.shape[2] // heads, v.shape[2] // heads, scale, q.dtype == torch.bfloat16, torch.get_num_threads(),
        _at(statistics),
    )  # fmt: skip


def attention_gradient(
    dq: Tensor, dk: Tensor, dv: Tensor, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, statistics: Tensor, heads: int,
    scale: float,
) -> None:  # fmt: skip
    """Into `dq`, `dk` and `dv`; all are contiguous, and as in `attention`."""
    n, pixels, _ = q.shape
    get().functions.fastddpm_attention_gradient(
        _at(dq), _at(dk), _at(dv), _at(dy), _at(q), _at(k), _at(v), _at(statistics), n, pixels, heads,
        q.shape[2] // heads, v.shape[2] // heads, scale, q.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip


def group_norm(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, x2: Tensor | None,
    residual: Tensor | None, total: Tensor | None, time_bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, silu: bool, *, mean: Tensor | None = None, rstd: Tensor | None = None,
) -> None:  # fmt: skip
    """Into `y` and, with a residual, `total`; for gradients also `mean` and `rstd` [N, num_groups]."""
    get().functions.fastddpm_group_norm(
        _at(y), _at(x), _at(x2), _at(residual), _at(total), _at(weight), _at(bias), _at(time_bias), _at(scale),
        _at(shift), _row_stride(time_bias), _row_stride(scale), _row_stride(shift), x.shape[0],
        math.prod(x.shape[2:]), x.shape[1], 0 if x2 is None else x2.shape[1], num_groups, eps, silu,
        x.dtype == torch.bfloat16, torch.get_num_threads(), _at(mean), _at(rstd),
    )  # fmt: skip


def group_norm_gradient(
    dx: Tensor, dx2: Tensor | None, sums: Tensor, dy: Tensor, x: Tensor, x2: Tensor | None, weight: Tensor,
    bias: Tensor, mean: Tensor, rstd: Tensor, time_bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    silu: bool,
) -> None:  # fmt: skip
    """Into `dx`, `dx2` and `sums` [3, N, C + C2], over the pixels, from which all other gradients follow."""
    get().functions.fastddpm_group_norm_gradient(
        _at(dx), _at(dx2), _at(sums), _at(dy), _at(x), _at(x2), _at(weight), _at(bias), _at(mean), _at(rstd),
        _at(time_bias), _at(scale), _at(shift), _row_stride(time_bias), _row_stride(scale), _row_stride(shift),
        x.shape[0], math.prod(x.shape[2:]), x.shape[1], 0 if x2 is None else x2.shape[1], mean.shape[1], silu,
        x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip


def rms_norm(
    y: Tensor, x: Tensor, weight: Tensor, eps: float, x2: Tensor | None, residual: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, silu: bool,
) -> None:  # fmt: skip
    """Into `y`."""
    get().functions.fastddpm_rms_norm(
        _at(y), _at(x), _at(x2), _at(residual), _at(weight), _at(scale), _at(shift), _row_stride(scale),
        _row_stride(shift), x.shape[0], math.prod(x.shape[2:]), x.shape[1], 0 if x2 is None else x2.shape[1], eps,
        silu, x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip


def checksums(tensors: list[Tensor]) -> list[int]:
    """Of each, a sum of all its memory, whose order does not matter. They are dense, in any order of dimensions."""
    places = (_P * len(tensors))(*(t.data_ptr() for t in tensors))
    sizes = (ctypes.c_int64 * len(tensors))(*(t.numel() * t.element_size() for t in tensors))
    sums = (ctypes.c_uint64 * len(tensors))()
    get().functions.fastddpm_checksums(sums, places, sizes, len(tensors), torch.get_num_threads())
    return list(sums)
