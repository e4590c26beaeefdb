"""`attention_`: the native backend against float64 on hard shapes, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fastddpm_kernels import native as _native
from fastddpm_kernels.attention import attention_
from fastddpm_kernels.backend import BackendError
from fastddpm_kernels.testing import assert_close
from torch import Tensor

# (N, heads, head_dim, value_dim, H, W): one pixel, an odd number of them, one more than a panel of keys, heads narrower
# and wider than a vector, values wider than queries, so many samples that threads take whole heads, and nothing.
SHAPES = {
    "one_pixel": (1, 1, 2, 2, 1, 1),
    "three_by_five": (2, 2, 4, 4, 3, 5),
    "one_more_than_a_panel": (1, 1, 30, 18, 3, 11),
    "values_are_wider": (2, 3, 8, 34, 4, 9),
    "one_wide_head": (1, 1, 256, 256, 9, 8),
    "many_heads": (7, 4, 16, 16, 8, 8),
    "empty": (0, 2, 4, 4, 3, 3),
}


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def make(shape: str, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    n, heads, head_dim, value_dim, h, w = SHAPES[shape]
    return last((spread * torch.randn(n, heads * (2 * head_dim + value_dim), h, w)).to(dtype))


def run(shape: str, qkv: Tensor, backend: str, dtype: torch.dtype | None = None) -> Tensor:
    n, heads, head_dim, value_dim, h, w = SHAPES[shape]
    memory = torch.full((n * heads * value_dim * h * w + 128,), 7.0, dtype=dtype or qkv.dtype)
    y = memory[64:-64].fill_(float("nan")).view(n, h, w, heads * value_dim).permute(0, 3, 1, 2)
    attention_(y, qkv.to(y.dtype), heads, head_dim, backend=backend)
    assert bool((memory[:64] == 7).all())
    assert bool((memory[-64:] == 7).all())
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("native", "threads")
def test_hard_shapes(shape: str, spread: float, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if dtype == torch.bfloat16:
        request.getfixturevalue("native_bfloat16")
    qkv = make(shape, dtype, spread)
    expected, eager = run(shape, qkv, "reference", torch.float64), run(shape, qkv, "eager")
    assert_close(run(shape, qkv, "native"), expected, eager=eager, name=shape)


@pytest.mark.usefixtures("native")
def test_scores_of_any_size_leave_finite_results() -> None:
    """Scores that overflow an exponential, and rows in which all are far below zero."""
    qkv = make("many_heads", torch.float32)
    qkv[:, :64] *= 3e4
    expected, eager = run("many_heads", qkv, "reference", torch.float64), run("many_heads", qkv, "eager")
    assert_close(run("many_heads", qkv, "native"), expected, eager=eager)
    qkv[0, 0, 0, 0] = math.nan  # of one query of one head
    y = run("many_heads", qkv, "native")
    assert bool(y[0, :16, 0, 0].isnan().all())
    assert int(y.isnan().sum()) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("native")
def test_results_do_not_depend_on_threads_or_batch(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if dtype == torch.bfloat16:
        request.getfixturevalue("native_bfloat16")
    qkv, before, results = make("many_heads", dtype), torch.get_num_threads(), []
    try:
        for count in (1, 2, 50):  # the last shares heads among threads
            torch.set_num_threads(count)
            results.append(run("many_heads", qkv, "native"))
            one = torch.empty_like(results[0][:1])
            attention_(one, qkv[3:4], 4, 16, backend="native")
            assert torch.equal(one, results[0][3:4])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_auto_is_native_where_that_runs(monkeypatch: pytest.MonkeyPatch, native: str) -> None:
    qkv = make("three_by_five", torch.float32)
    assert torch.equal(run("three_by_five", qkv, "auto"), run("three_by_five", qkv, native))
    contiguous = qkv.contiguous()  # another layout: torch's own
    y, eager = torch.empty(2, 2, 8, 3, 5).unbind()
    attention_(y, contiguous, 2, 4)
    attention_(eager, contiguous, 2, 4, backend="eager")
    assert torch.equal(y, eager)
    with pytest.raises(ValueError, match=r"qkv has strides .*, must be channels-last on the native backend"):
        attention_(last(y), contiguous, 2, 4, backend=native)
    assert run("three_by_five", qkv.half(), "auto").dtype == torch.float16
    with pytest.raises(BackendError, match="attention: backend 'native' cannot run here: native kernels compute in"):
        attention_(y.half(), contiguous.half(), 2, 4, backend=native)
    odd = last(torch.randn(1, 9, 2, 2).bfloat16())
    monkeypatch.setattr(_native.get(), "bfloat16", 1)
    with pytest.raises(ValueError, match="head_dim is 3 of 9 channels, both must be even in bfloat16"):
        attention_(last(torch.empty(1, 3, 2, 2).bfloat16()), odd, 1, 3, backend=native)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": None}, "qkv is NoneType, must be a tensor"),
        ({"y": torch.ones(1, 4, 3, 3, dtype=torch.int32)}, "y is torch.int32, must be float32"),
        ({"y": torch.ones(1, 4, 3, 3).half()}, r"y is torch.float16, must be of qkv's dtype, torch.float32"),
        ({"qkv": torch.ones(1, 12, 9)}, r"qkv has shape \(1, 12, 9\), must be \[N, C, H, W\]"),
        ({"heads": 0}, "heads is 0 and head_dim 4, must be at least 1"),
        ({"heads": 2}, "qkv has 12 channels, must have 16 for queries and keys and a multiple of 2 for values"),
        ({"y": torch.ones(1, 5, 3, 3)}, r"y has shape \(1, 5, 3, 3\), must have shape \(1, 4, 3, 3\)"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    given = {"y": torch.ones(1, 4, 3, 3), "qkv": torch.ones(1, 12, 3, 3), "heads": 1, "head_dim": 4}
    with pytest.raises((TypeError, ValueError), match=message):
        attention_(**{**given, **change})


def test_the_result_is_no_part_of_what_is_read() -> None:
    qkv = torch.ones(1, 12, 3, 3)
    with pytest.raises(ValueError, match="y is qkv, must be other memory"):
        attention_(qkv[:, :4], qkv, 1, 4)
