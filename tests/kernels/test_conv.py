"""`conv_`: every algorithm of the native backend against float64, on hard shapes; what it refuses.

A result may be as far from float64 as torch's own convolution in float32 is, times what the algorithm must lose
(`error_factor`), times two.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels import native as _native
from fastddpm_kernels.backend import BackendError
from fastddpm_kernels.conv import ALGORITHMS, PackedWeight, choose_algorithm, conv_, error_factor, pack, packed_values
from fastddpm_kernels.conv.packing import _transforms
from fastddpm_kernels.testing import assert_close, errors
from torch import Tensor

# (N, C, O, H, W): less than a tile, less than a vector, one more than a vector or a panel, borders in all places,
# so many tiles that threads take whole blocks, and nothing.
SHAPES = {
    "one_pixel": (1, 1, 1, 1, 1),
    "two_by_two": (2, 3, 5, 2, 2),
    "three_by_five": (2, 5, 17, 3, 5),
    "seven_by_nine": (1, 17, 33, 7, 9),
    "many_channels": (1, 130, 70, 6, 4),
    "many_tiles": (3, 20, 40, 33, 34),
    "empty": (0, 3, 4, 5, 5),
}
UPSAMPLED = [(a, up) for up in (False, True) for a in ALGORITHMS if not (up and a == "winograd2")]
HALF = [(a, up) for up in (False, True) for a in ("winograd2", "direct")]


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def make(
    n: int, c: int, o: int, h: int, w: int, c2: int = 0, kernel: int = 3
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """x, x2, weight and bias."""
    x2 = last(torch.randn(n, c2, h, w)) if c2 else None
    return (
        last(torch.randn(n, c, h, w)), x2, torch.randn(o, c + c2, kernel, kernel) / math.sqrt(c * kernel**2),
        torch.randn(o),
    )  # fmt: skip


def check(
    algorithm: str, x: Tensor, weight: Tensor, size: tuple[int, int], *, residual: bool = True, **options: Any
) -> Tensor:
    """Compares the native backend with `reference` and `eager`; nothing outside of y may be written."""
    shape = (len(x), *size, len(weight))
    added = last(torch.randn(len(x), len(weight), *size).to(x.dtype)) if residual else None
    memory = torch.full((math.prod(shape) + 128,), 7.0, dtype=x.dtype)
    y = memory[64:-64].fill_(float("nan")).view(shape).permute(0, 3, 1, 2)
    eager, expected = torch.empty_like(y), torch.empty_like(y, dtype=torch.float64)
    c2 = options["x2"].shape[1] if options.get("x2") is not None else 0
    packed = pack(weight, algorithm, options.get("upsample", False), dtype=x.dtype, channels2=c2)
    conv_(y, x, packed, residual=added, **options)
    conv_(eager, x, weight.to(x.dtype), residual=added, backend="eager", **options)
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    added = None if added is None else added.double()
    conv_(expected, x.double(), weight.double(), residual=added, backend="reference", **wide)
    mean, worst = (2 * error_factor(algorithm, worst=worst) for worst in (False, True))
    assert_close(y, expected, eager=eager, factor=mean, max_factor=worst, name=algorithm)
    assert bool((memory[:64] == 7).all())
    assert bool((memory[-64:] == 7).all())
    return y


@pytest.mark.parametrize(("algorithm", "upsample"), UPSAMPLED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("native")
def test_hard_shapes(shape: str, algorithm: str, upsample: bool, threads: int) -> None:
    n, c, o, h, w = SHAPES[shape]
    x, _, weight, bias = make(n, c, o, h, w)
    check(algorithm, x, weight, (h * (1 + upsample), w * (1 + upsample)), bias=bias, upsample=upsample)


@pytest.mark.parametrize(("algorithm", "upsample"), UPSAMPLED)
@pytest.mark.parametrize("c", [4, 16, 17])
@pytest.mark.usefixtures("native")
def test_a_concatenation_is_read_where_it_is(algorithm: str, upsample: bool, c: int) -> None:
    x, x2, weight, _ = make(2, c, 24, 5, 6, c2=19)
    check(algorithm, x, weight, (5 * (1 + upsample), 6 * (1 + upsample)), x2=x2, upsample=upsample, residual=False)


@pytest.mark.parametrize(("algorithm", "upsample"), HALF)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("native_bfloat16")
def test_hard_shapes_in_bfloat16(shape: str, algorithm: str, upsample: bool, threads: int) -> None:
    n, c, o, h, w = SHAPES[shape]
    c += c % 2 if algorithm == "direct" else 0
    x, _, weight, bias = make(n, c, o, h, w)
    size = (h * (1 + upsample), w * (1 + upsample))
    check(algorithm, last(x.bfloat16()), weight, size, bias=bias, upsample=upsample)


@pytest.mark.parametrize(("algorithm", "upsample"), HALF)
@pytest.mark.parametrize("c", [4, 17, 32, 50])
@pytest.mark.usefixtures("native_bfloat16")
def test_a_concatenation_in_bfloat16(algorithm: str, upsample: bool, c: int) -> None:
    direct = algorithm == "direct"
    x, x2, weight, _ = make(2, c + c % 2 * direct, 24, 5, 6, c2=19 + direct)
    assert x2 is not None
    size = (5 * (1 + upsample), 6 * (1 + upsample))
    check(algorithm, last(x.bfloat16()), weight, size, x2=last(x2.bfloat16()), upsample=upsample, residual=False)


@pytest.mark.usefixtures("native_bfloat16")
def test_small_integers_are_exact_in_bfloat16() -> None:
    """Whatever is not exact then is in the wrong place."""
    for algorithm, upsample in HALF:
        x, x2 = (last(torch.randint(-2, 3, (2, c, 5, 7)).bfloat16()) for c in (34, 6))
        weight = 4.0 * torch.randint(-1, 2, (37, 40, 3, 3))
        expected = torch.empty(2, 37, 5 * (1 + upsample), 7 * (1 + upsample), dtype=torch.float64)
        y = last(torch.empty_like(expected, dtype=torch.bfloat16))
        options: dict[str, Any] = {"upsample": upsample}
        conv_(expected, x.double(), weight.double(), x2=x2.double(), backend="reference", **options)
        conv_(y, x, pack(weight, algorithm, upsample, dtype=x.dtype, channels2=6), x2=x2, **options)
        assert torch.equal(y, expected.bfloat16()), algorithm


@pytest.mark.usefixtures("native_bfloat16")
def test_an_odd_number_of_channels_in_bfloat16_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, weight, _ = (None if t is None else t.bfloat16() for t in make(1, 5, 6, 4, 4, kernel=1))
    assert x is not None and weight is not None  # noqa: PT018
    x, y, eager = last(x), last(torch.empty(1, 6, 4, 4).bfloat16()), last(torch.empty(1, 6, 4, 4).bfloat16())
    conv_(eager, x, weight, padding=0, backend="eager")
    conv_(y, x, weight, padding=0)
    assert torch.equal(y, eager)
    with pytest.raises(ValueError, match="there are 5 . 0 input channels, must be even numbers in bfloat16"):
        conv_(y, x, weight, padding=0, backend="native")
    with pytest.raises(ValueError, match="algorithm is 'winograd4', must be 'winograd2' or 'direct' in bfloat16"):
        pack(torch.ones(1, 2, 3, 3), "winograd4", dtype=torch.bfloat16)
    wide = pack(torch.ones(4, 6, 3, 3), "winograd2", dtype=torch.bfloat16, channels2=2)
    y, six, four, two = (last(torch.zeros(1, c, 4, 4).bfloat16()) for c in (4, 6, 4, 2))
    conv_(y, four, wide, x2=two)
    with pytest.raises(ValueError, match="weight is packed for 2 channels of x2, must be for 0"):
        conv_(y, six, wide)
    with pytest.raises(TypeError, match=r"weight is packed for torch.bfloat16, must be for x's dtype, torch.float32"):
        conv_(y.float(), four.float(), wide, x2=two.float())
    monkeypatch.setattr(_native.get(), "bfloat16", 0)
    with pytest.raises(BackendError, match="has no AVX512-BF16"):
        pack(torch.ones(1, 2, 3, 3), "direct", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size", "out"),
    [
        (1, 1, 0, (5, 3), (5, 3)),
        (7, 1, 3, (5, 9), (5, 9)),
        (2, 2, 0, (6, 8), (3, 4)),
        (3, 2, 0, (6, 8), (3, 4)),  # as if padded below and to the right alone
        (3, 2, 1, (7, 8), (4, 4)),
        (3, 1, 0, (7, 8), (5, 6)),
        (3, 1, 2, (4, 4), (6, 6)),
    ],
)
@pytest.mark.usefixtures("native")
def test_other_convolutions(
    kernel: int, stride: int, padding: int, size: tuple[int, int], out: tuple[int, int]
) -> None:
    x, x2, weight, bias = make(2, 6, 35, *size, c2=9, kernel=kernel)
    y = check("direct", x, weight, out, x2=x2, bias=bias, stride=stride, padding=padding)
    plain = torch.empty_like(y)
    conv_(plain, x, weight, x2=x2, stride=stride, padding=padding, backend="native")  # packed for this call
    conv_(y, x, pack(weight, "direct"), x2=x2, stride=stride, padding=padding)
    assert torch.equal(y, plain)
    if _native.why_not_bfloat16(slower=True) is None:
        x, x2, weight, bias = make(2, 6, 35, *size, c2=10, kernel=kernel)
        assert x2 is not None
        x, x2 = last(x.bfloat16()), last(x2.bfloat16())
        check("direct", x, weight, out, x2=x2, bias=bias, stride=stride, padding=padding)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.usefixtures("native")
def test_the_residual_may_be_the_result(algorithm: str) -> None:
    x, _, weight, bias = make(2, 8, 12, 6, 5)
    residual = last(torch.randn(2, 12, 6, 5))
    y, packed = residual.clone(), pack(weight, algorithm)
    apart = torch.empty_like(y)
    conv_(y, x, packed, bias=bias, residual=y)
    conv_(apart, x, packed, bias=bias, residual=residual)
    assert torch.equal(y, apart)


@pytest.mark.parametrize(("algorithm", "upsample"), UPSAMPLED)
@pytest.mark.usefixtures("native")
def test_results_do_not_depend_on_threads_or_batch(algorithm: str, upsample: bool) -> None:
    x, _, weight, _ = make(5, 9, 40, 21, 13)
    packed, before = pack(weight, algorithm, upsample), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            y = last(torch.empty(5, 40, 21 * (1 + upsample), 13 * (1 + upsample)))
            conv_(y, x, packed, upsample=upsample)
            one = torch.empty_like(y[:1])
            conv_(one, x[3:4], packed, upsample=upsample)
            results += [y, one]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0][3:4] if len(result) == 1 else results[0]) for result in results)


@pytest.mark.parametrize("m", [2, 4])
def test_transforms_are_the_convolution(m: int) -> None:
    a, g, b = _transforms(m)
    x, w = torch.randn(2, m + 2, m + 2, dtype=torch.float64)[0], torch.randn(3, 3, dtype=torch.float64)
    y = a @ ((g @ w @ g.T) * (b @ x @ b.T)) @ a.T
    torch.testing.assert_close(y, F.conv2d(x[None, None], w[None, None])[0, 0], rtol=0, atol=1e-12)


def test_point_minus_one_vanishes_on_an_upsampled_image() -> None:
    _, _, b = _transforms(4)
    x = torch.tensor([3.0, 5.0, 5.0, -2.0, -2.0, 7.0], dtype=torch.float64)
    assert (b @ x)[2] == 0
    assert bool(((b @ x)[[0, 1, 3, 4, 5]] != 0).all())


def test_eager_is_the_reference_rounded() -> None:
    x, x2, weight, bias = make(2, 6, 10, 7, 5, c2=3)
    for options in ({"upsample": True, "out": (14, 10)}, {"stride": 2, "padding": 0, "out": (3, 2)}):
        out = options.pop("out")
        results = {}
        for backend in ("eager", "reference"):
            results[backend] = torch.empty(2, 10, *out)
            conv_(results[backend], x, weight, x2=x2, bias=bias, backend=backend, **options)
        assert errors(results["eager"], results["reference"])[0] < 3e-7


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
    half = {"threads": 2, "dtype": torch.bfloat16}
    assert choose_algorithm(16, 32, 32, 128, 128, **half) == "winograd2"
    assert choose_algorithm(16, 16, 16, 256, 256, upsample=True, **half) == "winograd2"
    assert choose_algorithm(16, 32, 32, 8, 128, **half) == "direct"  # of 32 channels 24 would be zeros


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x is NoneType, must be a tensor"),
        ({"weight": 3}, "weight is int, must be a tensor or a PackedWeight"),
        ({"bias": torch.ones(4, dtype=torch.int64)}, "bias is torch.int64, must be float32"),
        ({"x2": torch.ones(2, 1, 5, 5)}, r"x2 has shape \(2, 1, 5, 5\), must equal x's \(2, 3, 6, 6\)"),
        ({"weight": torch.ones(4, 2, 3, 3)}, r"weight has shape \(4, 2, 3, 3\), must be \[O, 3, k, k\]"),
        ({"stride": 0}, "stride is 0, must be at least 1"),
        ({"padding": 3}, "padding is 3, must be from 0 to 2"),
        ({"upsample": True, "stride": 2}, "upsample is True with kernel 3, stride 2, padding 1, must be 3, 1, 1"),
        ({"y": torch.ones(2, 4, 3, 6)}, r"y has shape \(2, 4, 3, 6\), must be x's \(2, 3, 6, 6\) convolved"),
        ({"y": torch.ones(2, 4, 12, 11), "upsample": True}, r"y has shape \(2, 4, 12, 11\), must be x's"),
        ({"bias": torch.ones(3)}, r"bias has shape \(3,\), must be \[4\], one per row of weight"),
        ({"residual": torch.ones(2, 4, 6, 5)}, r"residual has shape \(2, 4, 6, 5\), must be y's, \(2, 4, 6, 6\)"),
        ({"backend": "cuda"}, "backend is 'cuda', must be 'auto' or one of triton, native, eager, reference"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    given = {"y": torch.ones(2, 4, 6, 6), "x": torch.ones(2, 3, 6, 6), "weight": torch.ones(4, 3, 3, 3)}
    with pytest.raises((TypeError, ValueError), match=message):
        conv_(**{**given, **change})


def test_the_result_has_its_own_memory() -> None:
    x = torch.ones(1, 2, 4, 4)
    with pytest.raises(ValueError, match="y is x, must be other memory"):
        conv_(x, x, torch.ones(2, 2, 3, 3))


def test_bad_packed_weights_are_named(native: str) -> None:
    x, _, weight, _ = make(1, 3, 4, 6, 6)
    y, packed = last(torch.empty(1, 4, 6, 6)), pack(weight, "winograd4")
    with pytest.raises(ValueError, match="weight is packed for the native backend, must be a tensor"):
        conv_(y, x, packed, backend="eager")
    with pytest.raises(ValueError, match="weight is packed for upsample=False, must be for True"):
        conv_(last(torch.empty(1, 4, 12, 12)), x, packed, upsample=True)
    with pytest.raises(ValueError, match="weight is packed for winograd4, must be for direct"):
        conv_(last(torch.empty(1, 4, 3, 3)), x, packed, stride=2)
    with pytest.raises(ValueError, match=r"strides \(108, 36, 6, 1\), must be channels-last on the native backend"):
        conv_(y, x.contiguous(), weight, backend=native)
    with pytest.raises(BackendError, match="in torch.float32 or torch.bfloat16, not torch.float16"):
        conv_(y.half(), x.half(), weight.half(), backend=native)
    with pytest.raises(ValueError, match="algorithm is 'fft', must be one of winograd4, winograd2, direct"):
        packed_values(weight, "fft")
    with pytest.raises(ValueError, match="weight is 5x5, must be 3x3 for winograd2"):
        packed_values(torch.ones(1, 1, 5, 5), "winograd2")
    with pytest.raises(ValueError, match="algorithm is 'winograd2', must be 'winograd4' or 'direct'"):
        packed_values(weight, "winograd2", upsample=True)
    assert isinstance(packed, PackedWeight)
