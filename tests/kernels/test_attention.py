"""`attention_` and `attention`: the native ops against float64, forward and gradients; what they refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels import native as _native
from fastddpm_kernels.attention import attention_
from fastddpm_kernels.attention.training import attention, resolve_attention
from fastddpm_kernels.backend import BackendError
from fastddpm_kernels.testing import (
    FLOORS,
    Guarded,
    assert_close,
    assert_close_if_few,
    check_compiles,
    check_op,
    check_refuses,
    gradients,
    same_on_any_threads,
    to_layout,
)
from torch import Tensor

SINGLE, BFLOAT = torch.float32, torch.bfloat16
KINDS = pytest.mark.parametrize(
    ("backend", "dtype"), [("native", SINGLE), ("native_bfloat16", BFLOAT)], indirect=["backend"], ids=str
)


@dataclass(frozen=True)
class Case:
    why: str
    batch: int
    heads: int
    head_dim: int
    value_dim: int
    size: tuple[int, int]


CASES = {
    "one_pixel": Case("the softmax of one score is 1", 1, 1, 2, 2, (1, 1)),
    "three_by_five": Case("an odd number of pixels; heads narrower than a vector", 2, 2, 4, 4, (3, 5)),
    "one_more_than_a_panel": Case("33 keys; values narrower than queries", 1, 1, 30, 18, (3, 11)),
    "values_are_wider": Case("values wider than queries", 2, 3, 8, 34, (4, 9)),
    "one_wide_head": Case("a head wider than any vector", 1, 1, 256, 256, (9, 8)),
    "many_heads": Case("threads take whole heads", 7, 4, 16, 16, (8, 8)),
    "empty": Case("nothing to do", 0, 2, 4, 4, (3, 3)),
}
MANY = CASES["many_heads"]


def make(case: Case, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    channels = case.heads * (2 * case.head_dim + case.value_dim)
    return to_layout((spread * torch.randn(case.batch, channels, *case.size)).to(dtype), "channels_last")


def call(case: Case, qkv: Tensor, backend: str) -> Tensor:
    y = Guarded((case.batch, case.heads * case.value_dim, *case.size), qkv.dtype, layout="channels_last")
    attention_(y.tensor, qkv, case.heads, case.head_dim, backend=backend)
    y.check()
    return y.tensor


@KINDS
@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.usefixtures("backend")
def test_results(case: Case, spread: float, dtype: torch.dtype) -> None:
    qkv = make(case, dtype, spread)
    check_op(lambda backend, dtype: {"y": call(case, qkv.to(dtype), backend)}, "native", dtype)


@KINDS
@pytest.mark.parametrize("spread", [1.0, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.usefixtures("backend")
def test_result_and_gradients(case: Case, spread: float, dtype: torch.dtype) -> None:
    pixels, widths = math.prod(case.size), {"q": case.head_dim, "k": case.head_dim, "v": case.value_dim}
    tensors = {n: (spread * torch.randn(case.batch, pixels, case.heads * w)).to(dtype) for n, w in widths.items()}

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: value.detach().to(dtype, copy=True).requires_grad_() for name, value in tensors.items()}
        results = {"y": attention(**leaves, heads=case.heads, backend=backend)}
        return results | gradients(results, leaves)

    def compare(name: str, actual: Tensor, expected: Tensor, eager: Tensor) -> None:
        if pixels == 1 and name in ("dq", "dk"):  # zero but for rounding, whose size is that of the products'
            assert actual.abs().max() <= FLOORS[dtype][1] * spread * 4, name
        else:
            assert_close_if_few(actual, expected, eager=eager, name=name)

    check_op(run, "native", dtype, compare=compare, threads=(50, 2, 1))  # the first shares heads among threads


def test_reference_is_the_definition() -> None:
    case = CASES["values_are_wider"]
    qkv = make(case, torch.float64)
    q, k, v = (part.flatten(2) for part in qkv.split([24, 24, 102], 1))
    parts = []
    for h in range(3):
        scores = q[:, 8 * h : 8 * h + 8].transpose(1, 2) @ k[:, 8 * h : 8 * h + 8] / 8**0.5
        weights = scores.exp() / scores.exp().sum(2, keepdim=True)
        parts.append(v[:, 34 * h : 34 * h + 34] @ weights.transpose(1, 2))
    assert_close(call(case, qkv, "reference"), torch.cat(parts, 1).unflatten(2, case.size))


@pytest.mark.usefixtures("native")
def test_scores_of_any_size_leave_finite_results() -> None:
    """Scores that overflow an exponential, and rows in which all are far below zero."""
    qkv = make(MANY, SINGLE)
    qkv[:, :64] *= 3e4
    check_op(lambda backend, dtype: {"y": call(MANY, qkv.to(dtype), backend)}, "native", SINGLE)
    qkv[0, 0, 0, 0] = math.nan  # of one query of one head
    y = call(MANY, qkv, "native")
    assert bool(y[0, :16, 0, 0].isnan().all())
    assert int(y.isnan().sum()) == 16


@KINDS
@pytest.mark.usefixtures("backend")
def test_results_do_not_depend_on_threads_or_batch(dtype: torch.dtype) -> None:
    qkv = make(MANY, dtype)

    def run() -> dict[str, Tensor]:
        y = call(MANY, qkv, "native")
        one = torch.empty_like(y[:1])
        attention_(one, qkv[3:4], 4, 16, backend="native")
        assert torch.equal(one, y[3:4])
        return {"y": y}

    same_on_any_threads(run, (1, 2, 50))


@pytest.mark.usefixtures("native")
def test_strides_do_not_matter() -> None:
    """Parts of one product, and a gradient that was expanded."""
    parts = [part.detach().requires_grad_() for part in torch.randn(2, 15, 24).chunk(3, dim=2)]
    dense = [part.detach().contiguous().requires_grad_() for part in parts]
    expanded = torch.autograd.grad(attention(*parts, 2, backend="native").sum(), parts)
    plain = torch.autograd.grad(attention(*dense, 2, backend="native"), dense, torch.ones(2, 15, 8))
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain, strict=True))


@pytest.mark.usefixtures("native")
def test_compiles() -> None:
    leaves = [t.requires_grad_() for t in torch.randn(3, 2, 15, 8).unbind()]
    torch.library.opcheck(torch.ops.fastddpm.attention.default, (*leaves, 2))
    check_compiles(
        lambda q, k, v: attention(q, k, v, 2, backend="native"), *(t.detach().requires_grad_() for t in leaves)
    )


def test_nothing_in_nothing_out() -> None:
    q = torch.ones(0, 4, 6, requires_grad=True)
    assert torch.autograd.grad(attention(q, q, q, 2).sum(), q)[0].shape == (0, 4, 6)


def test_auto_is_native_where_that_runs(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["three_by_five"]
    qkv = make(case, SINGLE)
    assert torch.equal(call(case, qkv, "auto"), call(case, qkv, native))
    contiguous = qkv.contiguous()  # another layout: torch's own
    y, eager = torch.empty(2, 2, 8, 3, 5).unbind()
    attention_(y, contiguous, 2, 4)
    attention_(eager, contiguous, 2, 4, backend="eager")
    assert torch.equal(y, eager)
    assert call(case, qkv.half(), "auto").dtype == torch.float16
    given = {"y": y, "qkv": contiguous, "heads": 2, "head_dim": 4, "backend": native}
    check_refuses(attention_, ValueError, "strides .*channels-last", **given)
    check_refuses(attention_, BackendError, "float16", **given | {"y": y.half(), "qkv": contiguous.half()})
    monkeypatch.setattr(_native.get(), "bfloat16", 1)
    y, qkv = (to_layout(torch.zeros(1, c, 2, 2).bfloat16(), "channels_last") for c in (3, 9))
    check_refuses(attention_, ValueError, "head_dim .*even", y=y, qkv=qkv, heads=1, head_dim=3, backend=native)


def test_elsewhere_it_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {**dict(zip("qkv", torch.randn(3, 2, 15, 8), strict=True)), "heads": 2}
    eager = attention(**given, backend="eager")
    parts = [given[name].unflatten(2, (2, -1)).transpose(1, 2) for name in "qkv"]
    assert torch.equal(eager, F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
    assert attention(*(given[name].double() for name in "qkv"), 2).dtype == torch.float64
    monkeypatch.setattr("fastddpm_kernels.native.why_not", lambda: "there is no C++ compiler")
    assert torch.equal(attention(**given), eager)
    check_refuses(attention, BackendError, "no C.. compiler", **given, backend="native")


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


Y, QKV, Q = torch.ones(1, 4, 3, 3), torch.ones(1, 12, 3, 3), torch.ones(1, 4, 6)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "qkv .*NoneType", {"qkv": None}),
        (TypeError, "y .*int32", {"y": Y.int()}),
        (TypeError, "y .*float16", {"y": Y.half()}),
        (ValueError, r"qkv .*\(1, 12, 9\)", {"qkv": torch.ones(1, 12, 9)}),
        (ValueError, "heads .*0", {"heads": 0}),
        (ValueError, "qkv .*12 channels", {"heads": 2}),
        (ValueError, r"y .*\(1, 5, 3, 3\)", {"y": torch.ones(1, 5, 3, 3)}),
        (ValueError, "y is qkv", {"y": QKV[:, :4]}),
    ],
)
def test_bad_input_in_place(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    check_refuses(attention_, error, message, **{"y": Y, "qkv": QKV, "heads": 1, "head_dim": 4, **changed})


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "q .*NoneType", {"q": None}),
        (ValueError, r"q .*\(4, 6\)", {"q": torch.ones(4, 6)}),
        (ValueError, r"k .*\(1, 5, 6\)", {"k": torch.ones(1, 5, 6)}),
        (ValueError, r"v .*\(1, 5, 6\)", {"v": torch.ones(1, 5, 6)}),
        (ValueError, "heads .*4", {"heads": 4}),
        (ValueError, "backend .*triton", {"backend": "triton"}),
    ],
)
def test_bad_input(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    check_refuses(attention, error, message, **{"q": Q, "k": Q, "v": Q, "heads": 2, **changed})
