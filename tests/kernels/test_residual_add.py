"""Every backend of the residual sum against `reference` in float64, and how its kernel walks memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.residual_add import residual_add_
from fastddpm_kernels.testing import FLOORS, assert_close, errors
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OUTSIDE = 7776.0  # exact in every dtype

# [N, C, ...], and by how much y is larger in each spatial dimension.
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "plain": ((2, 32, 8, 8), (0, 0)),
    "padded": ((2, 32, 8, 8), (1, 1)),
    "image_channels": ((2, 3, 5, 7), (1, 1)),
    "wider": ((2, 16, 5, 7), (0, 3)),
    "higher": ((2, 16, 5, 7), (2, 0)),
    "one_pixel": ((3, 8, 1, 1), (1, 1)),
    "one_channel": ((2, 1, 9, 9), (1, 1)),
    "one_sample": ((1, 48, 6, 6), (1, 1)),
    "several_programs": ((2, 100, 9, 11), (1, 1)),
    "no_space": ((5, 24), ()),
    "one_dimension": ((2, 24, 9), (2,)),
    "three_dimensions": ((2, 8, 3, 4, 5), (0, 0, 0)),
    "empty_batch": ((0, 8, 4, 4), (1, 1)),
}
# Tensors beside x; "total is" and "y is" name one that is overwritten.
VARIANTS: dict[str, tuple[str, ...]] = {
    "copy": (),
    "residual": ("residual",),
    "bias": ("bias",),
    "both": ("residual", "bias"),
    "all": ("residual", "bias", "total"),
    "total_is_x": ("residual", "bias", "total is x"),
    "total_is_residual": ("residual", "bias", "total is residual"),
}


def to_layout(x: Tensor, layout: str) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x.contiguous()


def make(shape: tuple[int, ...], names: tuple[str, ...]) -> dict[str, Tensor]:
    tensors = {"x": torch.randn(shape).double()}
    if "residual" in names:
        tensors["residual"] = torch.randn(shape).double()
    if "bias" in names:
        tensors["bias"] = torch.randn(shape[1]).double()
    return tensors


def run(
    backend: str, device: torch.device, tensors: dict[str, Tensor], dtype: torch.dtype, padding: tuple[int, ...],
    names: tuple[str, ...] = (), layout: str = "channels_last",
) -> Tensor:  # fmt: skip
    """The pixels of y that are written, having checked that `total` equals them and all else is as it was."""
    given = {name: value.to(device, dtype, copy=True) for name, value in tensors.items()}
    for name in ("x", "residual"):
        if name in given:
            given[name] = to_layout(given[name], layout)
    shape = given["x"].shape
    larger = (*shape[:2], *(size + more for size, more in zip(shape[2:], padding, strict=True)))
    y = to_layout(torch.full(larger, OUTSIDE, device=device, dtype=dtype), layout)
    inner = (slice(None), slice(None), *(slice(size) for size in shape[2:]))
    y[inner] = float("nan")
    before = {name: value.clone() for name, value in given.items()}
    overwritten = None
    if "total" in names:
        given["total"] = torch.full_like(given["x"], float("nan"))
    for name in ("x", "residual"):
        if f"total is {name}" in names:
            given["total"], overwritten = given[name], name
    assert residual_add_(y, backend=backend, **given) is None
    written = y[inner].clone()
    if "total" in given:
        assert torch.equal(given["total"], written)
    for name, value in before.items():
        assert name == overwritten or torch.equal(given[name], value), name
    y[inner] = OUTSIDE
    assert bool((y == OUTSIDE).all())
    return written


def check(
    backend: str, device: torch.device, shape: str, dtype: torch.dtype, variant: str, layout: str = "channels_last"
) -> None:
    """Compares `backend` with `reference` at the inputs rounded to `dtype`."""
    if backend == "triton" and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("triton's interpreter computes bf16 wrongly")
    size, padding = SHAPES[shape]
    names = VARIANTS[variant]
    rounded = {name: value.to(dtype).double() for name, value in make(size, names).items()}
    expected = run("reference", device, rounded, torch.float64, padding, names, layout)
    actual = run(backend, device, rounded, dtype, padding, names, layout)
    if backend == "eager":
        assert errors(actual, expected)[0] <= 2 * FLOORS[dtype][0]  # it rounds twice
        assert_close(run(backend, device, rounded, torch.float64, padding, names, layout), expected)
    else:
        # Rounded once: nothing is nearer to the truth but the truth, rounded.
        assert_close(actual, expected)
        if dtype != torch.float32:
            assert errors(actual, expected.to(dtype))[0] <= FLOORS[dtype][0] / 100


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_hard_shapes(shape: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    check(backend, device, shape, dtype, "all")


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", ["plain", "padded", "image_channels"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, shape: str, layout: str, backend: str, device: torch.device) -> None:
    check(backend, device, shape, torch.float16, variant, layout)


@pytest.mark.parametrize("name", ["x", "residual"])
def test_y_may_be_an_input(name: str, backend: str, device: torch.device) -> None:
    given = {n: v.to(device).float() for n, v in make((2, 16, 5, 7), ("residual", "bias")).items()}
    expected = torch.full_like(given["x"], float("nan"))
    residual_add_(expected, **given, backend=backend)
    residual_add_(given[name], **given, backend=backend)
    assert torch.equal(given[name], expected)


def test_memory_formats_may_differ(backend: str, device: torch.device) -> None:
    given = {n: v.to(device).float() for n, v in make((2, 16, 5, 7), ("residual", "bias")).items()}
    expected = given["x"] + given["residual"] + given["bias"][:, None, None]
    y = to_layout(torch.zeros(2, 16, 5, 7, device=device), "channels_last")
    given["residual"] = torch.stack((given["residual"], given["residual"]), -1)[..., 1]
    residual_add_(y, **given, total=given["x"], backend=backend)
    assert_close(y, expected)
    assert_close(given["x"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bias_may_be_wider_than_images(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x, bias = torch.randn(2, 16, 5, 7, device=device).to(dtype), torch.randn(32, device=device)[::2]
    y = torch.empty_like(x)
    residual_add_(y, x, bias=bias, backend=backend)
    assert errors(y, x.double() + bias.double()[:, None, None])[0] <= 2 * FLOORS[dtype][0]


def test_it_pads_for_a_convolution_of_stride_two(backend: str, device: torch.device) -> None:
    # diffusers' Downsample2D with padding 0 pads right and below before the convolution.
    x, residual = torch.randn(2, 2, 8, 6, 6, device=device)
    weight, padded = torch.randn(4, 8, 3, 3, device=device), torch.zeros(2, 8, 7, 7, device=device)
    residual_add_(padded, x, residual=residual, backend=backend)
    expected = F.conv2d(F.pad(x + residual, (0, 1, 0, 1)), weight, stride=2)
    assert torch.equal(F.conv2d(padded, weight, stride=2), expected)


def test_no_gradient_is_recorded(backend: str, device: torch.device) -> None:
    x = torch.randn(2, 8, 4, 4, device=device, requires_grad=True)
    y = torch.zeros(2, 8, 4, 4, device=device)
    residual_add_(y, x, residual=x, backend=backend)
    assert not y.requires_grad


@pytest.fixture
def _triton() -> None:
    pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.usefixtures("_triton")
def test_what_is_walked_with_one_stride_is_one_dimension() -> None:
    from fastddpm_kernels.residual_add.triton import make_walk

    x = to_layout(torch.empty(4, 16, 6, 6), "channels_last")
    bias, padded = torch.empty(16, 1, 1), to_layout(torch.empty(4, 16, 7, 7), "channels_last")
    assert make_walk([x, x]) == ([2304], [[1], [1]])
    assert make_walk([x, x, bias]) == ([144, 16], [[16, 1], [16, 1], [0, 1]])
    assert make_walk([padded[..., :6, :6], x]) == ([4, 6, 96], [[784, 112, 1], [576, 96, 1]])
    assert make_walk([padded[..., :6, :6], bias]) == ([4, 6, 6, 16], [[784, 112, 16, 1], [0, 0, 0, 1]])
    assert make_walk([x.contiguous(), bias]) == ([4, 16, 36], [[576, 36, 1], [0, 1, 0]])
    assert make_walk([x[:1, :1, :1, :1]]) == ([1], [[1]])


@pytest.mark.usefixtures("_triton")
def test_too_many_strides_are_refused(device: torch.device) -> None:
    x, y = (to_layout(torch.zeros(2, 8, *size, device=device), "channels_last") for size in ((3, 4, 5), (4, 5, 6)))
    residual_add_(y, x, backend="triton")
    with pytest.raises(ValueError, match=r"x has strides .* must be such that 4 strides walk all tensors"):
        residual_add_(y, x, bias=torch.zeros(8, device=device), backend="triton")


@pytest.mark.gpu
def test_allocates_nothing_and_can_be_captured(device: torch.device) -> None:
    x, residual = (to_layout(t, "channels_last") for t in torch.randn(2, 4, 64, 16, 16, device=device).half())
    bias = torch.randn(64, device=device).half()
    y = to_layout(torch.zeros(4, 64, 17, 17, device=device, dtype=torch.float16), "channels_last")
    residual_add_(y, x, residual=residual, bias=bias, backend="triton")
    expected = y.clone()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    residual_add_(y, x, residual=residual, bias=bias, backend="triton")
    assert torch.cuda.max_memory_allocated() == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        residual_add_(y, x, residual=residual, bias=bias, backend="triton")
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device: torch.device) -> None:
    x = torch.randn(33, 1024, 1024, 64, device=device, dtype=torch.float16).movedim(-1, 1)
    y = torch.zeros(33, 1025, 1025, 64, device=device, dtype=torch.float16).movedim(-1, 1)
    residual_add_(y, x, residual=x, backend="triton")
    assert torch.equal(y[-1, :, :-1, :-1], 2 * x[-1])
    assert not bool(y[:, :, -1].any())


X = torch.randn(2, 8, 4, 4)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x is list, must be a tensor", {"x": [1.0]}),
        (TypeError, "y is NoneType, must be a tensor", {"y": None}),
        (TypeError, r"x is torch\.int64, must be float32, float16, bfloat16 or float64", {"x": X.long()}),
        (TypeError, r"y is torch\.float16, must be of x's dtype, torch\.float32", {"y": X.half()}),
        (TypeError, r"total is torch\.float16, must be of x's dtype, torch\.float32", {"total": X.half()}),
        (TypeError, r"bias is torch\.int64, must be float32", {"bias": torch.arange(8)}),
        (ValueError, "residual is on meta, must be on x's device, cpu", {"residual": X.to("meta")}),
        (ValueError, r"x has shape \(8,\), must be \[N, C, \.\.\.\]", {"x": X[0, :, 0, 0]}),
        (ValueError, r"residual has shape \(1, 8, 4, 4\), must be x's, \(2, 8, 4, 4\)", {"residual": X[:1]}),
        (ValueError, r"total has shape \(2, 8, 4\), must be x's, \(2, 8, 4, 4\)", {"total": X[..., 0]}),
        (ValueError, r"bias has shape \(4,\), must be \[8\], one per channel", {"bias": X[0, 0, 0]}),
        (ValueError, r"y has shape \(2, 8, 3, 4\), must be x's .* or larger in space", {"y": X[:, :, 1:]}),
        (ValueError, r"y has shape \(2, 4, 4, 4\), must be x's .* or larger in space", {"y": X[:, 4:]}),
        (ValueError, r"y has shape \(2, 8, 4\), must be x's .* or larger in space", {"y": X[..., 0]}),
        (ValueError, "backend is 'cuda', must be 'auto' or one of", {"backend": "cuda"}),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        residual_add_(**{"y": X.clone(), "x": X, **arguments})


@pytest.mark.usefixtures("_triton")
def test_triton_takes_no_float64(device: torch.device) -> None:
    x = X.double().to(device)
    with pytest.raises(TypeError, match=r"x is torch\.float64, must be float32, float16 or bfloat16 on the triton"):
        residual_add_(torch.zeros_like(x), x, backend="triton")
