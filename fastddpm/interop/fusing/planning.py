"""The plan for each module of a model, a report for each of its norms, and the classes that carry out the plan."""

from __future__ import annotations

import ast
import copy
import copyreg
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastddpm.interop.fusing.pair import FusedModule, is_silu, is_upcasting, why_not
from fastddpm.interop.fusing.rewriting import Rewriter, Site
from fastddpm.interop.fusing.source import NotReadable, read, write


@dataclass(frozen=True)
class NormReport:
    """A report on one GroupNorm: whether it is fused, and why or why not.

    Attributes:
        name: of the norm, in the model.
        fused: whether the kernel computes it together with a SiLU after it.
        what: the operations that the kernel computes (with an example: in its calls); "" if none.
        where: the methods that call it.
        reason: why it is not fused; "" if it is.
        calls: how often the fused pair ran on the example; None without an example.
        error: the largest difference from float64 in these calls, relative to the largest magnitude; None without an
            example.
    """

    name: str
    fused: bool
    what: str = ""
    where: str = ""
    reason: str = ""
    calls: int | None = None
    error: float | None = None

    def __str__(self) -> str:
        if not self.fused:
            return f"{self.name}: not fused: {self.reason}"
        if self.calls is None:
            return f"{self.name}: {self.what} in {self.where}, not verified: no example_inputs"
        if self.calls == 0:
            return f"{self.name}: {self.what} in {self.where}, not verified: not run as one on the example"
        return f"{self.name}: {self.what} in {self.where}, {self.calls} calls, error {self.error:.1e}"


@dataclass
class _Plan:
    """The plan for one module: its new methods, and the pairs in each."""

    methods: dict[str, Callable[..., Any]]
    trees: tuple[str, ...]
    sites: dict[str, list[Site]]
    problems: dict[str, str]


class Plans:
    """The plan of every module of a model."""

    def __init__(self, model: nn.Module, backend: str) -> None:
        self.model, self.backend = model, backend
        self.plans = {module: _plan(module) for module in model.modules() if not isinstance(module, nn.GroupNorm)}

    def apply(self) -> list[nn.Module]:
        """Give every module that has a pair its new class, and return these modules."""
        classes: dict[Any, type] = {}
        fused = []
        for module, plan in self.plans.items():
            sites = [site for found in plan.sites.values() for site in found]
            if not sites:
                continue
            norms = tuple(sorted({type(site.norm) for site in sites}, key=str))
            silus = tuple(dict.fromkeys(site.silu for site in sites))
            key = (type(module), plan.trees, norms, silus)
            if key not in classes:
                classes[key] = _fused_class(type(module), plan.methods, norms, silus, self.backend)
            module.__class__ = classes[key]
            fused.append(module)
        return fused

    def reports(self) -> list[NormReport]:
        """Return a report for each norm, in the model's order."""
        found: dict[nn.Module, list[tuple[str, str]]] = {}
        for module, plan in self.plans.items():
            for method, sites in plan.sites.items():
                for site in sites:
                    found.setdefault(site.norm, []).append((site.what, f"{type(module).__name__}.{method}"))
        rows = []
        for name, norm in self.model.named_modules():
            if not isinstance(norm, nn.GroupNorm):
                continue
            if norm in found:
                what, where = (" or ".join(dict.fromkeys(texts)) for texts in zip(*found[norm], strict=True))
                rows.append(NormReport(name, True, what, where))
            else:
                rows.append(NormReport(name, False, reason=why_not(norm) or self._why_no_pair(norm)))
        return rows

    def _why_no_pair(self, norm: nn.GroupNorm) -> str:
        owners = [module for module in self.plans if norm in module._modules.values()]
        problems = [
            f"{type(owner).__name__}.{method}: {problem}"
            for owner in owners
            for method, problem in self.plans[owner].problems.items()
        ]
        if problems:
            return "; ".join(dict.fromkeys(problems))
        kinds = dict.fromkeys(type(o).__name__ for o in owners if not isinstance(o, (nn.ModuleList, nn.ModuleDict)))
        names = " or ".join(kinds) or "the modules around it"
        return f"no SiLU follows it and alone reads its output, as far as the source of {names} shows"


def _plan(module: nn.Module) -> _Plan:
    plan = _Plan({}, (), {}, {})
    kind = type(module)
    if "forward" in module.__dict__:
        plan.problems["forward"] = "it was replaced on the module itself"
        return plan
    if kind.forward is nn.Sequential.forward:
        parts = list(module._modules.values())
        pairs = [
            Site(norm, type(silu), False, False)
            for norm, silu in itertools.pairwise(parts)
            if isinstance(norm, nn.GroupNorm) and why_not(norm) is None and is_silu(silu)
        ]
        if pairs:
            plan.sites["forward"], plan.methods["forward"] = pairs, _sequential_forward
        return plan
    names = {name for name, child in module._modules.items() if child is not None and _has_norm(child)}
    for name, function in _methods(kind) if names else ():
        try:
            code = getattr(_innermost(function), "__code__", None)
            if code is None or not names & set(code.co_names):
                continue
            rewriter = Rewriter(module, read(function), lambda norm: why_not(norm) is None)
            tree = rewriter.run()
            if rewriter.sites:
                plan.methods[name] = write(function, tree)
                plan.sites[name] = rewriter.sites
                plan.trees += (f"{name}: {ast.unparse(tree)}",)
        except NotReadable as error:
            plan.problems[name] = str(error)
    return plan


def _methods(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    """Return the methods that a module's own classes define, without torch's and without overridden ones."""
    seen: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith("torch.nn.") or base is object:
            return
        for name, value in vars(base).items():
            if name not in seen and isinstance(value, types.FunctionType) and not name.startswith("__"):
                yield name, value
            seen.add(name)


def _innermost(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _has_norm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.GroupNorm) for part in module.modules())


def _sequential_forward(self: Any, input: Any) -> Any:
    """Run nn.Sequential's forward with pairs."""
    modules, i = list(self), 0
    while i < len(modules):
        if i + 1 < len(modules) and isinstance(modules[i], nn.GroupNorm):
            input = self.fastddpm_pair(modules[i], modules[i + 1], input)
            i += 2
        else:
            input = modules[i](input)
            i += 1
    return input


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    replica = self.__new__(type(self))
    memo[id(self)] = replica
    replica.__setstate__(copy.deepcopy(self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__, memo))
    return replica


def _reduce(self: Any, protocol: Any) -> Any:
    """Reduce as the original class does, so that unpickling a model does not need this package."""
    plain = self.__new__(self.fastddpm_original)
    plain.__dict__.update(self.__dict__)
    function, arguments, *rest = plain.__reduce_ex__(protocol)
    if function is copyreg.__newobj__:  # type: ignore[attr-defined]  # pickle wants the class of the object itself there
        function, arguments = copyreg._reconstructor, (self.fastddpm_original, object, None)  # type: ignore[attr-defined]
    return (function, arguments, *rest)


def _fused_class(
    original: type,
    methods: dict[str, Callable[..., Any]],
    norms: tuple[type, ...],
    silus: tuple[Any, ...],
    backend: str,
) -> type:
    """Return a subclass that has the name of its base and other methods."""
    space: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "fastddpm_original": original,
        "fastddpm_backend": backend,
        "fastddpm_norms": norms,
        "fastddpm_upcasting": tuple(norm for norm in norms if norm is not nn.GroupNorm and is_upcasting(norm)),
        "fastddpm_silus": silus,
        **methods,
    }
    if not hasattr(original, "__deepcopy__"):
        space["__deepcopy__"] = _deepcopy
    return type(original)(original.__name__, (FusedModule, original), space)
