"""The native group norm and RMS norm against float64, and that nothing but the result is written."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from fastddpm_kernels.group_norm_silu import group_norm_silu, group_norm_silu_, rms_norm_silu, rms_norm_silu_
from fastddpm_kernels.testing import SHAPES, assert_close
from torch import Tensor

# Arguments beside x, the weights and y. With 20 + 28 channels in 4 groups, the second group straddles x and x2.
VARIANTS: dict[str, tuple[str, ...]] = {
    "alone": (),
    "residual": ("residual", "total"),
    "no_total": ("residual", "time_bias"),
    "film": ("scale", "shift"),
    "concat_no_total": ("x2", "residual"),
    "all": ("x2", "residual", "total", "time_bias", "scale", "shift"),
}


@pytest.fixture(params=[1, 2, 5], ids=lambda count: f"{count}_threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def guarded(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The memory, 7 on either side, and the tensor of NaN in its middle, channels-last."""
    memory = torch.full((math.prod(shape) + 128,), 7.0)
    inner = memory[64:-64].fill_(float("nan"))
    return memory, inner.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def untouched(memory: Tensor) -> bool:
    return bool((memory[:64] == 7).all()) and bool((memory[-64:] == 7).all())


def make(shape: tuple[int, ...], names: tuple[str, ...], c2: int = 28) -> dict[str, Tensor]:
    """Random arguments; the channels differ in mean and spread."""
    channels = shape[1] + (c2 if "x2" in names else 0)
    offset = torch.linspace(-20, 20, shape[1]).reshape(1, -1, *(1,) * (len(shape) - 2))
    given = {"x": last(torch.randn(shape) * (1 + offset.abs()) + offset)}
    for name in names:
        if name == "x2":
            given[name] = last(torch.randn(shape[0], c2, *shape[2:]))
        elif name == "residual":
            given[name] = last(3 * torch.randn(shape))
        elif name != "total":
            given[name] = torch.randn(shape[0], channels)
    return given | {"weight": torch.randn(channels), "bias": torch.randn(channels)}


def check_group_norm(shape: tuple[int, ...], names: tuple[str, ...], groups: int, **options: str | None) -> None:
    given = make(shape, names)
    before = {name: value.clone() for name, value in given.items()}
    y_memory, y = guarded((shape[0], len(given["weight"]), *shape[2:]))
    total_memory, total = guarded(shape)
    into = {"total": total} if "total" in names else {}
    group_norm_silu_(y, **given, num_groups=groups, **into, **options, backend="native")
    assert all(torch.equal(given[name], before[name]) for name in given)
    if residual := "residual" in names:
        given["x"] = given["x"] + given.pop("residual")
    eager = group_norm_silu(**given, num_groups=groups, **options, backend="eager")
    wide = {name: value.double() for name, value in given.items()}
    assert_close(
        y, group_norm_silu(**wide, num_groups=groups, **options, backend="reference"), eager=eager, name="y"
    )
    assert untouched(y_memory)
    if residual and into:
        assert torch.equal(total, given["x"])
        assert untouched(total_memory)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("native", "threads")
def test_hard_shapes(shape: str) -> None:
    size, groups = SHAPES[shape]
    check_group_norm(size, VARIANTS["residual"], groups)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("native", "threads")
def test_variants(variant: str) -> None:
    check_group_norm((2, 20, 33, 31), VARIANTS[variant], 4, activation=None if variant == "film" else "silu")


@pytest.mark.parametrize("shape", [(3, 24), (2, 24, 7), (1, 24, 2, 3, 4)], ids=str)
@pytest.mark.usefixtures("native")
def test_any_rank(shape: tuple[int, ...]) -> None:
    check_group_norm(shape, VARIANTS["concat_no_total"], 4)


@pytest.mark.usefixtures("native")
def test_a_mean_far_from_zero_costs_no_more_than_it_must() -> None:
    x = last(1000 + torch.randn(2, 32, 32, 33))
    weight, bias, y = torch.ones(32), torch.zeros(32), last(torch.empty(2, 32, 32, 33))
    group_norm_silu_(y, x, weight, bias, 8, activation=None, backend="native")
    expected = group_norm_silu(x.double(), weight, bias, 8, activation=None, backend="reference")
    assert (y - expected).abs().max() < 2e-4  # x is rounded to 6e-5; E[x^2] - E[x]^2 would lose all of the variance


@pytest.mark.usefixtures("native")
def test_results_do_not_depend_on_threads_or_batch() -> None:
    given, before, results = make((6, 20, 40, 41), VARIANTS["all"]), torch.get_num_threads(), []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            for part in (slice(0, 6), slice(4, 5)):
                own = {name: value[part] if value.ndim > 1 else value for name, value in given.items()}
                y = last(torch.empty(len(own["x"]), 48, 40, 41))
                group_norm_silu_(y, **own, num_groups=4, backend="native")
                results.append(y)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0] if len(y) == 6 else results[0][4:5]) for y in results)


@pytest.mark.parametrize("place", ["x", "residual"])
@pytest.mark.usefixtures("native")
def test_in_the_place_of_an_input(place: str) -> None:
    given = make((2, 24, 9, 8), ("residual",))
    apart, total = torch.empty_like(given["x"]), torch.empty_like(given["x"])
    group_norm_silu_(apart, **given, total=total, num_groups=4, backend="native")
    group_norm_silu_(given[place], **given, num_groups=4, backend="native")
    assert torch.equal(given[place], apart)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("c2", [0, 5, 28])
@pytest.mark.parametrize("shape", [(2, 20, 5, 7), (3, 1, 1, 1), (1, 64, 40, 40), (0, 4, 3, 3)], ids=str)
@pytest.mark.usefixtures("native", "threads")
def test_rms_norm(shape: tuple[int, ...], c2: int, residual: bool) -> None:
    given = make(shape, ("scale", "shift") + (("x2",) if c2 else ()), c2)
    del given["bias"]
    given["x"][..., 0] = 0
    y_memory, y = guarded((shape[0], len(given["weight"]), *shape[2:]))
    added = last(torch.randn(y.shape)) if residual else None
    rms_norm_silu_(y, **given, residual=added, backend="native")
    eager, expected = torch.empty_like(y), torch.empty_like(y, dtype=torch.float64)
    rms_norm_silu_(eager, **given, residual=added, backend="eager")
    wide = {name: value.double() for name, value in given.items()}
    rms_norm_silu_(expected, **wide, residual=None if added is None else added.double(), backend="reference")
    assert_close(y, expected, eager=eager, name="y")
    assert untouched(y_memory)


@pytest.mark.usefixtures("native")
def test_silu_over_the_whole_range() -> None:
    # The norm of zeros is zero, and a row of `shift` is what SiLU is of.
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, 1e-30, -88.7, 3e38])])[:, None]
    y, zeros = torch.empty(len(x), 1, 1), torch.zeros(len(x), 1)
    rms_norm_silu_(y, zeros[:, :, None], torch.ones(1), scale=zeros, shift=x, backend="native")
    torch.testing.assert_close(y.flatten(), torch.nn.functional.silu(x.flatten()), rtol=1e-6, atol=1e-36)


@pytest.mark.usefixtures("native")
def test_the_functional_forms_give_the_same() -> None:
    given = make((2, 24, 5, 6), ("time_bias",))
    y = torch.empty_like(given["x"])
    group_norm_silu_(y, **given, num_groups=4, backend="native")
    assert torch.equal(group_norm_silu(**given, num_groups=4, backend="native"), y)
    rms_norm_silu_(y, given["x"], given["weight"], backend="native")
    assert torch.equal(rms_norm_silu(given["x"], given["weight"], backend="native"), y)
    with pytest.raises(ValueError, match="a gradient is required, which the native backend does not give"):
        rms_norm_silu(given["x"].requires_grad_(), given["weight"], backend="native")
    contiguous = given | {"x": given["x"].detach().contiguous()}
    expected = group_norm_silu(**given | {"x": given["x"].detach()}, num_groups=4, backend="native")
    assert torch.equal(group_norm_silu(**contiguous, num_groups=4, backend="native"), expected)
