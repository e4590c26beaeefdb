"""`conv_` and `conv3x3`: every native algorithm against float64, forward and gradients; what they refuse.

A result may be as far from float64 as torch's own convolution in the same dtype is, times what the algorithm must lose
(`error_factor`), times two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels import native as _native
from fastddpm_kernels.backend import BackendError
from fastddpm_kernels.conv import ALGORITHMS, PackedWeight, choose_algorithm, conv_, error_factor, pack, packed_values
from fastddpm_kernels.conv.packing import why_not_stored
from fastddpm_kernels.conv.training import conv3x3, resolve_conv3x3
from fastddpm_kernels.group_norm_silu import group_norm_silu
from fastddpm_kernels.testing import (
    FLOORS,
    Guarded,
    assert_close,
    assert_close_if_few,
    check_compiles,
    check_op,
    check_refuses,
    errors,
    gradients,
    same_on_any_threads,
    to_layout,
)
from torch import Tensor

SINGLE, BFLOAT = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    why: str
    shape: tuple[int, ...]  # N, C, C2, O, H, W
    residual: str | None = "own"  # None, "own" memory, or "y"
    bias: bool = True
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    out: tuple[int, int] | None = None  # H and W of the result, where they are not those of the image


# Each for every algorithm: their tiles, vectors and panels end at different places.
CASES = {
    "one_pixel": Case("less than a tile, all of it borders", (16, 1, 0, 1, 1, 1)),
    "two_by_two": Case("one tile of winograd2, less than one of winograd4", (2, 3, 0, 5, 2, 2)),
    "three_by_five": Case("less than a vector of channels; one more than a vector", (2, 5, 0, 17, 3, 5)),
    "seven_by_nine": Case("one more than a panel of output channels", (1, 17, 0, 33, 7, 9)),
    "many_channels": Case("long sums", (1, 130, 0, 70, 6, 4)),
    "many_tiles": Case("threads take whole blocks", (3, 20, 0, 40, 33, 34)),
    "one_of_many": Case("few output channels: sums over whole vectors of channels", (3, 64, 0, 1, 5, 6)),
    "four_of_two": Case("the same of two sources", (1, 32, 96, 4, 3, 7), residual="y"),
    "half_a_panel": Case("a panel whose second vector is empty", (2, 16, 0, 16, 9, 4), residual=None),
    "few_to_few": Case("few channels of two sources, gathered", (2, 2, 4, 6, 5, 7)),
    "empty": Case("nothing to do", (0, 3, 0, 4, 5, 5)),
    "residual_is_y": Case("what is added is overwritten", (2, 8, 0, 12, 6, 5), residual="y"),
    "x_is_small": Case("the second source begins within a vector", (2, 4, 19, 24, 5, 6), residual=None, bias=False),
    "x_is_a_vector": Case("the second source begins with a vector", (2, 16, 19, 24, 5, 6), residual=None),
    "x_is_no_vector": Case("the first source ends within a second vector", (2, 17, 19, 24, 5, 6), residual=None),
    "x_is_32": Case("bfloat16 takes 32 channels at a time", (2, 32, 19, 24, 5, 6), residual=None, bias=False),
    "x_is_more": Case("32 channels and a rest", (2, 50, 19, 24, 5, 6), residual=None, bias=False),
}
KINDS = [
    *(("native", SINGLE, a, up) for up in (False, True) for a in ALGORITHMS if not (up and a == "winograd2")),
    *(("native_bfloat16", BFLOAT, a, up) for up in (False, True) for a in ("winograd2", "direct")),
]
OTHER_CASES = {
    "pointwise": Case("no borders", (2, 6, 10, 35, 5, 3), kernel=1, padding=0),
    "rows_apart": Case("rows that meet in few sets of a cache are copied", (1, 1024, 0, 70, 9, 8), kernel=1, padding=0),
    "seven": Case("a kernel larger than the image is high", (2, 6, 10, 35, 5, 9), kernel=7, padding=3),
    "two": Case("an even kernel", (2, 6, 10, 35, 6, 8), kernel=2, stride=2, padding=0, out=(3, 4)),
    "downsample_0": Case("padded below and to the right alone", (2, 6, 10, 35, 6, 8), stride=2, padding=0, out=(3, 4)),
    "downsample_1": Case("an odd height", (2, 6, 10, 35, 7, 8), stride=2, out=(4, 4)),
    "valid": Case("smaller than the image", (2, 6, 10, 35, 7, 8), padding=0, out=(5, 6)),
    "full": Case("larger than the image", (2, 6, 10, 35, 4, 4), padding=2, out=(6, 6)),
}


def last(x: Tensor) -> Tensor:
    return to_layout(x, "channels_last")


def check(case: Case, dtype: torch.dtype, algorithm: str, upsample: bool) -> None:
    """Compare the native backend with `reference`; nothing outside of y may be written."""
    n, c, c2, o, h, w = case.shape
    if dtype == BFLOAT and algorithm == "direct":
        c, c2 = c + c % 2, c2 + c2 % 2
    sizes = {"x": (n, c, h, w), "x2": (n, c2, h, w)}
    out = case.out or (h * (1 + upsample), w * (1 + upsample))
    images = {name: last(torch.randn(size).to(dtype)) for name, size in sizes.items() if size[1]}
    residual = last(torch.randn(n, o, *out).to(dtype))
    weight = torch.randn(o, c + c2, case.kernel, case.kernel) / math.sqrt((c + c2) * case.kernel**2)
    packed = pack(weight, algorithm, upsample, dtype=dtype, channels2=c2)
    options: dict[str, Any] = {"stride": case.stride, "padding": case.padding, "upsample": upsample}
    if case.bias:
        options["bias"] = torch.randn(o)

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        given = {name: value.to(dtype) for name, value in images.items()}
        y = Guarded((n, o, *out), dtype, layout="channels_last")
        if case.residual == "y":
            given["residual"] = y.tensor.copy_(residual)
        elif case.residual:
            given["residual"] = residual.to(dtype)
        conv_(y.tensor, **given, weight=packed if backend == "native" else weight.to(dtype), backend=backend, **options)
        y.check()
        return {"y": y.tensor}

    def compare(name: str, actual: Tensor, expected: Tensor, eager: Tensor) -> None:
        mean, worst = (2 * error_factor(algorithm, worst=worst) for worst in (False, True))
        assert_close(actual, expected, eager=eager, factor=mean, max_factor=worst, name=name)

    check_op(run, "native", dtype, compare=compare)


@pytest.mark.parametrize(("backend", "dtype", "algorithm", "upsample"), KINDS, indirect=["backend"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.usefixtures("backend")
def test_algorithms(case: Case, dtype: torch.dtype, algorithm: str, upsample: bool) -> None:
    check(case, dtype, algorithm, upsample)


@pytest.mark.parametrize(
    ("backend", "dtype", "tile"),
    [("native", SINGLE, 2), ("native", SINGLE, 4), ("native_bfloat16", BFLOAT, 2)],
    indirect=["backend"],
)
@pytest.mark.usefixtures("backend")
def test_weights_may_be_transformed_at_every_call(dtype: torch.dtype, tile: int) -> None:
    """They give what weights that are transformed beforehand give, to rounding."""
    algorithm = f"winograd{tile}"
    # Parts of a panel's channels; two sources; one vector of a panel; many tiles; few.
    for n, c, c2, o, h, w in (
        (1, 320, 0, 48, 9, 7),
        (2, 32, 64, 33, 17, 30),
        (1, 64, 32, 16, 4, 4),
        (3, 160, 96, 70, 6, 5),
    ):
        weight, bias = torch.randn(o, c + c2, 3, 3) / math.sqrt(9 * (c + c2)), torch.randn(o)
        x, x2 = last(torch.randn(n, c, h, w).to(dtype)), last(torch.randn(n, c2, h, w).to(dtype)) if c2 else None
        given = {"x": x, "x2": x2, "bias": bias, "residual": last(torch.randn(n, o, h, w).to(dtype))}
        results = {
            name: last(torch.empty(n, o, h, w)).to(dtype) for name in ("exact", "eager", "before", "at the call")
        }
        for name, backend in (("exact", "reference"), ("eager", "eager")):
            results[name] = results[name].to(torch.float64 if name == "exact" else dtype)
            own = {key: None if v is None else v.to(results[name].dtype) for key, v in given.items()}
            conv_(results[name], weight=weight.to(results[name].dtype), **own, backend=backend)
        for name, packed in (
            ("before", pack(weight, algorithm, dtype=dtype, channels2=c2)),
            ("at the call", pack(weight, "direct", dtype=dtype, channels2=c2, tile=tile)),
        ):
            conv_(results[name], weight=packed, **given)
            mean, worst = (2 * error_factor(algorithm, worst=worst) for worst in (False, True))
            assert_close(
                results[name], results["exact"], eager=results["eager"], factor=mean, max_factor=worst, name=name
            )
    check_refuses(conv_, ValueError, "tile 3", y=results["eager"], **given, weight=replace(packed, tile=3))


@pytest.mark.parametrize(
    ("backend", "dtype"), [("native", SINGLE), ("native_bfloat16", BFLOAT)], indirect=["backend"], ids=str
)
@pytest.mark.parametrize("case", OTHER_CASES.values(), ids=list(OTHER_CASES))
@pytest.mark.usefixtures("backend")
def test_other_convolutions(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "direct", False)


@pytest.mark.usefixtures("native")
def test_a_weight_may_be_packed_for_the_call() -> None:
    x, weight, (y, expected) = (
        last(torch.randn(2, 6, 7, 8)),
        torch.randn(35, 6, 3, 3),
        last(torch.empty(4, 35, 4, 4)).chunk(2),
    )
    conv_(y, x, weight, stride=2, backend="native")
    conv_(expected, x, pack(weight, "direct"), stride=2)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("upsample", [False, True])
def test_reference_is_the_definition(upsample: bool) -> None:
    x, x2, weight, bias = torch.randn(2, 6, 7, 5), torch.randn(2, 3, 7, 5), torch.randn(10, 9, 3, 3), torch.randn(10)
    stride, padding, out = (1, 1, (14, 10)) if upsample else (2, 0, (3, 2))
    whole = torch.cat((x, x2), 1).double()
    whole = whole.repeat_interleave(2, 2).repeat_interleave(2, 3) if upsample else whole
    expected = F.conv2d(whole, weight.double(), bias.double(), stride, padding)
    for backend, floor in (("reference", 1e-7), ("eager", 3e-7)):  # y is float32
        y = torch.empty(2, 10, *out)
        options = {"stride": stride, "padding": padding, "upsample": upsample}
        conv_(y, x, weight, x2=x2, bias=bias, **options, backend=backend)
        assert errors(y, expected)[0] < floor, backend


@pytest.mark.parametrize(("backend", "dtype", "algorithm", "upsample"), KINDS, indirect=["backend"])
@pytest.mark.usefixtures("backend")
def test_results_do_not_depend_on_threads_or_batch(dtype: torch.dtype, algorithm: str, upsample: bool) -> None:
    x, weight = last(torch.randn(5, 10, 21, 13).to(dtype)), torch.randn(40, 10, 3, 3)
    packed = pack(weight, algorithm, upsample, dtype=dtype)

    def run() -> dict[str, Tensor]:
        y, one = (last(torch.empty(n, 40, 21 * (1 + upsample), 13 * (1 + upsample), dtype=dtype)) for n in (5, 1))
        conv_(y, x, packed, upsample=upsample)
        conv_(one, x[3:4], packed, upsample=upsample)
        assert torch.equal(one, y[3:4])
        return {"y": y}

    same_on_any_threads(run, (1, 2, 5))


@pytest.mark.parametrize(("backend", "dtype", "algorithm", "upsample"), KINDS[:5], indirect=["backend"])
@pytest.mark.usefixtures("backend")
def test_weights_stored_in_float16(dtype: torch.dtype, algorithm: str, upsample: bool) -> None:
    """They are the float32 ones, rounded once; the products are those of the rounded ones, bit for bit."""
    if reason := why_not_stored(torch.float16, dtype):
        pytest.skip(reason)
    # A vector and a rest of output channels; few of them; two panels.
    for c, c2, o in ((20, 12, 19), (48, 16, 2), (130, 0, 70)):
        weight, bias = torch.randn(o, c + c2, 3, 3) / math.sqrt(9 * (c + c2)), torch.randn(o)
        half = pack(weight, algorithm, upsample, stored=torch.float16)
        whole = replace(half, values=half.values.float())
        exact = packed_values(weight, algorithm, upsample)
        assert half.values.dtype == torch.float16
        assert bool(((whole.values - exact).abs() <= exact.abs() * 2**-11 + 2**-25).all())
        x, x2 = last(torch.randn(3, c, 7, 6)), last(torch.randn(3, c2, 7, 6)) if c2 else None
        y, expected = (last(torch.empty(3, o, 7 * (1 + upsample), 6 * (1 + upsample))) for _ in range(2))
        conv_(y, x, half, x2=x2, bias=bias, upsample=upsample)
        conv_(expected, x, whole, x2=x2, bias=bias, upsample=upsample)
        assert torch.equal(y, expected)


@pytest.mark.usefixtures("native_bfloat16")
def test_small_integers_are_exact_in_bfloat16() -> None:
    """Whatever is not exact then is in the wrong place."""
    for _, _, algorithm, upsample in KINDS[-4:]:
        x, x2 = (last(torch.randint(-2, 3, (2, c, 5, 7)).bfloat16()) for c in (34, 6))
        weight = 4.0 * torch.randint(-1, 2, (37, 40, 3, 3))
        expected = torch.empty(2, 37, 5 * (1 + upsample), 7 * (1 + upsample), dtype=torch.float64)
        y = last(torch.empty_like(expected, dtype=BFLOAT))
        conv_(expected, x.double(), weight.double(), x2=x2.double(), upsample=upsample, backend="reference")
        conv_(y, x, pack(weight, algorithm, upsample, dtype=BFLOAT, channels2=6), x2=x2, upsample=upsample)
        assert torch.equal(y, expected.bfloat16()), algorithm


def test_what_an_algorithm_loses() -> None:
    assert error_factor("direct") == 1
    assert 1 < error_factor("winograd2") < 2 < error_factor("winograd4") < 12
    assert error_factor("winograd4", worst=True) < 24


def test_the_choice_weighs_products_and_weights() -> None:
    assert choose_algorithm(16, 32, 32, 128, 128, threads=2) == "winograd4"
    assert choose_algorithm(16, 16, 16, 256, 256, upsample=True, threads=2) == "winograd4"
    assert choose_algorithm(1, 8, 8, 256, 256, threads=2) == "winograd2"
    assert choose_algorithm(1, 4, 4, 256, 256, threads=64) == "direct"  # reading weights is all it costs
    assert choose_algorithm(16, 32, 32, 128, 128, kernel=1, padding=0) == "direct"
    assert choose_algorithm(16, 32, 32, 128, 128, stride=2) == "direct"
    half: dict[str, Any] = {"threads": 2, "dtype": BFLOAT}
    assert choose_algorithm(16, 32, 32, 128, 128, **half) == "winograd2"
    assert choose_algorithm(16, 16, 16, 256, 256, upsample=True, **half) == "winograd2"
    assert choose_algorithm(16, 32, 32, 8, 128, **half) == "direct"  # of 32 channels 24 would be zeros


GOOD = {"y": torch.ones(2, 4, 6, 6), "x": torch.ones(2, 3, 6, 6), "weight": torch.ones(4, 3, 3, 3)}


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "x .*NoneType", {"x": None}),
        (TypeError, "weight .*int", {"weight": 3}),
        (TypeError, "bias .*int64", {"bias": torch.ones(4, dtype=torch.int64)}),
        (ValueError, r"x2 .*\(2, 1, 5, 5\)", {"x2": torch.ones(2, 1, 5, 5)}),
        (ValueError, r"weight .*\(4, 2, 3, 3\)", {"weight": torch.ones(4, 2, 3, 3)}),
        (ValueError, "stride .*0", {"stride": 0}),
        (ValueError, "padding .*3", {"padding": 3}),
        (ValueError, "upsample .*stride", {"upsample": True, "stride": 2}),
        (ValueError, r"y .*\(2, 4, 3, 6\)", {"y": torch.ones(2, 4, 3, 6)}),
        (ValueError, r"y .*\(2, 4, 12, 11\)", {"y": torch.ones(2, 4, 12, 11), "upsample": True}),
        (ValueError, "y is x", {"y": GOOD["x"], "weight": torch.ones(3, 3, 3, 3)}),
        (ValueError, r"bias .*\(3,\)", {"bias": torch.ones(3)}),
        (ValueError, r"residual .*\(2, 4, 6, 5\)", {"residual": torch.ones(2, 4, 6, 5)}),
        (ValueError, "backend .*cuda", {"backend": "cuda"}),
    ],
)
def test_bad_input(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    check_refuses(conv_, error, message, **GOOD | changed)


@pytest.mark.usefixtures("native")
def test_bad_input_of_native() -> None:
    x, weight = last(torch.ones(1, 3, 6, 6)), torch.ones(4, 3, 3, 3)
    y, packed = last(torch.empty(1, 4, 6, 6)), pack(weight, "winograd4")
    assert isinstance(packed, PackedWeight)
    good = {"y": y, "x": x, "weight": packed}
    twice, half = last(torch.empty(1, 4, 12, 12)), last(torch.empty(1, 4, 3, 3))
    check_refuses(conv_, ValueError, "weight .*packed", **good, backend="eager")
    check_refuses(conv_, ValueError, "weight .*upsample", **good | {"y": twice}, upsample=True)
    check_refuses(conv_, ValueError, "weight .*winograd4", **good | {"y": half}, stride=2)
    check_refuses(conv_, ValueError, "strides", **good | {"x": x.contiguous(), "weight": weight}, backend="native")
    fp16 = {name: value.half() for name, value in {**good, "weight": weight}.items()}
    check_refuses(conv_, BackendError, "float16", **fp16, backend="native")
    check_refuses(packed_values, BackendError, "float16 for float32", weight=weight, algorithm="direct", stored=BFLOAT)
    if why_not_stored(torch.float16, SINGLE) is None:
        large = {"weight": 1e5 * weight, "algorithm": "direct", "stored": torch.float16}
        check_refuses(packed_values, ValueError, "stored .*1e.05", **large)
    check_refuses(packed_values, ValueError, "algorithm .*fft", weight=weight, algorithm="fft")
    check_refuses(packed_values, ValueError, "weight .*5x5", weight=torch.ones(1, 1, 5, 5), algorithm="winograd2")
    check_refuses(packed_values, ValueError, "algorithm", weight=weight, algorithm="winograd2", upsample=True)


@pytest.mark.usefixtures("native_bfloat16")
def test_bad_input_of_native_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = last(torch.randn(1, 5, 4, 4).bfloat16()), torch.randn(6, 5, 1, 1).bfloat16()
    y, eager = last(torch.empty(2, 6, 4, 4).bfloat16()).chunk(2)
    conv_(eager, x, weight, padding=0, backend="eager")
    conv_(y, x, weight, padding=0)
    assert torch.equal(y, eager)  # an odd number of channels is torch's
    check_refuses(conv_, ValueError, "channels.* even", y=y, x=x, weight=weight, padding=0, backend="native")
    three = torch.ones(4, 6, 3, 3)
    check_refuses(pack, ValueError, "algorithm .*winograd4", weight=three, algorithm="winograd4", dtype=BFLOAT)
    packed = pack(three, "winograd2", dtype=BFLOAT, channels2=2)
    y, six, four, two = (last(torch.zeros(1, c, 4, 4).bfloat16()) for c in (4, 6, 4, 2))
    conv_(y, four, packed, x2=two)
    check_refuses(conv_, ValueError, "weight .*x2", y=y, x=six, weight=packed)
    wide = {"y": y.float(), "x": four.float(), "x2": two.float()}
    check_refuses(conv_, TypeError, "weight .*bfloat16", **wide, weight=packed)
    monkeypatch.setattr(_native.get(), "bfloat16", 0)
    check_refuses(pack, BackendError, "AVX512-BF16", weight=three, algorithm="direct", dtype=BFLOAT)


# `conv3x3`, with gradients.

TRAINING = {
    "one_pixel": Case("torch adds fewer terms than the transforms do", (1, 1, 0, 1, 1, 1)),
    "two_by_three": Case("as one_pixel", (2, 3, 0, 5, 2, 3)),
    "seven_by_nine": Case("more output channels than panels hold", (1, 17, 0, 130, 7, 9)),
    "one_more_than_a_panel": Case("the same of input channels, whose gradient it is", (2, 130, 0, 17, 7, 9)),
    "two_sources": Case("the second source begins within a vector", (2, 17, 3, 33, 5, 4)),
    "two_long_sources": Case("each source has 32 channels and a rest", (1, 37, 40, 70, 3, 3)),
    "no_bias": Case("one gradient less", (2, 6, 2, 9, 4, 5), bias=False),
    "many_tiles": Case("several chunks and blocks", (3, 80, 80, 96, 36, 33)),
}


def make(case: Case, layout: str = "contiguous") -> dict[str, Tensor | None]:
    """Return x, weight, bias and x2."""
    n, c, c2, o, h, w = case.shape
    weight = to_layout(torch.randn(o, c + c2, 3, 3) / math.sqrt(9 * (c + c2)), layout)
    x, x2 = to_layout(torch.randn(n, c, h, w), layout), to_layout(torch.randn(n, c2, h, w), layout) if c2 else None
    return {"x": x, "weight": weight, "bias": torch.randn(o) if case.bias else None, "x2": x2}


@pytest.mark.parametrize(
    ("backend", "dtype"), [("native", SINGLE), ("native_bfloat16", BFLOAT)], indirect=["backend"], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", TRAINING.values(), ids=list(TRAINING))
@pytest.mark.usefixtures("backend")
def test_result_and_gradients(case: Case, layout: str, dtype: torch.dtype) -> None:
    tensors = {name: value for name, value in make(case, layout).items() if value is not None}
    tensors |= {name: tensors[name].to(dtype) for name in ("x", "x2") if name in tensors}

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        # The native op has parameters in float32, torch's in the dtype of the images.
        parameters = SINGLE if backend == "native" else dtype
        kinds = {"x": dtype, "x2": dtype, "weight": parameters, "bias": parameters}
        leaves = {name: value.detach().to(kinds[name], copy=True).requires_grad_() for name, value in tensors.items()}
        results = {"y": conv3x3(**leaves, backend=backend)}
        assert results["y"].dtype == dtype
        return results | gradients(results, leaves)

    def compare(name: str, actual: Tensor, expected: Tensor, eager: Tensor) -> None:
        if dtype == BFLOAT:
            assert_close_if_few(
                actual, expected, eager=eager, factor=2 * error_factor("winograd2"), dtype=dtype, name=name
            )
        elif case.shape[2:] in ((0, 1, 1, 1), (0, 5, 2, 3)):
            assert all(got < 3 * floor for got, floor in zip(errors(actual, expected), FLOORS[SINGLE], strict=True)), (
                name
            )
        else:
            mean, worst = (2 * error_factor("winograd4", worst=worst) for worst in (False, True))
            assert_close(actual, expected, eager=eager, factor=mean, max_factor=worst, name=name)

    # For few pixels the number of threads is part of what chooses float32's algorithm.
    chosen = dtype == SINGLE and case is not TRAINING["many_tiles"]
    for threads in ((3,), (1,)) if chosen else ((5, 2, 1),):
        check_op(run, "native", dtype, compare=compare, threads=threads)


@pytest.mark.parametrize("case", TRAINING.values(), ids=list(TRAINING))
@pytest.mark.usefixtures("native_bfloat16")
def test_small_integers_and_their_gradients_are_exact_in_bfloat16(case: Case) -> None:
    """Nothing is rounded where transformed values have eight bits: what is not exact is in the wrong place."""
    n, c, c2, o, h, w = case.shape
    given = {
        "x": torch.randint(-2, 3, (n, c, h, w)).bfloat16(),
        "weight": 4.0 * torch.randint(-1, 2, (o, c + c2, 3, 3)),
    }
    if c2:
        given["x2"] = torch.randint(-2, 3, (n, c2, h, w)).bfloat16()
    dy = torch.randint(-2, 3, (n, o, h, w)).bfloat16()
    found = []
    for backend, kind in (("native", None), ("reference", torch.float64)):
        own = {name: value.to(kind or value.dtype, copy=True) for name, value in given.items()}
        images = [own[name].requires_grad_() for name in ("x", "x2") if name in own]
        y = conv3x3(**own, backend=backend)
        found.append([value.bfloat16() for value in (y, *torch.autograd.grad(y, images, dy.to(y.dtype)))])
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x2",), ("weight", "x2")], ids="-".join)
@pytest.mark.usefixtures("native")
def test_only_what_is_wanted_has_a_gradient(wanted: tuple[str, ...]) -> None:
    found = []
    tensors = make(TRAINING["two_sources"])
    for names in (tuple(tensors), wanted):
        leaves = {n: v.detach().clone().requires_grad_(n in names) for n, v in tensors.items() if v is not None}
        conv3x3(**leaves, backend="native").sum().backward()
        found.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, grad in found[1].items():
        assert grad is None if name not in wanted else torch.equal(grad, found[0][name])


@pytest.mark.usefixtures("native")
def test_nothing_in_nothing_out() -> None:
    weight = torch.ones(4, 3, 3, 3, requires_grad=True)
    y = conv3x3(torch.ones(0, 3, 5, 5), weight, backend="native")
    assert y.shape == (0, 4, 5, 5)
    assert not torch.autograd.grad(y.sum(), weight)[0].any()


@pytest.mark.usefixtures("native")
def test_compiles_without_graph_breaks() -> None:
    def both(x: Tensor, weight: Tensor, bias: Tensor, x2: Tensor) -> Tensor:
        h = conv3x3(x, weight, bias, x2)
        return group_norm_silu(h, bias, bias, 3, backend=resolve_conv3x3(x, weight, bias, x2))

    check_compiles(
        both, *(value.requires_grad_() for value in make(TRAINING["two_sources"]).values() if value is not None)
    )


@pytest.mark.parametrize(
    ("backend", "dtype"), [("native", SINGLE), ("native_bfloat16", BFLOAT)], indirect=["backend"], ids=str
)
@pytest.mark.usefixtures("backend")
def test_custom_op(dtype: torch.dtype) -> None:
    x, weight, bias, x2 = (v for v in make(TRAINING["two_sources"], "channels_last").values() if v is not None)
    leaves = tuple(value.requires_grad_() for value in (x.to(dtype), weight, bias, x2.to(dtype)))
    torch.library.opcheck(torch.ops.fastddpm.conv3x3.default, leaves)


@pytest.mark.usefixtures("native")
def test_where_torch_is_faster_in_bfloat16_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.ones(2, 3, 2, 3), torch.ones(5, 3, 3, 3), torch.ones(5)
    half = x.bfloat16()
    for kind, reason in ((2, ""), (0, "AVX512-BF16")):
        monkeypatch.setattr(_native.get(), "bfloat16", kind)
        assert resolve_conv3x3(half, weight, bias) == "eager"
        assert resolve_conv3x3(x, weight, bias) == "native"
        if kind == 2:
            assert resolve_conv3x3(half, weight, bias, backend="native") == "native"
        else:
            with pytest.raises(BackendError, match=reason):
                resolve_conv3x3(half, weight, bias, backend="native")


def test_elsewhere_it_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: value for name, value in make(TRAINING["two_sources"]).items() if value is not None}
    whole = torch.cat((given["x"], given["x2"]), 1)
    expected = F.conv2d(whole, given["weight"], given["bias"], padding=1)
    assert torch.equal(conv3x3(**given, backend="eager"), expected)
    half = {name: value.bfloat16() for name, value in given.items()}  # the parameters, too
    assert torch.equal(conv3x3(**half), F.conv2d(whole.bfloat16(), half["weight"], half["bias"], padding=1))
    check_refuses(conv3x3, BackendError, "parameters .*bfloat16", **half, backend="native")
    mixed = given | {"x2": half["x2"]}
    check_refuses(conv3x3, BackendError, "bfloat16", **mixed, backend="native")
    fp16 = given | {name: given[name].half() for name in ("x", "x2")}
    check_refuses(conv3x3, BackendError, "float16", **fp16, backend="native")
    monkeypatch.setattr("fastddpm_kernels.native.why_not", lambda: "there is no C++ compiler")
    assert torch.equal(conv3x3(**given), expected)
    check_refuses(conv3x3, BackendError, "no C.. compiler", **given, backend="native")


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "x .*NoneType", {"x": None}),
        (ValueError, r"x .*\(2, 3, 4\)", {"x": torch.ones(2, 3, 4)}),
        (ValueError, r"weight .*\(4, 3, 1, 1\)", {"weight": torch.ones(4, 3, 1, 1)}),
        (ValueError, r"bias .*\(3,\)", {"bias": torch.ones(3)}),
        (ValueError, r"x2 .*\(2, 1, 5, 5\)", {"x2": torch.ones(2, 1, 5, 5)}),
        (ValueError, "backend .*triton", {"backend": "triton"}),
    ],
)
def test_bad_input_of_conv3x3(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    check_refuses(conv3x3, error, message, **{"x": GOOD["x"], "weight": GOOD["weight"], **changed})
