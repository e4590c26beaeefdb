"""Whether the native ops that have gradients can take what they are given: convolutions, norms, attention."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from fastddpm_kernels import native as _native

log = logging.getLogger("fastddpm.kernels")


def why_not_native(
    *tensors: Tensor | None, float32: tuple[Tensor | None, ...] = (), products: bool = True, slower: bool = False
) -> str | None:
    """Why native ops with gradients cannot take these tensors, or None. `torch.compile` traces through this.

    Args:
        tensors: what is float32 or bfloat16, all alike. None is left out.
        float32: what must be float32.
        products: whether the op multiplies matrices, which not every CPU does in bfloat16.
        slower: whether torch's own being faster is no reason.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    fixed = [tensor for tensor in float32 if tensor is not None]
    for tensor in (*given, *fixed):
        if tensor.device.type != "cpu":
            return f"native kernels run on the CPU, not on device type {tensor.device.type!r}"
    for tensor in given:
        if tensor.dtype not in (torch.float32, torch.bfloat16) or tensor.dtype != given[0].dtype:
            return f"native kernels compute in torch.float32 or torch.bfloat16, not {tensor.dtype}"
    for tensor in fixed:
        if tensor.dtype != torch.float32:
            return f"native kernels take parameters in torch.float32, not {tensor.dtype}"
    if products and given and given[0].dtype == torch.bfloat16:
        reason = _native.why_not_bfloat16(slower=slower)
        if reason is not None:
            return reason
    return _why_no_library()


def _why_no_library() -> str | None:
    reason = _native.why_not()
    _say(reason)
    return reason


# As torch.compiler.assume_constant_result does, which would import torch._dynamo, and seconds with it.
_why_no_library._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1)
def _say(reason: str | None) -> None:
    """Once in a process."""
    log.debug("layers with gradients on the CPU: %s", "native" if reason is None else f"eager ({reason})")
