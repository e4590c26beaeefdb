"""fuse leaves alone what it cannot prove, and says why."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusing_networks import Nested, Net, SharedAct, example
from torch import Tensor, nn

from fastddpm.interop.fusing import fuse


class DoubledNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class UsedTwice(Net):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.norm(x)
        y = self.act(h)
        return y + h


class UsedTwiceInOne(Net):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.act(h) * h
        return h


class UsedLater(Net):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for _ in range(2):
            h = self.norm(x)
            y = self.act(h)
            x = y
        return x + h


class SeenByClosure(Net):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.norm(x)
        seen = lambda: h  # noqa: E731
        h = self.norm(x)
        return self.act(h) + seen()


class OtherFirst(Net):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.conv(h)
        h = self.act(h)
        return self.act(-self.norm2(h))


class OtherActivation(Net):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return F.relu(self.norm(x)) + torch.sigmoid(self.norm2(x))


class Effects(Net):
    """Something with an effect on the norm's input runs between the two, or could."""

    def double(self, x: Tensor) -> Tensor:
        return x.mul_(2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = x.clone()
        h = self.norm(x)
        h = self.double(x) + self.act(h)
        return h


class EffectsInside(Effects):
    """The norm's own argument has an effect on what is read before the SiLU is called."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = x.clone()
        h = self.norm(self.double(x))
        h = x * 3 + self.act(h)
        y = self.act((1 + x) * self.norm2(self.double(x)) + 1)
        return h + y


class Caught(Net):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        try:
            h = self.norm(x)
            h = self.act(h)
        except RuntimeError:
            h = x
        return h


class OtherMethod(Net):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.activate(self.norm(x))

    def activate(self, x: Tensor) -> Tensor:
        return self.act(x)


class Private(Net):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.act(self.norm(x)) + self.__one()

    def __one(self) -> int:
        return 1


class Locals(Net):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.act(h)
        return locals()["h"]


class Shadowed(Net):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        swish = torch.tanh
        return swish(self.norm(x))


class NotAffine(Nested):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.GroupNorm(4, 16, affine=False), nn.GroupNorm(4, 16, affine=False)


class OwnForward(Nested):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = DoubledNorm(4, 16), DoubledNorm(4, 16)


class Hooked(Nested):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        for norm in (self.norm, self.norm2):
            norm.register_forward_hook(lambda module, args, output: self.seen.append(output.detach()))


class Replaced(Nested):
    def __init__(self) -> None:
        super().__init__()
        self.forward = lambda x, emb: self.conv(self.act(self.norm(x)))  # type: ignore[method-assign]


LEFT: dict[str, tuple[type[Net], str]] = {
    "used_twice": (UsedTwice, "source of UsedTwice"),
    "used_twice_in_one": (UsedTwiceInOne, "source of UsedTwiceInOne"),
    "used_later": (UsedLater, "source of UsedLater"),
    "seen_by_closure": (SeenByClosure, "source of SeenByClosure"),
    "other_first": (OtherFirst, "source of OtherFirst"),
    "other_activation": (OtherActivation, "source of OtherActivation"),
    "effects": (Effects, "source of Effects"),
    "effects_inside": (EffectsInside, "source of EffectsInside"),
    "caught": (Caught, "source of Caught"),
    "other_method": (OtherMethod, "source of OtherMethod"),
    "private": (Private, "Private.forward: it uses names that are private"),
    "locals": (Locals, "Locals.forward: it calls locals"),
    "shadowed": (Shadowed, "source of Shadowed"),
    "not_affine": (NotAffine, "no weight and bias"),
    "own_forward": (OwnForward, "DoubledNorm has a forward of its own"),
    "hooked": (Hooked, "hooks"),
    "replaced": (Replaced, "Replaced.forward: it was replaced on the module itself"),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_as_it_is(case: str) -> None:
    kind, reason = LEFT[case]
    model, inputs = kind(), example()
    expected = model(*inputs)
    with pytest.warns(UserWarning, match="found nothing to fuse"):
        fused = fuse(model, inputs)
    assert not any(norm.fused for norm in fused.norms)
    assert all(reason in norm.reason for norm in fused.norms), str(fused)
    assert torch.equal(fused.model(*inputs), expected)


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOURCE = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.GroupNorm(2, 4), nn.SiLU()

    def forward(self, x):
        return self.act(self.norm(x))
"""


def test_a_model_that_cannot_be_copied() -> None:
    model = SharedAct()
    model.kept = model.norm.weight * 2
    with pytest.raises(ValueError, match="model cannot be copied .*, must be fused with inplace=True"):
        fuse(model)
    assert fuse(model, inplace=True).norms[0].fused


def test_source_that_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "block.py"
    path.write_text(SOURCE)
    block = load(path, "block_before").Block()
    assert fuse(block).norms[0].fused
    path.write_text(SOURCE.replace("self.act(self.norm(x))", "1 + self.act(self.norm(x))"))
    block = load(path, "block_other").Block()
    path.write_text(SOURCE.replace("self.act(self.norm(x))", "2 + self.act(self.norm(x))"))
    with pytest.warns(UserWarning, match="its source has changed since it was compiled"):
        fuse(block)


def test_no_source() -> None:
    space: dict[str, Any] = {"__name__": "nowhere"}
    exec(SOURCE, space)
    with pytest.warns(UserWarning, match="its source cannot be read"):
        fuse(space["Block"]())
