"""The attention block of one head: every backend against `reference`, its folded projections, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastddpm_kernels.attention_block import attention_block_, fold
from fastddpm_kernels.conv import statistics_shape
from fastddpm_kernels.conv.formula import statistics_by_torch
from fastddpm_kernels.testing import assert_close, check_op, check_refuses
from torch import Tensor

HALF, BFLOAT = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    why: str
    channels: int = 48
    size: tuple[int, int] = (5, 7)
    groups: int = 8
    dtype: torch.dtype = torch.float32
    batch: int = 2
    scale: float = 1.0  # of the scores: how unlike the pixels' weights are
    offset: float = 0.0
    deviation: float = 1.0
    statistics: bool = False  # those of x are given, and those of y are left


CASES = {
    "plain": Case("channels that are no power of two, pixels beyond the last block"),
    "half": Case("one program a sample", 64, (4, 4), dtype=HALF),
    "bfloat16": Case("as half", 64, (4, 4), dtype=BFLOAT),
    "several_blocks": Case("own pixels and keys in several blocks, the last not full", 32, (9, 9), 4, HALF),
    "whole_blocks": Case("as a DDPM level", 256, (8, 8), 32, HALF, batch=1),
    "one_pixel": Case("nothing to choose from", size=(1, 1)),
    "one_group": Case("a norm of all channels", 24, (3, 5), 1),
    "one_channel_a_group": Case("a group is a channel", 16, (3, 5), 16),
    "few_channels": Case("fewer than the smallest tile", 6, (3, 5), 3),
    "peaked": Case("one pixel outweighs the rest, which may come last", scale=30.0),
    "far_from_zero": Case("means beside which deviations are small", offset=30.0, dtype=HALF),
    "flat": Case("pixels that hardly differ: the norm scales by hundreds", deviation=1e-3, dtype=HALF),
    "statistics": Case("blocks of channels, a last span that is not full", 32, (9, 9), 4, HALF, statistics=True),
    "statistics_of_few_pixels": Case("fewer pixels than the smallest tile", 48, (3, 3), 6, statistics=True),
    "empty": Case("nothing to do", batch=0),
}


def make(case: Case) -> dict[str, Tensor]:
    """Return random arguments in float64, exact in the case's dtype."""
    c = case.channels
    x = case.offset + case.deviation * torch.randn(case.batch, *case.size, c).permute(0, 3, 1, 2)
    matrices = {"scores": case.scale / c * torch.randn(c, c), "values": c**-0.5 * torch.randn(c, c)}
    vectors = {name: torch.randn(c) for name in ("weight", "bias", "scores_bias", "values_bias")}
    vectors["scores_bias"] *= case.scale / c**0.5
    return {name: value.to(case.dtype).double() for name, value in {"x": x, **matrices, **vectors}.items()}


@pytest.mark.parametrize("backend", ["eager", "triton"], indirect=True)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_backends(case: Case, backend: str, device: torch.device) -> None:
    wide = {name: value.to(device) for name, value in make(case).items()}

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        own = {name: value.to(dtype) for name, value in wide.items()}
        y = torch.empty_like(own["x"])
        if not case.statistics:
            attention_block_(y, num_groups=case.groups, **own, backend=backend)
            return {"y": y}
        x, kind = own["x"], torch.promote_types(dtype, torch.float32)
        given, left = (x.new_empty(statistics_shape(x, unit), dtype=kind) for unit in (case.channels // case.groups, 4))
        statistics_by_torch(given, x)
        attention_block_(y, num_groups=case.groups, **own, given=given, statistics=left, backend=backend)
        again = torch.empty_like(left)
        statistics_by_torch(again, y)
        assert_close(left, again.double(), name="statistics")
        return {"y": y}

    # Eager rounds the norm, queries, sums and the result; a softmax of steep scores multiplies what precedes it.
    check_op(run, backend, case.dtype, rounds=100 if case.scale > 1 or case.deviation < 1 else 6)


def test_folds_the_projections() -> None:
    """Two matrices compute what queries, keys, values and the output projection do, biases included."""
    n, c, head, value = 2, 12, 8, 5
    x, weight, bias = torch.randn(n, c, 3, 4).double(), torch.randn(c).double(), torch.randn(c).double()
    qkv, qkv_bias = torch.randn(2 * head + value, c).double(), torch.randn(2 * head + value).double()
    out, out_bias = torch.randn(c, value).double(), torch.randn(c).double()
    h = torch.nn.functional.group_norm(x, 3, weight, bias).flatten(2).mT
    q, k, v = (h @ qkv.T + qkv_bias).split([head, head, value], dim=2)
    attended = torch.softmax(q @ k.mT * head**-0.5, dim=2) @ v
    expected = x + (attended @ out.T + out_bias).mT.view(x.shape)
    y = torch.empty_like(x)
    attention_block_(y, x, weight, bias, 3, *fold(qkv, qkv_bias, out, out_bias, head), backend="reference")
    assert_close(y, expected)


GOOD: dict[str, Any] = {
    "y": torch.empty(1, 8, 2, 2), "x": torch.ones(1, 8, 2, 2), "weight": torch.ones(8), "bias": torch.ones(8),
    "num_groups": 2, "scores": torch.ones(8, 8), "scores_bias": torch.ones(8), "values": torch.ones(8, 8),
    "values_bias": torch.ones(8), "backend": "eager",
}  # fmt: skip
BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    r"x has shape \(1, 8, 4\), must be \[N, C, H, W\]": (ValueError, {"x": torch.ones(1, 8, 4)}),
    r"y has shape \(2, 8, 2, 2\), must be x's": (ValueError, {"y": torch.ones(2, 8, 2, 2)}),
    r"values has shape \(8, 4\), must be \(8, 8\)": (ValueError, {"values": torch.ones(8, 4)}),
    r"weight has shape \(4,\), must be \[8\]": (ValueError, {"weight": torch.ones(4)}),
    "num_groups is 3, must divide the 8 channels": (ValueError, {"num_groups": 3}),
    "eps is 0, must be positive": (ValueError, {"eps": 0}),
    "y is x, must be other memory": (ValueError, {"y": GOOD["x"]}),
    "scores is torch.float64, must be of x's dtype": (TypeError, {"scores": torch.ones(8, 8).double()}),
    "y has strides .* must be channels-last on the triton": (ValueError, {"backend": "triton"}),
}


@pytest.mark.parametrize("message", BAD)
def test_refuses(message: str) -> None:
    error, changes = BAD[message]
    if changes.get("backend") == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    x = changes.get("x", GOOD["x"])
    y = GOOD["y"] if "y" in changes or x.shape == GOOD["x"].shape else torch.empty_like(x)
    check_refuses(attention_block_, error, message, **{**GOOD, "y": y, "x": x, **changes})
