"""Noise alone: how fast normals are made and written down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastddpm_kernels._backend import why_not
from fastddpm_kernels.philox import STREAM_STEP, normal, sample_keys


@pytest.mark.parametrize("backend", ["triton", "eager", "reference"])
def test_normal(measure: Callable[..., Any], device: torch.device, backend: str) -> None:
    if device.type == "cpu" and backend == "triton":
        pytest.skip("triton kernels are timed on a GPU only")
    assert why_not(backend, device.type) is None
    batch, shape = (2048, (3, 64, 64)) if device.type == "cuda" else (16, (3, 32, 32))
    keys, step = sample_keys([0] * batch, range(batch), device), torch.tensor([7], device=device)
    expected = normal(keys[-2:], shape, step=step, stream=STREAM_STEP, backend="reference")
    z = normal(keys, shape, step=step, stream=STREAM_STEP, backend=backend)
    torch.testing.assert_close(z[-2:], expected, rtol=5e-7, atol=2e-15)  # 4 units in the last place
    measure(lambda: normal(keys, shape, step=step, stream=STREAM_STEP, backend=backend), bytes_moved=4 * z.numel())
