"""The residual sum, plain and into a padded image, on feature maps of the CIFAR-10 and the 256-pixel U-Net."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastddpm_kernels import _backend
from fastddpm_kernels.residual_add import residual_add_
from fastddpm_kernels.testing import assert_close
from torch import Tensor

# (N, C, side)
SIZES = {
    "cuda": {
        "cifar 32x32 batch 1": (1, 128, 32),
        "cifar 32x32": (256, 128, 32),
        "celeba 256x256": (16, 128, 256),
    },
    "cpu": {"small": (2, 64, 16)},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


@pytest.fixture(params=_backend.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    # The interpreter's speed says nothing: on the CPU the kernels are not timed.
    if request.param == "triton" and (DEVICE == "cpu" or _backend.why_not("triton", DEVICE)):
        pytest.skip("triton is timed on a GPU only")
    return request.param


def image(n: int, c: int, side: int) -> Tensor:
    return torch.randn(n, side, side, c, device=DEVICE, dtype=DTYPE).movedim(-1, 1)


@pytest.mark.parametrize("padding", [0, 1], ids=["plain", "padded"])
@pytest.mark.parametrize("size", SIZES[DEVICE])
def test_residual_add(size: str, padding: int, backend: str, measure: Callable[..., Any]) -> None:
    n, c, side = SIZES[DEVICE][size]
    y, x, residual = image(n, c, side + padding), image(n, c, side), image(n, c, side)
    bias, total = torch.randn(c, device=DEVICE, dtype=DTYPE), torch.empty_like(x) if padding else None
    expected = x.double() + residual.double() + bias.double()[:, None, None]
    residual_add_(y, x, residual=residual, bias=bias, total=total, backend="eager")
    eager = y.clone()
    residual_add_(y, x, residual=residual, bias=bias, total=total, backend=backend)
    assert_close(y[..., :side, :side], expected, eager=eager[..., :side, :side])
    del expected, eager
    moved = (4 if padding else 3) * x.numel() * DTYPE.itemsize
    measure(lambda: residual_add_(y, x, residual=residual, bias=bias, total=total, backend=backend), bytes_moved=moved)
