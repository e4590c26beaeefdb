"""The update of a sampling loop: in place, with the network's next input written along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastddpm_kernels._backend import why_not
from fastddpm_kernels.philox import sample_keys
from fastddpm_kernels.reverse_step import reverse_step, reverse_step_
from fastddpm_kernels.testing import assert_close

# Rows [A B C D E F S]: mid-way in 1000 steps of the ancestral sampler, and in 50 of DDIM with eta = 0.
ANCESTRAL = [3.573, -3.430, 0.0206, 0.9882, 0.0, 0.0, 0.0990]
DDIM = [3.573, -3.430, 0.3363, 0.0, 0.9418, 0.0, 0.0]


@pytest.mark.parametrize("backend", ["triton", "eager", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "guided"])
def test_reverse_step(
    measure: Callable[..., Any], device: torch.device, backend: str, dtype: torch.dtype, layout: str, sampler: str
) -> None:
    if device.type == "cpu" and backend == "triton":
        pytest.skip("triton kernels are timed on a GPU only")
    assert why_not(backend, device.type) is None
    batch, shape = (2048, (3, 64, 64)) if device.type == "cuda" else (16, (3, 32, 32))
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    guided = sampler == "guided"
    x = torch.randn(batch, *shape, device=device)
    out = torch.randn(batch * (1 + guided), *shape, device=device).to(dtype).contiguous(memory_format=memory_format)
    net_in = torch.empty_like(out)
    table = torch.tensor([DDIM if sampler == "ddim" else ANCESTRAL], device=device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    keys = sample_keys([0] * batch, range(batch), device)
    options: dict[str, Any] = {
        "keys": keys,
        "clip_range": 1.0,
        "guidance_scale": torch.tensor([3.0], device=device) if guided else None,
    }

    def run(backend: str, x: torch.Tensor) -> None:
        reverse_step_(x, out, table, step, net_in=net_in, **options, backend=backend)

    got = x.clone()
    run(backend, got)
    results = (reverse_step(x, out, table, step, **options, backend=name)[0] for name in ("reference", "eager"))
    expected, eager = results
    assert_close(got, expected, eager=eager, name="x")
    assert torch.equal(net_in[:batch], got.to(dtype))
    # x is read and written, out read, net_in written.
    bytes_moved = 2 * x.numel() * x.element_size() + (out.numel() + net_in.numel()) * out.element_size()
    measure(lambda: run(backend, x), bytes_moved=bytes_moved)
