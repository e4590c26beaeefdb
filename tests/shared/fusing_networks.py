"""Networks that people could write, which several files of tests fuse: styles of a norm and what follows it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.interop.fusing import Fused

PLAIN, ADD, FILM = "GroupNorm + SiLU", "add + GroupNorm + SiLU", "GroupNorm + scale and shift + SiLU"
BOTH = "add + GroupNorm + scale and shift + SiLU"


def swish(x: Tensor) -> Tensor:
    """Swish."""
    return x * torch.sigmoid(x)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class GroupNorm32(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


def traced(name: str) -> Callable[[Any], Any]:
    """A decorator that notes its calls on the module."""

    def decorate(method: Any) -> Any:
        @functools.wraps(method)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.notes = [*getattr(self, "notes", []), name]
            return method(self, *args, **kwargs)

        return wrapper

    return decorate


class Net(nn.Module):
    """What the hand-written networks share: [N, 16, ...] and an embedding [N, 8] to [N, 16, ...]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.GroupNorm(4, 16), nn.GroupNorm(2, 16)
        self.act = nn.SiLU()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.emb, self.emb2 = nn.Linear(8, 16), nn.Linear(8, 32)
        for norm in (self.norm, self.norm2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)


class Nested(Net):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(self.conv(self.act(self.norm2(x))))))


class SharedAct(Net):
    """As in diffusers' ResnetBlock2D: one SiLU for two norms and the embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.act(h)
        h = self.conv(h)
        h = h + self.emb(self.act(emb))[:, :, None, None]
        h = self.norm2(h)
        h = self.act(h)
        return x + self.conv(h)


class Names(Net):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        normalised = self.norm(x)
        y = torch.nn.functional.silu(normalised, inplace=True)
        y = self.norm2(self.conv(y))
        return self.act(y)


class Film(Net):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb2(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(x) * (1 + scale) + shift
        h = self.conv(swish(h))
        h = self.norm2(h)
        h = (scale + 1) * h + shift
        return self.act(h)


class AddAndFilm(Net):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb2(emb[:1])[:, :, None, None].chunk(2, dim=1)  # one row for all samples
        return self.act(self.norm(self.conv(x) + self.emb(emb)[:, :, None, None]) * (1 + scale) + shift) + self.norm2(x)


class Branches(Net):
    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        h = self.conv(x)
        if emb is not None:
            emb = self.emb(emb)[:, :, None, None]
            h = h + emb
        h = self.norm(h)
        h = self.act(h)
        if x.shape[0] > 100:
            return x
        elif x.shape[1] == 16:
            h = self.norm2(h)
        else:
            h = self.conv(h)
        h = self.act(h)
        return h


class Full(Net):
    """Adds and scales by values per pixel, which the kernel does not take."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.act(self.norm(x + self.conv(x)))
        return self.act(self.norm2(h) * (1 + x) + x)


class Methods(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([self.norm, self.norm2])
        self.swish = Swish()

    @traced("forward")
    @torch.no_grad()
    def forward(self, x: Tensor, emb: Tensor, *, power: float = 1.0) -> Tensor:
        return self.block(x) ** power

    def block(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.swish(self.norms[0](x))
        with torch.enable_grad():
            x = self.norms[-1](x)
            x = self.swish(x)
        return x + self.extra()

    def extra(self) -> float:
        return 0.5


class Inherited(Methods):
    def extra(self) -> float:
        return super().extra() + 1  # needs the cell of __class__


class Upcast(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(GroupNorm32(4, 16), Swish(), self.conv, self.norm, nn.SiLU(True), nn.Identity())
        del self.norm2

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        rest = self.layers[1:]
        return self.layers(x) + rest(self.layers[0](x))  # the norm alone, and what is behind it


# The network, and what is fused of `norm` and `norm2` (or the names given).
STYLES: dict[str, tuple[type[Net], dict[str, str]]] = {
    "nested": (Nested, {"norm": PLAIN, "norm2": PLAIN}),
    "shared_act": (SharedAct, {"norm": PLAIN, "norm2": ADD}),
    "names": (Names, {"norm": PLAIN, "norm2": PLAIN}),
    "film": (Film, {"norm": FILM, "norm2": FILM}),
    "add_and_film": (AddAndFilm, {"norm": BOTH}),
    "branches": (Branches, {"norm": ADD, "norm2": PLAIN}),
    "full": (Full, {"norm": PLAIN}),
    "methods": (Methods, {"norm": PLAIN, "norm2": PLAIN}),
    "inherited": (Inherited, {"norm": PLAIN, "norm2": PLAIN}),
    "upcast": (Upcast, {"layers.0": PLAIN, "norm": PLAIN}),
}


def example(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 16, 5, 4, dtype=dtype), torch.randn(3, 8, dtype=dtype)


def exactly(model: nn.Module) -> nn.Module:
    """The model in float64; in all of it."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if isinstance(module, GroupNorm32):
            module.__class__ = nn.GroupNorm
    return exact


def done(fused: Fused) -> dict[str, str]:
    """What ran as one on the example, by norm."""
    return {norm.name: norm.what for norm in fused.norms if norm.calls}


def grads(model: nn.Module, *args: Tensor) -> list[Tensor]:
    args = tuple(value.clone().requires_grad_() for value in args)
    parameters = [p for p in model.parameters()]
    model(*args).square().mean().backward()
    result = [value.grad for value in (*args, *parameters)]
    model.zero_grad(set_to_none=True)
    return [torch.zeros(()) if value is None else value for value in result]
