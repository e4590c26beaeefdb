"""Every backend of the two normalisations against `reference` in float64: values and every gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.group_norm_silu import group_norm_silu, rms_norm_silu
from fastddpm_kernels.testing import FLOORS, SHAPES, assert_close, errors, poisoned_memory
from torch import Tensor

OPS: dict[str, Callable[..., Tensor]] = {"group_norm": group_norm_silu, "rms_norm": rms_norm_silu}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Arguments beside x and the weights. With 20 + 28 channels in 4 groups, the second group straddles x and x2.
VARIANTS: dict[str, tuple[str, ...]] = {
    "alone": (),
    "time_bias": ("time_bias",),
    "film": ("scale", "shift"),
    "concat": ("x2",),
    "all": ("x2", "time_bias", "scale", "shift"),
}


def to_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "neither":
        return torch.stack((x, x), -1)[..., 0]
    return x.contiguous()


def make(op: str, shape: tuple[int, ...], names: tuple[str, ...], c2: int = 28) -> dict[str, Tensor]:
    """Random float64 arguments; the channels differ in mean and spread."""
    channels = shape[1] + (c2 if "x2" in names else 0)
    tensors = {"x": torch.randn(shape), "weight": torch.randn(channels)}
    if op == "group_norm":
        tensors["bias"] = torch.randn(channels)
    for name in names:
        if name == "x2":
            tensors[name] = torch.randn(shape[0], c2, *shape[2:])
        elif op == "group_norm" or name != "time_bias":
            tensors[name] = torch.randn(shape[0], channels)
    offset = torch.linspace(-2, 2, shape[1]).reshape(1, -1, *(1,) * (len(shape) - 2))
    tensors["x"] = tensors["x"] * (1 + offset.abs()) + offset
    return {name: value.double() for name, value in tensors.items()}


def run(
    op: str, backend: str, tensors: dict[str, Tensor], dtype: torch.dtype, layout: str = "contiguous", **options: Any
) -> dict[str, Tensor]:
    """The result `y`, and the gradient of every tensor."""
    leaves = {name: value.detach().to(dtype, copy=True).requires_grad_() for name, value in tensors.items()}
    inputs = dict(leaves)
    for name in ("x", "x2"):
        if name in inputs:
            inputs[name] = to_layout(inputs[name], layout)
    with poisoned_memory():
        y = OPS[op](backend=backend, **inputs, **options)
        generator = torch.Generator().manual_seed(1)
        dy = torch.randint(-128, 129, y.shape, generator=generator) / 64  # exact in every dtype
        y.backward(dy.to(y))
    assert y.dtype == dtype
    assert (y.movedim(1, -1) if layout == "channels_last" else y).is_contiguous()
    gradients = {}
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        gradients[f"d{name}"] = leaf.grad
    return {"y": y, **gradients}


def check(
    op: str,
    backend: str,
    device: torch.device,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    layout: str = "contiguous",
    **options: Any,
) -> None:
    """Compares `backend` with `reference` at the inputs rounded to `dtype`."""
    if backend == "triton" and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("triton's interpreter computes bf16 wrongly")
    rounded = {name: value.to(device, dtype).double() for name, value in tensors.items()}
    expected = run(op, "reference", rounded, torch.float64, layout, **options)
    actual = run(op, backend, rounded, dtype, layout, **options)
    if expected["dx"].numel() and expected["dx"].abs().max() < 1e-9:
        # Of one channel over its norm only the sign is left: no gradient, and so none to be relative to.
        assert (actual.pop("dx").double() * rounded["x"]).abs().max() <= FLOORS[dtype][1]
    if backend == "eager":
        # It rounds after each of its operations, of which the forward has up to six.
        assert errors(actual["y"], expected["y"])[0] <= 6 * FLOORS[dtype][0]
        exact = run(op, backend, rounded, torch.float64, layout, **options)
        for name in actual:
            assert_close(exact[name], expected[name], name=name)
        return
    eager = run(op, "eager", rounded, dtype, layout, **options)
    for name, value in actual.items():
        if name in ("y", "dx", "dx2") or dtype != torch.float32:
            assert_close(value, expected[name], eager=eager[name], name=name)
        else:
            # A sum of n terms of either sign is about sqrt(n) times smaller than the sum of their magnitudes,
            # and it is the latter that sets its rounding error.
            terms = actual["y"].numel() // actual["y"].shape[1]
            assert errors(value, expected[name])[0] <= FLOORS[dtype][0] * max(terms, 1) ** 0.5, name


@pytest.fixture(params=["one_pass", "two_passes"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the kernels run: small images take one pass unless a slab may have no elements."""
    if request.param == "two_passes":
        pytest.importorskip("triton", reason="triton is not installed")
        from fastddpm_kernels.group_norm_silu import plan as forward
        from fastddpm_kernels.group_norm_silu import triton_backward as backward
        from fastddpm_kernels.group_norm_silu.plan import Limits

        for module in (forward, backward):
            monkeypatch.setattr(module, "LIMITS", Limits(0, 1024, 32, 3))
    return request.param


def options_of(op: str, groups: int) -> dict[str, int]:
    return {"num_groups": groups} if op == "group_norm" else {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_hard_shapes(op: str, shape: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    size, groups = SHAPES[shape]
    layout = "channels_last" if dtype == torch.float16 else "contiguous"
    check(op, backend, device, make(op, size, ()), dtype, layout, **options_of(op, groups))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("op", OPS)
def test_variants(op: str, variant: str, layout: str, backend: str, device: torch.device) -> None:
    tensors = make(op, (2, 20, 5, 7), VARIANTS[variant])
    check(op, backend, device, tensors, torch.float32, layout, **options_of(op, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_two_passes(layout: str, dtype: torch.dtype, way: str, backend: str, device: torch.device) -> None:
    tensors = make("group_norm", (2, 20, 13, 11), VARIANTS["all"])
    check("group_norm", backend, device, tensors, dtype, layout, num_groups=4)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(3, 24), (2, 24, 7), (1, 24, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "neither"])
def test_any_rank_and_layout(op: str, shape: tuple[int, ...], layout: str, backend: str, device: torch.device) -> None:
    names = ("x2", "scale", "shift")
    check(op, backend, device, make(op, shape, names, c2=8), torch.float32, layout, **options_of(op, 4))


@pytest.mark.parametrize("op", OPS)
def test_without_activation(op: str, backend: str, device: torch.device) -> None:
    tensors = make(op, (2, 24, 4, 4), ("scale", "shift"))
    check(op, backend, device, tensors, torch.float32, activation=None, eps=1e-2, **options_of(op, 3))


def test_statistics_survive_a_large_mean(way: str, backend: str, device: torch.device) -> None:
    # E[x^2] - E[x]^2 in float32 would have nothing left of a variance of 1 beside a mean of 4000.
    x = (torch.randn(2, 16, 12, 12, dtype=torch.float64) + 4000).to(device)
    weight, bias = torch.ones(16, device=device), torch.zeros(16, device=device)
    actual = group_norm_silu(x.float(), weight, bias, 4, backend=backend)
    expected = group_norm_silu(x.float().double(), weight.double(), bias.double(), 4, backend="reference")
    # x itself is exact, but one unit in the last place of the mean is 2.4e-4 of the result.
    assert errors(actual, expected)[1] < 5e-4


def test_a_black_pixel_has_no_direction(backend: str, device: torch.device) -> None:
    x = torch.zeros(1, 8, 2, 2, device=device, dtype=torch.float16, requires_grad=True)
    y = rms_norm_silu(x, torch.ones(8, device=device, dtype=torch.float16), eps=0.5, backend=backend)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.allclose(x.grad, torch.full_like(x, 0.5 * 8**0.5 / 0.5), rtol=1e-3)


@pytest.mark.parametrize("op", OPS)
def test_weights_may_be_wider_than_images(op: str, backend: str, device: torch.device) -> None:
    tensors = {name: value.to(device).float() for name, value in make(op, (2, 24, 4, 4), ("scale", "shift")).items()}
    tensors["x"] = tensors["x"].half()
    for value in tensors.values():
        value.requires_grad_()
    y = OPS[op](**tensors, backend=backend, **options_of(op, 4))
    y.float().sum().backward()
    expected = OPS[op](**{k: v.detach().double() for k, v in tensors.items()}, backend="reference", **options_of(op, 4))
    assert y.dtype == torch.float16
    assert errors(y, expected)[0] <= 6 * FLOORS[torch.float16][0]
    assert {name: value.grad.dtype for name, value in tensors.items() if value.grad is not None} == {
        name: value.dtype for name, value in tensors.items()
    }


def test_rows_may_be_expanded_or_chunks(backend: str, device: torch.device) -> None:
    x, weight, bias = torch.randn(3, 8, 4, 4), torch.randn(8), torch.randn(8)
    x, weight, bias = x.to(device), weight.to(device), bias.to(device)
    time_bias = torch.randn(1, 8, device=device).expand(3, 8)
    scale, shift = torch.randn(3, 16, device=device).chunk(2, dim=1)
    transposed = torch.randn(8, 3, device=device).t()
    for s in (scale, transposed):
        given = group_norm_silu(x, weight, bias, 2, time_bias=time_bias, scale=s, shift=shift, backend=backend)
        copied = group_norm_silu(
            x, weight, bias, 2, time_bias=time_bias.contiguous(), scale=s.contiguous(), shift=shift.contiguous(),
            backend=backend,
        )  # fmt: skip
        assert torch.equal(given, copied)


def test_results_are_reproducible_to_the_bit(way: str, backend: str, device: torch.device) -> None:
    tensors = {name: value.to(device) for name, value in make("group_norm", (1, 20, 9, 9), VARIANTS["all"]).items()}
    first, second = (run("group_norm", backend, tensors, torch.float32, num_groups=4) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_reference_is_group_norm() -> None:
    x, weight, bias = torch.randn(2, 12, 5, 5).double(), torch.randn(12).double(), torch.randn(12).double()
    expected = F.silu(F.group_norm(x, 3, weight, bias, 1e-3))
    assert_close(group_norm_silu(x, weight, bias, 3, eps=1e-3, backend="reference"), expected)


def test_reference_is_the_peers_rms_norm() -> None:
    x, g = torch.randn(2, 12, 5, 5).double(), torch.randn(1, 12, 1, 1).double()
    expected = F.normalize(x, dim=1) * g * x.shape[1] ** 0.5  # denoising_diffusion_pytorch's RMSNorm.forward
    assert_close(rms_norm_silu(x, g.flatten(), activation=None, backend="reference"), expected)


@pytest.mark.parametrize(
    ("op", "layout", "backend"),
    [
        ("group_norm", "contiguous", "eager"),
        ("group_norm", "channels_last", "triton"),
        ("rms_norm", "contiguous", "triton"),
        ("rms_norm", "channels_last", "eager"),
    ],
    indirect=["backend"],
)
def test_under_torch_compile(op: str, layout: str, backend: str, device: torch.device) -> None:
    tensors = {name: value.to(device) for name, value in make(op, (2, 20, 4, 4), VARIANTS["all"]).items()}
    options = options_of(op, 4)
    expected = run(op, backend, tensors, torch.float32, layout, **options)
    compiled = torch.compile(OPS[op], fullgraph=True, backend="aot_eager")
    original = OPS[op]
    OPS[op] = compiled
    try:
        actual = run(op, backend, tensors, torch.float32, layout, **options)
    finally:
        OPS[op] = original
        torch._dynamo.reset()
    for name, value in actual.items():
        assert_close(value, expected[name], name=name)


@pytest.fixture
def _triton() -> None:
    pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("names", [(), VARIANTS["all"]], ids=["alone", "all"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "neither"])
def test_opcheck(layout: str, names: tuple[str, ...], device: torch.device) -> None:
    t = {name: value.to(device).float() for name, value in make("group_norm", (2, 8, 3, 3), names, c2=4).items()}
    for name in ("x", "x2"):
        if name in t:
            t[name] = to_layout(t[name], layout)
    t = {name: value.detach().requires_grad_() for name, value in t.items()}
    film = (t.get("scale"), t.get("shift"))
    ops, checks = torch.ops.fastddpm, ("test_schema", "test_autograd_registration", "test_faketensor")
    args = (t["x"], t["weight"], t["bias"], 4, 1e-5, t.get("x2"), t.get("time_bias"), *film, True)
    torch.library.opcheck(ops.group_norm_silu.default, args, test_utils=checks)
    y, mean, rstd = (value.detach() for value in ops.group_norm_silu(*args))
    args = (y, t["x"], t["weight"], t["bias"], mean, rstd, t.get("x2"), t.get("time_bias"), *film, True)
    args = tuple(value.detach() if isinstance(value, Tensor) else value for value in args)
    torch.library.opcheck(ops.group_norm_silu_backward.default, args, test_utils=checks)
    args = (t["x"], t["weight"], 1e-12, t.get("x2"), *film, True)
    torch.library.opcheck(ops.rms_norm_silu.default, args, test_utils=checks)
    args = tuple(value.detach() if isinstance(value, Tensor) else value for value in (y, *args))
    torch.library.opcheck(ops.rms_norm_silu_backward.default, args, test_utils=checks)


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("side", [1, 3, 8, 32, 33, 64, 250, 256])
def test_every_plan_covers_its_image(side: int) -> None:
    from fastddpm_kernels.group_norm_silu import plan as _norm_plan
    from fastddpm_kernels.group_norm_silu import triton_backward as group_norm_silu_backward

    for n, (channels, groups), dtype, last, limits in itertools.product(
        (1, 2, 64, 300),
        ((1, 1), (96, 32), (128, 32), (384, 32), (320, 32), (512, 1), (48, 48), (2048, 32)),
        (torch.float32, torch.float16),
        (False, True),
        (_norm_plan.LIMITS, group_norm_silu_backward.LIMITS),
    ):
        shape = (n, side, side, channels) if last else (n, channels, side, side)
        x = torch.empty(shape, dtype=dtype, device="meta")
        plan = _norm_plan.make_plan(x.movedim(-1, 1) if last else x, channels, groups, 132, limits)
        assert plan.slab_groups * (channels // groups) <= plan.block_c
        assert (plan.slabs - 1) * plan.slab_groups < groups <= plan.slabs * plan.slab_groups
        span = plan.tiles * plan.block_p
        assert (plan.splits - 1) * span < side * side <= plan.splits * span  # none is empty
        assert plan.splits == 1 or not plan.one_pass
        assert plan.splits <= limits.max_splits
        assert plan.num_warps in (1, 2, 4, 8, 16)
        assert plan.block_p * plan.block_c <= max(32768, plan.block_c)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device: torch.device) -> None:
    x = torch.randn(33, 64, 1024, 1024, device=device, dtype=torch.float16)
    x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 64, device=device)
    y = group_norm_silu(x, weight, bias, 8, backend="triton")
    assert_close(y[-1:], group_norm_silu(x[-1:].contiguous(), weight, bias, 8, backend="triton"))


X, W, ROWS = torch.randn(2, 8, 4, 4), torch.randn(8), torch.randn(2, 8)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x is list, must be a tensor", {"x": [1.0]}),
        (TypeError, r"x is torch\.int64, must be float32", {"x": X.long()}),
        (ValueError, r"x has shape \(8,\), must be \[N, C, \.\.\.\]", {"x": W}),
        (ValueError, r"weight has shape \(7,\), must be \[8\]", {"weight": W[:7]}),
        (TypeError, "weight is NoneType, must be a tensor", {"weight": None}),
        (TypeError, r"x2 is torch\.float64, must be of x's dtype, torch\.float32", {"x2": X.double()}),
        (ValueError, r"x2 has shape \(2, 8, 4\), must equal x's", {"x2": X[..., 0]}),
        (ValueError, r"weight has shape \(8,\), must be \[16\]", {"x2": X}),
        (ValueError, r"scale has shape \(8, 2\), must be \[2, 8\]", {"scale": ROWS.t(), "shift": ROWS}),
        (ValueError, "shift is None, must be given", {"scale": ROWS}),
        (ValueError, "scale is on meta, must be on x's device, cpu", {"scale": ROWS.to("meta"), "shift": ROWS}),
        (ValueError, "eps is -1, must be >= 0", {"eps": -1}),
        (ValueError, "activation is 'gelu', must be 'silu' or None", {"activation": "gelu"}),
        (ValueError, "backend is 'cuda', must be 'auto' or one of", {"backend": "cuda"}),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    common = {"x": X, "weight": W, **arguments}
    with pytest.raises(error, match=message):
        rms_norm_silu(**common)
    with pytest.raises(error, match=message):
        group_norm_silu(**{"bias": common["weight"], "num_groups": 4, **common})


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("num_groups is 3, must divide the number of channels, 8", {"num_groups": 3}),
        ("num_groups is 0, must divide", {"num_groups": 0}),
        (r"bias has shape \(2, 8\), must be \[8\]", {"bias": ROWS}),
        (r"time_bias has shape \(1, 8\), must be \[2, 8\]", {"time_bias": ROWS[:1]}),
    ],
)
def test_bad_input_to_group_norm(message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**{"x": X, "weight": W, "bias": W, "num_groups": 4, **arguments})


@pytest.mark.usefixtures("_triton")
def test_triton_takes_no_float64(device: torch.device) -> None:
    with pytest.raises(TypeError, match=r"x is torch\.float64, must be float32, float16 or bfloat16 on the triton"):
        rms_norm_silu(X.double().to(device), W.to(device), backend="triton")
