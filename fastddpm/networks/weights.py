"""Detect that a module's weights have changed, however they were written, and keep copies up to date."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Iterator

import torch
from fastddpm_kernels import native
from torch import Tensor, nn
from torch.nn.modules import module as _module

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by itemsize


# What the modules of a call were found to be, by their identity; None outside of `summed_once`.
_found: contextvars.ContextVar[dict[int, tuple[object, list[float]]] | None] = contextvars.ContextVar(
    "found", default=None
)


@contextlib.contextmanager
def summed_once() -> Iterator[None]:
    """Let `fingerprint` sum a module's weights once, as long as addresses and versions say that they are the same.

    A call of many chunks looks at its weights before each. Whatever writes through `.data` during the call is found by
    the next call.
    """
    token = _found.set({})
    try:
        yield
    finally:
        _found.reset(token)


def fingerprint(module: nn.Module) -> object:
    """Return values that differ if a parameter or buffer does: addresses, autograd's version counters, and sums.

    Autograd misses writes through `.data` and changes of inference tensors. The sums miss permutations (and, on CUDA,
    signs). On CUDA the sums of floating-point weights are norms in float64, a few kernels for all weights. On the CPU
    the native library computes the sums if it is loaded, since it is faster than torch.
    """
    weights = list(_tensors(module))
    seen = tuple((w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version) for w in weights)
    found = _found.get()
    if found is not None and id(module) in found and found[id(module)][0] == seen:
        return found[id(module)]
    sums = _sums(weights)
    if found is not None:
        found[id(module)] = seen, sums
    return seen, sums


def _sums(weights: list[Tensor]) -> list[float]:
    by_device: dict[torch.device, list[Tensor]] = {}
    for weight in weights:
        by_device.setdefault(weight.device, []).append(weight)
    sums: list[float] = []
    for device, group in by_device.items():
        if device.type == "meta":
            continue
        if device.type == "cpu" and native.is_loaded():
            dense = [w for w in group if _is_dense(w)]
            sums += native.checksums(dense)
            group = [w for w in group if not _is_dense(w)]
            if not group:
                continue
        normed = [w for w in group if device.type == "cuda" and w.is_floating_point()]
        summed = [w for w in group if not (device.type == "cuda" and w.is_floating_point())]
        values = [*torch._foreach_norm(normed, 2, dtype=torch.float64)] if normed else []
        values += [_sum_of_bits(w) for w in summed]
        sums += torch.stack([value.double() for value in values]).tolist() if normed else torch.stack(values).tolist()
    return sums


class Watch:
    """Notices in a fraction of a millisecond what torch itself tells of a module's changes.

    These are other layers, parameters or buffers, hooks, and changes in place that autograd counts; not writes through
    `.data`, changes of inference tensors, and other attributes of layers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.accept()

    def accept(self) -> None:
        """Take the module as it is now for unchanged."""
        self._layers = list(self._module.modules())
        self._seen = self._state()

    def changed(self) -> bool:
        """Return whether the module has changed since it was accepted."""
        return self._state() != self._seen

    def _state(self) -> list[object]:
        state: list[object] = [_module._has_any_global_hook()]  # type: ignore[no-untyped-call]
        for layer in self._layers:
            state += layer._modules.values()
            state.append(len(layer._forward_hooks) + len(layer._forward_pre_hooks))
            for tensor in itertools.chain(layer._parameters.values(), layer._buffers.values()):
                if tensor is not None:
                    state += (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        return state


def release(module: nn.Module) -> None:
    """Free the memory of a module's parameters, which keep shape, dtype and device and read as NaN."""
    for parameter in module.parameters():
        parameter.data = parameter.new_full((1,) * parameter.ndim, torch.nan).expand(parameter.shape)


class Follower:
    """Keeps a copy of a module, perhaps in another dtype, device or memory format, up to date with its weights.

    Attributes:
        copy: the copy.
    """

    def __init__(self, original: nn.Module, copy: nn.Module) -> None:
        """Follow `original` with `copy`, which has its parameters and buffers in its order and with their values."""
        self._original, self.copy = original, copy
        self._seen = fingerprint(original)

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights of the original in place if they have changed."""
        now = fingerprint(self._original)
        if now == self._seen:
            return
        for mine, theirs in zip(_tensors(self.copy), _tensors(self._original), strict=True):
            mine.copy_(theirs)
        self._seen = now


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return (tensor.detach() for tensor in itertools.chain(module.parameters(), module.buffers()))


def _is_dense(x: Tensor) -> bool:
    """Return whether the elements fill one block of memory without gaps, in any order."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _sum_of_bits(x: Tensor) -> Tensor:
    if x.is_complex():
        x = torch.view_as_real(x)
    bits = x.view(_BITS[x.itemsize])
    # A 64-bit sum drops the carry out of the sign bits: so add a sum of the upper halves.
    return bits.sum() if x.itemsize < 8 else bits.sum() + (bits >> 32).sum()
