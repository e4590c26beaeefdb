"""The noising step of training, noise included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastddpm_kernels._backend import why_not
from fastddpm_kernels.philox import sample_keys
from fastddpm_kernels.q_sample import q_sample
from fastddpm_kernels.testing import assert_close


@pytest.mark.parametrize("backend", ["triton", "eager", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("noise", ["made", "given"])
def test_q_sample(
    measure: Callable[..., Any],
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    prediction_type: str,
    noise: str,
) -> None:
    if device.type == "cpu" and backend == "triton":
        pytest.skip("triton kernels are timed on a GPU only")
    assert why_not(backend, device.type) is None
    batch, shape = (2048, (3, 64, 64)) if device.type == "cuda" else (16, (3, 32, 32))
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    table = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], 1).float().to(device)
    x0 = (torch.rand(batch, *shape, device=device) * 2 - 1).to(dtype)
    t = torch.randint(0, 1000, (batch,), device=device)
    given = torch.randn_like(x0) if noise == "given" else None
    keys = sample_keys([0] * batch, range(batch), device) if noise == "made" else None
    step = torch.tensor([7], device=device) if noise == "made" else None

    def run(backend: str, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"noise": None if given is None else given[rows], "keys": None if keys is None else keys[rows]}
        return q_sample(
            x0[rows], table, t[rows], **options, step=step, prediction_type=prediction_type, backend=backend
        )

    some = slice(batch - 2, batch)
    for name, actual, expected in zip(("x_t", "target"), run(backend), run("reference", some), strict=True):
        assert_close(actual[some], expected, name=name)
    # x0 and the noise given are read; x_t, and the target unless it is that noise, are written.
    tensors = 2 + (noise == "given") + (noise == "made" or prediction_type == "v_prediction")
    measure(lambda: run(backend), bytes_moved=tensors * x0.numel() * x0.element_size())
