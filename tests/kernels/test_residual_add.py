"""Every backend of the residual sum against `reference` in float64, and how its kernel walks memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.residual_add import residual_add_
from fastddpm_kernels.testing import FLOORS, assert_close, check_op, check_refuses, errors, to_layout
from torch import Tensor

HALF, BFLOAT = torch.float16, torch.bfloat16
OUTSIDE = 7776.0  # exact in every dtype


@dataclass(frozen=True)
class Case:
    why: str
    shape: tuple[int, ...] = (2, 16, 5, 7)
    larger: tuple[int, ...] | None = None  # by how much y is larger in each spatial dimension; by 1 if None
    given: tuple[str, ...] = ("residual", "bias")
    total: str | None = "own"  # None, "own" memory, "x" or "residual"
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"


CASES = {
    "half": Case("one rounding", dtype=HALF),
    "bfloat16": Case("one rounding, of the dtype of fewest bits", dtype=BFLOAT),
    "contiguous": Case("a bias with another stride than the image's", layout="contiguous", dtype=HALF),
    "copy": Case("nothing to add", given=(), total=None),
    "residual": Case("no bias", given=("residual",), total=None),
    "bias": Case("no residual", given=("bias",), total=None),
    "no_total": Case("only y is written", total=None, dtype=HALF),
    "total_is_x": Case("what is read is overwritten", total="x", dtype=HALF),
    "total_is_residual": Case("as total_is_x", total="residual", dtype=HALF),
    "total_is_x_contiguous": Case("as total_is_x, in other strides", total="x", layout="contiguous", dtype=HALF),
    "same_size": Case("all tensors are walked with one stride", (2, 32, 8, 8), (0, 0)),
    "same_size_contiguous": Case("as same_size", (2, 32, 8, 8), (0, 0), layout="contiguous", dtype=HALF),
    "image_channels": Case("rows that no vector divides", (2, 3, 5, 7)),
    "image_channels_contiguous": Case("as image_channels", (2, 3, 5, 7), layout="contiguous", dtype=HALF),
    "wider": Case("y has gaps between rows", larger=(0, 3)),
    "higher": Case("y has gaps between samples", larger=(2, 0)),
    "one_pixel": Case("dimensions of size one", (3, 8, 1, 1)),
    "one_channel": Case("a channel dimension of size one", (2, 1, 9, 9)),
    "one_sample": Case("a batch dimension of size one", (1, 48, 6, 6)),
    "several_programs": Case("more values than a program adds", (2, 100, 9, 11), dtype=HALF),
    "no_space": Case("channels alone", (5, 24), ()),
    "one_dimension": Case("a signal", (2, 24, 9), (2,)),
    "three_dimensions": Case("a volume", (2, 8, 3, 4, 5), (0, 0, 0)),
    "empty_batch": Case("nothing to do", (0, 8, 4, 4)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_results(case: Case, backend: str, device: torch.device) -> None:
    sizes = {"x": case.shape, "residual": case.shape, "bias": case.shape[1:2]}
    wide = {name: torch.randn(sizes[name]).to(device, case.dtype).double() for name in ("x", *case.given)}
    space = case.shape[2:]
    larger = (1,) * len(space) if case.larger is None else case.larger
    inner = (slice(None), slice(None), *(slice(size) for size in space))

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the pixels of y that are written, having checked that `total` equals them and all else is kept."""
        given = {name: value.to(dtype, copy=True) for name, value in wide.items()}
        given |= {n: to_layout(given[n], case.layout) for n in ("x", "residual") if n in given}
        size = (*case.shape[:2], *(a + b for a, b in zip(space, larger, strict=True)))
        y = to_layout(torch.full(size, OUTSIDE, device=device, dtype=dtype), case.layout)
        y[inner] = torch.nan
        before = {name: value.clone() for name, value in given.items()}
        if case.total is not None:
            given["total"] = given[case.total] if case.total in given else torch.full_like(given["x"], torch.nan)
        assert residual_add_(y, backend=backend, **given) is None
        written = y[inner].clone()
        assert case.total is None or torch.equal(given["total"], written)
        assert all(torch.equal(given[name], value) for name, value in before.items() if name != case.total)
        y[inner] = OUTSIDE
        assert bool((y == OUTSIDE).all())
        return {"y": written}

    def compare(name: str, actual: Tensor, expected: Tensor, eager: Tensor) -> None:
        assert_close(actual, expected, name=name)
        if case.dtype != torch.float32:  # rounded once: nothing is nearer to the truth but the truth, rounded
            assert errors(actual, expected.to(case.dtype))[0] <= FLOORS[case.dtype][0] / 100

    check_op(run, backend, case.dtype, rounds=2, compare=compare)


def make(device: torch.device) -> dict[str, Tensor]:
    """Return x, residual and bias in float32."""
    sizes = {"x": (2, 16, 5, 7), "residual": (2, 16, 5, 7), "bias": (16,)}
    return {name: torch.randn(size, device=device) for name, size in sizes.items()}


@pytest.mark.parametrize("name", ["x", "residual"])
def test_y_may_be_an_input(name: str, backend: str, device: torch.device) -> None:
    given = make(device)
    expected = torch.full_like(given["x"], torch.nan)
    residual_add_(expected, **given, backend=backend)
    residual_add_(given[name], **given, backend=backend)
    assert torch.equal(given[name], expected)


def test_memory_formats_may_differ(backend: str, device: torch.device) -> None:
    given = make(device)
    expected = given["x"] + given["residual"] + given["bias"][:, None, None]
    y = to_layout(torch.zeros(2, 16, 5, 7, device=device), "channels_last")
    given["residual"] = to_layout(given["residual"], "neither")
    residual_add_(y, **given, total=given["x"], backend=backend)
    assert_close(y, expected)
    assert_close(given["x"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
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


@pytest.mark.usefixtures("on_triton")
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


@pytest.mark.gpu
def test_allocates_nothing_and_can_be_captured(device: torch.device) -> None:
    x, residual = (to_layout(t, "channels_last") for t in torch.randn(2, 4, 64, 16, 16, device=device).half())
    bias = torch.randn(64, device=device).half()
    y = to_layout(torch.zeros(4, 64, 17, 17, device=device, dtype=HALF), "channels_last")
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
    x = torch.randn(33, 1024, 1024, 64, device=device, dtype=HALF).movedim(-1, 1)
    y = torch.zeros(33, 1025, 1025, 64, device=device, dtype=HALF).movedim(-1, 1)
    residual_add_(y, x, residual=x, backend="triton")
    assert torch.equal(y[-1, :, :-1, :-1], 2 * x[-1])
    assert not bool(y[:, :, -1].any())


X = torch.randn(2, 8, 4, 4)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "x .*list", {"x": [1.0]}),
        (TypeError, "y .*NoneType", {"y": None}),
        (TypeError, "x .*int64", {"x": X.long()}),
        (TypeError, "y .*float16", {"y": X.half()}),
        (TypeError, "total .*float16", {"total": X.half()}),
        (TypeError, "bias .*int64", {"bias": torch.arange(8)}),
        (ValueError, "residual .*meta", {"residual": X.to("meta")}),
        (ValueError, r"x .*\(8,\)", {"x": X[0, :, 0, 0]}),
        (ValueError, r"residual .*\(1, 8, 4, 4\)", {"residual": X[:1]}),
        (ValueError, r"total .*\(2, 8, 4\)", {"total": X[..., 0]}),
        (ValueError, r"bias .*\(4,\)", {"bias": X[0, 0, 0]}),
        (ValueError, r"y .*\(2, 8, 3, 4\)", {"y": X[:, :, 1:]}),
        (ValueError, r"y .*\(2, 4, 4, 4\)", {"y": X[:, 4:]}),
        (ValueError, r"y .*\(2, 8, 4\)", {"y": X[..., 0]}),
        (ValueError, "backend .*cuda", {"backend": "cuda"}),
    ],
)
def test_bad_input(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    check_refuses(residual_add_, error, message, **{"y": X.clone(), "x": X, **changed})


def test_bad_input_of_triton(on_triton: torch.device) -> None:
    x = X.double().to(on_triton)
    check_refuses(residual_add_, TypeError, "x .*float64", y=torch.zeros_like(x), x=x, backend="triton")
    x, y = (to_layout(torch.zeros(2, 8, *s, device=on_triton), "channels_last") for s in ((3, 4, 5), (4, 5, 6)))
    residual_add_(y, x, backend="triton")
    bias = torch.zeros(8, device=on_triton)  # one stride too many
    check_refuses(residual_add_, ValueError, "x .*strides", y=y, x=x, bias=bias, backend="triton")
