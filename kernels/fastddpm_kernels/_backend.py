"""The only place that picks a backend for an op, and says why not the others.

Every op has the same function for all backends:

- `triton`: one fused kernel, on CUDA and ROCm devices (and, when the environment variable `TRITON_INTERPRET=1`
  was set before triton was imported, on the CPU through triton's interpreter: slow, for tests);
- `eager`: idiomatic torch in the input's own dtype, on any device;
- `reference`: the readable specification, computed in float64.

`auto` is `triton` on a GPU where triton can be imported, else `eager`. A backend that is asked for by name and
cannot run raises; nothing falls back in silence.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil

import torch

BACKENDS = ("triton", "eager", "reference")
OPS = ("q_sample", "reverse_step", "group_norm_silu", "pointwise_conv", "residual_add", "philox")


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


def why_not(backend: str, device_type: str) -> str | None:
    """The reason why `backend` cannot run on a device of type `device_type` ("cuda", "cpu", ...), or None.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, must be 'auto' or one of {', '.join(BACKENDS)}")
    if backend != "triton":
        return None
    if device_type not in ("cuda", "cpu"):
        return f"there are no triton kernels for device type {device_type!r}"
    if device_type == "cpu" and not interpreting():
        return "triton kernels need a GPU (on the CPU only through the interpreter, TRITON_INTERPRET=1)"
    if _NO_TRITON is None and device_type == "cuda" and not _HAS_COMPILER:
        return f"triton finds no C compiler ({', '.join(_COMPILERS)}, or one named by the variable CC)"
    return _NO_TRITON


def resolve(op: str, backend: str, device_type: str, dtype: torch.dtype | None = None) -> str:
    """The backend that runs `op` on a device of type `device_type` when the caller asked for `backend`.

    `dtype` is that of the input where it matters: "auto" never takes triton for float64, which the kernels do not
    have. `torch.compile` traces through this function.

    Raises:
        ValueError: `backend` is not `"auto"` or one of `BACKENDS`.
        BackendError: `backend` was named and cannot run here; the message says why.
    """
    if backend == "auto":
        if device_type == "cuda" and dtype != torch.float64 and why_not("triton", device_type) is None:
            return "triton"
        if not torch.compiler.is_compiling():
            log.debug("%s on %s: eager (%s)", op, device_type, why_not("triton", device_type) or "slow or float64")
        return "eager"
    reason = why_not(backend, device_type)
    if reason is not None:
        raise BackendError(f"{op}: backend {backend!r} cannot run here: {reason}")
    return backend
