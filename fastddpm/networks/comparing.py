"""Check that a network is unchanged, and that its replacement computes the same.

Class and config do not fully determine what a network computes, since layers may have been edited. So a network is
compared once with its replacement. After that only its layers' settings are checked (`settings_of`), which costs no
evaluation. Weights may change at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from fastddpm_kernels import philox
from torch import Tensor, nn
from torch.nn.modules import module as _module

_FLOOR = 1e-4  # of the rms: float32 rounding changes a U-Net's output by about 1e-6 of it
_ULPS = 8
# Attributes that do not affect what a network computes when sampling.
_OF_NO_EFFECT = {"training", "backend", "_backend", "p", "inplace", "gradient_checkpointing"}
_OF_TORCH = vars(nn.Module()).keys()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PLAIN = (bool, int, float, complex, str, bytes, tuple, type(None), torch.dtype)
_GONE = object()
_METHODS: dict[type, frozenset[str]] = {}

Settings = dict[tuple[str, str], Any]


class Replacement:
    """A method of a layer that computes what the one in its place does: the layer is still what its class says."""


class _Object(NamedTuple):
    """An attribute that is compared by identity."""

    id: int


def settings_of(model: nn.Module) -> Settings:
    """Return the settings that, with the weights, determine what a model computes, by (layer name, setting name).

    They are the class of every layer and its attributes: numbers, strings and tuples by value, all others by identity.
    """
    found: Settings = {}
    for name, layer in model.named_modules():
        found[name, "class"] = type(layer)
        for key, value in vars(layer).items():
            if key not in _OF_TORCH and key not in _OF_NO_EFFECT and not isinstance(value, Tensor):
                found[name, key] = value if isinstance(value, _PLAIN) else _Object(id(value))
    return found


def changed(before: Settings, now: Settings, *, of_another: bool = False) -> str | None:
    """Describe the first setting of `before` that has changed, or return None. New settings do not count.

    `of_another`: the two are of different models. Objects never count then, since they are never identical.
    """
    for (layer, name), value in before.items():
        given = now.get((layer, name), _GONE)
        if given == value or (of_another and isinstance(value, _Object)):
            continue
        if isinstance(value, type) and isinstance(given, type):
            return f"its layer {layer} is a {given.__name__}, must be a {value.__name__}"
        known = given is not _GONE and not isinstance(value, _Object) and not isinstance(given, _Object)
        return f"its {_path(layer, name)} " + (f"is {given!r}, must be {value!r}" if known else "has been replaced")
    return None


def why_not_layers(model: nn.Module, known: Callable[[type], bool]) -> str | None:
    """Describe the first layer that is not `known` or whose calls are not those of its class; None if all are."""
    if _module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "torch has hooks for all modules"
    for name, layer in model.named_modules():
        if not known(type(layer)):
            return f"its layer {name} is a {type(layer).__name__} of {type(layer).__module__.partition('.')[0]}"
        if any(vars(layer)[hooks] for hooks in _HOOKS):
            return f"its layer {name or 'forward'} has hooks"
        own = vars(layer)
        if replaced := [n for n in own.keys() & _methods(type(layer)) if not isinstance(own[n], Replacement)]:
            return f"its {_path(name, min(replaced))} has been replaced"
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep every module of the model in eval mode inside, and record no gradients."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def some_noise(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return one sample [1, ...] of `shape`, always the same normal noise, in the dtype and on the device of `like`."""
    keys = philox.sample_keys([0], [0])
    return philox.normal(keys, shape, step=0, stream=philox.STREAM_INITIAL, backend="eager").to(like)


def difference(theirs: Tensor, ours: Tensor, dtype: torch.dtype, *, floor: float = _FLOOR) -> str | None:
    """Describe how two results of one computation differ, or return None if rounding explains it.

    Args:
        theirs, ours: of one shape.
        dtype: the least precise dtype that either was computed in.
        floor: the difference allowed in any dtype, relative to the rms.
    """
    if theirs.shape != ours.shape:
        return f"has shape {tuple(ours.shape)} in place of {tuple(theirs.shape)}"
    error, size = (_rms(value) for value in (ours.double().cpu() - theirs.double().cpu(), theirs.double().cpu()))
    if error <= max(floor, _ULPS * torch.finfo(dtype).eps) * size:  # False for NaN
        return None
    return f"differs by {error:.3g} of {size:.3g}"


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _path(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _methods(kind: type) -> frozenset[str]:
    if kind not in _METHODS:
        _METHODS[kind] = frozenset(name for name in dir(kind) if callable(getattr(kind, name)))
    return _METHODS[kind]
