"""The noising step: every backend against float64, any layout, gradients, and noise that depends on the key alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastddpm_kernels.philox import STREAM_Q_SAMPLE, normal, sample_keys
from fastddpm_kernels.q_sample import PREDICTION_TYPES, q_sample
from fastddpm_kernels.testing import (
    SHAPES,
    assert_close,
    check_compiles,
    check_op,
    check_refuses,
    gradients,
    to_layout,
)
from torch import Tensor

ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
HALF, BFLOAT = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    why: str
    shape: tuple[int, ...] = (3, 3, 13, 17)
    prediction_type: str = "epsilon"
    given: bool = False  # the noise is given, not made from keys
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    noise_layout: str = "contiguous"


CASES = {
    "epsilon_made": Case("the target is written beside x_t, from the same registers"),
    "epsilon_given": Case("the target is the given tensor itself", given=True),
    "sample_made": Case("the target is x0 itself, and only x_t is written", prediction_type="sample"),
    "sample_given": Case("noise is read, nothing but x_t written", prediction_type="sample", given=True, dtype=HALF),
    "v_made": Case("both results need both inputs", prediction_type="v_prediction"),
    "v_given": Case("both gradients mix both results", prediction_type="v_prediction", given=True),
    "half": Case("one rounding at the end, not one per operation", prediction_type="v_prediction", dtype=HALF),
    "half_given": Case("as half, with noise that is rounded itself", given=True, dtype=HALF),
    "bfloat16": Case("the dtype of fewest bits", prediction_type="v_prediction", dtype=BFLOAT),
    "bfloat16_given": Case("as bfloat16, with noise that is rounded itself", given=True, dtype=BFLOAT),
    "one_value": Case("no dimension but the batch", (2,)),
    "vector": Case("fewer values than a vector of a thread", (3, 2), "v_prediction"),
    "signal": Case("an odd number of values in a sample", (2, 4, 19), "v_prediction"),
    "volume": Case("a rank that has its own memory format", (2, 3, 2, 5, 4), layout="channels_last", given=True),
    "six_dimensions": Case("more dimensions than torch has memory formats for", (2, 3, 2, 2, 2, 3), "v_prediction"),
    "one_pixel": Case("contiguous and channels-last at once", SHAPES["one_pixel"][0], layout="channels_last"),
    "one_channel": Case("as one_pixel, the other way round", SHAPES["one_channel"][0], layout="channels_last"),
    "wide": Case("made noise is numbered as if contiguous", SHAPES["wide"][0], layout="channels_last"),
    "many_pixels": Case("several programs a sample", SHAPES["many_pixels"][0], layout="channels_last"),
    "empty_batch": Case("nothing to do", SHAPES["empty_batch"][0], "v_prediction"),
    "every_second": Case("no dense input: results are contiguous", layout="neither", given=True),
    "noise_in_another_format": Case(
        "noise is read in its own strides", prediction_type="v_prediction", given=True, noise_layout="channels_last"
    ),
}


def make_table(device: torch.device) -> Tensor:
    return torch.stack([ALPHA_BAR.sqrt(), (1 - ALPHA_BAR).sqrt()], 1).float().to(device)


def levels(batch: int, device: torch.device) -> Tensor:
    return torch.tensor([0, 999, 321, 500], device=device)[torch.arange(batch) % 4]


def make_keys(batch: int, device: torch.device) -> Tensor:
    return sample_keys([7] * batch, range(batch), device)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_results_and_gradients(case: Case, backend: str, device: torch.device) -> None:
    batch, table = case.shape[0], make_table(device)
    wide = {"x0": torch.randn(case.shape, device=device).to(case.dtype).double()}
    if case.given:
        wide["noise"] = torch.randn(case.shape, device=device).to(case.dtype).double()

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: value.to(dtype, copy=True).requires_grad_() for name, value in wide.items()}
        x0 = to_layout(leaves["x0"], case.layout)
        source = {"keys": make_keys(batch, device)}
        if case.given:
            source = {"noise": to_layout(leaves["noise"], case.noise_layout)}
        x_t, target = q_sample(
            x0, table, levels(batch, device), **source, prediction_type=case.prediction_type, backend=backend
        )
        assert x_t.dtype == target.dtype == dtype
        assert x_t.is_contiguous() if x0.is_contiguous() or case.layout == "neither" else x_t.stride() == x0.stride()
        if case.prediction_type == "sample":
            assert target is x0
        elif case.prediction_type == "epsilon" and case.given and x_t.stride() == source["noise"].stride():
            assert target is source["noise"]
        else:
            assert target.stride() == x_t.stride()
        results = {"x_t": x_t, "target": target}
        return results | gradients(results, leaves)

    check_op(run, backend, case.dtype)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_reference_is_the_formula(prediction_type: str) -> None:
    x0, noise = torch.randn(2, 3, 3, 4, 5, dtype=torch.float64)
    t, table = torch.tensor([3, 5, 999]), make_table(torch.device("cpu"))
    x_t, target = q_sample(x0, table, t, noise=noise, prediction_type=prediction_type, backend="reference")
    for n in range(3):
        signal, sigma = table[t[n]].double().tolist()
        expected = {"epsilon": noise[n], "sample": x0[n], "v_prediction": signal * noise[n] - sigma * x0[n]}
        torch.testing.assert_close(x_t[n], signal * x0[n] + sigma * noise[n], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(target[n], expected[prediction_type], rtol=1e-14, atol=1e-14)


def test_strides_change_no_bit(backend: str, device: torch.device) -> None:
    t, table, big = levels(3, device), make_table(device), torch.randn(3, 8, 12, 14, device=device)
    noise = torch.randn(3, 6, 12, 7, device=device)
    for x0 in (big[:, :6, :, :7], big.transpose(2, 3)[:, 1:7, ::2, :12].transpose(2, 3)):
        x_t, _ = q_sample(x0, table, t, noise=to_layout(noise, "channels_last"), backend=backend)
        assert x_t.is_contiguous()
        assert torch.equal(x_t, q_sample(x0.contiguous(), table, t, noise=noise, backend=backend)[0])


def test_noise_may_be_wider_than_images(backend: str, device: torch.device) -> None:
    x0, noise = torch.randn(2, 2, 3, 4, 4, device=device)
    given = (make_table(device), levels(2, device))
    x_t, target = q_sample(x0.half(), *given, noise=noise, backend=backend)
    expected, _ = q_sample(x0.half().double(), *given, noise=noise.double(), backend="reference")
    assert_close(x_t, expected)
    assert torch.equal(target, noise.half())


def test_noise_depends_on_the_key_alone(backend: str, device: torch.device) -> None:
    x0, t, keys = torch.randn(4, 3, 9, 7, device=device), levels(4, device), make_keys(4, device)
    step, table = torch.tensor([123], device=device), make_table(device)

    def run(x0: Tensor, rows: slice) -> Tensor:
        return q_sample(x0[rows], table, t[rows], keys=keys[rows], step=step, backend=backend)[1]

    whole = run(x0, slice(None))
    assert torch.equal(whole, torch.cat([run(x0, slice(0, 1)), run(x0, slice(1, 4))]))
    assert torch.equal(whole, run(to_layout(x0, "channels_last"), slice(None)))
    assert torch.equal(whole, normal(keys, (3, 9, 7), step=123, stream=STREAM_Q_SAMPLE, backend=backend))
    assert not torch.equal(whole, q_sample(x0, table, t, keys=keys, backend=backend)[1])


def test_one_step_chain(device: torch.device, backend: str) -> None:
    """T steps of q(x_t | x_{t-1}), one after the other, have the mean and variance of q(x_T | x_0)."""
    betas = torch.linspace(0.05, 0.3, 8)
    chain = torch.stack([(1 - betas).sqrt(), betas.sqrt()], 1).to(device)
    x = torch.full((1, 2000), 0.5, device=device)
    for i in range(8):
        step = torch.tensor([i], device=device)
        x, _ = q_sample(x, chain, step, keys=make_keys(1, device), step=step, backend=backend)
    left = float((1 - betas).prod())
    assert abs(float(x.mean()) - 0.5 * left**0.5) < 5 / 2000**0.5
    assert abs(float(x.var()) - (1 - left)) < 5 * (2 / 2000) ** 0.5


@pytest.mark.parametrize("prediction_type", ["v_prediction"])
def test_compiles(backend: str, device: torch.device, prediction_type: str) -> None:
    table, t, keys = make_table(device), levels(2, device), make_keys(2, device)

    def run(x0: Tensor) -> tuple[Tensor, Tensor]:
        x_t, target = q_sample(x0 * 2, table, t, keys=keys, prediction_type=prediction_type, backend=backend)
        return x_t.square(), target.square() + x_t

    check_compiles(run, to_layout(torch.randn(2, 3, 5, 4, device=device), "channels_last").requires_grad_())


@pytest.mark.parametrize(("source", "prediction_type"), [("keys", "epsilon"), ("noise", "v_prediction")])
def test_custom_op(on_triton: torch.device, source: str, prediction_type: str) -> None:
    x0 = to_layout(torch.randn(2, 3, 5, 4, device=on_triton), "channels_last").requires_grad_()
    noise = torch.randn_like(x0).requires_grad_() if source == "noise" else None
    keys, step = (make_keys(2, on_triton), torch.tensor([3], device=on_triton)) if noise is None else (None, None)
    arguments = (x0, make_table(on_triton), levels(2, on_triton), noise, keys, step, prediction_type)
    torch.library.opcheck(torch.ops.fastddpm.q_sample.default, arguments)


X, KEYS = torch.zeros(2, 3), sample_keys([0, 0], [0, 1])
TABLE, T = torch.ones(5, 2), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "x0 .*int64", {"x0": X.long()}),
        (ValueError, "x0 .*dimensions", {"x0": X[0, 0]}),
        (TypeError, "table .*float64", {"table": TABLE.double()}),
        (ValueError, r"table .*\[5, 3\]", {"table": torch.ones(5, 3)}),
        (ValueError, "table .*meta", {"table": TABLE.to("meta")}),
        (TypeError, "t .*int32", {"t": T.int()}),
        (ValueError, r"t .*\[1\]", {"t": T[:1]}),
        (ValueError, "t .*meta", {"t": T.to("meta")}),
        (ValueError, r"t .*\[0, 5\]", {"t": torch.tensor([0, 5])}),
        (ValueError, r"t .*\[-1, 0\]", {"t": torch.tensor([-1, 0])}),
        (ValueError, r"noise .*\[3\]", {"noise": X[0]}),
        (TypeError, "noise .*int64", {"noise": X.long()}),
        (ValueError, "neither .*noise .*keys", {"noise": None}),
        (ValueError, "both .*noise .*keys", {"keys": KEYS}),
        (ValueError, r"keys .*\[1, 2\]", {"noise": None, "keys": KEYS[:1]}),
        (TypeError, "step .*int", {"noise": None, "keys": KEYS, "step": 3}),
        (ValueError, "prediction_type .*eps", {"prediction_type": "eps"}),
        (ValueError, "backend .*fast", {"backend": "fast"}),
    ],
)
def test_bad_input(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    check_refuses(q_sample, error, message, **{"x0": X, "table": TABLE, "t": T, "noise": X, **changed})


def test_bad_input_of_triton(on_triton: torch.device) -> None:
    x0, table, t = (value.to(on_triton) for value in (X, TABLE, T))
    given: dict[str, Any] = {"x0": x0, "table": table, "t": t, "noise": x0, "backend": "triton"}
    check_refuses(q_sample, TypeError, "x0 .*float64", **{**given, "x0": x0.double()})
    check_refuses(q_sample, ValueError, "table .*gradient", **{**given, "table": table.clone().requires_grad_()})


def test_level_out_of_range_is_nan(on_triton: torch.device) -> None:
    """Where values are not checked, nothing that lies beyond the table is passed off as a result."""
    x0, table = torch.zeros(3, 3, device=on_triton), TABLE.to(on_triton)
    t = torch.tensor([-1, 0, 5], device=on_triton)
    x_t, _ = torch.ops.fastddpm.q_sample(x0, table, t, x0, None, None, "epsilon")
    assert x_t.isnan().any(1).tolist() == [True, False, True]
