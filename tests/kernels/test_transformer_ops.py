"""Layer norm, GEGLU, attention with separate keys and values: every backend against `reference`; what they refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastddpm_kernels.cross_attention import cross_attention_
from fastddpm_kernels.geglu import geglu_
from fastddpm_kernels.layer_norm import layer_norm_
from fastddpm_kernels.layer_norm_linear import layer_norm_linear_
from fastddpm_kernels.testing import check_op, check_refuses, to_layout
from torch import Tensor

HALF, BFLOAT = torch.float16, torch.bfloat16
EVERY = pytest.mark.parametrize("backend", ["eager", "triton", "native"], indirect=True)


@dataclass(frozen=True)
class Norm:
    why: str
    shape: tuple[int, ...] = (2, 48, 3, 5)
    dtype: torch.dtype = torch.float32
    residual: bool = False
    offset: float = 0.0


NORMS = {
    "plain": Norm("a width that is no power of two"),
    "residual": Norm("the sum is kept", residual=True),
    "half": Norm("the sum is rounded before it is normalised", (2, 320, 3, 3), HALF, residual=True),
    "bfloat16": Norm("as half", (2, 320, 3, 3), BFLOAT, residual=True),
    "wide": Norm("a pixel is a program", (1, 2100, 1, 3)),
    "odd": Norm("no vector divides the channels", (3, 33, 1, 7), residual=True),
    "one_channel": Norm("nothing is left but the bias", (2, 1, 2, 2)),
    "one_pixel": Norm("dimensions of size one", (1, 40, 1, 1)),
    "far_from_zero": Norm("a mean beside which the deviations are small", (2, 64, 3, 3), offset=1000.0),
    "empty": Norm("nothing to do", (0, 8, 2, 2)),
}


@EVERY
@pytest.mark.parametrize("case", NORMS.values(), ids=list(NORMS))
def test_layer_norm(case: Norm, backend: str, device: torch.device) -> None:
    backend = "native" if backend.startswith("native") else backend
    if backend == "native" and case.dtype == HALF:
        pytest.skip("native kernels do not compute in float16")
    device = torch.device("cpu") if backend == "native" else device
    x, residual = ((torch.randn(case.shape) + case.offset).to(device, case.dtype).double() for _ in range(2))
    weight, bias = torch.randn(2, case.shape[1], device=device)

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        images = [to_layout(image.to(dtype), "channels_last") for image in (x, residual)]
        y, total = torch.empty_like(images[0]), torch.empty_like(images[0])
        if not case.residual:
            layer_norm_(y, images[0], weight, bias, backend=backend)
            return {"y": y}
        layer_norm_(y, images[0], weight, bias, residual=images[1], total=total, backend=backend)
        return {"y": y, "total": total}

    check_op(run, backend, case.dtype, rounds=2e4 if case.offset or case.residual else 3)


@EVERY
@pytest.mark.parametrize(
    ("shape", "dtype", "scale"),
    [((2, 96, 3, 5), torch.float32, 1.0), ((1, 34, 1, 9), torch.float32, 6.0), ((2, 640, 5, 5), HALF, 2.0),
     ((2, 80, 3, 5), BFLOAT, 2.0), ((0, 8, 2, 2), torch.float32, 1.0)],
    ids=["plain", "tails", "half", "bfloat16", "empty"],
)  # fmt: skip
def test_geglu(shape: tuple[int, ...], dtype: torch.dtype, scale: float, backend: str, device: torch.device) -> None:
    if backend == "native" and dtype == HALF:
        pytest.skip("native kernels do not compute in float16")
    device = torch.device("cpu") if backend == "native" else device
    x = (torch.randn(shape) * scale).to(device, dtype).double()

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        y = torch.empty(shape[0], *shape[2:], shape[1] // 2, dtype=dtype, device=device).movedim(-1, 1)
        geglu_(y, to_layout(x.to(dtype), "channels_last"), backend=backend)
        return {"y": y}

    check_op(run, backend, dtype, rounds=3)


def test_gelu_is_exact_in_its_tails(native: str) -> None:
    """Where 1 + erf cancels, of which torch keeps nothing below -5.6."""
    gates = torch.linspace(-12, 12, 4097)
    x = torch.cat([torch.ones_like(gates)[:, None], gates[:, None]], dim=1)[:, :, None, None]
    y = torch.empty(len(gates), 1, 1, 1)
    geglu_(y, x, backend=native)
    expected = 0.5 * gates.double() * torch.special.erfc(-gates.double() * 0.5**0.5)
    assert ((y.flatten() - expected).abs() <= 4e-6 * expected.abs() + 1e-37).all()


@dataclass(frozen=True)
class NormLinear:
    why: str
    shape: tuple[int, ...] = (2, 48, 3, 5)
    out: int = 36
    gate: bool = False
    dtype: torch.dtype = torch.float32
    offset: float = 0.0


NORM_LINEARS = {
    "plain": NormLinear("channels and columns that no tile divides"),
    "gated": NormLinear("values and gates", gate=True),
    "half": NormLinear("as a transformer's", (1, 320, 8, 8), 192, dtype=HALF),
    "gated_half": NormLinear("two products in one loop", (1, 320, 4, 4), 160, True, HALF),
    "bfloat16": NormLinear("as gated_half", (1, 320, 4, 4), 160, True, BFLOAT),
    "several_tiles": NormLinear("tiles in both directions, the last not full", (1, 36, 13, 23), 150, dtype=HALF),
    "far_from_zero": NormLinear("a mean beside which the deviations are small", offset=100.0),
    "one_pixel": NormLinear("dimensions of size one", (1, 40, 1, 1)),
    "one_channel": NormLinear("nothing is left but the bias", (2, 1, 2, 2)),
    "empty": NormLinear("nothing to do", (0, 8, 2, 2)),
}


@pytest.mark.parametrize("backend", ["eager", "triton"], indirect=True)
@pytest.mark.parametrize("case", NORM_LINEARS.values(), ids=list(NORM_LINEARS))
def test_layer_norm_linear(case: NormLinear, backend: str, device: torch.device) -> None:
    rows, channels = case.out * (1 + case.gate), case.shape[1]
    given = torch.randn(case.shape) + case.offset, channels**-0.5 * torch.randn(rows, channels), torch.randn(rows)
    x, weight, bias = (value.to(device, case.dtype).double() for value in given)

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        own = to_layout(x.to(dtype), "channels_last")
        y = torch.empty(len(x), *case.shape[2:], case.out, dtype=dtype, device=device).movedim(-1, 1)
        sums = weight.sum(1) if dtype == torch.float64 else weight.sum(1).float()
        layer_norm_linear_(y, own, weight.to(dtype), sums, bias, gate=case.gate, backend=backend)
        return {"y": y}

    check_op(run, backend, case.dtype, rounds=2e4 if case.offset or case.shape[1] == 1 else 6)


def test_layer_norm_linear_refuses() -> None:
    x, weight = torch.ones(1, 8, 2, 2), torch.ones(6, 8)
    good = {"y": torch.empty(1, 6, 2, 2), "x": x, "weight": weight, "sums": weight.sum(1), "bias": torch.ones(6)}
    for changes, message in (
        ({"weight": torch.ones(6, 7)}, r"weight has shape \(6, 7\), must be \[O, 8\]"),
        ({"weight": torch.ones(5, 8), "gate": True}, r"must be \[2 O, 8\]"),
        ({"sums": torch.ones(5)}, r"sums has shape \(5,\), must be \[6\]"),
        ({"gate": True}, r"y has shape .* must be \(1, 3, 2, 2\)"),
        ({"eps": 0.0}, "eps is 0.0, must be positive"),
    ):
        check_refuses(layer_norm_linear_, ValueError, message, **{**good, **changes})


@dataclass(frozen=True)
class Attend:
    why: str
    heads: int = 2
    width: int = 40
    size: tuple[int, int] = (5, 7)
    tokens: int = 77
    own: bool = False
    masked: bool = False
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    batch: int = 2


ATTENDS = {
    "text": Attend("a text of CLIP"),
    "two_texts": Attend("a longer text, in wide heads", 1, 160, tokens=154),
    "narrow": Attend("heads narrower than a vector", 3, 8, tokens=9),
    "one_token": Attend("a single key", 2, 16, tokens=1),
    "one_pixel": Attend("a single query", size=(1, 1)),
    "itself": Attend("text and image together", own=True),
    "masked": Attend("some tokens are discarded", 2, 64, own=True, masked=True),
    "peaked": Attend("one key outweighs the rest, also across blocks of keys", 1, 32, (4, 4), 600, scale=12.0),
    "many_keys": Attend("several blocks of keys, and queries of several items", 1, 16, (20, 20), 700, own=True),
    "bfloat16": Attend("exponentials are rounded", dtype=BFLOAT, own=True, masked=True),
    "odd_tokens_bfloat16": Attend("half a word of keys is left", 1, 32, tokens=301, dtype=BFLOAT),
    "empty": Attend("nothing to do", batch=0),
}


@pytest.mark.parametrize("backend", ["eager", "native"], indirect=True)
@pytest.mark.parametrize("case", ATTENDS.values(), ids=list(ATTENDS))
def test_cross_attention(case: Attend, backend: str, device: torch.device) -> None:
    backend = "native" if backend.startswith("native") else backend
    channels, pixels = case.heads * case.width, case.size[0] * case.size[1]
    keys = case.tokens + (pixels if case.own else 0)
    qkv = (torch.randn(case.batch, 3 * channels, *case.size) * case.scale).to(case.dtype).double()
    kv = torch.randn(case.batch, 2 * channels, 1, case.tokens).to(case.dtype).double()
    mask = torch.randn(case.batch, keys)
    if case.batch:
        mask[0, : case.tokens // 2] = -10000.0

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        image, text = (to_layout(t.to(dtype), "channels_last") for t in (qkv, kv))
        y = torch.empty(case.batch, *case.size, channels, dtype=dtype).movedim(-1, 1)
        cross_attention_(
            y, image[:, :channels], text, case.heads, own=image[:, channels:] if case.own else None,
            mask=mask if case.masked else None, backend=backend,
        )  # fmt: skip
        return {"y": y}

    check_op(run, backend, case.dtype, rounds=8)


X = to_layout(torch.randn(2, 8, 3, 3), "channels_last")
V = torch.randn(8)


@pytest.mark.parametrize(
    ("op", "error", "message", "arguments"),
    [
        (layer_norm_, TypeError, "x .*int64", {"y": X, "x": X.long(), "weight": V, "bias": V}),
        (layer_norm_, ValueError, r"weight .*\(4,\)", {"y": X.clone(), "x": X, "weight": V[:4], "bias": V}),
        (layer_norm_, ValueError, "eps is 0", {"y": X.clone(), "x": X, "weight": V, "bias": V, "eps": 0}),
        (layer_norm_, ValueError, "together", {"y": X.clone(), "x": X, "weight": V, "bias": V, "residual": X}),
        (layer_norm_, ValueError, "y is x", {
            "y": X, "x": X, "weight": V, "bias": V, "residual": X, "total": X.clone()}),
        (geglu_, ValueError, r"x .*\(2, 7, 3, 3\)", {"y": X, "x": X[:, 1:]}),
        (geglu_, ValueError, r"y .*\(2, 8, 3, 3\)", {"y": X.clone(), "x": X}),
        (cross_attention_, ValueError, "heads is 3", {"y": X.clone(), "q": X, "kv": X, "heads": 3}),
        (cross_attention_, ValueError, r"kv .*\(2, 8, 3, 3\)", {"y": X.clone(), "q": X, "kv": X, "heads": 2}),
        (cross_attention_, ValueError, r"mask .*\(2, 4\)", {
            "y": X[:, :4].clone(), "q": X[:, :4], "kv": X, "heads": 2, "mask": X[:, :4, 0, 0]}),
    ],
)  # fmt: skip
def test_bad_input(op: Any, error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    check_refuses(op, error, message, **arguments)
