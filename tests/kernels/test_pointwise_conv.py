"""Every backend of the 1x1 convolution against `reference` in float64, and how its kernel is cut into programs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.pointwise_conv import pointwise_conv_, rows
from fastddpm_kernels.testing import FLOORS, assert_close, errors
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OUTSIDE = 7776.0  # exact in every dtype

# (N, *spatial), C, C2, O: each here for a reason.
SHAPES: dict[str, tuple[tuple[int, ...], int, int, int]] = {
    "plain": ((2, 4, 8), 64, 0, 64),
    "image_channels": ((2, 5, 5), 3, 0, 16),
    "to_image_channels": ((2, 5, 5), 24, 0, 3),
    "eight_channels": ((1, 4, 4), 8, 0, 8),
    "concat": ((1, 4, 4), 384, 128, 100),
    "concat_of_unlike_tails": ((2, 3, 7), 40, 3, 36),
    "one_row": ((1, 1, 1), 64, 0, 48),
    "seventeen_rows": ((1, 17), 48, 16, 40),
    "no_pixels_dimension": ((5,), 32, 0, 20),
    "three_dimensions": ((2, 2, 3, 2), 20, 0, 12),
    "one_channel": ((2, 3, 3), 1, 1, 1),
    "several_tiles": ((1, 13, 23), 36, 12, 150),
    "empty_batch": ((0, 4, 4), 8, 0, 8),
}
# Arguments beside x and weight (x2 and weight2 follow from the shape); "residual is y" makes it y itself.
VARIANTS: dict[str, tuple[str, ...]] = {
    "alone": (),
    "bias": ("bias",),
    "residual": ("residual",),
    "residual_is_y": ("residual is y",),
    "all": ("bias", "residual"),
    "all_in_place": ("bias", "residual is y"),
}


def image(channels: int, size: tuple[int, ...]) -> Tensor:
    """Random float64 [N, C, ...]."""
    return torch.randn(*size, channels, dtype=torch.float64).movedim(-1, 1)


def make(size: tuple[int, ...], c: int, c2: int, o: int, names: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Random float64 arguments; "y" is what stands in y before the call, NaN unless it is the residual."""
    tensors = {"x": image(c, size), "weight": torch.randn(o, c).double() / (c + c2) ** 0.5}
    tensors["y"] = image(o, size) if "residual is y" in names else torch.full_like(image(o, size), float("nan"))
    if c2:
        tensors |= {"x2": image(c2, size), "weight2": torch.randn(o, c2).double() / (c + c2) ** 0.5}
    if "bias" in names:
        tensors["bias"] = torch.randn(o).double()
    if "residual" in names:
        tensors["residual"] = image(o, size)
    return tensors


def framed(x: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of x [N, C, ...] as a slice of channels, and all the memory around it: [1 + rows + 1, 16 + C + 8]."""
    n, c = x.shape[:2]
    count = x.numel() // c
    memory = x.new_full((count + 2, c + 24), OUTSIDE)
    memory[1:-1, 16:-8] = x.movedim(1, -1).reshape(count, c)
    return memory[1:-1, 16:-8].view(n, *x.shape[2:], c).movedim(-1, 1), memory


def to_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "slice" and x.ndim >= 2:
        return framed(x)[0]
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x.contiguous()


def run(
    backend: str, device: torch.device, tensors: dict[str, Tensor], dtype: torch.dtype, layout: str = "channels_last",
    in_place: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    """The y that results, having checked that nothing else was written."""
    given = {name: value.to(device, dtype, copy=True) for name, value in tensors.items()}
    for name in ("x", "x2", "y", "residual"):
        if name in given:
            given[name] = to_layout(given[name], layout)
    memory = None
    if layout == "slice":
        given["y"], memory = framed(given["y"])
    if in_place:
        given["residual"] = given["y"]
    before = {name: value.clone() for name, value in given.items() if name != "y" and value is not given["y"]}
    assert pointwise_conv_(backend=backend, **given, **options) is None
    for name, value in before.items():
        assert torch.equal(given[name], value), name
    if memory is not None:
        outside = torch.ones_like(memory, dtype=torch.bool)
        outside[1:-1, 16:-8] = False
        assert bool((memory[outside] == OUTSIDE).all())
    return given["y"]


def check(
    backend: str, device: torch.device, tensors: dict[str, Tensor], dtype: torch.dtype, layout: str = "channels_last",
    in_place: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    """Compares `backend` with `reference` at the inputs rounded to `dtype`."""
    if backend == "triton" and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("triton's interpreter computes bf16 wrongly")
    rounded = {name: value.to(dtype).double() for name, value in tensors.items()}
    expected = run("reference", device, rounded, torch.float64, layout, in_place)
    actual = run(backend, device, rounded, dtype, layout, in_place, **options)
    if backend == "eager":
        # Up to three operations round: two products, and a bias that is added to a residual.
        assert errors(actual, expected)[0] <= 3 * FLOORS[dtype][0]
        assert_close(run(backend, device, rounded, torch.float64, layout, in_place), expected)
    elif dtype == torch.float32:
        # Of a sum of K terms each of the K partial sums is rounded to 24 bits, which is as a random walk. Tensor cores
        # truncate instead, once for 8 terms, always towards zero.
        terms = sum(tensors[name].shape[1] for name in ("weight", "weight2") if name in tensors)
        walk = 2**-23 * max(terms / 8, 1) if options.get("allow_tf32") else 2**-24 * terms**0.5
        for error, floor, multiple in zip(errors(actual, expected), FLOORS[dtype], (1, 2), strict=True):
            assert error <= max(floor, multiple * walk)
    else:
        assert_close(actual, expected, eager=run("eager", device, rounded, dtype, layout, in_place))
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_hard_shapes(shape: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    check(backend, device, make(*SHAPES[shape], ("bias",)), dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("c2", [0, 12], ids=["x", "concat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_variants(dtype: torch.dtype, c2: int, variant: str, backend: str, device: torch.device) -> None:
    names = VARIANTS[variant]
    check(backend, device, make((2, 3, 5), 20, c2, 36, names), dtype, in_place="residual is y" in names)


@pytest.mark.parametrize("variant", ["alone", "all", "all_in_place"])
@pytest.mark.parametrize("shape", ["concat", "one_row", "seventeen_rows", "one_channel", "several_tiles"])
def test_slices_of_channels(shape: str, variant: str, backend: str, device: torch.device) -> None:
    names = VARIANTS[variant]
    check(backend, device, make(*SHAPES[shape], names), torch.float16, "slice", in_place="residual is y" in names)


@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_takes_contiguous_images(variant: str, device: torch.device) -> None:
    names = VARIANTS[variant]
    tensors = make((2, 3, 5), 20, 12, 36, names)
    check("eager", device, tensors, torch.float32, "contiguous", in_place="residual is y" in names)


def test_sums_are_not_rounded_in_between(device: torch.device) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    # Sums of each source near 1000, where fp16 has steps of 0.5, that cancel but for a little.
    tensors = make((1, 8, 8), 64, 64, 32)
    tensors["x"] = tensors["x"].half().double()
    tensors["x"][:, 0], tensors["weight"][:, 0] = 1.0, 1000.0
    tensors["x2"], tensors["weight2"] = torch.zeros_like(tensors["x2"]), torch.zeros_like(tensors["weight2"])
    tensors["x2"][:, 0], tensors["weight2"][:, 0] = -1.0, 1000.0
    expected = run("reference", device, {k: v.half().double() for k, v in tensors.items()}, torch.float64)
    assert errors(run("triton", device, tensors, torch.float16), expected)[0] <= FLOORS[torch.float16][0]
    assert errors(run("eager", device, tensors, torch.float16), expected)[0] > 10 * FLOORS[torch.float16][0]


@pytest.fixture
def _triton() -> None:
    pytest.importorskip("triton", reason="triton is not installed")


def units() -> list[str]:
    return ["HALF", "TF32", "FMA"]


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("unit", units())
def test_every_tile(unit: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastddpm_kernels.pointwise_conv import triton as pointwise_conv

    chosen = getattr(pointwise_conv, unit)
    dtype = torch.float16 if unit == "HALF" else torch.float32
    for shape in chosen.shapes:
        # Two tiles of columns and two of rows, or of the lowest a group of GROUP_M and two more; the last not full.
        tall = pointwise_conv.GROUP_M + 1 if shape[0] == 16 else 1
        tensors = make((1, tall * shape[0] + 13), 36, 128, shape[1] + 7, ("bias", "residual is y"))
        if unit == "TF32":
            # Factors of 11 significant bits are exact in TensorFloat-32: what is left is the error of the sum.
            tensors = {name: value.half().double() for name, value in tensors.items()}
        monkeypatch.setattr(pointwise_conv, unit, replace(chosen, shapes=(shape,)))
        check("triton", device, tensors, dtype, in_place=True, allow_tf32=unit == "TF32")


@pytest.mark.usefixtures("_triton")
def test_tf32_only_where_allowed_and_rounded_to_nearest(device: torch.device) -> None:
    # Positive factors, so that truncating them (by 2^-11 on average) would shrink every result by about as much.
    tensors = {name: value.abs() for name, value in make((1, 8, 8), 256, 0, 64).items()}
    exact = run("reference", device, {k: v.float().double() for k, v in tensors.items()}, torch.float64)
    assert errors(run("triton", device, tensors, torch.float32), exact)[0] < 1e-6
    tf32 = run("triton", device, tensors, torch.float32, allow_tf32=True)
    assert 1e-6 < errors(tf32, exact)[0] < 2**-12
    assert abs(float((tf32 / exact - 1).mean())) < 2**-15


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000], ids=hex)
def test_tf32_keeps_nan_and_infinity(bits: int, device: torch.device) -> None:
    given = {name: value.to(device).float() for name, value in make((1, 4, 4), 16, 0, 16).items()}
    given["weight"].abs_()
    special = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    given["x"][0, 3, 2, 1] = special.to(device)
    pointwise_conv_(**given, allow_tf32=True, backend="triton")
    assert torch.equal(given["y"][0, :, 2, 1].cpu(), special.expand(16)) or bool(
        special.isnan() and given["y"][0, :, 2, 1].isnan().all()
    )
    given["y"][0, :, 2, 1] = 0
    assert bool(given["y"].isfinite().all())


def test_results_are_reproducible_to_the_bit(backend: str, device: torch.device) -> None:
    tensors = make(*SHAPES["concat"], ("bias",))
    assert torch.equal(*(run(backend, device, tensors, torch.float16) for _ in range(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bias_may_be_wider_than_images(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    tensors = {name: value.to(device, dtype) for name, value in make((2, 3, 5), 20, 0, 36).items()}
    bias = torch.randn(36, device=device)
    pointwise_conv_(**tensors, bias=bias, backend=backend)
    expected = F.conv2d(tensors["x"].double(), tensors["weight"].double()[..., None, None], bias.double())
    assert errors(tensors["y"], expected)[0] <= 3 * FLOORS[dtype][0]


def test_reference_is_a_convolution_of_a_concatenation() -> None:
    t = make((2, 3, 5), 20, 12, 36, ("bias", "residual"))
    weight = torch.cat((t["weight"], t["weight2"]), 1)[..., None, None]
    expected = F.conv2d(torch.cat((t["x"], t["x2"]), 1), weight, t["bias"]) + t["residual"]
    assert_close(run("reference", torch.device("cpu"), t, torch.float64), expected)


def test_no_gradient_is_recorded(backend: str, device: torch.device) -> None:
    t = {name: value.to(device).float() for name, value in make((2, 3, 5), 20, 0, 36).items()}
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


@pytest.mark.usefixtures("_triton")
def test_large_calls_get_large_tiles_and_small_ones_fill_the_chip() -> None:
    from fastddpm_kernels.pointwise_conv.triton import FMA, HALF, Tile, choose_tile

    assert choose_tile(256 * 1024, 128, 256, 0, 2, HALF, 132) == Tile(128, 128, 64, 8, 3)
    assert choose_tile(256 * 256, 768, 256, 0, 2, HALF, 132) == Tile(128, 128, 64, 8, 3)
    big = choose_tile(256 * 1024, 128, 256, 0, 4, FMA, 132)
    assert big.block_m * big.block_n >= 64 * 64
    for (m, o), processors in itertools.product(((16, 256), (64, 256), (256, 256), (1024, 128)), (108, 132, 304)):
        programs = choose_tile(m, o, 256, 128, 2, HALF, processors).programs(m, o)
        assert programs >= min(m // 16 * o // 16, processors / 2)


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("unit", units())
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
    t = {name: value.to(device).half() for name, value in make((4, 16, 16), 256, 128, 256, ("bias",)).items()}
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


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x is list, must be a tensor", {"x": [1.0]}),
        (TypeError, "y is NoneType, must be a tensor", {"y": None}),
        (TypeError, "weight is NoneType, must be a tensor", {"weight": None}),
        (TypeError, r"x is torch\.int64, must be float32, float16, bfloat16 or float64", {"x": X.long()}),
        (TypeError, r"weight is torch\.float16, must be of x's dtype, torch\.float32", {"weight": W.half()}),
        (TypeError, r"y is torch\.float16, must be of x's dtype, torch\.float32", {"y": Y.half()}),
        (TypeError, r"residual is torch\.float16, must be of x's dtype", {"residual": Y.half()}),
        (TypeError, r"bias is torch\.int64, must be float32", {"bias": torch.arange(6)}),
        (ValueError, "weight is on meta, must be on x's device, cpu", {"weight": W.to("meta")}),
        (ValueError, r"x has shape \(8,\), must be \[N, C, \.\.\.\] with at least one channel", {"x": X[0, :, 0, 0]}),
        (ValueError, r"x has shape \(2, 0, 4, 4\), must be .* at least one channel", {"x": X[:, :0]}),
        (ValueError, r"weight has shape \(6, 8, 1, 1\), must be \[O, 8\]", {"weight": W[..., None, None]}),
        (ValueError, r"weight has shape \(6, 7\), must be \[O, 8\], x's channels", {"weight": W[:, 1:]}),
        (ValueError, "x2 is None, must be given: x2 and weight2 come together", {"weight2": W}),
        (ValueError, "weight2 is None, must be given", {"x2": X}),
        (ValueError, r"x2 has shape \(1, 8, 4, 4\), must equal x's .* but for the", {"x2": X[:1], "weight2": W}),
        (ValueError, r"weight2 has shape \(6, 7\), must be \[6, 8\]", {"x2": X.clone(), "weight2": W[:, 1:]}),
        (ValueError, r"bias has shape \(8,\), must be \[6\], one per row of weight", {"bias": W[0]}),
        (ValueError, r"y has shape \(2, 8, 4, 4\), must be \(2, 6, 4, 4\)", {"y": X}),
        (ValueError, r"residual has shape \(2, 8, 4, 4\), must be \(2, 6, 4, 4\)", {"residual": X}),
        (ValueError, "y is x, must be other memory", {"y": X, "weight": torch.randn(8, 8)}),
        (
            ValueError,
            "y is x2, must be other memory",
            {"y": X.clone(memory_format=torch.preserve_format), "weight": torch.eye(8), "weight2": torch.eye(8)},
        ),
        (ValueError, "backend is 'cuda', must be 'auto' or one of", {"backend": "cuda"}),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    arguments = {"y": Y.clone(), "x": X, "weight": W, **arguments}
    if "y is x2" in message:
        arguments["x2"] = arguments["y"]
    with pytest.raises(error, match=message):
        pointwise_conv_(**arguments)


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"x has strides \(128, 16, 4, 1\), must be channels-last on the triton", {"x": X.contiguous()}),
        (ValueError, r"y has strides \(96, 16, 4, 1\), must be channels-last", {"y": Y.contiguous()}),
        (ValueError, r"residual has strides \(96, 16, 4, 1\), must be", {"residual": Y.contiguous()}),
        (ValueError, r"x2 has strides \(128, 16, 4, 1\), must be", {"x2": X.contiguous(), "weight2": W}),
        (ValueError, r"weight has strides \(1, 6\), must be contiguous", {"weight": W.t().contiguous().t()}),
        (ValueError, r"bias has strides \(2,\), must be contiguous", {"bias": torch.randn(12)[::2]}),
    ],
)
def test_bad_input_to_triton(
    error: type[Exception], message: str, arguments: dict[str, Any], device: torch.device
) -> None:
    given = {name: value.to(device) for name, value in {"y": Y.clone(), "x": X, "weight": W, **arguments}.items()}
    if "bias" in arguments:
        given["bias"] = torch.randn(12, device=device)[::2]
    with pytest.raises(error, match=message):
        pointwise_conv_(**given, backend="triton")


@pytest.mark.usefixtures("_triton")
def test_triton_takes_no_float64(device: torch.device) -> None:
    given = (value.double().to(device) for value in (Y, X, W))
    with pytest.raises(TypeError, match=r"x is torch\.float64, must be float32, float16 or bfloat16 on the triton"):
        pointwise_conv_(*given, backend="triton")
