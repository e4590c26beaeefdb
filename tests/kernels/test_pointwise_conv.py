"""Every backend of the 1x1 convolution against `reference` in float64, and how its kernel is cut into programs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.pointwise_conv import pointwise_conv_, rows
from fastddpm_kernels.testing import FLOORS, assert_close, check_op, check_refuses, errors, to_layout
from torch import Tensor

HALF, BFLOAT = torch.float16, torch.bfloat16
OUTSIDE = 7776.0  # exact in every dtype


@dataclass(frozen=True)
class Case:
    why: str
    size: tuple[int, ...] = (2, 3, 5)  # N and the spatial dimensions
    channels: int = 20
    channels2: int = 0
    out: int = 36
    given: tuple[str, ...] = ("bias",)  # "in place": the residual is y
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"  # "slice": of the channels of a wider image


ALL, IN_PLACE = ("bias", "residual"), ("bias", "in place")
CASES = {
    "alone": Case("one product", given=()),
    "residual": Case("added without a bias", given=("residual",)),
    "residual_is_y": Case("added to what stands there", given=("in place",)),
    "all": Case("every term, all in one sum", given=ALL),
    "all_in_place": Case("as all, where it stands", given=IN_PLACE),
    "concat_alone": Case("two sources, two products", channels2=12, given=(), dtype=HALF),
    "concat_bias": Case("two sources and a bias", channels2=12, dtype=HALF),
    "concat_residual": Case("two sources and a residual", channels2=12, given=("residual",)),
    "concat_in_place": Case("torch adds the second product where the first is", channels2=12, given=("in place",)),
    "concat_all": Case("every term of two sources", channels2=12, given=ALL),
    "concat_all_in_place": Case("as concat_all, where it stands", channels2=12, given=IN_PLACE, dtype=HALF),
    "plain": Case("sizes that tiles divide", (2, 4, 8), 64, 0, 64),
    "plain_half": Case("as plain, for tensor cores", (2, 4, 8), 64, 0, 64, dtype=HALF),
    "plain_bfloat16": Case("as plain_half", (2, 4, 8), 64, 0, 64, dtype=BFLOAT),
    "image_channels": Case("fewer channels than a tile is deep", (2, 5, 5), 3, 0, 16),
    "to_image_channels": Case("fewer columns than a tile has", (2, 5, 5), 24, 0, 3, dtype=HALF),
    "eight_channels": Case("one vector of halves", (1, 4, 4), 8, 0, 8, dtype=HALF),
    "deep": Case("several steps through both sources", (1, 4, 4), 384, 128, 100),
    "deep_half": Case("sums of 512 terms in float32", (1, 4, 4), 384, 128, 100, dtype=HALF),
    "deep_bfloat16": Case("as deep_half", (1, 4, 4), 384, 128, 100, dtype=BFLOAT),
    "unlike_tails": Case("each source ends within a step", (2, 3, 7), 40, 3, 36),
    "unlike_tails_bfloat16": Case("as unlike_tails", (2, 3, 7), 40, 3, 36, dtype=BFLOAT),
    "one_row": Case("one pixel of one sample", (1, 1, 1), 64, 0, 48),
    "seventeen_rows": Case("one row more than the smallest tile", (1, 17), 48, 16, 40, dtype=HALF),
    "no_space": Case("channels alone", (5,), 32, 0, 20),
    "three_dimensions": Case("a volume", (2, 2, 3, 2), 20, 0, 12),
    "one_channel": Case("contiguous and channels-last at once", (2, 3, 3), 1, 1, 1),
    "several_tiles": Case("tiles in both directions, the last not full", (1, 13, 23), 36, 12, 150),
    "empty_batch": Case("nothing to do", (0, 4, 4), 8, 0, 8),
    "slice": Case("pixels further apart than channels", (1, 13, 23), 36, 12, 150, ALL, HALF, "slice"),
    "slice_in_place": Case("as slice", (1, 17), 48, 16, 40, IN_PLACE, HALF, "slice"),
    "slice_deep": Case("as slice", (1, 4, 4), 384, 128, 100, (), HALF, "slice"),
    "slice_of_one_row": Case("a slice whose stride is not seen", (1, 1, 1), 64, 0, 48, ALL, HALF, "slice"),
    "slice_of_one_channel": Case("a slice of one channel", (2, 3, 3), 1, 1, 1, IN_PLACE, HALF, "slice"),
}
CONTIGUOUS = {
    name: replace(CASES[name], layout="contiguous", dtype=torch.float32)
    for name in ("alone", "all", "all_in_place", "concat_alone", "concat_all", "concat_all_in_place")
}


def image(channels: int, size: tuple[int, ...]) -> Tensor:
    """Return random float64 [N, C, ...], channels-last."""
    return torch.randn(*size, channels, dtype=torch.float64).movedim(-1, 1)


def make(case: Case) -> dict[str, Tensor]:
    """Return random float64 arguments; "y" is what stands in y before the call, NaN unless it is the residual."""
    scale = (case.channels + case.channels2) ** -0.5
    tensors = {"x": image(case.channels, case.size), "weight": scale * torch.randn(case.out, case.channels).double()}
    if case.channels2:
        tensors["x2"] = image(case.channels2, case.size)
        tensors["weight2"] = scale * torch.randn(case.out, case.channels2).double()
    tensors["y"] = image(case.out, case.size)
    if "in place" not in case.given:
        tensors["y"] = torch.full_like(tensors["y"], torch.nan)
    if "bias" in case.given:
        tensors["bias"] = torch.randn(case.out).double()
    if "residual" in case.given:
        tensors["residual"] = image(case.out, case.size)
    return tensors


def framed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a copy of x as a slice of channels, and all the memory around it: [1 + rows + 1, 16 + C + 8]."""
    n, c = x.shape[:2]
    count = x.numel() // c
    memory = x.new_full((count + 2, c + 24), OUTSIDE)
    memory[1:-1, 16:-8] = x.movedim(1, -1).reshape(count, c)
    return memory[1:-1, 16:-8].view(n, *x.shape[2:], c).movedim(-1, 1), memory


def run(case: Case, backend: str, tensors: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> Tensor:
    """Return the y that results, having checked that nothing else was written."""
    given = {name: value.to(dtype, copy=True) for name, value in tensors.items()}
    memory = None
    for name in ("x", "x2", "y", "residual"):
        if name in given and case.layout == "slice":
            given[name], around = framed(given[name])
            memory = around if name == "y" else memory
        elif name in given:
            given[name] = to_layout(given[name], case.layout)
    before = {name: value.clone() for name, value in given.items() if name != "y"}
    if "in place" in case.given:
        given["residual"] = given["y"]
    assert pointwise_conv_(backend=backend, **given, **options) is None
    assert all(torch.equal(given[name], value) for name, value in before.items())
    if memory is not None:
        outside = torch.ones_like(memory, dtype=torch.bool)
        outside[1:-1, 16:-8] = False
        assert bool((memory[outside] == OUTSIDE).all())
    return given["y"]


def check(
    case: Case, backend: str, device: torch.device, *, exact_in: torch.dtype | None = None, **options: Any
) -> None:
    """Compare `backend` with `reference` at inputs rounded to the case's dtype, or to `exact_in`."""
    wide = {name: value.to(device, exact_in or case.dtype).double() for name, value in make(case).items()}

    def compare(name: str, actual: Tensor, expected: Tensor, eager: Tensor) -> None:
        if case.dtype != torch.float32:
            assert_close(actual, expected, eager=eager, name=name)
            return
        # Of a sum of K terms each of the K partial sums is rounded to 24 bits, which is as a random walk. Tensor cores
        # truncate instead, once for 8 terms, always towards zero.
        terms = case.channels + case.channels2
        walk = 2**-23 * max(terms / 8, 1) if options.get("allow_tf32") else 2**-24 * terms**0.5
        for error, floor, multiple in zip(errors(actual, expected), FLOORS[torch.float32], (1, 2), strict=True):
            assert error <= max(floor, multiple * walk), name

    def on(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"y": run(case, backend, wide, dtype, **options if backend == "triton" else {})}

    # Up to three operations of eager's round: two products, and a bias that is added to a residual.
    check_op(on, backend, case.dtype, rounds=3, compare=compare)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_results(case: Case, backend: str, device: torch.device) -> None:
    check(case, backend, device)


@pytest.mark.parametrize("case", CONTIGUOUS.values(), ids=list(CONTIGUOUS))
def test_torch_takes_contiguous_images(case: Case, device: torch.device) -> None:
    check(case, "eager", device)


def test_reference_is_a_convolution_of_a_concatenation() -> None:
    case = CASES["concat_all"]
    t = make(case)
    weight = torch.cat((t["weight"], t["weight2"]), 1)[..., None, None]
    expected = F.conv2d(torch.cat((t["x"], t["x2"]), 1), weight, t["bias"]) + t["residual"]
    assert_close(run(case, "reference", t, torch.float64), expected)


def test_sums_are_not_rounded_in_between(on_triton: torch.device) -> None:
    # Sums of each source near 1000, where float16 has steps of 0.5, that cancel but for a little.
    case = Case("", (1, 8, 8), 64, 64, 32, ())
    tensors = {name: value.half().double().to(on_triton) for name, value in make(case).items()}
    tensors["x"][:, 0], tensors["weight"][:, 0] = 1.0, 1000.0
    tensors["x2"].zero_()[:, 0], tensors["weight2"].zero_()[:, 0] = -1.0, 1000.0
    expected = run(case, "reference", tensors, torch.float64)
    assert errors(run(case, "triton", tensors, HALF), expected)[0] <= FLOORS[HALF][0]
    assert errors(run(case, "eager", tensors, HALF), expected)[0] > 10 * FLOORS[HALF][0]


UNITS = ["HALF", "TF32", "FMA"]


@pytest.mark.parametrize("unit", UNITS)
def test_every_tile(unit: str, on_triton: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastddpm_kernels.pointwise_conv import triton as pointwise_conv

    chosen = getattr(pointwise_conv, unit)
    dtype = HALF if unit == "HALF" else torch.float32
    for shape in chosen.shapes:
        # Two tiles of columns and two of rows, or of the lowest a group of GROUP_M and two more; the last not full.
        tall = pointwise_conv.GROUP_M + 1 if shape[0] == 16 else 1
        case = Case("", (1, tall * shape[0] + 13), 36, 128, shape[1] + 7, IN_PLACE, dtype)
        monkeypatch.setattr(pointwise_conv, unit, replace(chosen, shapes=(shape,)))
        # Factors of 11 significant bits are exact in TensorFloat-32: what is left is the error of the sum.
        check(case, "triton", on_triton, exact_in=HALF if unit == "TF32" else None, allow_tf32=unit == "TF32")


def test_tf32_only_where_allowed_and_rounded_to_nearest(on_triton: torch.device) -> None:
    # Positive factors, so that truncating them (by 2^-11 on average) would shrink every result by about as much.
    case = Case("", (1, 8, 8), 256, 0, 64, ())
    tensors = {name: value.abs().float().double().to(on_triton) for name, value in make(case).items()}
    exact = run(case, "reference", tensors, torch.float64)
    assert errors(run(case, "triton", tensors, torch.float32), exact)[0] < 1e-6
    tf32 = run(case, "triton", tensors, torch.float32, allow_tf32=True)
    assert 1e-6 < errors(tf32, exact)[0] < 2**-12
    assert abs(float((tf32 / exact - 1).mean())) < 2**-15


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000], ids=hex)
def test_tf32_keeps_nan_and_infinity(bits: int, on_triton: torch.device) -> None:
    given = {name: value.to(on_triton).float() for name, value in make(Case("", (1, 4, 4), 16, 0, 16, ())).items()}
    given["weight"].abs_()
    special = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    given["x"][0, 3, 2, 1] = special.to(on_triton)
    pointwise_conv_(**given, allow_tf32=True, backend="triton")
    assert torch.equal(given["y"][0, :, 2, 1].cpu(), special.expand(16)) or bool(
        special.isnan() and given["y"][0, :, 2, 1].isnan().all()
    )
    given["y"][0, :, 2, 1] = 0
    assert bool(given["y"].isfinite().all())


def test_results_are_reproducible_to_the_bit(backend: str, device: torch.device) -> None:
    tensors = {name: value.to(device) for name, value in make(CASES["deep"]).items()}
    assert torch.equal(*(run(CASES["deep"], backend, tensors, HALF) for _ in range(2)))


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_bias_may_be_wider_than_images(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    tensors = {name: value.to(device, dtype) for name, value in make(CASES["alone"]).items()}
    bias = torch.randn(36, device=device)
    pointwise_conv_(**tensors, bias=bias, backend=backend)
    expected = F.conv2d(tensors["x"].double(), tensors["weight"].double()[..., None, None], bias.double())
    assert errors(tensors["y"], expected)[0] <= 3 * FLOORS[dtype][0]


def test_no_gradient_is_recorded(backend: str, device: torch.device) -> None:
    t = {name: value.to(device).float() for name, value in make(CASES["alone"]).items()}
    t["weight"].requires_grad_()
    pointwise_conv_(**t, backend=backend)
    assert not t["y"].requires_grad


@pytest.mark.parametrize(
    ("x", "stride"),
    [
        (image(8, (2, 3, 5)), 8),
        (image(8, (2, 3, 5))[:, 2:5], 8),
        (torch.zeros(4, 8), 8),
        (torch.zeros(1, 8, 1, 1), 8),
        (torch.zeros(3, 1, 4, 4), 1),  # a single channel: contiguous is channels-last
        (torch.zeros(2, 8, 3, 5), None),
        (image(8, (2, 3, 5))[:, :, :, ::2], None),
        (image(8, (2, 3, 5))[:, :, :2], None),
        (image(8, (1, 3, 5))[:, :, :2], 8),
        (image(8, (2, 3, 4))[:, :, :, ::2], 16),
        (image(8, (2, 3, 5))[:, ::2], None),
        (torch.zeros(8, 1).expand(2, 8, 4), None),
    ],
)
def test_rows(x: Tensor, stride: int | None) -> None:
    view = rows(x)
    if stride is None:
        assert view is None
    else:
        assert view is not None
        assert view.stride() == (stride, 1)
        assert torch.equal(view, x.movedim(1, -1).reshape(-1, x.shape[1]))


@pytest.mark.usefixtures("on_triton")
def test_large_calls_get_large_tiles_and_small_ones_fill_the_chip() -> None:
    from fastddpm_kernels.pointwise_conv.triton import FMA, HALF, Tile, choose_tile

    assert choose_tile(256 * 1024, 128, 256, 0, 2, HALF, 132) == Tile(128, 128, 64, 8, 3)
    assert choose_tile(256 * 256, 768, 256, 0, 2, HALF, 132) == Tile(128, 128, 64, 8, 3)
    big = choose_tile(256 * 1024, 128, 256, 0, 4, FMA, 132)
    assert big.block_m * big.block_n >= 64 * 64
    for (m, o), processors in itertools.product(((16, 256), (64, 256), (256, 256), (1024, 128)), (108, 132, 304)):
        programs = choose_tile(m, o, 256, 128, 2, HALF, processors).programs(m, o)
        assert programs >= min(m // 16 * o // 16, processors / 2)


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("unit", UNITS)
def test_every_tile_fits(unit: str) -> None:
    from fastddpm_kernels.pointwise_conv import triton as pointwise_conv
    from fastddpm_kernels.pointwise_conv.triton import SHARED, choose_tile

    itemsize = 2 if unit == "HALF" else 4
    for m, o, (c, c2), processors in itertools.product(
        (1, 16, 17, 1000, 4096, 262144),
        (1, 3, 100, 128, 512, 1536),
        ((1, 0), (3, 0), (8, 8), (100, 3), (128, 0), (256, 128), (320, 640), (2048, 0)),
        (1, 4, 20, 132),
    ):
        tile = choose_tile(m, o, c, c2, itemsize, getattr(pointwise_conv, unit), processors)
        assert tile.block_k in (16, 32, 64, 128)
        assert 2 <= tile.num_stages <= 4
        assert (tile.block_m + tile.block_n) * tile.block_k * itemsize * tile.num_stages <= SHARED
        assert 2 * 32 * tile.num_warps <= tile.block_m * tile.block_n
        if c % 32 == 0 and c2 % 32 == 0 and tile.block_k > 32:
            assert c % tile.block_k == 0  # no masks where none are needed
            assert c2 % tile.block_k == 0


@pytest.mark.gpu
def test_allocates_nothing_and_can_be_captured(device: torch.device) -> None:
    t = {name: value.to(device).half() for name, value in make(Case("", (4, 16, 16), 256, 128, 256, ("bias",))).items()}
    pointwise_conv_(**t, backend="triton")
    expected = t["y"].clone()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pointwise_conv_(**t, backend="triton")
    assert torch.cuda.max_memory_allocated() == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pointwise_conv_(**t, backend="triton")
    t["y"].fill_(float("nan"))
    graph.replay()
    assert torch.equal(t["y"], expected)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device: torch.device) -> None:
    x = torch.randn(33, 1024, 1024, 64, device=device, dtype=torch.float16).movedim(-1, 1)
    weight, y = torch.randn(64, 64, device=device, dtype=torch.float16), torch.empty_like(x)
    pointwise_conv_(y, x, weight, residual=x, backend="triton")
    last = torch.empty_like(y[-1:])
    pointwise_conv_(last, x[-1:], weight, residual=x[-1:], backend="triton")
    assert torch.equal(y[-1:], last)


X, W, Y = image(8, (2, 4, 4)).float(), torch.randn(6, 8), image(6, (2, 4, 4)).float()
OWN = X.clone(memory_format=torch.preserve_format)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "x .*list", {"x": [1.0]}),
        (TypeError, "y .*NoneType", {"y": None}),
        (TypeError, "weight .*NoneType", {"weight": None}),
        (TypeError, "x .*int64", {"x": X.long()}),
        (TypeError, "weight .*float16", {"weight": W.half()}),
        (TypeError, "y .*float16", {"y": Y.half()}),
        (TypeError, "residual .*float16", {"residual": Y.half()}),
        (TypeError, "bias .*int64", {"bias": torch.arange(6)}),
        (ValueError, "weight .*meta", {"weight": W.to("meta")}),
        (ValueError, r"x .*\(8,\)", {"x": X[0, :, 0, 0]}),
        (ValueError, r"x .*\(2, 0, 4, 4\)", {"x": X[:, :0]}),
        (ValueError, r"weight .*\(6, 8, 1, 1\)", {"weight": W[..., None, None]}),
        (ValueError, r"weight .*\(6, 7\)", {"weight": W[:, 1:]}),
        (ValueError, "x2 .*None", {"weight2": W}),
        (ValueError, "weight2 .*None", {"x2": X}),
        (ValueError, r"x2 .*\(1, 8, 4, 4\)", {"x2": X[:1], "weight2": W}),
        (ValueError, r"weight2 .*\(6, 7\)", {"x2": X.clone(), "weight2": W[:, 1:]}),
        (ValueError, r"bias .*\(8,\)", {"bias": W[0]}),
        (ValueError, r"y .*\(2, 8, 4, 4\)", {"y": X}),
        (ValueError, r"residual .*\(2, 8, 4, 4\)", {"residual": X}),
        (ValueError, "y is x, .*memory", {"y": X, "weight": torch.randn(8, 8)}),
        (ValueError, "y is x2, .*memory", {"y": OWN, "x2": OWN, "weight": torch.eye(8), "weight2": torch.eye(8)}),
        (ValueError, "backend .*cuda", {"backend": "cuda"}),
    ],
)
def test_bad_input(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    check_refuses(pointwise_conv_, error, message, **{"y": Y.clone(), "x": X, "weight": W, **changed})


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "x .*float64", {"y": Y.double(), "x": X.double(), "weight": W.double()}),
        (ValueError, "x .*strides", {"x": X.contiguous()}),
        (ValueError, "y .*strides", {"y": Y.contiguous()}),
        (ValueError, "residual .*strides", {"residual": Y.contiguous()}),
        (ValueError, "x2 .*strides", {"x2": X.contiguous(), "weight2": W}),
        (ValueError, "weight .*strides", {"weight": W.t().contiguous().t()}),
    ],
)
def test_bad_input_of_triton(
    error: type[Exception], message: str, changed: dict[str, Any], on_triton: torch.device
) -> None:
    given = {name: value.to(on_triton) for name, value in {"y": Y.clone(), "x": X, "weight": W, **changed}.items()}
    check_refuses(pointwise_conv_, error, message, **given, backend="triton")


def test_a_strided_bias_is_refused_by_triton(on_triton: torch.device) -> None:
    bias = torch.randn(12, device=on_triton)[::2]  # a copy to the device would be contiguous
    given = (value.to(on_triton) for value in (Y, X, W))
    named = dict(zip(("y", "x", "weight"), given, strict=True))
    check_refuses(pointwise_conv_, ValueError, "bias .*strides", **named, bias=bias, backend="triton")
