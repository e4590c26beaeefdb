"""fuse computes what the model did, undoes it exactly, and leaves alone what it cannot prove."""

from __future__ import annotations

import copy
import functools
import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels._backend import BackendError
from fastddpm_kernels.group_norm_silu import group_norm_silu
from fastddpm_kernels.testing import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastddpm.fusing import Fused, fuse, pair
from fastddpm.fusing.pair import FusedModule
from fastddpm.sampler import Sampler
from fastddpm.schedule import NoiseSchedule

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


class DoubledNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


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


@pytest.mark.parametrize("style", STYLES)
def test_styles(style: str, backend: str) -> None:
    kind, expected = STYLES[style]
    model, inputs = kind(), example()
    fused = fuse(model, inputs, backend=backend)
    assert done(fused) == expected, str(fused)
    assert fused.error is not None
    assert fused.error < 1e-5
    exact = exactly(model)(*(value.double() for value in inputs))
    assert_close(fused.model(*inputs), exact, eager=model(*inputs), factor=4)


@pytest.mark.parametrize("style", [style for style in STYLES if style not in ("methods", "inherited")])
def test_gradients(style: str, backend: str) -> None:
    model, inputs = STYLES[style][0](), example()
    fused = fuse(model, backend=backend).model
    exact = grads(exactly(model), *(value.double() for value in inputs))
    for new, old, true in zip(grads(fused, *inputs), grads(model, *inputs), exact, strict=True):
        assert_close(new, true, eager=old, factor=4)


@pytest.mark.parametrize("style", STYLES)
def test_undo(style: str) -> None:
    model, inputs = STYLES[style][0](), example()
    before = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
    keys, out = list(model.state_dict()), model(*inputs)
    fused = fuse(model, backend="reference", inplace=True)
    assert fused.model is model
    assert list(model.state_dict()) == keys
    assert any(isinstance(module, FusedModule) for module in model.modules())
    assert isinstance(model, STYLES[style][0])
    model(*inputs)
    assert fused.undo() is model
    assert fused.undo() is model
    after = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
    after = {name: (kind, names - {"notes"}) for name, (kind, names) in after.items()}
    assert after == {name: (kind, names - {"notes"}) for name, (kind, names) in before.items()}
    assert torch.equal(model(*inputs), out)


def test_a_copy_by_default() -> None:
    model = SharedAct()
    with fuse(model) as fused:
        assert type(fused.model) is not SharedAct
        assert type(model) is SharedAct
        assert fused.model.norm.weight is not model.norm.weight
    assert type(fused.model) is SharedAct


# What must stay as it is, and why.


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


# Models of diffusers.


def unet(**options: Any) -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 24),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        **options,
    ).eval()


def conditional_unet() -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 24),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()


def unet_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 8, 8), torch.tensor([3, 700])


RESNETS: dict[str, tuple[dict[str, Any], str]] = {
    "default": ({}, ADD),
    "scale_shift": ({"resnet_time_scale_shift": "scale_shift"}, FILM),
    "resnet_sampling": ({"downsample_type": "resnet", "upsample_type": "resnet"}, ADD),
}


@pytest.mark.parametrize("case", RESNETS)
def test_unet2d(case: str, backend: str) -> None:
    options, second = RESNETS[case]
    model, (x, t) = unet(**options), unet_inputs()
    fused = fuse(model, (x, t), backend=backend)
    left = [norm.name for norm in fused.norms if not norm.fused]
    assert left
    assert all(name.endswith("group_norm") for name in left)  # of attention: no SiLU
    for name, what in done(fused).items():
        assert what == (second if name.endswith("norm2") else PLAIN)
    assert len(done(fused)) + len(left) == len(fused.norms)
    exact = exactly(model)(x.double(), t).sample
    with torch.no_grad():
        assert_close(fused.model(x, t).sample, exact, eager=model(x, t).sample, factor=4)


def test_unet2d_condition(backend: str) -> None:
    model = conditional_unet()
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": 7, "encoder_hidden_states": torch.randn(2, 5, 8)}
    fused = fuse(model, inputs, backend=backend)
    left = [norm.name for norm in fused.norms if not norm.fused]
    assert len(left) == 4
    assert all("attentions" in name for name in left)
    assert done(fused)["conv_norm_out"] == PLAIN  # beneath a decorator
    assert done(fused)["mid_block.resnets.0.norm2"] == ADD
    assert fused.error is not None
    assert fused.error < 1e-5
    assert fused.model.config == model.config
    exact = exactly(model)
    doubled = {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with torch.no_grad():
        assert_close(
            fused.model(**inputs).sample, exact(**doubled).sample, eager=model(**inputs).sample, factor=4
        )


def test_saves_as_before(tmp_path: Path) -> None:
    model, inputs = unet(), unet_inputs()
    fused = fuse(model).model
    fused.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert type(loaded) is diffusers.UNet2DModel
    assert torch.equal(loaded(*inputs).sample, model(*inputs).sample)


def test_sampler_takes_it() -> None:
    model, schedule = unet(), NoiseSchedule.linear(100)
    plain = Sampler(model, schedule, num_inference_steps=3).sample(2, seed=0, shape=(3, 8, 8))
    fused = Sampler(fuse(model).model, schedule, num_inference_steps=3).sample(2, seed=0, shape=(3, 8, 8))
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5)


# What is done to the model afterwards.


def test_hooks_and_parts_changed_afterwards() -> None:
    model, (x, emb) = SharedAct(), example()
    fused, seen = fuse(model).model, []
    handle = fused.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    out = fused(x, emb)
    assert torch.equal(seen[0], model.norm(x))
    handle.remove()
    torch.testing.assert_close(fused(x, emb), out)
    assert len(seen) == 1
    fused.norm, model.norm = nn.Identity(), nn.Identity()
    fused.act = model.act = nn.ReLU()
    assert torch.equal(fused(x, emb), model(x, emb))


def test_copies_and_pickles() -> None:
    model, inputs = Upcast(), example()
    fused = fuse(model).model
    copied = copy.deepcopy(fused)
    assert isinstance(copied.layers, FusedModule)
    assert copied.layers[0].weight is not fused.layers[0].weight
    assert torch.equal(copied(*inputs), fused(*inputs))
    loaded = pickle.loads(pickle.dumps(fused))
    assert type(loaded) is Upcast
    assert not any(isinstance(module, FusedModule) for module in loaded.modules())
    assert torch.equal(loaded(*inputs), model(*inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("style", ["shared_act", "film", "add_and_film", "branches"])
def test_dtypes(style: str, dtype: torch.dtype) -> None:
    model, inputs = STYLES[style][0](), example()
    exact = exactly(model)(*(value.double() for value in inputs))
    model, inputs = model.to(dtype), tuple(value.to(dtype) for value in inputs)
    fused = fuse(model, inputs)
    assert done(fused) == STYLES[style][1]
    out = fused.model(*inputs)
    assert out.dtype == dtype
    assert_close(out, exact, eager=model(*inputs))


@pytest.mark.parametrize("style", STYLES)
def test_autocast(style: str) -> None:
    model, (x, emb) = STYLES[style][0](), example()
    fused = fuse(model).model
    with torch.autocast("cpu", torch.bfloat16):
        x = F.conv2d(x, torch.eye(16)[:, :, None, None])
        assert x.dtype == torch.bfloat16
        plain, new = model(x, emb), fused(x, emb)
    assert new.dtype == plain.dtype
    exact = exactly(model)(x.double(), emb.double())
    assert_close(new, exact, eager=plain, dtype=torch.bfloat16)


def test_autocast_that_computes_norms_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's does; here a device that does is made of the CPU, and its norm is given float32 by hand."""
    monkeypatch.setattr(pair, "AUTOCAST_NORMS", ("cpu",))
    model, (x, _) = Film(), example(torch.bfloat16)
    scale = torch.randn(3, 16, 1, 1, dtype=torch.bfloat16)
    fused = fuse(model).model
    assert isinstance(fused, FusedModule)
    with torch.autocast("cpu", torch.bfloat16):
        out = fused.fastddpm_pair(fused.norm, swish, x, add=(scale,), film=(scale, scale))
        plain = pair.unfused(lambda value: model.norm(value.float()), swish, x, (scale,), (scale, scale))
    assert out.dtype == plain.dtype == torch.float32
    double = scale.double()
    exact = pair.unfused(exactly(model).norm, swish, (x + scale).double(), (), (double, double))
    assert_close(out, exact)
    assert_close(plain, exact, dtype=torch.bfloat16)  # 1 + scale is rounded


@pytest.mark.gpu
@pytest.mark.parametrize("style", ["nested", "shared_act", "film", "branches", "upcast"])
def test_on_a_gpu(style: str) -> None:
    model, inputs = STYLES[style][0]().cuda(), tuple(value.cuda() for value in example())
    fused = fuse(model, inputs)
    assert done(fused) == STYLES[style][1]
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        plain, new = model(*inputs), fused.model(*inputs)
    assert new.dtype == plain.dtype
    assert_close(new, exactly(model)(*(value.double() for value in inputs)), eager=plain, dtype=torch.float16)


@pytest.mark.parametrize("style", ["nested", "shared_act", "film", "branches", "upcast"])
def test_compiles(style: str) -> None:
    model, inputs = STYLES[style][0](), example()
    fused = fuse(model).model
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for new, old in zip(grads(compiled, *inputs), grads(model, *inputs), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-6)


def test_compiles_diffusers() -> None:
    model, inputs = unet(), unet_inputs()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(fuse(model).model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*inputs).sample, model(*inputs).sample)


class GuidedDiffusion(Net):
    """As guided-diffusion's ResBlock that changes the resolution: it calls parts of its Sequentials."""

    def __init__(self) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm32(4, 16), nn.SiLU(), self.conv)
        self.out_layers = nn.Sequential(self.norm, nn.SiLU(), self.conv)
        del self.norm, self.norm2

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, x, emb, use_reentrant=False)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        in_rest, in_conv = self.in_layers[:-1], self.in_layers[-1]
        scale, shift = self.emb2(emb)[:, :, None, None].chunk(2, dim=1)
        out_norm, out_rest = self.out_layers[0], self.out_layers[1:]
        return x + out_rest(out_norm(in_conv(in_rest(x))) * (1 + scale) + shift)


def test_parts_of_a_sequential() -> None:
    model, inputs = GuidedDiffusion(), example()
    fused = fuse(model, inputs)
    assert [norm.calls for norm in fused.norms] == [1, 0]
    torch.testing.assert_close(fused.model(*inputs), model(*inputs))


def test_other_ways_to_run_a_model() -> None:
    model, (x, emb) = SharedAct(), example()
    fused = fuse(model).model
    expected = model(x, emb)
    doubled = {name: 2 * value for name, value in model.named_parameters()}
    out = torch.func.functional_call(fused, doubled, (x, emb))
    torch.testing.assert_close(out, torch.func.functional_call(model, doubled, (x, emb)))
    torch.testing.assert_close(torch.export.export(fused, (x, emb)).module()(x, emb), expected)
    last = x.to(memory_format=torch.channels_last)
    out = fused.to(memory_format=torch.channels_last)(last, emb)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)
    assert copy.deepcopy(fused).to("meta")(x.to("meta"), emb.to("meta")).shape == x.shape


def test_verifies_in_eval_mode_without_a_trace() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Dropout(0.5), nn.BatchNorm2d(4))
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model[2].eval()
    fused = fuse(model, torch.randn(2, 4, 3, 3), inplace=True)
    modes = [module.training for module in model.modules()]
    assert modes == [True, True, True, False, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "fastddpm_pair" not in model.__dict__
    assert str(fused).startswith("Sequential: 1 of 1 GroupNorms fused with SiLU, outputs differ by ")
    torch.set_rng_state(rng)


def test_reports() -> None:
    fused = fuse(Branches())
    assert [norm.what for norm in fused.norms] == [f"{ADD} or {PLAIN}", PLAIN]
    assert "norm2: GroupNorm + SiLU in Branches.forward, not verified: no example_inputs" in str(fused)
    small = torch.randn(1, 16, 2, 2)
    fused = fuse(Branches(), {"x": small, "emb": None})
    assert done(fused) == {"norm": PLAIN, "norm2": PLAIN}
    fused = fuse(Branches(), (small.expand(101, 16, 2, 2), None))
    assert [norm.calls for norm in fused.norms] == [1, 0]
    assert "not verified: not run as one on the example" in str(fused)


# Errors.


def broken_kernel(*args: Any, **options: Any) -> Tensor:
    return group_norm_silu(*args, **options) * 1.001


@pytest.mark.parametrize("inplace", [True, False])
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, inplace: bool) -> None:
    monkeypatch.setattr(FusedModule, "fastddpm_kernel", staticmethod(broken_kernel))
    model = SharedAct()
    nn.init.zeros_(model.conv.weight)  # the outputs alone would not show it
    with pytest.raises(ValueError, match=r"norm with SiLU differs by 1.00e-03, must by 2.00e-06 or less"):
        fuse(model, example(), inplace=inplace)
    assert type(model) is SharedAct


def test_outputs_are_compared() -> None:
    model = SharedAct().half()
    inputs = example(torch.float16)
    with pytest.raises(ValueError, match=r"outputs differ by .*, must by 0.00e\+00 or less"):
        fuse(model, inputs, backend="reference", tolerance=0.0, inplace=True)
    assert type(model) is SharedAct


def test_undo_after_another_change() -> None:
    fused = fuse(SharedAct())
    fused.model.__class__ = SharedAct
    with pytest.raises(RuntimeError, match="the class of a SharedAct was changed after fuse"):
        fused.undo()


def test_bad_arguments() -> None:
    model, inputs = SharedAct(), example()
    with pytest.raises(TypeError, match="model is a function, must be an nn.Module"):
        fuse(swish)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="example_inputs is a int, must be a tensor"):
        fuse(model, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend is 'cuda', must be"):
        fuse(model, backend="cuda")
    with pytest.raises(ValueError, match="tolerance is -1, must be >= 0"):
        fuse(model, inputs, tolerance=-1)
    with pytest.raises(ValueError, match="model is fused already"):
        fuse(fuse(model).model)
    with pytest.raises(ValueError, match="model is compiled already"):
        fuse(torch.compile(model))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not finite, must be finite"):
        fuse(model, (inputs[0] * float("nan"), inputs[1]))
    with pytest.raises(ValueError, match="has no tensor"):
        fuse(Empty(), inputs)


class Empty(Net):
    def forward(self, x: Tensor, emb: Tensor) -> None:
        self.act(self.norm(x))


def test_a_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("triton runs here")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    model = SharedAct()
    with pytest.raises(BackendError, match="need a GPU"):
        fuse(model, example(), backend="triton", inplace=True)
    assert type(model) is SharedAct
