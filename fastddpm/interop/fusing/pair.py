"""The call that replaces a GroupNorm and the SiLU after it, and the tests that recognise the two."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fastddpm_kernels.group_norm_silu import DTYPES, group_norm_silu
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)
AUTOCAST_NORMS = ("cuda", "xpu", "mps")
# Forwards of a GroupNorm that computes in float32 for any input dtype, as the kernel does.
UPCASTS = (
    "super().forward(x.float()).type(x.dtype)",
    "super().forward(x.float()).to(x.dtype)",
    "super().forward(x.float()).type_as(x)",
)
SWISHES = (
    "x * torch.sigmoid(x)",
    "torch.sigmoid(x) * x",
    "x * x.sigmoid()",
    "x.sigmoid() * x",
    "x * F.sigmoid(x)",
    "F.silu(x)",
    "torch.nn.functional.silu(x)",
    "nn.functional.silu(x)",
)


class FusedModule:
    """The base that `fuse` adds before the class of a rewritten module.

    The rewritten code calls `fastddpm_pair` with the modules that it called one by one before. Every call checks that
    they are still as they were when the code was rewritten: a module that was replaced or has got a hook is called
    as before.
    """

    fastddpm_original: type[nn.Module]
    fastddpm_backend: str
    fastddpm_norms: tuple[type, ...]
    fastddpm_upcasting: tuple[type, ...]
    fastddpm_silus: tuple[Any, ...]

    fastddpm_kernel = staticmethod(group_norm_silu)

    def fastddpm_pair(self, norm: Any, silu: Any, x: Any, add: tuple[Any, ...] = (), film: tuple[Any, ...] = ()) -> Any:
        """Compute `silu(norm(x + add[0]) * (1 + film[0]) + film[1])` without the parts not given, as `unfused` does.

        Args:
            norm, silu: the modules (or the function) that were called.
            x: [N, C, ...].
            add: nothing, or one value. The kernel adds one of [N or 1, C, 1, ...]; any other is added before it.
            film: nothing, or two values. The kernel takes two of that shape; with any others the modules are called.
        """
        if not takes(self, norm, silu):
            return unfused(norm, silu, x, add, film)
        upcasts = type(norm) in self.fastddpm_upcasting
        bias = _row(add[0], x) if add else None
        if add and bias is None:
            x, add = x + add[0], ()
        if not isinstance(x, Tensor) or x.ndim < 2 or x.dtype not in DTYPES:
            return unfused(norm, silu, x, add, film)
        scale, shift = (_row(film[0], x), _row(film[1], x)) if film else (None, None)
        if film and (scale is None or shift is None):
            return unfused(norm, silu, x if bias is None else x + add[0], (), film)
        if x.dtype in HALVES and not upcasts and _autocast_to_float32(x.device.type):
            # Autocast would give the norm float32, and every later value would be float32 too.
            if bias is not None:
                x, bias = x + add[0], None
            x = x.float()
            scale, shift = (None, None) if scale is None or shift is None else (scale.float(), shift.float())
        return self.fastddpm_kernel(
            x,
            norm.weight,
            norm.bias,
            norm.num_groups,
            eps=norm.eps,
            time_bias=bias,
            scale=scale,
            shift=shift,
            backend=self.fastddpm_backend,
        )


def unfused(norm: Any, silu: Any, x: Any, add: tuple[Any, ...] = (), film: tuple[Any, ...] = ()) -> Any:
    """Compute `FusedModule.fastddpm_pair` in single steps, as the code did before it was rewritten."""
    for value in add:
        x = x + value
    x = norm(x)
    if film:
        x = x * (1 + film[0]) + film[1]
    return silu(x)


def what(adds: bool, film: bool) -> str:
    """Return the name of a pair for reports."""
    return ("add + " if adds else "") + "GroupNorm + " + ("scale and shift + " if film else "") + "SiLU"


def takes(fused: FusedModule, norm: Any, silu: Any) -> bool:
    """Return whether the kernel can compute this norm and SiLU in this call."""
    if type(norm) not in fused.fastddpm_norms or norm.weight is None or norm.bias is None or _is_watched(norm):
        return False
    if isinstance(silu, nn.Module):
        return type(silu) in fused.fastddpm_silus and not _is_watched(silu)
    return any(silu is known for known in fused.fastddpm_silus)


def why_not(norm: nn.GroupNorm) -> str | None:
    """Return why the kernel cannot compute a GroupNorm, whatever follows it; None if it can."""
    if norm.weight is None or norm.bias is None:
        return "it has no weight and bias (the kernel takes an affine norm)"
    if type(norm).forward is not nn.GroupNorm.forward and not is_upcasting(type(norm)):
        return f"{type(norm).__name__} has a forward of its own"
    if _is_watched(norm):
        return "it has hooks, or a forward of its own, which must see its output"
    return None


def is_upcasting(kind: type) -> bool:
    """Return whether a subclass of GroupNorm only adds computing in float32 (guided-diffusion's GroupNorm32)."""
    return issubclass(kind, nn.GroupNorm) and _returns(kind.forward, UPCASTS)


def is_silu(value: Any) -> bool:
    """Return whether a module or function is SiLU, x * sigmoid(x), by its identity or by its whole source."""
    if isinstance(value, nn.Module):
        known = type(value) is nn.SiLU or _returns(type(value).forward, SWISHES)
        return known and not _is_watched(value)
    return value is F.silu or (inspect.isfunction(value) and _returns(value, SWISHES))


def _autocast_to_float32(device_type: str) -> bool:
    """Return whether autocast is on and computes group_norm in float32; on the CPU it does not."""
    return device_type in AUTOCAST_NORMS and torch.is_autocast_enabled(device_type)


def _is_watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _row(value: Any, x: Tensor) -> Tensor | None:
    """Return a value per sample and channel, [N or 1, C, 1, ...] of x's dtype and device, as [N, C]; else None."""
    if not isinstance(value, Tensor) or not isinstance(x, Tensor):
        return None
    if value.dtype != x.dtype or value.device != x.device or value.ndim != x.ndim or x.ndim < 2:
        return None
    if value.shape[0] not in (1, x.shape[0]) or value.shape[1] != x.shape[1] or any(n != 1 for n in value.shape[2:]):
        return None
    return value.flatten(1).expand(x.shape[0], x.shape[1])


@functools.lru_cache(maxsize=4096)
def _returns(function: Callable[..., Any], expressions: tuple[str, ...]) -> bool:
    """Return whether a function of one argument (beside self) only returns one of these expressions of x."""
    if hasattr(function, "__wrapped__"):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return False
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        return False
    names = [argument.arg for argument in tree.args.args]
    names = names[1:] if names[:1] == ["self"] else names
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    if len(names) != 1 or len(body) != 1 or not isinstance(body[0], ast.Return) or body[0].value is None:
        return False
    value = body[0].value
    if not _means_torch(value, function):
        return False
    for node in ast.walk(value):
        if isinstance(node, ast.Name) and node.id == names[0]:
            node.id = "x"
    return ast.unparse(value) in expressions


def _means_torch(value: ast.expr, function: Callable[..., Any]) -> bool:
    """Return whether the modules that an expression names are torch's."""
    known = {"torch": torch, "F": F, "nn": nn}
    space = getattr(function, "__globals__", {})
    names = {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
    return all(space.get(name) is module for name, module in known.items() if name in names)
