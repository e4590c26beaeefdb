"""fuse computes what the model did, and undoes it exactly."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.backend import BackendError
from fastddpm_kernels.group_norm_silu import group_norm_silu
from fastddpm_kernels.testing import assert_close
from fusing_networks import (
    ADD,
    PLAIN,
    STYLES,
    Branches,
    Film,
    GroupNorm32,
    Net,
    SharedAct,
    Upcast,
    done,
    exactly,
    example,
    grads,
    swish,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastddpm.interop.fusing import fuse, pair
from fastddpm.interop.fusing.pair import FusedModule


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


@pytest.mark.parametrize(
    ("style", "dtype"),
    [("shared_act", torch.float64), ("film", torch.float16), ("add_and_film", torch.bfloat16), ("film", torch.float64),
     ("branches", torch.float16), ("shared_act", torch.bfloat16)],
)  # fmt: skip
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


@pytest.mark.parametrize("style", ["shared_act", "film", "upcast"])
def test_compiles(style: str) -> None:
    model, inputs = STYLES[style][0](), example()
    fused = fuse(model).model
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for new, old in zip(grads(compiled, *inputs), grads(model, *inputs), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-6)


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
