"""Verify a fused model: each pair against float64, and the outputs against those before fusing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.interop.fusing.pair import FusedModule, unfused, what
from fastddpm.networks.comparing import evaluating

# Largest error of one pair, relative to its largest magnitude: a few units in the last place of the dtype, or
# `FACTOR` times the error of the unfused modules.
FLOORS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
FACTOR = 4.0
# Largest error of a whole model, where differences in rounding pass through all layers.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class Measured:
    """What the pairs of one norm did on the example: calls, largest error, and the operations they took in."""

    calls: int = 0
    error: float = 0.0
    what: list[str] = field(default_factory=list)


class Verifier:
    """Runs a model on an example: once when the object is made, before fusing, and once in `compare`."""

    def __init__(self, model: nn.Module, example_inputs: Any, tolerance: float | None) -> None:
        self.model, self.tolerance = model, tolerance
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        if isinstance(example_inputs, Mapping):
            self.kwargs = dict(example_inputs)
        else:
            self.args = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
        self.before = self._run()
        if not self.before:
            raise ValueError("the model's output on example_inputs has no tensor, must have one to be verified")
        if not all(bool(torch.isfinite(value).all()) for value in self.before):
            raise ValueError("the model's output on example_inputs is not finite, must be finite to be verified")

    def compare(self, fused: Sequence[nn.Module]) -> tuple[float, dict[nn.Module, Measured]]:
        """Return the relative error of the outputs, and what the pairs of each norm did.

        Raises:
            ValueError: an error is larger than is allowed.
        """
        pairs: dict[nn.Module, Measured] = {}
        names = {module: name for name, module in self.model.named_modules()}
        kinds: set[Any] = {type(module) for module in fused}  # made for this model; a slice of a Sequential is one too
        record, launch = _recorder(pairs, names)
        for kind in kinds:
            kind.fastddpm_pair, kind.fastddpm_kernel = record, staticmethod(launch)
        try:
            after = self._run()
        finally:
            for kind in kinds:
                del kind.fastddpm_pair, kind.fastddpm_kernel
        if [value.shape for value in after] != [value.shape for value in self.before]:
            raise ValueError("the fused model's outputs on example_inputs have other shapes, must have the same")
        error = max((_error(new, old) for new, old in zip(after, self.before, strict=True)), default=0.0)
        allowed = self.tolerance
        if allowed is None:
            dtypes = {value.dtype for value in (*self.before, *self.model.parameters())}
            allowed = max(TOLERANCES.get(dtype, 0.0) for dtype in dtypes)
        if not error <= allowed:
            raise ValueError(f"the fused model's outputs differ by {error:.2e}, must by {allowed:.2e} or less")
        return error, pairs

    def _run(self) -> list[Tensor]:
        cuda = {value.device.index or 0 for value in self.model.parameters() if value.device.type == "cuda"}
        with evaluating(self.model), torch.random.fork_rng(devices=sorted(cuda)):
            torch.manual_seed(0)  # for models that draw noise themselves
            return [value.clone() for value in _tensors(self.model(*self.args, **self.kwargs))]


def _tensors(value: Any) -> list[Tensor]:
    """Return the floating tensors of an output: a tensor, a sequence, a mapping, or an object with `.sample`."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for part in value.values() for tensor in _tensors(part)]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    sample = getattr(value, "sample", None)
    return [sample] if isinstance(sample, Tensor) else []


def _exact(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return (value.cpu() if value.device.type == "mps" else value).detach().double()


def _error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest magnitude, or the difference itself if `expected` is all zero."""
    if expected.numel() == 0:
        return 0.0
    actual, expected = _exact(actual), _exact(expected)
    scale = float(expected.abs().max()) or 1.0
    error = float((actual - expected).abs().max()) / scale
    return error if math.isfinite(error) else math.inf


def _recorder(
    pairs: dict[nn.Module, Measured], names: dict[nn.Module, str]
) -> tuple[Callable[..., Any], Callable[..., Tensor]]:
    """Return stand-ins for `fastddpm_pair`, which checks its result and notes it in `pairs`, and for the kernel."""
    kernel = FusedModule.fastddpm_kernel
    launched: dict[str, Any] = {}  # the options of the kernel's last call, in this call of the pair

    def launch(*args: Any, **options: Any) -> Tensor:
        launched.update(options)
        return kernel(*args, **options)

    def record(self: Any, norm: Any, silu: Any, x: Any, add: tuple[Any, ...] = (), film: tuple[Any, ...] = ()) -> Any:
        launched.clear()
        actual = FusedModule.fastddpm_pair(self, norm, silu, x, add, film)
        if not launched:
            return actual
        plain, name = unfused(norm, silu, x, add, film), names.get(norm, "a norm")
        if actual.shape != plain.shape or actual.dtype != plain.dtype:
            found, must = f"{actual.dtype} {tuple(actual.shape)}", f"{plain.dtype} {tuple(plain.shape)}"
            raise ValueError(f"{name} with SiLU gives {found}, must give {must}")
        weight, bias = _exact(norm.weight), _exact(norm.bias)
        exact = unfused(
            lambda value: F.group_norm(value, norm.num_groups, weight, bias, norm.eps),
            F.silu,
            _exact(x),
            tuple(_exact(value) for value in add),
            tuple(_exact(value) for value in film),
        )
        error, allowed = _error(actual, exact), FACTOR * _error(plain, exact)
        allowed = max(FLOORS.get(x.dtype, 0.0), FLOORS.get(actual.dtype, 0.0), allowed)
        if not error <= allowed:
            raise ValueError(f"{name} with SiLU differs by {error:.2e}, must by {allowed:.2e} or less")
        measured = pairs.setdefault(norm, Measured())
        measured.calls, measured.error = measured.calls + 1, max(measured.error, error)
        if (done := what(launched["time_bias"] is not None, launched["scale"] is not None)) not in measured.what:
            measured.what.append(done)
        return actual

    return record, launch
