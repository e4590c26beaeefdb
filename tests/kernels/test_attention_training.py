"""`attention` with gradients: the native op against float64 on hard shapes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastddpm_kernels import native as _native
from fastddpm_kernels.attention.training import _attention, attention, resolve_attention
from fastddpm_kernels.backend import BackendError
from fastddpm_kernels.testing import FLOORS, assert_close, errors, poisoned_memory
from torch import Tensor

# (N, P, heads, head_dim, value_dim): as in test_attention.py; also values narrower than queries.
SHAPES = {
    "one_pixel": (1, 1, 1, 2, 2),
    "fifteen": (2, 15, 2, 4, 4),
    "one_more_than_a_panel": (1, 33, 1, 30, 18),
    "values_are_wider": (2, 36, 3, 8, 34),
    "one_wide_head": (1, 72, 1, 256, 256),
    "many_heads": (7, 64, 4, 16, 16),
}


def make(shape: str, dtype: torch.dtype, spread: float = 1.0) -> tuple[list[Tensor], Tensor]:
    """q, k and v, and a gradient of the result."""
    n, pixels, heads, head_dim, value_dim = SHAPES[shape]
    widths = (heads * head_dim, heads * head_dim, heads * value_dim)
    tensors = [(spread * torch.randn(n, pixels, width)).to(dtype) for width in widths]
    return tensors, torch.randn(n, pixels, heads * value_dim).to(dtype)


def gradients(tensors: list[Tensor], dy: Tensor, heads: int, backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    leaves = [t.to(dtype).detach().requires_grad_() for t in tensors]
    y = attention(*leaves, heads, backend=backend)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [1.0, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("native", "threads")
def test_result_and_gradients(shape: str, spread: float, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if dtype == torch.bfloat16:
        request.getfixturevalue("native_bfloat16")
    torch.manual_seed(0)
    (tensors, dy), heads = make(shape, dtype, spread), SHAPES[shape][2]
    with poisoned_memory():
        actual = gradients(tensors, dy, heads, "native", dtype)
    expected = gradients(tensors, dy, heads, "reference", torch.float64)
    eager = gradients(tensors, dy, heads, "eager", dtype)
    for name, a, e, t in zip(("y", "dq", "dk", "dv"), actual, expected, eager, strict=True):
        if shape == "one_pixel" and name in ("dq", "dk"):  # zero but for rounding, whose size is that of dp
            assert a.abs().max() <= FLOORS[dtype][1] * spread * dy.abs().max() * 4, name
        elif a.numel() < 16:  # too few for a mean
            assert errors(a, e)[1] <= max(FLOORS[dtype][1], 2 * errors(t, e)[1]), name
        else:
            assert_close(a, e, eager=t, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("native")
def test_gradients_do_not_depend_on_threads(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if dtype == torch.bfloat16:
        request.getfixturevalue("native_bfloat16")
    (tensors, dy), before, results = make("many_heads", dtype), torch.get_num_threads(), []
    try:
        for count in (1, 2, 50):  # the last shares heads among threads
            torch.set_num_threads(count)
            results.append(gradients(tensors, dy, 4, "native", dtype))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.usefixtures("native")
def test_strides_do_not_matter() -> None:
    """Parts of one product, and a gradient that was expanded."""
    together = torch.randn(2, 15, 24)
    parts = [part.detach().requires_grad_() for part in together.chunk(3, dim=2)]
    attention(*parts, 2, backend="native").sum().backward()
    dense = [part.detach().contiguous().requires_grad_() for part in parts]
    attention(*dense, 2, backend="native").backward(torch.ones(2, 15, 8))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(parts, dense, strict=True))  # type: ignore[arg-type]


@pytest.mark.usefixtures("native")
def test_registered_and_compiled_as_torch_wants_it() -> None:
    tensors, dy = make("fifteen", torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.fastddpm.attention.default, (*leaves, 2))
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, 2, backend="native"), fullgraph=True, backend="aot_eager"
    )
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves, dy),
        torch.autograd.grad(_attention(*leaves, 2)[0], leaves, dy),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_elsewhere_it_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, _ = make("fifteen", torch.float32)
    eager = attention(*tensors, 2, backend="eager")
    parts = [t.unflatten(2, (2, -1)).transpose(1, 2) for t in tensors]
    expected = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
    assert torch.equal(eager, expected)
    assert attention(*[t.double() for t in tensors], 2).dtype == torch.float64
    monkeypatch.setattr("fastddpm_kernels.native.why_not", lambda: "there is no C++ compiler")
    assert torch.equal(attention(*tensors, 2), eager)
    with pytest.raises(BackendError, match="attention: backend 'native' cannot run here: there is no C"):
        attention(*tensors, 2, backend="native")


@pytest.mark.usefixtures("native")
def test_what_native_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.ones(1, 4, 6)
    assert resolve_attention(q, q, q, 2) == "native"
    with pytest.raises(BackendError, match="native kernels compute in"):
        resolve_attention(*[q.half()] * 3, 2, "native")
    monkeypatch.setattr(_native.get(), "bfloat16", 1)
    half = q.bfloat16()
    assert resolve_attention(half, half, half, 1) == "native"
    assert resolve_attention(half, half, half, 2) == "eager"
    with pytest.raises(BackendError, match="an odd number of channels, must be even in bfloat16"):
        resolve_attention(half, half, half, 2, "native")
    monkeypatch.setattr(_native.get(), "bfloat16", 2)  # torch's own is faster
    assert resolve_attention(half, half, half, 1) == "eager"
    assert resolve_attention(half, half, half, 1, "native") == "native"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": None}, "q is NoneType, must be a tensor"),
        ({"q": torch.ones(4, 6)}, r"q has shape \(4, 6\), must be \[N, P, heads . head_dim\]"),
        ({"k": torch.ones(1, 5, 6)}, r"k has shape \(1, 5, 6\), must be q's, \(1, 4, 6\)"),
        ({"v": torch.ones(1, 5, 6)}, r"v has shape \(1, 5, 6\), must equal q's \(1, 4, 6\) but for the channels"),
        ({"heads": 4}, "heads is 4, must be at least 1 and divide the 6 channels of q"),
        ({"backend": "triton"}, "backend is 'triton', must be 'auto' or one of native, eager, reference"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {name: torch.ones(1, 4, 6) for name in ("q", "k", "v")} | {"heads": 2}
    with pytest.raises((TypeError, ValueError), match=message):
        attention(**{**given, **change})


def test_nothing_in_nothing_out() -> None:
    q = torch.ones(0, 4, 6, requires_grad=True)
    attention(q, q, q, 2).sum().backward()
    assert q.grad is not None
    assert q.grad.shape == (0, 4, 6)
