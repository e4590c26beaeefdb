"""What runs in place of a GroupNorm and the SiLU behind it, and what may be taken for either."""

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
# Forwards of a GroupNorm that computes in float32 whatever comes in, as the kernel does.
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
    """What a rewritten module has beside its class's own attributes; `fuse` puts it before that class.

    The rewritten code calls `fastddpm_pair` with the very modules that it called one by one before. Whether these
    are still what they were when the code was written is asked in every call: if one has been given a hook or been
    replaced, it is called as before.
    """

    fastddpm_original: type[nn.Module]
    fastddpm_backend: str
    fastddpm_norms: tuple[type, ...]
    fastddpm_upcasting: tuple[type, ...]
    fastddpm_silus: tuple[Any, ...]

    fastddpm_kernel = staticmethod(group_norm_silu)

    def fastddpm_pair(
        self, norm: Any, silu: Any, x: Any, add: tuple[Any, ...] = (), film: tuple[Any, ...] = ()
    ) -> Any:
        """`silu(norm(x + add[0]) * (1 + film[0]) + film[1])`, without what is not given; `unfused` says the same.

        Args:
            norm, silu: the modules (or the function) that were called.
            x: [N, C, ...].
            add: nothing, or one value; [N or 1, C, 1, ...] is taken into the kernel, all else is added before it.
            film: nothing, or two values, of that shape for the kernel; with others the modules are called.
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
            # The norm would be given float32, and what follows would be float32 too.
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
    """The same in single steps, as the code said before it was rewritten."""
    for value in add:
        x = x + value
    x = norm(x)
    if film:
        x = x * (1 + film[0]) + film[1]
    return silu(x)


def what(adds: bool, film: bool) -> str:
    """A pair in words."""
    return ("add + " if adds else "") + "GroupNorm + " + ("scale and shift + " if film else "") + "SiLU"


def takes(fused: FusedModule, norm: Any, silu: Any) -> bool:
    """Whether the two are, in this call, what the kernel computes."""
    if type(norm) not in fused.fastddpm_norms or norm.weight is None or norm.bias is None or _is_watched(norm):
        return False
    if isinstance(silu, nn.Module):
        return type(silu) in fused.fastddpm_silus and not _is_watched(silu)
    return any(silu is known for known in fused.fastddpm_silus)


def why_not(norm: nn.GroupNorm) -> str | None:
    """Why a GroupNorm cannot be computed by the kernel, whatever follows it; or None."""
    if norm.weight is None or norm.bias is None:
        return "it has no weight and bias (the kernel takes an affine norm)"
    if type(norm).forward is not nn.GroupNorm.forward and not is_upcasting(type(norm)):
        return f"{type(norm).__name__} has a forward of its own"
    if _is_watched(norm):
        return "it has hooks, or a forward of its own, which must see its output"
    return None


def is_upcasting(kind: type) -> bool:
    """Whether a subclass of GroupNorm does nothing but compute in float32 (guided-diffusion's GroupNorm32)."""
    return issubclass(kind, nn.GroupNorm) and _returns(kind.forward, UPCASTS)


def is_silu(value: Any) -> bool:
    """Whether a module or function is SiLU, x * sigmoid(x), and says so: by its identity or by its whole source."""
    if isinstance(value, nn.Module):
        known = type(value) is nn.SiLU or _returns(type(value).forward, SWISHES)
        return known and not _is_watched(value)
    return value is F.silu or (inspect.isfunction(value) and _returns(value, SWISHES))


def _autocast_to_float32(device_type: str) -> bool:
    """Whether autocast is on and has group_norm among what it computes in float32; on the CPU it has not."""
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
    """A value per sample and channel as [N, C], if it is one: [N or 1, C, 1, ...] of x's dtype and device."""
    if not isinstance(value, Tensor) or not isinstance(x, Tensor):
        return None
    if value.dtype != x.dtype or value.device != x.device or value.ndim != x.ndim or x.ndim < 2:
        return None
    if value.shape[0] not in (1, x.shape[0]) or value.shape[1] != x.shape[1] or any(n != 1 for n in value.shape[2:]):
        return None
    return value.flatten(1).expand(x.shape[0], x.shape[1])


@functools.lru_cache(maxsize=4096)
def _returns(function: Callable[..., Any], expressions: tuple[str, ...]) -> bool:
    """Whether all that a function of one argument (beside self) does is to return one of these expressions of x."""
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
    """Whether the modules that an expression names are torch's."""
    known = {"torch": torch, "F": F, "nn": nn}
    space = getattr(function, "__globals__", {})
    names = {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
    return all(space.get(name) is module for name, module in known.items() if name in names)
