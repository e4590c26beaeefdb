"""The per-sample threshold of `reverse_step`: x0 = clip(x0, -threshold, threshold) / threshold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fastddpm_kernels.philox import sample_keys
from fastddpm_kernels.reverse_step import reverse_step, reverse_step_
from fastddpm_kernels.testing import SHAPES, assert_close, poisoned_memory
from torch import Tensor

TABLE = torch.tensor([[1.1, -0.4, 0.6, 0.3, 0.0, 0.0, 0.25], [1.2, -0.7, 0.8, 0.2, 0.15, -0.3, 0.5]])


def make(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments for a state of this shape, with thresholds that cut much, little and nothing."""
    return {
        "x": torch.randn(shape, device=device),
        "out": torch.randn(shape, device=device).to(dtype),
        "table": TABLE.to(device),
        "threshold": torch.tensor([1.0, 1.7, 100.0], device=device)[torch.arange(shape[0], device=device) % 3],
    }


def call(arguments: dict[str, Any], row: int, backend: str, **changes: Any) -> tuple[Tensor, Tensor]:
    merged = arguments | changes
    x, out, table = merged.pop("x"), merged.pop("out"), merged.pop("table")
    return reverse_step(x, out, table, torch.tensor([row], device=x.device), backend=backend, **merged)


def test_reference_is_the_formula() -> None:
    a = make((3, 2, 4, 5), torch.device("cpu"))
    a["x"] = a["x"].double()
    x_next, x0 = call(a, 0, "reference")
    A, B, C, D, *_ = TABLE[0].double().tolist()
    for i, bound in enumerate(a["threshold"].tolist()):
        x, out = a["x"][i], a["out"][i].double()
        expected = torch.minimum((A * x + B * out).abs(), torch.tensor(bound)).copysign(A * x + B * out) / bound
        torch.testing.assert_close(x0[i], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x_next[i], C * expected + D * x, rtol=1e-12, atol=1e-12)
    assert float(x0.abs().amax((1, 2, 3))[0]) == 1


@pytest.mark.parametrize("name", SHAPES)
def test_matches_reference(backend: str, device: torch.device, name: str) -> None:
    a = make(SHAPES[name][0], device, torch.float16)
    with poisoned_memory():
        got = call(a, 0, backend)
    truth, eager = call(a, 0, "reference", x=a["x"].double()), call(a, 0, "eager")
    for what, actual, expected, torchs in zip(("x_next", "x0"), got, truth, eager, strict=True):
        assert_close(actual, expected, eager=torchs, name=what)


def test_in_place_with_everything(backend: str, device: torch.device) -> None:
    """With guidance, multistep, noise and a known region: x, x0 and net_in are those of the functional form."""
    a = make((2, 3, 6, 5), device)
    a["out"] = torch.randn(4, 3, 6, 5, device=device)
    options = {
        "threshold": a["threshold"],
        "keys": sample_keys([1, 2], [0, 0], device),
        "guidance_scale": torch.tensor([3.0], device=device),
        "known": torch.rand(3, 6, 5, device=device),
        "known_mask": torch.rand(6, 5, device=device).round(),
        "known_table": torch.tensor([[0.7, 0.7], [0.9, 0.3]], device=device),
    }
    x0_prev = torch.randn_like(a["x"])
    expected = call(a | options, 1, "reference", x=a["x"].double(), x0_prev=x0_prev.double())
    eager = call(a | options, 1, "eager", x0_prev=x0_prev)
    x, x0, net_in = a["x"].clone(), x0_prev.clone(), torch.full_like(a["out"], math.nan)
    step = torch.tensor([1], device=device)
    reverse_step_(x, a["out"], a["table"], step, x0=x0, net_in=net_in, multistep=True, backend=backend, **options)
    assert_close(x, expected[0], eager=eager[0], name="x")
    assert_close(x0, expected[1], eager=eager[1], name="x0")
    assert torch.equal(net_in, torch.cat([x, x]))


def test_gradients(backend: str, device: torch.device) -> None:
    a = make((3, 2, 3, 5), device)
    g = torch.randn(2, 3, 2, 3, 5, device=device)

    def gradients(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = {name: a[name].to(dtype).requires_grad_() for name in ("x", "out")}
        return torch.autograd.grad(call(a, 0, backend, **inputs), list(inputs.values()), tuple(g.to(dtype)))

    truth, eager = gradients("reference", torch.float64), gradients("eager", torch.float32)
    for name, got, expected, torchs in zip(["x", "out"], gradients(backend, torch.float32), truth, eager, strict=True):
        assert_close(got, expected, eager=torchs, name=f"gradient of {name}")


def test_nan_of_the_network_is_not_hidden(backend: str, device: torch.device) -> None:
    a = make((1, 2, 4, 4), device)
    a["out"][0, 1, 2, 3] = math.nan
    for result in call(a, 0, backend):
        assert int(result.isnan().sum()) == 1


def test_compiles(backend: str, device: torch.device) -> None:
    a = make((2, 3, 4, 5), device)

    def functional(x: Tensor) -> Tensor:
        return call(a, 0, backend, x=x * 1.5)[0]

    compiled = torch.compile(functional, fullgraph=True, backend="aot_eager")
    assert_close(compiled(a["x"]), functional(a["x"]).double())


def test_custom_op(device: torch.device) -> None:
    pytest.importorskip("triton")
    a = make((2, 3, 4), device)
    x, out = a["x"].requires_grad_(), a["out"].requires_grad_()
    step = torch.tensor([0], device=device)
    arguments = (x, out, a["table"], step, *[None] * 10, a["threshold"])
    torch.library.opcheck(torch.ops.fastddpm.reverse_step.default, arguments)


def test_bad_input() -> None:
    a = make((2, 3, 4), torch.device("cpu"))
    for error, match, changes in (
        (ValueError, "both clip_range and threshold given", {"clip_range": 1.0}),
        (TypeError, "threshold is torch.float64", {"threshold": a["threshold"].double()}),
        (ValueError, r"threshold has shape \[1\], must be \[2\]", {"threshold": a["threshold"][:1]}),
        (ValueError, "threshold is on meta", {"threshold": a["threshold"].to("meta")}),
    ):
        with pytest.raises(error, match=match):
            call(a, 0, "auto", **changes)
