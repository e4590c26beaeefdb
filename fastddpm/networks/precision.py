"""The precisions that a network can run in, by name, and the switch for TensorFloat-32.

float32 has 23 bits of mantissa. tf32 keeps float32 tensors, but CUDA's tensor cores round the factors of products to
10 bits of mantissa. float16 has 10 bits too, and its largest value is 65504. bfloat16 has float32's range and 7 bits.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
FLOAT16_MAX = float(torch.finfo(torch.float16).max)  # 65504
_TF32_CAPABILITY = (8, 0)
_LOCK = threading.Lock()
_entered: list[list[bool]] = []  # uses of `tf32` not yet exited, the latest last
_restore: list[Callable[[], None]] = []  # one function while `_entered` is not empty


def parse_precision(
    value: torch.dtype | str, device: torch.device | str, name: str = "dtype"
) -> tuple[torch.dtype, bool]:
    """Return the dtype of a precision, and whether it lets float32 products be TensorFloat-32.

    Args:
        value: one of `PRECISIONS`, or the dtype of one.
        device: where the network runs.
        name: of the argument, in errors.

    Raises:
        TypeError: `value` is neither a string nor a dtype.
        ValueError: it is no precision, or the device has no TensorFloat-32.
    """
    if not isinstance(value, (str, torch.dtype)):
        raise TypeError(f"{name} is of {type(value).__name__}, must be a torch.dtype or one of {', '.join(PRECISIONS)}")
    precision = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    if precision not in PRECISIONS:
        shown = repr(value) if isinstance(value, str) else str(value)
        raise ValueError(f"{name} is {shown}, must be one of {', '.join(PRECISIONS)}")
    if precision != "tf32":
        dtype: torch.dtype = getattr(torch, precision)
        return dtype, False
    if reason := why_not_tf32(device):
        raise ValueError(f"{name} is 'tf32', which {device} cannot run: {reason}")
    return torch.float32, True


def why_not_tf32(device: torch.device | str) -> str | None:
    """Return why `device` has no TensorFloat-32, in one line, or None if it has."""
    device = torch.device(device)
    least = ".".join(map(str, _TF32_CAPABILITY))
    if device.type != "cuda":
        return f"it needs CUDA of capability {least} or more"
    if torch.version.hip is not None:
        return "this torch is built for ROCm; it needs CUDA"
    if not torch.cuda.is_available():
        return "CUDA is not available"
    capability = torch.cuda.get_device_capability(device)
    if capability < _TF32_CAPABILITY:
        return f"its capability is {'.'.join(map(str, capability))}, must be {least} or more"
    return None


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Run CUDA's float32 matrix products and convolutions in TensorFloat-32 inside, or in float32 if not `enabled`.

    Torch's default is float32 for products but TensorFloat-32 for convolutions. The setting belongs to the process,
    not to the thread: while several threads are inside, the last to enter decides. When all have left, the setting is
    restored. A CUDA graph keeps the setting that it was captured under.
    """
    entry = [enabled]  # a list, since equal entries differ by identity
    with _LOCK:
        if not _entered:
            _restore.append(_remember())
        _entered.append(entry)
        _switch(enabled)
    try:
        yield
    finally:
        with _LOCK:
            _entered[:] = [other for other in _entered if other is not entry]
            if _entered:
                _switch(_entered[-1][0])
            else:
                _restore.pop()()


def _settings() -> tuple:
    cudnn = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn  # type: ignore[attr-defined]


def _switch(enabled: bool) -> None:
    # "medium" holds for the CPU as well and would contradict the new setting: so the CPU's changes with CUDA's.
    if _matmul_precision() == "medium":
        torch.set_float32_matmul_precision("high" if enabled else "highest")
    _set_both((enabled, enabled), ["tf32" if enabled else "ieee"] * len(_settings()))


def _remember() -> Callable[[], None]:
    """Return a function that restores the present settings."""
    new = [setting.fp32_precision for setting in _settings()]
    old = (_old_setting(torch.backends.cuda.matmul, new[0]), _old_setting(torch.backends.cudnn, new[1]))
    medium = _matmul_precision() == "medium"

    def restore() -> None:
        _set_both(old, new)
        if medium:
            torch.set_float32_matmul_precision("medium")
            torch.backends.cuda.matmul.fp32_precision = new[0]

    return restore


def _old_setting(module: object, new: str) -> bool:
    with _quiet():
        try:
            return bool(module.allow_tf32)  # type: ignore[attr-defined]
        except RuntimeError:  # only the new one was set
            return new == "tf32"


def _matmul_precision() -> str | None:
    with _quiet():
        try:
            return torch.get_float32_matmul_precision()
        except RuntimeError:
            return None


def _set_both(old: tuple[bool, bool], new: list[str]) -> None:
    # Torch has an old and a new setting, and raises if one is read after only the other was set. So set both here: the
    # old one first, since it also overwrites the new.
    with _quiet():
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = old
    for setting, value in zip(_settings(), new, strict=True):
        setting.fp32_precision = value


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's advice to use the new setting instead of the old: this module uses both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
