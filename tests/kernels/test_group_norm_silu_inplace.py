"""`group_norm_silu_` on every backend: the normalised sum against float64, the sum itself to the bit, and memory.

What is written lies in buffers of NaN between guards, which must be as before afterwards.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fastddpm_kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_,
    group_norm_silu_launches,
    group_norm_silu_workspace,
)
from fastddpm_kernels.group_norm_silu import plan as _norm_plan
from fastddpm_kernels.testing import SHAPES, assert_close, errors, poisoned_memory
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last"]
GUARD = 64  # elements: 16 bytes in every dtype, so that what lies between is aligned as an allocation would be

# Arguments beside x, the weights and y. With 20 + 28 channels in 4 groups, the second group straddles x and x2.
VARIANTS: dict[str, tuple[str, ...]] = {
    "alone": (),
    "residual": ("residual", "total"),
    "no_total": ("residual", "time_bias"),
    "film": ("residual", "total", "scale", "shift"),
    "concat": ("x2", "residual", "total"),
    "concat_no_total": ("x2", "residual"),
    "all": ("x2", "residual", "total", "time_bias", "scale", "shift"),
}


class Guarded:
    """A tensor of NaN in the middle of a larger one of 7; `check` says that the rest is still 7."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str = "contiguous"):
        count = torch.Size(shape).numel()
        self.memory = torch.full((count + 2 * GUARD,), 7.0, dtype=dtype, device=device)
        inner = self.memory[GUARD : GUARD + count].fill_(float("nan"))
        last = layout == "channels_last"
        self.tensor = inner.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if last else inner.view(shape)

    def check(self) -> None:
        assert bool((self.memory[:GUARD] == 7).all())
        assert bool((self.memory[self.memory.numel() - GUARD :] == 7).all())


def to_layout(x: Tensor, layout: str) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x.contiguous()


def make(
    shape: tuple[int, ...], names: tuple[str, ...], dtype: torch.dtype, device: torch.device,
    layout: str = "contiguous", c2: int = 28,
) -> dict[str, Tensor]:  # fmt: skip
    """Random arguments, without y and total; the channels differ in mean and spread."""
    channels = shape[1] + (c2 if "x2" in names else 0)
    offset = torch.linspace(-2, 2, shape[1]).reshape(1, -1, *(1,) * (len(shape) - 2))
    tensors = {"x": torch.randn(shape) * (1 + offset.abs()) + offset}
    for name in names:
        if name == "x2":
            tensors[name] = torch.randn(shape[0], c2, *shape[2:])
        elif name == "residual":
            tensors[name] = 3 * torch.randn(shape) - offset
        elif name != "total":
            tensors[name] = torch.randn(shape[0], channels)
    tensors = {n: to_layout(v, layout) if n in ("x", "x2", "residual") else v for n, v in tensors.items()}
    tensors |= {"weight": torch.randn(channels), "bias": torch.randn(channels)}
    return {name: value.to(device, dtype) for name, value in tensors.items()}


def truth(tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(the sum in x's dtype, its norm by `eager`, its norm by `reference` in float64)."""
    given = dict(tensors)
    residual = given.pop("residual", None)
    if residual is not None:
        given["x"] = given["x"] + residual
    exact = {name: value.double() for name, value in given.items()}
    return (
        given["x"],
        group_norm_silu(**given, backend="eager", **options),
        group_norm_silu(**exact, backend="reference", **options),
    )


def check(
    backend: str, device: torch.device, shape: tuple[int, ...], names: tuple[str, ...], dtype: torch.dtype,
    layout: str = "contiguous", c2: int = 28, **options: Any,
) -> None:  # fmt: skip
    """Compares `backend` with the norm of the rounded sum; checks the sum, the guards and that inputs are as before."""
    if backend == "triton" and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("triton's interpreter computes bf16 wrongly")
    tensors = make(shape, names, dtype, device, layout, c2)
    before = {name: value.clone() for name, value in tensors.items()}
    summed, eager, expected = truth(tensors, **options)
    y = Guarded((shape[0], tensors["weight"].shape[0], *shape[2:]), dtype, device, layout)
    total = Guarded(shape, dtype, device, layout) if "total" in names else None
    with poisoned_memory():
        group_norm_silu_(
            y.tensor, **tensors, total=None if total is None else total.tensor, backend=backend, **options
        )
    if backend == "eager" and (layout == "contiguous" or len(shape) in (4, 5)):
        assert torch.equal(y.tensor, eager)  # in other ranks torch knows no channels-last, and sums in another order
    else:
        assert_close(y.tensor, expected, eager=eager, name="y")
    y.check()
    if total is not None:
        assert torch.equal(total.tensor, summed)
        total.check()
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


@pytest.fixture(params=["one_pass", "two_passes"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the kernels run: small images take one pass unless a slab may have no elements."""
    if request.param == "two_passes":
        monkeypatch.setattr(_norm_plan, "LIMITS", _norm_plan.Limits(0, 1024, 32, 3))
    return request.param


@pytest.fixture(params=["reference", "eager", "triton"])
def any_backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_hard_shapes(shape: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    size, groups = SHAPES[shape]
    layout = "channels_last" if dtype == torch.float16 else "contiguous"
    check(backend, device, size, VARIANTS["residual"], dtype, layout, num_groups=groups)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, layout: str, way: str, any_backend: str, device: torch.device) -> None:
    check(any_backend, device, (2, 20, 13, 11), VARIANTS[variant], torch.float32, layout, num_groups=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_the_sum_once(dtype: torch.dtype, way: str, backend: str, device: torch.device) -> None:
    check(backend, device, (2, 20, 13, 11), VARIANTS["all"], dtype, "channels_last", num_groups=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_twelve_channels_a_group_across_a_concatenation(
    dtype: torch.dtype, way: str, backend: str, device: torch.device
) -> None:
    # 256 is no multiple of 12: the 22nd group has 4 channels of x, which have a residual, and 8 of x2.
    names = ("x2", "residual", "total", "time_bias")
    check(backend, device, (1, 256, 5, 4), names, dtype, "channels_last", c2=128, num_groups=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_image_is_split(layout: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    shape = (1, 16, 93, 96) if device.type == "cpu" else (1, 16, 253, 256)
    x = to_layout(torch.empty(shape, device=device, dtype=dtype), layout)
    assert group_norm_silu_launches(x, 16, 4) == 2
    check(backend, device, shape, VARIANTS["film"], dtype, layout, num_groups=4)


@pytest.mark.parametrize("shape", [(3, 24), (2, 24, 7), (1, 24, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_rank(layout: str, shape: tuple[int, ...], any_backend: str, device: torch.device) -> None:
    check(any_backend, device, shape, VARIANTS["concat"], torch.float32, layout, c2=8, num_groups=4)


def test_no_pixels(any_backend: str, device: torch.device) -> None:
    x, weight = torch.empty(2, 24, 0, device=device), torch.empty(24, device=device)
    group_norm_silu_(x.clone(), x, weight, weight, 4, residual=x, total=x.clone(), backend=any_backend)


def test_without_activation(way: str, backend: str, device: torch.device) -> None:
    options: dict[str, Any] = {"activation": None, "eps": 1e-2, "num_groups": 4}
    check(backend, device, (2, 24, 4, 4), VARIANTS["film"], torch.float32, **options)
    check(backend, device, (2, 24, 4, 4), VARIANTS["alone"], torch.float32, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("y_is", "total_is"),
    [(None, "x"), (None, "residual"), ("x", None), ("residual", None), ("x", "residual"), ("residual", "x")],
)
def test_results_in_the_memory_of_inputs(
    y_is: str | None, total_is: str | None, layout: str, way: str, any_backend: str, device: torch.device
) -> None:
    tensors = make((2, 20, 13, 11), ("residual", "time_bias", "scale", "shift"), torch.float32, device, layout)
    summed, eager, expected = truth(tensors, num_groups=4)
    own = Guarded((2, 20, 13, 11), torch.float32, device, layout)
    y = tensors[y_is] if y_is else own.tensor
    total = tensors[total_is] if total_is else None
    untouched = {name: value.clone() for name, value in tensors.items() if name not in (y_is, total_is)}
    group_norm_silu_(y, **tensors, total=total, num_groups=4, backend=any_backend)
    assert_close(y, expected, eager=eager, name="y")
    assert total is None or torch.equal(total, summed)
    assert all(torch.equal(tensors[name], value) for name, value in untouched.items())


def test_a_total_beside_a_concatenation_may_be_x(way: str, any_backend: str, device: torch.device) -> None:
    tensors = make((2, 20, 5, 7), ("x2", "residual"), torch.float16, device, "channels_last")
    summed, eager, expected = truth(tensors, num_groups=4)
    y = to_layout(torch.full((2, 48, 5, 7), float("nan"), dtype=torch.float16, device=device), "channels_last")
    group_norm_silu_(y, **tensors, total=tensors["x"], num_groups=4, backend=any_backend)
    assert_close(y, expected, eager=eager, name="y")
    assert torch.equal(tensors["x"], summed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_pass_and_two_agree(dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    tensors = make((2, 20, 13, 11), VARIANTS["all"], dtype, device, "channels_last")
    results = []
    for limits in (_norm_plan.LIMITS, _norm_plan.Limits(0, 1024, 32, 3)):
        monkeypatch.setattr(_norm_plan, "LIMITS", limits)
        y = torch.full((2, 13, 11, 48), float("nan"), dtype=dtype, device=device).movedim(-1, 1)
        total = torch.full_like(tensors["x"], float("nan"))
        group_norm_silu_(y, **tensors, total=total, num_groups=4, backend="triton")
        results.append((y, total))
    assert torch.equal(results[0][1], results[1][1])
    assert_close(results[0][0], results[1][0])


def test_statistics_survive_a_large_mean(way: str, backend: str, device: torch.device) -> None:
    x, residual = (torch.randn(2, 16, 12, 12, device=device) + 2000 for _ in range(2))
    weight, bias = torch.ones(16, device=device), torch.zeros(16, device=device)
    y = torch.empty_like(x)
    group_norm_silu_(y, x, weight, bias, 4, residual=residual, backend=backend)
    expected = group_norm_silu((x + residual).double(), weight.double(), bias.double(), 4, backend="reference")
    # One unit in the last place of the mean, 4000, is 2.4e-4 of the result.
    assert errors(y, expected)[1] < 5e-4


@pytest.mark.parametrize("with_total", [True, False], ids=["total", "no_total"])
def test_it_is_the_rounded_sum_that_is_normalised(
    with_total: bool, way: str, any_backend: str, device: torch.device
) -> None:
    # Above 4096 float16 holds multiples of 4, so of a residual in [-1, 2) nothing remains: no variance, only the bias.
    x = torch.full((2, 8, 13, 11), 4100, dtype=torch.float16, device=device)
    residual = 2.9 * torch.rand_like(x) - 1
    weight, bias = torch.randn(2, 8, device=device).unbind()
    y, total = torch.empty_like(x), torch.empty_like(x) if with_total else None
    options: dict[str, Any] = {"num_groups": 4, "activation": None, "backend": any_backend}
    group_norm_silu_(y, x, weight, bias, residual=residual, total=total, **options)
    if any_backend == "eager":  # whose float16 statistics are not exact even of a constant
        assert torch.equal(y, group_norm_silu(x, weight, bias, **options))
    else:
        assert torch.equal(y, bias.half().reshape(1, 8, 1, 1).expand_as(y))
    assert total is None or torch.equal(total, x)


def test_rows_may_be_expanded(way: str, backend: str, device: torch.device) -> None:
    tensors = make((3, 8, 4, 4), ("residual",), torch.float32, device)
    table = torch.randn(5, 8, device=device)
    expanded, copied = (torch.empty_like(tensors["x"]) for _ in range(2))
    row = table[2:3].expand(3, 8)
    group_norm_silu_(expanded, **tensors, num_groups=2, time_bias=row, backend=backend)
    group_norm_silu_(copied, **tensors, num_groups=2, time_bias=row.contiguous(), backend=backend)
    assert torch.equal(expanded, copied)


def test_weights_may_be_wider_than_images(way: str, backend: str, device: torch.device) -> None:
    tensors = make((2, 24, 4, 4), ("residual", "scale", "shift"), torch.float32, device)
    half = {name: value.half() if name in ("x", "residual") else value for name, value in tensors.items()}
    y = torch.empty_like(half["x"])
    group_norm_silu_(y, **half, num_groups=4, backend=backend)
    _, eager, expected = truth(half, num_groups=4)
    assert_close(y, expected, eager=eager)


def test_nothing_is_differentiated(backend: str, device: torch.device) -> None:
    tensors = {n: v.requires_grad_() for n, v in make((2, 8, 4, 4), ("residual",), torch.float32, device).items()}
    y = torch.empty_like(tensors["x"])
    group_norm_silu_(y, **tensors, num_groups=2, backend=backend)
    assert not y.requires_grad


# Memory and launches.


class _Ops(TorchDispatchMode):
    """Names every torch operation that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_call_with_a_workspace_allocates_nothing(way: str, device: torch.device) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from fastddpm_kernels.group_norm_silu.triton import in_place_launches

    t = make((2, 20, 13, 11), VARIANTS["all"], torch.float32, device, "channels_last")
    summed, eager, expected = truth(t, num_groups=4)
    needed = group_norm_silu_workspace(t["x"], 48, 4)
    assert (needed > 0) == (way == "two_passes")
    workspace = Guarded((needed,), torch.float32, device)
    y = torch.empty(2, 13, 11, 48, device=device).movedim(-1, 1)
    with _Ops() as ops:
        launches = in_place_launches(
            y, t["x"], t["weight"], t["bias"], 4, 1e-5, t["x2"], t["residual"], t["x"], t["time_bias"], t["scale"],
            t["shift"], True, workspace.tensor,
        )  # fmt: skip
    assert ops.names == []
    assert len(launches) == group_norm_silu_launches(t["x"], 48, 4) == (2 if way == "two_passes" else 1)
    group_norm_silu_(y, **t, total=t["x"], num_groups=4, workspace=workspace.tensor, backend="triton")
    assert_close(y, expected, eager=eager)
    assert torch.equal(t["x"], summed)
    workspace.check()
    assert not bool(workspace.tensor.isnan().any())  # all of it is needed


@pytest.mark.parametrize(
    ("shape", "channels", "launches"),
    [
        ((64, 128, 32, 32), 128, 1),
        ((1, 128, 32, 32), 128, 1),
        ((64, 256, 32, 32), 384, 1),
        ((16, 256, 64, 64), 256, 1),
        ((64, 256, 48, 48), 256, 2),  # pixels are masked, so the largest slabs are not taken
        ((1, 128, 256, 256), 128, 2),
        ((0, 128, 32, 32), 128, 0),
        ((0, 128, 256, 256), 128, 0),
    ],
    ids=str,
)
def test_launches_are_counted_without_a_gpu(shape: tuple[int, ...], channels: int, launches: int) -> None:
    n, c, *sides = shape
    x = torch.empty(n, *sides, c, dtype=torch.float16, device="meta").movedim(-1, 1)
    assert group_norm_silu_launches(x, channels, 32) == launches
    assert (group_norm_silu_workspace(x, channels, 32) > 0) == (launches == 2)


def test_every_plan_covers_its_image_and_fits_its_registers() -> None:
    for side, n, (c1, c2), dtype, last in itertools.product(
        (1, 3, 16, 24, 32, 48, 64, 250), (1, 64), ((128, 0), (128, 128), (256, 128), (512, 512)),
        (torch.float32, torch.float16), (False, True),
    ):  # fmt: skip
        shape = (n, side, side, c1) if last else (n, c1, side, side)
        x = torch.empty(shape, dtype=dtype, device="meta")
        plan = _norm_plan.in_place_plan(x.movedim(-1, 1) if last else x, c1 + c2, 32)
        assert plan.slab_groups * ((c1 + c2) // 32) <= plan.block_c
        assert (plan.slabs - 1) * plan.slab_groups < 32 <= plan.slabs * plan.slab_groups
        span = plan.tiles * plan.block_p
        assert (plan.splits - 1) * span < side * side <= plan.splits * span  # none is empty
        masked = plan.block_p != side * side or (c2 and dtype == torch.float32)
        assert plan.block_p * plan.block_c <= (16384 if masked or not plan.one_pass else 32768)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 128, 32, 32), (1, 128, 256, 256)], ids=str)
def test_in_a_cuda_graph(shape: tuple[int, ...], device: torch.device) -> None:
    t = make(shape, VARIANTS["no_total"], torch.float16, device, "channels_last")
    y, total = torch.empty_like(t["x"]), torch.empty_like(t["x"])
    workspace = torch.empty(group_norm_silu_workspace(t["x"], 128, 32), device=device)

    def call() -> None:
        group_norm_silu_(y, **t, total=total, num_groups=32, workspace=workspace, backend="triton")

    call()
    expected = y.clone()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, expected)


# Bad input.

X, W, ROWS = torch.randn(2, 8, 4, 4), torch.randn(8), torch.randn(2, 8)
Y = torch.empty(2, 8, 4, 4)
LAST = to_layout(X, "channels_last")


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x is list, must be a tensor", {"x": [1.0]}),
        (TypeError, "y is NoneType, must be a tensor", {"y": None}),
        (TypeError, "residual is float, must be a tensor", {"residual": 1.0}),
        (TypeError, r"y is torch\.float16, must be of x's dtype, torch\.float32", {"y": Y.half()}),
        (TypeError, r"residual is torch\.float64, must be of x's dtype", {"residual": X.double()}),
        (TypeError, r"total is torch\.bfloat16, must be of x's", {"residual": X, "total": Y.bfloat16()}),
        (TypeError, r"x2 is torch\.float64, must be of x's dtype, torch\.float32", {"x2": X.double()}),
        (ValueError, r"y has shape \(2, 8, 4, 4\), must be \(2, 16, 4, 4\)", {"x2": X, "weight": W.repeat(2)}),
        (ValueError, r"y has shape \(2, 8, 16\), must be \(2, 8, 4, 4\)", {"y": Y.flatten(2)}),
        (ValueError, r"residual has shape \(1, 8, 4, 4\), must be \(2, 8, 4, 4\)", {"residual": X[:1]}),
        (ValueError, r"total has shape \(2, 4, 4, 4\), must be", {"residual": X, "total": Y[:, :4]}),
        (ValueError, "total is given without residual, must be None", {"total": Y}),
        (ValueError, "y is on meta, must be on x's device, cpu", {"y": Y.to("meta")}),
        (ValueError, "residual is on meta, must be on x's device, cpu", {"residual": Y.to("meta")}),
        (ValueError, r"x has strides \(128, 16, 1, 4\), must be contiguous or channels-last", {"x": X.mT}),
        (ValueError, r"y has strides \(128, 1, 32, 8\), must be contiguous, as x is", {"y": LAST.clone()}),
        (ValueError, r"y has strides \(128, 16, 4, 1\), must be channels-last, as x is", {"x": LAST}),
        (ValueError, r"residual has strides .*, must be contiguous, as x is", {"residual": LAST}),
        (ValueError, r"total has strides .*, must be contiguous, as", {"residual": X, "total": LAST.clone()}),
        (ValueError, "total is in the memory of y|y is in the memory of total", {"residual": X, "total": Y}),
        (ValueError, r"weight has shape \(7,\), must be \[8\]", {"weight": W[:7]}),
        (ValueError, r"weight has strides \(2,\), must be 1 from channel", {"weight": torch.randn(16)[::2]}),
        (ValueError, r"time_bias has strides \(1, 2\), must be 1 from", {"time_bias": torch.randn(8, 2).t()}),
        (ValueError, r"time_bias has shape \(1, 8\), must be \[2, 8\]", {"time_bias": ROWS[:1]}),
        (ValueError, "shift is None, must be given", {"scale": ROWS}),
        (ValueError, "eps is -1, must be >= 0", {"eps": -1}),
        (ValueError, "activation is 'gelu', must be 'silu' or None", {"activation": "gelu"}),
        (ValueError, "num_groups is 3, must divide the number of channels, 8", {"num_groups": 3}),
        (ValueError, "backend is 'cuda', must be 'auto' or one of", {"backend": "cuda"}),
        (TypeError, r"workspace is torch\.float16, must be a float32 tensor", {"workspace": W.half()}),
        (TypeError, "workspace is int, must be a float32 tensor", {"workspace": 4}),
        (ValueError, "workspace is on meta, must be on x's device, cpu", {"workspace": W.to("meta")}),
        (ValueError, r"workspace has strides \(2,\), must be contiguous", {"workspace": torch.randn(16)[::2]}),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    common = {"y": Y, "x": X, "weight": W, "num_groups": 4, **arguments}
    with pytest.raises(error, match=message):
        group_norm_silu_(**{"bias": common["weight"], **common})


def test_results_may_not_overlap_what_they_are_made_of() -> None:
    x2, weight = torch.randn(2, 8, 4, 4), torch.randn(16)
    memory = torch.randn(2, 16, 4, 4)
    y = torch.empty(2, 16, 4, 4)
    x = memory.flatten()[:256].view(2, 8, 4, 4)
    for name, arguments in {
        "x": {"y": memory, "x": x, "x2": x2},
        "residual": {"y": memory, "x": x2, "x2": x2, "residual": x},
        "x2": {"y": memory, "x": x2, "x2": x},
    }.items():
        with pytest.raises(ValueError, match=f"y is in the memory of {name}, must be in its own"):
            group_norm_silu_(weight=weight, bias=weight, num_groups=4, **arguments)
    with pytest.raises(ValueError, match="total is in the memory of x2, must be in its own"):
        group_norm_silu_(y, x, weight, weight, 4, x2=x2, residual=x, total=x2)


def test_bad_input_to_triton(way: str, device: torch.device) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    x, weight, y = X.to(device), W.to(device), Y.to(device)
    with pytest.raises(TypeError, match=r"x is torch\.float64, must be float32, float16 or bfloat16 on the triton"):
        group_norm_silu_(y.double(), x.double(), weight, weight, 4, backend="triton")
    needed = group_norm_silu_workspace(x, 8, 4)
    if needed:
        with pytest.raises(ValueError, match=f"workspace has {needed - 1} elements, must have {needed} or more"):
            group_norm_silu_(y, x, weight, weight, 4, workspace=x.new_empty(needed - 1), backend="triton")
    for function in (group_norm_silu_workspace, group_norm_silu_launches):
        with pytest.raises(ValueError, match="num_groups is 3, must divide the number of channels, 8"):
            function(x, 8, 3)
