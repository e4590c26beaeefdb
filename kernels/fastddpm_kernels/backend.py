"""The only place that picks a backend for an op, and says why not the others.

Every op has the same function for all backends:

- `triton`: one fused kernel, on CUDA and ROCm devices (and, when the environment variable `TRITON_INTERPRET=1`
  was set before triton was imported, on the CPU through triton's interpreter: slow, for tests);
- `native`: C++ for float32 and, some of it, bfloat16 on the CPU (`native`), built by the system's compiler when it is
  first wanted; some ops;
- `eager`: idiomatic torch in the input's own dtype, on any device;
- `reference`: the readable specification, computed in float64.

`auto` is `triton` on a GPU where triton can be imported, `native` on the CPU for the ops in place that a loop runs
(so that the library is not built for one call of a plain function), else `eager`. A backend that is asked for by name
and cannot run raises; nothing falls back in silence.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil

import torch

BACKENDS = ("triton", "native", "eager", "reference")
OPS = ("q_sample", "reverse_step", "group_norm_silu", "pointwise_conv", "residual_add", "philox", "conv", "attention")
_WITHOUT_TRITON = ("conv", "attention")  # the vendor's library is hard to beat there
_NATIVE = ("group_norm_silu", "conv", "attention")
_AUTO_NATIVE = ("group_norm_silu_", "conv", "attention")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


log = logging.getLogger("fastddpm.kernels")


def interpreting() -> bool:
    """Whether triton kernels run through triton's interpreter on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _find_triton() -> str | None:
    """Why triton cannot be had, or None; without importing it."""
    try:
        found = importlib.util.find_spec("triton") is not None
    except ValueError:  # something else stands under that name in sys.modules
        found = False
    return None if found else "triton cannot be imported (it is not installed)"


_NO_TRITON = _find_triton()
# Triton compiles the little program that launches a kernel, so on a GPU it needs a C compiler.
_COMPILERS = ("gcc", "clang", "cc")
_HAS_COMPILER = bool(os.environ.get("CC")) or any(shutil.which(name) for name in _COMPILERS)


def why_not(
    backend: str, device_type: str, op: str | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """The reason why `backend` cannot run on a device of type `device_type` ("cuda", "cpu", ...), or None.

    Args:
        backend: one of `BACKENDS`. For "native" the library is built, if it never was and nothing else stands against.
        device_type: of the input.
        op: one of `OPS`, where not all have the same backends; an underscore after it means its form in place.
        dtype: of the input, where it matters.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, must be 'auto' or one of {', '.join(BACKENDS)}")
    name = None if op is None else op.rstrip("_")
    if backend == "native":
        if name is not None and name not in _NATIVE:
            return f"there is no native kernel of {name}"
        if device_type != "cpu":
            return f"native kernels run on the CPU, not on device type {device_type!r}"
        if dtype not in (None, torch.float32, torch.bfloat16):
            return f"native kernels compute in torch.float32 or torch.bfloat16, not {dtype}"
        from fastddpm_kernels import native as _native

        return _native.why_not_bfloat16(slower=True) if _in_bfloat16(op, dtype) else _native.why_not()
    if backend != "triton":
        return None
    if name in _WITHOUT_TRITON:
        return f"there is no triton kernel of {name}"
    if device_type not in ("cuda", "cpu"):
        return f"there are no triton kernels for device type {device_type!r}"
    if device_type == "cpu" and not interpreting():
        return "triton kernels need a GPU (on the CPU only through the interpreter, TRITON_INTERPRET=1)"
    if _NO_TRITON is None and device_type == "cuda" and not _HAS_COMPILER:
        return f"triton finds no C compiler ({', '.join(_COMPILERS)}, or one named by the variable CC)"
    return _NO_TRITON


def resolve(op: str, backend: str, device_type: str, dtype: torch.dtype | None = None) -> str:
    """The backend that runs `op` on a device of type `device_type` when the caller asked for `backend`.

    `op` is one of `OPS`, with an underscore for its form in place. `dtype` is that of the input where it matters:
    "auto" never takes triton for float64, which the kernels do not have, and native for float32, and for bfloat16 where
    it is faster than torch's own.
    `torch.compile` traces through this function.

    Raises:
        ValueError: `backend` is not `"auto"` or one of `BACKENDS`.
        BackendError: `backend` was named and cannot run here; the message says why.
    """
    if backend == "auto":
        if device_type == "cuda" and dtype != torch.float64 and why_not("triton", device_type, op) is None:
            return "triton"
        if device_type == "cpu" and dtype in (torch.float32, torch.bfloat16) and op in _AUTO_NATIVE:
            reason = why_not("native", device_type, op, dtype)
            if reason is None and _in_bfloat16(op, dtype):
                from fastddpm_kernels import native as _native

                reason = _native.why_not_bfloat16()
            log.debug("%s on cpu: %s", op, "native" if reason is None else f"eager ({reason})")
            return "native" if reason is None else "eager"
        if not torch.compiler.is_compiling():
            log.debug("%s on %s: eager (%s)", op, device_type, why_not("triton", device_type, op) or "slow or float64")
        return "eager"
    reason = why_not(backend, device_type, op, dtype)
    if reason is not None:
        raise BackendError(f"{op}: backend {backend!r} cannot run here: {reason}")
    return backend


def _in_bfloat16(op: str | None, dtype: torch.dtype | None) -> bool:
    """Whether an op needs products of bfloat16: convolutions, and the ops in place that run between them."""
    return dtype == torch.bfloat16 and op in _AUTO_NATIVE
