"""The norms on every backend: values and gradients, the form in place with its sum, its memory and its launches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_,
    group_norm_silu_launches,
    group_norm_silu_workspace,
    rms_norm_silu,
    rms_norm_silu_,
)
from fastddpm_kernels.group_norm_silu import plan as _plan
from fastddpm_kernels.testing import (
    FLOORS,
    SHAPES,
    Guarded,
    assert_close,
    assert_close_if_few,
    check_compiles,
    check_op,
    check_refuses,
    errors,
    gradients,
    poisoned_memory,
    same_on_any_threads,
    to_layout,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SINGLE, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
OPS: dict[str, Callable[..., Tensor]] = {"group_norm": group_norm_silu, "rms_norm": rms_norm_silu}
IMAGES = ("x", "x2", "residual")
FILM, ALL = ("scale", "shift"), ("x2", "time_bias", "scale", "shift")


@dataclass(frozen=True)
class Case:
    why: str
    shape: tuple[int, ...] = (2, 20, 5, 7)  # with 28 channels of x2, the second group of 4 straddles both
    groups: int = 4
    given: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    channels2: int = 28
    y: str = "own"  # in place: the memory of y, "own", "x" or "residual"
    total: str | None = None  # in place: as y, or None
    wide: bool = False  # weights and rows are float32, whatever the images are
    eps: float | None = None
    activation: str | None = "silu"

    @property
    def options(self) -> dict[str, Any]:
        return {"activation": self.activation} | ({} if self.eps is None else {"eps": self.eps})


def shaped(name: str, why: str, **options: Any) -> Case:
    return Case(why, *SHAPES[name], **options)


# Registers hold a slab of 32768 values forward (half as many if pixels are masked in place) and 8192 backward. Larger
# ones take two passes. A group's channels and the pixels are each rounded up to a power of two.
LARGE = (2, 20, 23, 23)
CASES = {
    "plain": shaped("plain", "sizes that are powers of two"),
    "plain_half": shaped("plain", "the commonest call on a GPU", dtype=HALF, layout="channels_last"),
    "plain_bfloat16": shaped("plain", "the dtype of fewest bits", dtype=BFLOAT),
    "channels_not_a_power_of_two": shaped("channels_not_a_power_of_two", "masks of channels and of pixels"),
    "odd_channels_half": shaped("channels_not_a_power_of_two", "the same", dtype=HALF, layout="channels_last"),
    "twelve_channels_a_group": shaped("twelve_channels_a_group", "no vector divides a group"),
    "one_group": shaped("one_group", "a layer norm", dtype=HALF, layout="channels_last"),
    "one_channel_a_group": shaped("one_channel_a_group", "an instance norm"),
    "one_pixel": shaped("one_pixel", "contiguous and channels-last at once", dtype=HALF, layout="channels_last"),
    "one_row": shaped("one_row", "a dimension of size one"),
    "one_channel": shaped("one_channel", "all there is is one group", dtype=HALF, layout="channels_last"),
    "wide_half": shaped("wide", "more channels than pixels", dtype=HALF, layout="channels_last"),
    "many_pixels": shaped("many_pixels", "more pixels than channels"),
    "empty_batch": shaped("empty_batch", "nothing to do", dtype=HALF, layout="channels_last"),
    "time_bias": Case("added before the statistics", given=("time_bias",)),
    "film": Case("a scale and a shift per sample", given=FILM),
    "concat": Case("a group straddles both sources", given=("x2",)),
    "all": Case("no argument disturbs another", given=ALL),
    "all_last": Case("the same", given=ALL, layout="channels_last"),
    "vectors": Case("no space", (3, 24), 4, ("x2", *FILM), channels2=8),
    "signal": Case("rows that are copied first", (2, 24, 7), 4, ("x2", *FILM), channels2=8, layout="neither"),
    "signal_last": Case("torch knows no such format", (2, 24, 7), 4, ("x2",), channels2=8, layout="channels_last"),
    "volume": Case("three dimensions", (1, 24, 2, 3, 4), 4, ("x2", *FILM), channels2=8, layout="channels_last"),
    "volume_neither": Case("images that are copied first", (1, 24, 2, 3, 4), 4, FILM, layout="neither"),
    "no_activation": Case("no SiLU; an epsilon that shows", (2, 24, 4, 4), 3, FILM, eps=1e-2, activation=None),
    "two_passes_back": Case("one pass forward, two back", LARGE, given=ALL),
    "two_passes": Case("several splits of the pixels", LARGE, 2, ALL, channels2=48),
    "two_passes_last": Case("the same", LARGE, 2, ALL, channels2=48, layout="channels_last"),
    "two_passes_half": Case("slabs of several groups", (1, 20, 45, 47), 4, ALL, HALF, "channels_last"),
    "two_passes_bfloat16": Case("the same", LARGE, 2, ALL, BFLOAT, "channels_last", 48),
}  # fmt: skip
NATIVE = {
    "few": Case("too few values for a vector", (1, 1, 4, 4), 1),
    "three_groups": Case("groups of two channels", (2, 6, 2, 3), 3),
    "straddling": Case("a group of both sources", (2, 17, 7, 9), 5, ("x2",), channels2=13),
    "one_group": Case("all channels are one group", (1, 130, 33, 5), 1),
    "several_blocks": Case("threads share a sample", (5, 48, 16, 9), 8, ("x2",), channels2=16),
}


def make(case: Case, names: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
    """Return random arguments, rounded to the case's dtype, in float64; the channels differ in mean and spread."""
    shape, whole = case.shape, case.shape[1] + (case.channels2 if "x2" in names else 0)
    offset = torch.linspace(-2, 2, shape[1]).reshape(1, -1, *(1,) * (len(shape) - 2))
    tensors = {"x": torch.randn(shape) * (1 + offset.abs()) + offset}
    for name in names:
        if name == "x2":
            tensors[name] = torch.randn(shape[0], case.channels2, *shape[2:])
        elif name in ("weight", "bias"):
            tensors[name] = torch.randn(whole)
        else:
            tensors[name] = 3 * torch.randn(shape) - offset if name == "residual" else torch.randn(shape[0], whole)
    return {
        name: value.to(device, torch.float32 if case.wide and name not in IMAGES else case.dtype).double()
        for name, value in tensors.items()
    }


def run_of(case: Case, op: str, tensors: dict[str, Tensor]) -> Callable[[str, torch.dtype], dict[str, Tensor]]:
    """Return what calls an op, and gives its result `y` and the gradient of every tensor."""
    groups = {"num_groups": case.groups} if op == "group_norm" else {}

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: value.to(dtype, copy=True).requires_grad_() for name, value in tensors.items()}
        given = leaves | {name: to_layout(leaves[name], case.layout) for name in ("x", "x2") if name in leaves}
        y = OPS[op](**given, **groups, **case.options, backend=backend)
        assert y.dtype == dtype
        last = case.layout == "channels_last" or backend == "native"
        assert (y.movedim(1, -1) if last else y).is_contiguous()
        grads = gradients({"y": y}, leaves)
        if op == "rms_norm" and y.shape[1] == 1:
            # Of one channel over its norm only the sign is left: no gradient, and so none to be relative to.
            assert (grads.pop("dx").double() * tensors["x"]).abs().max() <= FLOORS[dtype][1]
        return {"y": y} | grads

    return run


# The RMS norm has no time_bias, and one pass always does.
BOTH = [(name, op) for name in CASES for op in OPS if op == "group_norm" or not name.startswith(("two_", "time_"))]


@pytest.mark.parametrize(("case", "op"), [(CASES[name], op) for name, op in BOTH], ids=map("-".join, BOTH))
def test_results_and_gradients(case: Case, op: str, backend: str, device: torch.device) -> None:
    weights = ("weight", "bias") if op == "group_norm" else ("weight",)
    names = (*weights, *(name for name in case.given if op == "group_norm" or name != "time_bias"))
    tensors = make(case, names, device)

    def compare(name: str, actual: Tensor, expected: Tensor, eager: Tensor) -> None:
        if name in ("y", "dx", "dx2") or case.dtype != torch.float32:
            assert_close(actual, expected, eager=eager, name=name)
        else:
            # A sum of n terms of either sign is about sqrt(n) times smaller than the sum of their magnitudes,
            # and it is the latter that sets its rounding error.
            terms = max(torch.Size((case.shape[0], *case.shape[2:])).numel(), 1)
            assert errors(actual, expected)[0] <= FLOORS[case.dtype][0] * terms**0.5, name

    # eager rounds after each of its operations, of which the forward has up to six.
    check_op(run_of(case, op, tensors), backend, case.dtype, rounds=6, compare=compare)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("native", torch.float32), ("native", BFLOAT)], indirect=["backend"], ids=str
)
@pytest.mark.parametrize("rows", [("time_bias",), FILM], ids="-".join)
@pytest.mark.parametrize("case", NATIVE.values(), ids=list(NATIVE))
@pytest.mark.usefixtures("backend")
def test_native_results_and_gradients(case: Case, rows: tuple[str, ...], dtype: torch.dtype) -> None:
    tensors = make(replace(case, dtype=dtype), ("weight", "bias", *case.given, *rows), torch.device("cpu"))
    check_op(
        run_of(case, "group_norm", tensors), "native", dtype, threads=(3, 1),
        compare=lambda name, actual, expected, eager: assert_close_if_few(actual, expected, eager=eager, name=name),
    )  # fmt: skip


def test_reference_is_group_norm() -> None:
    x, weight, bias = torch.randn(2, 12, 5, 5).double(), torch.randn(12).double(), torch.randn(12).double()
    expected = F.silu(F.group_norm(x, 3, weight, bias, 1e-3))
    assert_close(group_norm_silu(x, weight, bias, 3, eps=1e-3, backend="reference"), expected)
    x2, rows = torch.randn(2, 6, 5, 5).double(), torch.randn(3, 2, 18).double()
    weight, bias = torch.randn(2, 18).double()
    h = F.group_norm(torch.cat((x, x2), 1) + rows[0, :, :, None, None], 3, weight, bias, 1e-5)
    expected = h * (1 + rows[1, :, :, None, None]) + rows[2, :, :, None, None]
    given = dict(zip(("time_bias", "scale", "shift"), rows, strict=True))
    assert_close(group_norm_silu(x, weight, bias, 3, x2=x2, **given, activation=None, backend="reference"), expected)


def test_reference_is_the_peers_rms_norm() -> None:
    x, g = torch.randn(2, 12, 5, 5).double(), torch.randn(1, 12, 1, 1).double()
    expected = F.normalize(x, dim=1) * g * x.shape[1] ** 0.5  # denoising_diffusion_pytorch's RMSNorm.forward
    assert_close(rms_norm_silu(x, g.flatten(), activation=None, backend="reference"), expected)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("size", [(12, 12), (45, 12)], ids=["one_pass", "two_passes"])
@pytest.mark.parametrize("backend", ["eager", "triton", "native"], indirect=True)
def test_statistics_survive_a_large_mean(
    size: tuple[int, int], residual: bool, backend: str, device: torch.device
) -> None:
    # E[x^2] - E[x]^2 in float32 would have nothing left of a variance of 1 beside a mean of 4000.
    layout = "channels_last" if backend == "native" else "contiguous"  # torch's own kernel for the other loses it all
    x, second = (to_layout(t + 4000 / (1 + residual), layout) for t in torch.randn(2, 1, 64, *size, device=device))
    given: dict[str, Any] = {"residual": second} if residual else {}
    weight, bias, y = torch.ones(64, device=device), torch.zeros(64, device=device), torch.empty_like(x)
    group_norm_silu_(y, x, weight, bias, 1, **given, backend=backend)
    summed = (x + given.get("residual", 0)).double()
    expected = group_norm_silu(summed, weight.double(), bias.double(), 1, backend="reference")
    # One unit in the last place of the mean is 2.4e-4 of the result.
    assert errors(y, expected)[1] < 5e-4
    if not residual:
        assert errors(group_norm_silu(x, weight, bias, 1, backend=backend), expected)[1] < 5e-4


def test_a_black_pixel_has_no_direction(backend: str, device: torch.device) -> None:
    x = torch.zeros(1, 8, 2, 2, device=device, dtype=HALF, requires_grad=True)
    y = rms_norm_silu(x, torch.ones(8, device=device, dtype=HALF), eps=0.5, backend=backend)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.allclose(grad, torch.full_like(x, 0.5 * 8**0.5 / 0.5), rtol=1e-3)


@pytest.mark.parametrize("op", OPS)
def test_weights_may_be_wider_than_images(op: str, backend: str, device: torch.device) -> None:
    names = ("weight", "bias", *FILM) if op == "group_norm" else ("weight", *FILM)
    tensors = {name: value.float() for name, value in make(Case("", (2, 24, 4, 4)), names, device).items()}
    tensors["x"] = tensors["x"].half()
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    groups = {"num_groups": 4} if op == "group_norm" else {}
    y = OPS[op](**leaves, backend=backend, **groups)
    gradients({"y": y}, leaves)  # each in the dtype of its tensor
    expected = OPS[op](**{k: v.detach().double() for k, v in tensors.items()}, backend="reference", **groups)
    assert y.dtype == HALF
    assert errors(y, expected)[0] <= 6 * FLOORS[HALF][0]


def test_rows_may_be_expanded_or_chunks(backend: str, device: torch.device) -> None:
    tensors = {n: v.float() for n, v in make(Case("", (3, 8, 4, 4)), ("weight", "bias"), device).items()}
    time_bias = torch.randn(1, 8, device=device).expand(3, 8)
    scale, shift = torch.randn(3, 16, device=device).chunk(2, dim=1)
    for s in (scale, torch.randn(8, 3, device=device).t()):
        rows = {"time_bias": time_bias, "scale": s, "shift": shift}
        copies = {name: row.contiguous() for name, row in rows.items()}
        given, copied = (group_norm_silu(**tensors, num_groups=2, **r, backend=backend) for r in (rows, copies))
        assert torch.equal(given, copied)


@pytest.mark.parametrize("name", ["all_last", "two_passes"])
def test_results_are_reproducible_to_the_bit(name: str, backend: str, device: torch.device) -> None:
    run = run_of(CASES[name], "group_norm", make(CASES[name], ("weight", "bias", *ALL), device))
    first, second = (run(backend, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("op", "layout", "backend"),
    [
        ("group_norm", "channels_last", "triton"),
        ("rms_norm", "contiguous", "eager"),
    ],
    indirect=["backend"],
)
def test_compiles(op: str, layout: str, backend: str, device: torch.device) -> None:
    names = ("weight", "bias", *ALL) if op == "group_norm" else ("weight", "x2", *FILM)
    groups = {"num_groups": 4} if op == "group_norm" else {}
    tensors = {name: value.float() for name, value in make(Case("", (2, 20, 4, 4)), names, device).items()}
    tensors |= {name: to_layout(tensors[name], layout) for name in ("x", "x2")}

    def function(*values: Tensor) -> Tensor:
        return OPS[op](**dict(zip(tensors, values, strict=True)), **groups, backend=backend)

    # The gradient of the peers' way to normalise is added up in another order.
    check_compiles(
        function, *(v.requires_grad_() for v in tensors.values()), exact=(op, backend) != ("rms_norm", "eager")
    )


@pytest.mark.parametrize(("layout", "names"), [("contiguous", ()), ("channels_last", ALL), ("neither", ALL)])
def test_custom_ops(layout: str, names: tuple[str, ...], on_triton: torch.device) -> None:
    case = Case("", (2, 8, 3, 3), given=names, channels2=4)
    t = {name: value.float() for name, value in make(case, ("weight", "bias", *names), on_triton).items()}
    t |= {name: to_layout(t[name], layout) for name in ("x", "x2") if name in t}
    t = {name: value.detach().requires_grad_() for name, value in t.items()}
    film = (t.get("scale"), t.get("shift"))
    ops = torch.ops.fastddpm

    def check(op: Any, *args: Any, grad: bool = True) -> None:
        args = args if grad else tuple(value.detach() if isinstance(value, Tensor) else value for value in args)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op.default, args, test_utils=checks)

    args = (t["x"], t["weight"], t["bias"], 4, 1e-5, t.get("x2"), t.get("time_bias"), *film, True)
    check(ops.group_norm_silu, *args)
    y, mean, rstd = (value.detach() for value in ops.group_norm_silu(*args))
    args = (t["x"], t["weight"], t["bias"], mean, rstd, t.get("x2"), t.get("time_bias"), *film, True)
    check(ops.group_norm_silu_backward, y, *args, grad=False)
    args = (t["x"], t["weight"], 1e-12, t.get("x2"), *film, True)
    check(ops.rms_norm_silu, *args)
    check(ops.rms_norm_silu_backward, y, *args, grad=False)


@pytest.mark.usefixtures("native")
def test_custom_op_on_native() -> None:
    vector, x = (
        torch.ones(17, requires_grad=True),
        to_layout(torch.randn(2, 17, 5, 4), "channels_last").requires_grad_(),
    )
    given = (x, vector, vector, 17, 1e-5, None, None, None, None, True, True)
    torch.library.opcheck(torch.ops.fastddpm.group_norm_silu.default, given)


# In place.

SUM, SUM_ALL = ("residual",), ("x2", "residual", "time_bias", "scale", "shift")
IN_PLACE = {
    **{
        name: shaped(name, "as above, with a residual", given=SUM, total="own", dtype=dtype, layout=layout)
        for (name, dtype, layout) in zip(
            SHAPES,
            itertools.cycle((torch.float32, HALF)),
            itertools.cycle(("contiguous", "channels_last")),
            strict=False,
        )
    },
    "alone": Case("no sum"),
    "alone_bfloat16": Case("no sum", dtype=BFLOAT, layout="channels_last"),
    "sum": Case("the sum is written, too", given=SUM, total="own", layout="channels_last"),
    "no_total": Case("the sum is not kept", given=(*SUM, "time_bias")),
    "film": Case("rows of the whole batch", given=(*SUM, *FILM), total="own", layout="channels_last"),
    "concat": Case("a residual of a part of the channels", given=("x2", *SUM), total="own"),
    "concat_no_total": Case("the sum of a part is not kept", given=("x2", *SUM), layout="channels_last"),
    "all": Case("no argument disturbs another", given=SUM_ALL, total="own", layout="channels_last"),
    "all_half": Case("the sum is rounded once", given=SUM_ALL, total="own", dtype=HALF, layout="channels_last"),
    "all_bfloat16": Case("rounded once", given=SUM_ALL, total="own", dtype=BFLOAT, layout="channels_last"),
    "two_passes": Case("the second pass reads the sum", LARGE, 2, SUM_ALL, total="own"),
    "two_passes_last": Case("slabs of several groups", LARGE, 4, SUM_ALL, SINGLE, "channels_last", 48, total="own"),
    "two_passes_half": Case("the same", LARGE, 2, SUM_ALL, HALF, "channels_last", 48, total="own"),
    "two_passes_no_total": Case("the second pass adds again", LARGE, 2, (*SUM, "x2"), HALF, "channels_last", 48),
    "two_passes_alone": Case("one image, read twice", (2, 40, 23, 23), 2),
    "twelve_channels_a_group_across_a_concatenation": Case(
        "256 is no multiple of 12: the 22nd group has 4 channels of x, which have a residual, and 8 of x2",
        (1, 256, 5, 4), 32, ("x2", *SUM, "time_bias"), HALF, "channels_last", 128, total="own"),
    "vectors": Case("no space", (3, 24), 4, ("x2", *SUM), channels2=8, total="own"),
    "signal": Case("torch knows no such format", (2, 24, 7), 4, ("x2", *SUM), layout="channels_last", channels2=8),
    "volume": Case("three dimensions", (1, 24, 2, 3, 4), 4, ("x2", *SUM), layout="channels_last", channels2=8),
    "no_activation": Case("an epsilon that shows", (2, 24, 4, 4), 4, (*SUM, *FILM), eps=1e-2, activation=None),
    "wide_weights": Case("weights in float32", (2, 24, 4, 4), 4, (*SUM, *FILM), HALF, "channels_last", wide=True),
    "y_is_x": Case("the result over what is read", given=(*SUM, *FILM), y="x"),
    "y_is_residual": Case("the same", given=(*SUM, *FILM), y="residual", layout="channels_last"),
    "total_is_x": Case("the sum over what is read", given=(*SUM, *FILM), total="x", layout="channels_last"),
    "total_is_residual": Case("the same", given=(*SUM, *FILM), total="residual"),
    "both_over": Case("nothing is kept", given=(*SUM, *FILM), y="x", total="residual", layout="channels_last"),
    "both_over_crossed": Case("nothing is kept", given=(*SUM, *FILM), y="residual", total="x"),
    "total_is_x_of_two": Case("over a part", given=("x2", *SUM), total="x", dtype=HALF, layout="channels_last"),
    **{
        f"two_passes_y_{y}_total_{total}": Case("it finds the sum", (1, 36, 23, 23), 2, SUM, y=y, total=total)
        for y, total in (("x", None), ("residual", None), ("own", "x"), ("own", "residual"), ("residual", "x"))
    },
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "eager", "triton", "native"], indirect=True)
@pytest.mark.parametrize("case", IN_PLACE.values(), ids=list(IN_PLACE))
def test_in_place(case: Case, backend: str, device: torch.device) -> None:
    """It is the rounded sum that is normalised. Nothing else is written, and the sum is right to the bit."""
    if backend == "native":  # channels-last only, and not in half precision
        case = replace(case, layout="channels_last", dtype=BFLOAT if case.dtype == BFLOAT else torch.float32)
    weights = torch.float32 if case.wide else case.dtype
    tensors = {
        name: to_layout(value.to(case.dtype), case.layout) if name in IMAGES else value.to(weights)
        for name, value in make(case, ("weight", "bias", *case.given), device).items()
    }
    functional: dict[str, Any] = {name: value for name, value in tensors.items() if name != "residual"}
    if "residual" in tensors:
        functional["x"] = tensors["x"] + tensors["residual"]
    options: dict[str, Any] = {"num_groups": case.groups, **case.options}
    eager = group_norm_silu(**functional, **options, backend="eager")
    wide = {name: value.double() for name, value in functional.items()}
    expected = group_norm_silu(**wide, **options, backend="reference")
    whole = (case.shape[0], len(tensors["weight"]), *case.shape[2:])

    def run() -> dict[str, Tensor]:
        given = {name: value.clone(memory_format=torch.preserve_format) for name, value in tensors.items()}
        own_y, own_total = (Guarded(size, case.dtype, device, case.layout) for size in (whole, case.shape))
        y, total = given.get(case.y, own_y.tensor), given.get(case.total or "", own_total.tensor)
        into = {} if case.total is None else {"total": total}
        group_norm_silu_(y, **given, **into, **options, backend=backend)
        own_y.check(), own_total.check()
        for name, value in tensors.items():
            assert name in (case.y, case.total) or torch.equal(given[name], value), name
        assert case.total is None or torch.equal(total, functional["x"])
        return {"y": y}

    with poisoned_memory():
        y = (same_on_any_threads(run, (3, 1)) if backend == "native" else run())["y"]
    if backend == "eager" and (case.layout == "contiguous" or len(case.shape) in (4, 5)):
        assert torch.equal(y, eager)  # in other ranks torch knows no channels-last, and sums in another order
    else:
        assert_close(y, expected, eager=eager, name="y")


def test_which_cases_take_two_passes() -> None:
    for name, case in IN_PLACE.items():
        channels = case.shape[1] + (case.channels2 if "x2" in case.given else 0)
        x = to_layout(torch.empty(case.shape, dtype=case.dtype), case.layout)
        launches = group_norm_silu_launches(x, channels, case.groups)
        assert launches == (2 if name.startswith("two_passes") else 0 if name == "empty_batch" else 1), name


@pytest.mark.parametrize("with_total", [True, False], ids=["total", "no_total"])
@pytest.mark.parametrize("size", [(13, 11), (45, 29)], ids=["one_pass", "two_passes"])
@pytest.mark.parametrize("backend", ["reference", "eager", "triton"], indirect=True)
def test_it_is_the_rounded_sum_that_is_normalised(
    size: tuple[int, int], with_total: bool, backend: str, device: torch.device
) -> None:
    # Above 4096 float16 holds multiples of 4, so of a residual in [-1, 2) nothing remains: no variance, only the bias.
    x = torch.full((1, 16, *size), 4100, dtype=HALF, device=device)
    residual = 2.9 * torch.rand_like(x) - 1
    weight, bias = torch.randn(2, 16, device=device).unbind()
    y, total = torch.empty_like(x), torch.empty_like(x) if with_total else None
    options: dict[str, Any] = {"num_groups": 1, "activation": None, "backend": backend}
    group_norm_silu_(y, x, weight, bias, residual=residual, total=total, **options)
    if backend == "eager":  # whose float16 statistics are not exact even of a constant
        assert torch.equal(y, group_norm_silu(x, weight, bias, **options))
    else:
        assert torch.equal(y, bias.half().reshape(1, 16, 1, 1).expand_as(y))
    assert total is None or torch.equal(total, x)


@pytest.mark.parametrize("backend", ["reference", "eager", "triton", "native"], indirect=True)
def test_in_place_on_unusual_arguments(backend: str, device: torch.device) -> None:
    x, weight = torch.empty(2, 24, 0, device=device), torch.empty(24, device=device)
    group_norm_silu_(x.clone(), x, weight, weight, 4, residual=x, total=x.clone(), backend=backend)  # no pixels
    leaves = {n: v.float() for n, v in make(Case("", (3, 8, 4, 4)), ("weight", "bias", *SUM), device).items()}
    leaves = {n: to_layout(v, "channels_last").requires_grad_() if n in IMAGES else v for n, v in leaves.items()}
    row = torch.randn(5, 8, device=device)[2:3].expand(3, 8)
    y, copied = torch.empty_like(leaves["x"]), torch.empty_like(leaves["x"])
    group_norm_silu_(y, **leaves, num_groups=2, time_bias=row, backend=backend)
    group_norm_silu_(copied, **leaves, num_groups=2, time_bias=row.contiguous(), backend=backend)
    assert torch.equal(y, copied)
    assert not y.requires_grad


RMS = {
    "film": Case("odd sizes", (2, 17, 3, 5), given=FILM),
    "film_last": Case("odd sizes", (2, 17, 3, 5), given=(*FILM, "bias", "residual"), layout="channels_last"),
    "one_pixel": Case("one row of many channels", (1, 130, 1, 1), given=(*FILM, "bias", "residual"), dtype=HALF),
    "plain": Case("sizes that are powers of two", (3, 64, 8, 8), given=(*FILM, "bias", "residual")),
    "plain_half": Case("the same", (3, 64, 8, 8), 4, (*FILM, "bias", "residual"), HALF, "channels_last"),
    "plain_bfloat16": Case("the same", (3, 64, 8, 8), 4, (*FILM, "residual"), BFLOAT, "channels_last"),
    "signal": Case("one dimension", (2, 5, 7), given=(*FILM, "bias", "residual"), layout="channels_last"),
    "concat": Case("two sources", given=("x2", *FILM), layout="channels_last"),
    "concat_sum": Case("two sources and a residual of both", given=("x2", *FILM, "residual"), layout="channels_last"),
    "short_second": Case("less than a vector of x2", given=("x2", "residual"), channels2=5, layout="channels_last"),
    "one_value": Case("one channel of one pixel", (3, 1, 1, 1), given=("residual",)),
    "many_pixels": Case("threads share a sample", (1, 64, 40, 40), given=(*FILM, "residual"), layout="channels_last"),
    "no_activation": Case("nothing after the norm", given=("bias",), activation=None),
    "y_is_x": Case("the result over what is read", given=("residual", *FILM), y="x", layout="channels_last"),
    "y_is_residual": Case("the same", given=("residual", "bias", *FILM), y="residual", layout="channels_last"),
    "empty_batch": Case("nothing to do", (0, 4, 3, 3), given=FILM),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "eager", "triton", "native"], indirect=True)
@pytest.mark.parametrize("case", RMS.values(), ids=list(RMS))
def test_rms_norm_in_place(case: Case, backend: str, device: torch.device) -> None:
    if backend == "native":
        case = replace(case, layout="channels_last", dtype=BFLOAT if case.dtype == BFLOAT else torch.float32)
    tensors = make(case, ("weight", *case.given), device)
    if "x2" in tensors:
        tensors["residual"] = torch.randn(case.shape[0], len(tensors["weight"]), *case.shape[2:]).to(device, case.dtype)
    if "residual" not in case.given:
        tensors.pop("residual", None)
    tensors["x"][..., :1] = 0  # black pixels
    kept = {name: tensors[name].double() for name in tensors}
    columns = (*tensors["weight"].shape, *(1,) * (len(case.shape) - 2))
    h = torch.cat([kept[name] for name in ("x", "x2") if name in kept], 1)
    h = h + kept["bias"].view(columns) if "bias" in kept else h
    h = F.normalize(h, dim=1) * kept["weight"].view(columns) * h.shape[1] ** 0.5
    if "scale" in kept:
        scale, shift = (kept[name].reshape(-1, *columns) for name in FILM)
        h = h * (1 + scale) + shift
    expected = (F.silu(h) if case.activation else h) + kept.get("residual", 0)

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        given = {
            name: to_layout(value.to(dtype, copy=True), case.layout) if name in IMAGES else value.to(dtype)
            for name, value in tensors.items()
        }
        own = Guarded(tuple(expected.shape), dtype, device, case.layout)
        y = given.get(case.y, own.tensor)
        before = {name: value.clone() for name, value in given.items()}
        rms_norm_silu_(y, **given, **case.options, backend=backend)
        own.check()
        assert all(torch.equal(given[name], value) for name, value in before.items() if name != case.y)
        return {"y": y}

    actual = check_op(run, backend, case.dtype, rounds=8) if backend != "reference" else run(backend, torch.float64)
    if backend == "reference":
        torch.testing.assert_close(actual["y"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("native")
def test_native_results_do_not_depend_on_threads_or_batch() -> None:
    case = Case("", (6, 20, 40, 41), given=SUM_ALL)
    given = {n: v.float() for n, v in make(case, ("weight", "bias", *SUM_ALL), torch.device("cpu")).items()}
    given |= {name: to_layout(given[name], "channels_last") for name in IMAGES}

    def run() -> dict[str, Tensor]:
        results = []
        for part in (slice(0, 6), slice(4, 5)):
            own = {name: value[part] if value.ndim > 1 else value for name, value in given.items()}
            results.append(to_layout(torch.empty(len(own["x"]), 48, 40, 41), "channels_last"))
            group_norm_silu_(results[-1], **own, num_groups=4, backend="native")
        assert torch.equal(results[1], results[0][4:5])
        return {"y": results[0]}

    same_on_any_threads(run, (1, 2, 8))


@pytest.mark.usefixtures("native")
def test_native_silu_over_the_whole_range() -> None:
    # The norm of zeros is zero, and a row of `shift` is what SiLU is of.
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, 1e-30, -88.7, 3e38])])[:, None]
    y, zeros = torch.empty(len(x), 1, 1), torch.zeros(len(x), 1)
    rms_norm_silu_(y, zeros[:, :, None], torch.ones(1), scale=zeros, shift=x, backend="native")
    torch.testing.assert_close(y.flatten(), F.silu(x.flatten()), rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize("backend", ["eager", "triton", "native"], indirect=True)
def test_the_functional_forms_give_the_same(backend: str, device: torch.device) -> None:
    tensors = {n: v.float() for n, v in make(Case("", (2, 24, 5, 6)), ("weight", "bias", "time_bias"), device).items()}
    tensors["x"] = to_layout(tensors["x"], "channels_last")
    y = torch.empty_like(tensors["x"])
    group_norm_silu_(y, **tensors, num_groups=4, backend=backend)
    assert torch.equal(group_norm_silu(**tensors, num_groups=4, backend=backend), y)
    x, weight = tensors["x"], tensors["weight"]
    rms_norm_silu_(y, x, weight, activation=None, backend=backend)
    assert torch.equal(rms_norm_silu(x, weight, activation=None, backend=backend), y)
    if backend == "native":
        contiguous = tensors | {"x": x.contiguous()}
        expected = group_norm_silu(**tensors, num_groups=4, backend="native")
        assert torch.equal(group_norm_silu(**contiguous, num_groups=4, backend="native"), expected)
        given = {"x": x.requires_grad_(), "weight": weight, "backend": "native"}
        check_refuses(rms_norm_silu, ValueError, "gradient .*native", **given)


# Memory and launches.


class _Ops(TorchDispatchMode):
    """Names every torch operation that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["all", "two_passes_last"])
def test_a_call_with_a_workspace_allocates_nothing(name: str, on_triton: torch.device) -> None:
    from fastddpm_kernels.group_norm_silu.triton import in_place_launches

    case = IN_PLACE[name]
    t = {n: v.float() for n, v in make(case, ("weight", "bias", *SUM_ALL), on_triton).items()}
    t |= {image: to_layout(t[image], "channels_last") for image in IMAGES}
    groups, whole = case.groups, len(t["weight"])
    summed = t["x"] + t["residual"]
    given = {n: v.double() for n, v in t.items() if n != "residual"} | {"x": summed.double()}
    expected = group_norm_silu(**given, num_groups=groups, backend="reference")
    needed, launches = group_norm_silu_workspace(t["x"], whole, groups), group_norm_silu_launches(t["x"], whole, groups)
    assert (needed > 0) == (launches == 2) == name.startswith("two_passes")
    workspace = Guarded((needed,), torch.float32, on_triton)
    y = to_layout(torch.empty(2, whole, *case.shape[2:], device=on_triton), "channels_last")
    with _Ops() as ops:
        made = in_place_launches(
            y, t["x"], t["weight"], t["bias"], groups, 1e-5, t["x2"], t["residual"], t["x"], t["time_bias"], t["scale"],
            t["shift"], True, workspace.tensor,
        )  # fmt: skip
    assert ops.names == []
    assert len(made) == launches
    group_norm_silu_(y, **t, total=t["x"], num_groups=groups, workspace=workspace.tensor, backend="triton")
    assert_close(y, expected)
    assert torch.equal(t["x"], summed)
    workspace.check()
    assert not bool(workspace.tensor.isnan().any())  # all of it is needed
    if needed:
        short = t["x"].new_empty(needed - 1)
        arguments = {"y": y, **t, "num_groups": groups, "workspace": short, "backend": "triton"}
        check_refuses(group_norm_silu_, ValueError, f"workspace .*{needed}", **arguments)


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
    x = torch.empty(n, *sides, c, dtype=HALF, device="meta").movedim(-1, 1)
    assert group_norm_silu_launches(x, channels, 32) == launches
    assert (group_norm_silu_workspace(x, channels, 32) > 0) == (launches == 2)


@pytest.mark.parametrize("side", [1, 3, 16, 24, 32, 33, 48, 64, 250, 256])
def test_every_plan_covers_its_image_and_fits_its_registers(side: int) -> None:
    for n, (c1, c2, groups), dtype, last in itertools.product(
        (1, 2, 64, 300),
        ((1, 0, 1), (96, 0, 32), (128, 0, 32), (128, 128, 32), (256, 128, 32), (320, 0, 32), (512, 0, 1), (48, 0, 48),
         (512, 512, 32), (2048, 0, 32)),
        (torch.float32, HALF),
        (False, True),
    ):  # fmt: skip
        shape, channels = (n, side, side, c1) if last else (n, c1, side, side), c1 + c2
        x = torch.empty(shape, dtype=dtype, device="meta")
        x = x.movedim(-1, 1) if last else x
        plans = [(_plan.make_plan(x, channels, groups, 132, limits), limits)
                 for limits in (_plan.LIMITS, _plan.BACKWARD_LIMITS)]  # fmt: skip
        in_place = _plan.in_place_plan(x, channels, groups)
        for plan, limits in (*plans, (in_place, _plan.LIMITS)):
            assert plan.slab_groups * (channels // groups) <= plan.block_c
            assert (plan.slabs - 1) * plan.slab_groups < groups <= plan.slabs * plan.slab_groups
            span = plan.tiles * plan.block_p
            assert (plan.splits - 1) * span < side * side <= plan.splits * span  # none is empty
            assert plan.splits == 1 or not plan.one_pass
            assert plan.splits <= limits.max_splits
            assert plan.num_warps in (1, 2, 4, 8, 16)
            assert plan.block_p * plan.block_c <= max(32768, plan.block_c)
        if groups == 32 and channels <= 1024:
            masked = in_place.block_p != side * side or (c2 and dtype == torch.float32)
            assert in_place.block_p * in_place.block_c <= (16384 if masked or not in_place.one_pass else 32768)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 128, 32, 32), (1, 128, 256, 256)], ids=str)
def test_in_a_cuda_graph(shape: tuple[int, ...], device: torch.device) -> None:
    case = Case("", shape, given=(*SUM, "time_bias"))
    t = {n: v.half() for n, v in make(case, ("weight", "bias", *case.given), device).items()}
    t |= {name: to_layout(t[name], "channels_last") for name in ("x", "residual")}
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


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device: torch.device) -> None:
    x = to_layout(torch.randn(33, 64, 1024, 1024, device=device, dtype=HALF), "channels_last")
    weight, bias = torch.randn(2, 64, device=device)
    y = group_norm_silu(x, weight, bias, 8, backend="triton")
    assert_close(y[-1:], group_norm_silu(x[-1:].contiguous(), weight, bias, 8, backend="triton"))


# Bad input.

X, Y, W, ROWS = torch.randn(2, 8, 4, 4), torch.empty(2, 8, 4, 4), torch.randn(8), torch.randn(2, 8)
LAST, MEMORY = to_layout(X, "channels_last"), torch.randn(2, 16, 4, 4)
INSIDE, TWICE, TWO = MEMORY.flatten()[:256].view(2, 8, 4, 4), W.repeat(2), torch.empty(2, 16, 4, 4)
# Of every function that takes the arguments.
BAD = [
    (TypeError, "x .*list", {"x": [1.0]}),
    (TypeError, "x .*int64", {"x": X.long()}),
    (ValueError, r"x .*\(8,\)", {"x": W}),
    (ValueError, r"weight .*\(7,\)", {"weight": W[:7]}),
    (TypeError, "weight .*NoneType", {"weight": None}),
    (TypeError, "x2 .*float64", {"x2": X.double()}),
    (ValueError, r"x2 .*\(2, 8, 4\)", {"x2": X[..., 0]}),
    (ValueError, r"weight .*\(8,\)", {"x2": X}),
    (ValueError, r"scale .*\(8, 2\)", {"scale": ROWS.t(), "shift": ROWS}),
    (ValueError, "shift .*None", {"scale": ROWS}),
    (ValueError, "scale .*meta", {"scale": ROWS.to("meta"), "shift": ROWS}),
    (ValueError, "eps .*-1", {"eps": -1}),
    (ValueError, "activation .*gelu", {"activation": "gelu"}),
    (ValueError, "backend .*cuda", {"backend": "cuda"}),
]
BAD_GROUPS = [
    (ValueError, "num_groups .*3", {"num_groups": 3}),
    (ValueError, "num_groups .*0", {"num_groups": 0}),
    (ValueError, r"bias .*\(2, 8\)", {"bias": ROWS}),
    (ValueError, r"time_bias .*\(1, 8\)", {"time_bias": ROWS[:1]}),
]
BAD_IN_PLACE = [
    (TypeError, "y .*NoneType", {"y": None}),
    (TypeError, "residual .*float", {"residual": 1.0}),
    (TypeError, "y .*float16", {"y": Y.half()}),
    (TypeError, "residual .*float64", {"residual": X.double()}),
    (ValueError, r"y .*\(2, 8, 4, 4\)", {"x2": X, "weight": TWICE, "bias": TWICE}),
    (ValueError, r"y .*\(2, 8, 16\)", {"y": Y.flatten(2)}),
    (ValueError, r"residual .*\(1, 8, 4, 4\)", {"residual": X[:1]}),
    (ValueError, "y .*meta", {"y": Y.to("meta")}),
    (ValueError, "residual .*meta", {"residual": Y.to("meta")}),
    (ValueError, "x .*strides", {"x": X.mT}),
    (ValueError, "y .*strides", {"y": LAST.clone()}),
    (ValueError, "y .*strides", {"x": LAST}),
    (ValueError, "residual .*strides", {"residual": LAST}),
    (ValueError, "weight .*strides", {"weight": torch.randn(16)[::2]}),
    (ValueError, "y .*memory of x", {"y": MEMORY, "x": INSIDE, "x2": X, "weight": TWICE, "bias": TWICE}),
    (ValueError, "y .*memory of x2", {"y": MEMORY, "x": X, "x2": INSIDE, "weight": TWICE, "bias": TWICE}),
]
BAD_SUM = [
    (TypeError, "total .*bfloat16", {"residual": X, "total": Y.bfloat16()}),
    (ValueError, r"total .*\(2, 4, 4, 4\)", {"residual": X, "total": Y[:, :4]}),
    (ValueError, "total .*without residual", {"total": Y}),
    (ValueError, "total .*strides", {"residual": X, "total": LAST.clone()}),
    (ValueError, "memory of", {"residual": X, "total": Y}),
    (ValueError, "y .*memory of residual", {"y": MEMORY, "residual": INSIDE, "x2": X, "weight": TWICE, "bias": TWICE}),
    (ValueError, "total .*memory of x2",
     {"y": TWO, "residual": X, "x2": INSIDE, "total": INSIDE, "weight": TWICE, "bias": TWICE}),
    (ValueError, "time_bias .*strides", {"time_bias": torch.randn(8, 2).t()}),
    (TypeError, "workspace .*float16", {"workspace": W.half()}),
    (TypeError, "workspace .*int", {"workspace": 4}),
    (ValueError, "workspace .*meta", {"workspace": W.to("meta")}),
    (ValueError, "workspace .*strides", {"workspace": torch.randn(16)[::2]}),
]  # fmt: skip
FUNCTIONS: dict[Callable[..., Any], tuple[dict[str, Any], list[Any]]] = {
    rms_norm_silu: ({"x": X, "weight": W}, BAD),
    rms_norm_silu_: ({"y": Y, "x": X, "weight": W}, [*BAD_IN_PLACE, (ValueError, r"bias .*\(7,\)", {"bias": W[:7]}),
                                                     (ValueError, "bias .*strides", {"bias": torch.randn(16)[::2]})]),
    group_norm_silu: ({"x": X, "weight": W, "bias": W, "num_groups": 4}, [*BAD, *BAD_GROUPS]),
    group_norm_silu_: ({"y": Y, "x": X, "weight": W, "bias": W, "num_groups": 4},
                       [*BAD, *BAD_GROUPS, *BAD_IN_PLACE, *BAD_SUM]),
    group_norm_silu_workspace: ({"x": X, "channels": 8, "num_groups": 4}, BAD_GROUPS[:1]),
    group_norm_silu_launches: ({"x": X, "channels": 8, "num_groups": 4}, BAD_GROUPS[:1]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "error", "message", "changed"),
    [(function, *row) for function, (_, rows) in FUNCTIONS.items() for row in rows],
)
def test_bad_input(function: Callable[..., Any], error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    check_refuses(function, error, message, **FUNCTIONS[function][0] | changed)


def test_bad_input_of_triton(on_triton: torch.device) -> None:
    x, weight = X.double().to(on_triton), W.to(on_triton)
    check_refuses(rms_norm_silu, TypeError, "x .*float64", x=x, weight=weight, backend="triton")
    given = {"y": torch.empty_like(x), "x": x, "weight": weight, "bias": weight, "num_groups": 4, "backend": "triton"}
    check_refuses(group_norm_silu_, TypeError, "x .*float64", **given)
