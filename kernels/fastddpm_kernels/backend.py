"""Choose the backend that runs an op, and say why the others cannot. No other module decides this.

Every op has the same function for all backends:

- `triton`: one fused kernel, on CUDA and ROCm devices (and, when the environment variable `TRITON_INTERPRET=1`
  was set before triton was imported, on the CPU through triton's interpreter: slow, for tests);
- `native`: C++ for float32 and bfloat16 on the CPU (`native`), built by the system's compiler at its first use; some
  ops have it;
- `eager`: idiomatic torch in the input's own dtype, on any device;
- `reference`: the readable specification, computed in float64.

`auto` is `triton` on a GPU where triton can be imported, `native` on the CPU for convolutions, attention and the
in-place norms (one call of a plain norm does not pay for building the library), else `eager`. It takes no kernel that
has not passed its check on this device (`proving`). A backend that is named and cannot run raises an error; there is no
silent fallback.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastddpm_kernels import native, proving

BACKENDS = ("triton", "native", "eager", "reference")
OPS = (
    "q_sample", "reverse_step", "group_norm_silu", "layer_norm", "geglu", "pointwise_conv", "residual_add", "philox",
    "conv", "attention", "cross_attention", "conv1d", "group_norm_mish", "attention_block",
    "layer_norm_linear",
)  # fmt: skip
TRITON_OPS = tuple(op for op in OPS if op not in ("attention", "cross_attention"))
# On a GPU the vendor's convolutions and attention are hard to beat: "auto" leaves these to a table that measured them.
_BY_NAME = ("conv",)
NATIVE_OPS = (
    "group_norm_silu", "layer_norm", "geglu", "conv", "conv3x3", "attention", "cross_attention", "reverse_step_",
    "philox", "conv1d", "group_norm_mish",
)  # fmt: skip
# The ops that "auto" runs natively on a CPU. In bfloat16 they need a CPU with bfloat16 products.
_AUTO_NATIVE = (
    "group_norm_silu_", "layer_norm_", "geglu_", "conv", "conv3x3", "attention", "cross_attention_", "conv1d",
    "group_norm_mish_",
)  # fmt: skip


class BackendError(RuntimeError):
    """A backend was named and cannot run here; the message says why."""


class OperandError(BackendError, ValueError):
    """A backend was named and does not take these operands; the message says why."""


log = logging.getLogger("fastddpm.kernels")


def check_backend(backend: str, backends: Sequence[str] = BACKENDS) -> None:
    """Raise ValueError unless `backend` is one of `backends`."""
    if backend not in backends:
        raise ValueError(f"backend is {backend!r}, must be 'auto' or one of {', '.join(backends)}")


def interpreting() -> bool:
    """Return whether triton kernels run through triton's interpreter on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _find_triton() -> str | None:
    """Return why triton cannot be imported, or None, without importing it."""
    try:
        found = importlib.util.find_spec("triton") is not None
    except ValueError:  # something else stands under that name in sys.modules
        found = False
    return None if found else "triton cannot be imported (it is not installed)"


_NO_TRITON = _find_triton()
# Triton compiles the small program that launches a kernel, so on a GPU it needs a C compiler and Python's headers.
_COMPILERS = ("clang", "gcc")  # those that it looks for


def _no_launcher() -> str | None:
    """Return why triton cannot compile the program that launches a kernel, or None."""
    if not os.environ.get("CC") and not any(shutil.which(name) for name in _COMPILERS):
        return f"triton finds no C compiler ({', '.join(_COMPILERS)}, or one named by the variable CC)"
    headers = Path(sysconfig.get_paths(scheme=sysconfig.get_default_scheme())["include"])
    if not (headers / "Python.h").is_file():
        return f"triton finds no Python.h in {headers} (it is in the system's package of Python's headers)"
    return None


_NO_LAUNCHER = _no_launcher()


def why_not(backend: str, device_type: str, op: str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Return the reason why `backend` cannot run on a device of type `device_type` ("cuda", "cpu", ...), or None.

    Args:
        backend: one of `BACKENDS`. For "native" the library is built if it was not yet and nothing else prevents it.
        device_type: of the input.
        op: one of `OPS` or "conv3x3", if the answer depends on it; a trailing underscore means its in-place form.
        dtype: of the input, if the answer depends on it.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
    """
    check_backend(backend)
    name = None if op is None else op.rstrip("_")
    if backend == "native":
        if op is not None and op not in NATIVE_OPS and name not in NATIVE_OPS:
            return f"there is no native kernel of {name}"
        if device_type != "cpu":
            return f"native kernels run on the CPU, not on device type {device_type!r}"
        if dtype not in (None, torch.float32, torch.bfloat16):
            return f"native kernels compute in torch.float32 or torch.bfloat16, not {dtype}"
        multiplies = dtype == torch.bfloat16 and op in _AUTO_NATIVE
        return native.why_not_bfloat16(slower=True) if multiplies else native.why_not()
    if backend != "triton":
        return None
    if name is not None and name not in TRITON_OPS:
        return f"there is no triton kernel of {name}"
    if device_type not in ("cuda", "cpu"):
        return f"there are no triton kernels for device type {device_type!r}"
    if device_type == "cpu" and not interpreting():
        return "triton kernels need a GPU (on the CPU only through the interpreter, TRITON_INTERPRET=1)"
    if _NO_TRITON is None and device_type == "cuda":
        return _NO_LAUNCHER
    return _NO_TRITON


def resolve(
    op: str,
    backend: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    unfit: Callable[[], str | None] | None = None,
    others: Sequence[str] = (),
) -> str:
    """Return the backend that runs `op` on a device of type `device_type` for a caller who asked for `backend`.

    `torch.compile` traces through this function.

    Args:
        op: one of `OPS` or "conv3x3", with a trailing underscore for its in-place form.
        backend: `"auto"` or one of `BACKENDS`.
        device_type: of the input.
        dtype: of the input. "auto" never takes triton for float64, which the kernels do not have; it takes native for
            float32, and for bfloat16 on CPUs where that is faster than torch's own.
        unfit: returns why native kernels do not take the operands of this call, or None.
        others: further ops that the caller runs on the same backend, so that "auto" must trust them too.

    Raises:
        ValueError: `backend` is not `"auto"` or one of `BACKENDS`.
        BackendError: `backend` was named and cannot run here; the message says why.
        OperandError: `backend` is "native" and does not take the operands; the message says why.
    """
    if backend == "auto":
        chosen, reason = _automatic(op, device_type, dtype, unfit, others)
        if not torch.compiler.is_compiling():
            log.debug("%s on %s: %s%s", op, device_type, chosen, "" if reason is None else f" ({reason})")
        return chosen
    reason = why_not(backend, device_type, op, dtype)
    if reason is not None:
        raise BackendError(f"{op}: backend {backend!r} cannot run here: {reason}")
    if backend == "native" and unfit is not None and (reason := unfit()) is not None:
        raise OperandError(f"{op}: backend 'native' cannot run here: {reason}")
    return backend


def _automatic(
    op: str, device_type: str, dtype: torch.dtype | None, unfit: Callable[[], str | None] | None,
    others: Sequence[str],
) -> tuple[str, str | None]:  # fmt: skip
    """Return the backend that "auto" takes, and why it is not a faster one."""
    ops = (op, *others)
    reason: str | None = "slow or float64"
    if device_type == "cuda" and op in _BY_NAME:
        return "eager", "only its name or a tuned table selects the triton kernel"
    if device_type == "cuda" and dtype != torch.float64:
        reason = why_not("triton", device_type, op) or unproved(ops, device_type)
        return ("triton" if reason is None else "eager"), reason
    if device_type == "cpu" and dtype in (torch.float32, torch.bfloat16) and op in _AUTO_NATIVE:
        reason = why_not("native", device_type, op, dtype)
        if reason is None and dtype == torch.bfloat16:
            reason = native.why_not_bfloat16()
        if reason is None and unfit is not None:
            reason = unfit()
        if reason is None:
            reason = unproved(ops, device_type)
        return ("native" if reason is None else "eager"), reason
    if not torch.compiler.is_compiling():
        reason = why_not("triton", device_type, op) or reason
    return "eager", reason


def unproved(ops: Sequence[str], device_type: str) -> str | None:
    """Return why the kernel of one of `ops` is not trusted on the current device, or None if all are."""
    if not proving.enabled():
        return None
    device = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    reasons = (proving.why_not({"conv3x3": "conv"}.get(op, op.rstrip("_")), device) for op in ops)
    return next((reason for reason in reasons if reason is not None), None)


# Same effect as torch.compiler.assume_constant_result, which would import torch._dynamo and take seconds.
unproved._dynamo_marked_constant = True  # type: ignore[attr-defined]
