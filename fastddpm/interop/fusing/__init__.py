"""The norm kernels in any model: `fuse` finds each GroupNorm followed by a SiLU and computes both in one kernel.

    fused = fuse(model, example_inputs=(x, t))
    print(fused)                                        # what was fused, what was not, and why
    Sampler(fused.model, schedule).sample(16, seed=0)

Modules, parameters, state dict keys and hooks stay as they are. Only the methods that call a norm and a SiLU change
(`rewriting`): they call `group_norm_silu` with the norm's own parameters. Training, `torch.compile`, CUDA graphs,
`to()` and `deepcopy` work as before. Pickling saves the plain model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from fastddpm_kernels.backend import why_not as why_not_backend
from torch import Tensor, nn

from fastddpm.interop.fusing.pair import FusedModule
from fastddpm.interop.fusing.planning import NormReport, Plans
from fastddpm.interop.fusing.verifying import Measured, Verifier

__all__ = ["Fused", "NormReport", "fuse"]


class Fused:
    """A model whose norms are fused. `undo` restores it, and so does leaving the object as a context manager.

    Attributes:
        model: the model: a copy of the one given to `fuse`, or that one itself with `inplace`.
        norms: a report for each GroupNorm of the model.
        error: the largest difference between the model's outputs on the example before and after fusing, relative to
            the largest magnitude before; None without an example.
    """

    def __init__(self, model: nn.Module, norms: Sequence[NormReport], fused: Sequence[nn.Module]) -> None:
        self.model, self.norms = model, tuple(norms)
        self.error: float | None = None
        self._fused = [(module, type(module)) for module in fused]

    def undo(self) -> nn.Module:
        """Restore `model` to what it was before, and return it. A second call does nothing.

        Raises:
            RuntimeError: something else has changed a module's class since; nothing is undone.
        """
        changed = [module for module, kind in self._fused if type(module) is not kind]
        if changed:
            raise RuntimeError(f"the class of a {type(changed[0]).__name__} was changed after fuse, must be fuse's own")
        for module, kind in self._fused:
            module.__class__ = kind.fastddpm_original  # type: ignore[attr-defined]
        self._fused = []
        return self.model

    def __enter__(self) -> Fused:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        count = sum(norm.fused for norm in self.norms)
        verified = "not verified" if self.error is None else f"outputs differ by {self.error:.1e}"
        head = f"{type(self.model).__name__}: {count} of {len(self.norms)} GroupNorms fused with SiLU, {verified}"
        return "\n".join([head, *(f"  {norm}" for norm in self.norms)])


def fuse(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    backend: str = "auto",
    tolerance: float | None = None,
    inplace: bool = False,
) -> Fused:
    """Fuse each GroupNorm and the SiLU that alone reads its result into one kernel, in any model.

    A pair is found in an `nn.Sequential`, or in the source of a module's methods, where `self.norm(x)` is followed by
    a SiLU (a module, `torch.nn.functional.silu`, or code that is x * sigmoid(x) and nothing else). The kernel also
    computes `norm(x) * (1 + scale) + shift` and `norm(x + embedding)` if scale, shift and embedding are values per
    sample and channel, [N, C, 1, ...]. It does not round in between, so half precision loses less.

    Some norms are not fused but reported with the reason: those that are not affine, have hooks or a forward of their
    own, whose result has another reader, whose SiLU is called in another method, or that a method's source does not
    show. Calls of the function `group_norm` are not searched. A module whose parts change afterwards (a hook, another
    norm) runs as written.

    Args:
        model: any module. With `torch.compile`: fuse first.
        example_inputs: the arguments to call the model with: one tensor, a sequence of positional arguments, or a
            mapping of keyword arguments. With an example, everything is verified in eval mode and without gradients:
            each pair against float64 on its inputs in the model, and the model's outputs against those before.
        backend: of `group_norm_silu`: "auto", "triton", "eager" or "reference".
        tolerance: the largest allowed difference of outputs, relative to the largest magnitude; None for 1e-10 in
            float64, 1e-4 in float32, 2e-2 in float16 and 1e-1 in bfloat16.
        inplace: change the model itself, not a copy.

    Returns:
        `Fused`: its `model`, the reports on its `norms`, and `undo()`. Forward-mode derivatives and global module
        hooks do not go through the pairs.

    Raises:
        TypeError: the model is not a module, or cannot be called with the example.
        ValueError: the model is fused or compiled already or cannot be copied, or an argument is not known or out of
            range. With an example also: a fused result differs by more than is allowed or is not finite. The model is
            then as before.
        BackendError: the named backend cannot run on the example's device.
    """
    _check(model, example_inputs, backend, tolerance)
    model = model if inplace else _copy(model)
    plans = Plans(model, backend)
    verifier = None
    if example_inputs is not None:
        verifier = Verifier(model, example_inputs, tolerance)
    fused = Fused(model, plans.reports(), plans.apply())
    if verifier is not None:
        try:
            fused.error, pairs = verifier.compare([module for module, _ in fused._fused])
        except BaseException:
            fused.undo()
            raise
        fused.norms = tuple(_with_measured(norm, pairs.get(model.get_submodule(norm.name))) for norm in fused.norms)
    if not any(norm.fused for norm in fused.norms):
        warnings.warn(f"fuse found nothing to fuse in this model: {fused}", stacklevel=2)
    return fused


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"model cannot be copied ({error}), must be fused with inplace=True") from error


def _with_measured(norm: NormReport, measured: Measured | None) -> NormReport:
    if not norm.fused:
        return norm
    if measured is None:
        return replace(norm, calls=0)
    return replace(norm, what=" or ".join(measured.what), calls=measured.calls, error=measured.error)


def _check(model: Any, example_inputs: Any, backend: str, tolerance: float | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, must be an nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a ScriptModule, must be a module whose methods are Python")
    if hasattr(model, "_orig_mod"):
        raise ValueError("model is compiled already, must be fused before torch.compile")
    if any(isinstance(module, FusedModule) for module in model.modules()):
        raise ValueError("model is fused already, must be plain: undo() the first")
    if backend != "auto":
        why_not_backend(backend, "cpu")  # raises if it is not known
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}, must be >= 0")
    if not (example_inputs is None or isinstance(example_inputs, (Tensor, Sequence, Mapping))) or isinstance(
        example_inputs, str
    ):
        kind = type(example_inputs).__name__
        raise TypeError(f"example_inputs is a {kind}, must be a tensor, a sequence of arguments or a mapping of them")
