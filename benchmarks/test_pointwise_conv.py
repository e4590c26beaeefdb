"""1x1 convolutions and projections of the CIFAR-10 and the 256-pixel U-Net."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fastddpm_kernels import _backend
from fastddpm_kernels.pointwise_conv import pointwise_conv_
from fastddpm_kernels.testing import assert_close
from torch import Tensor

# (N, C, C2, O, side): channels of x, of the skip that is concatenated, and of the result; shortcuts, q/k/v, output.
SIZES = {
    "cuda": {
        "cifar 32x32 shortcut": (256, 128, 128, 128, 32),
        "cifar 32x32 shortcut batch 1": (1, 128, 128, 128, 32),
        "cifar 16x16 shortcut": (256, 256, 256, 256, 16),
        "cifar 16x16 shortcut batch 1": (1, 256, 256, 256, 16),
        "cifar 16x16 qkv": (256, 256, 0, 768, 16),
        "cifar 16x16 out": (256, 256, 0, 256, 16),
        "cifar 4x4 shortcut batch 1": (1, 256, 256, 256, 4),
        "celeba 256x256 shortcut": (16, 128, 128, 128, 256),
        "celeba 16x16 qkv batch 1": (1, 512, 0, 1536, 16),
    },
    "cpu": {"small": (2, 64, 0, 64, 16), "small concat": (2, 64, 32, 48, 16)},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float16, float32, and float32 with TensorFloat-32 allowed, which is a matter of GPUs.
KINDS = {"fp16": (torch.float16, False), "fp32": (torch.float32, False), "tf32": (torch.float32, True)}


@pytest.fixture(params=_backend.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    # The interpreter's speed says nothing: on the CPU the kernels are not timed.
    if request.param == "triton" and (DEVICE == "cpu" or _backend.why_not("triton", DEVICE)):
        pytest.skip("triton is timed on a GPU only")
    return request.param


@pytest.fixture
def torch_tf32(kind: str) -> Iterator[None]:
    """Eager takes its permission from torch's own setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("torch_tf32")
@pytest.mark.parametrize("size", SIZES[DEVICE])
@pytest.mark.parametrize("kind", KINDS if DEVICE == "cuda" else ["fp32"])
def test_pointwise_conv(kind: str, size: str, backend: str, measure: Callable[..., Any]) -> None:
    n, c, c2, o, side = SIZES[DEVICE][size]
    dtype, allow_tf32 = KINDS[kind]

    def image(channels: int) -> Tensor:
        return torch.randn(n, side, side, channels, device=DEVICE, dtype=dtype).movedim(-1, 1)

    def matrix(channels: int) -> Tensor:
        return torch.randn(o, channels, device=DEVICE, dtype=dtype) / (c + c2) ** 0.5

    tensors = {"x": image(c), "weight": matrix(c), "bias": torch.randn(o, device=DEVICE, dtype=dtype)}
    # A shortcut reads a concatenation; a projection of attention has a residual.
    tensors |= {"x2": image(c2), "weight2": matrix(c2)} if c2 else {"residual": image(o)}
    y, eager = image(o), image(o)
    expected = torch.empty_like(y, dtype=torch.float64)
    pointwise_conv_(expected, **{name: value.double() for name, value in tensors.items()}, backend="reference")
    pointwise_conv_(eager, **tensors, backend="eager")
    pointwise_conv_(y, **tensors, allow_tf32=allow_tf32, backend=backend)
    assert_close(y, expected, eager=eager)
    del expected, eager
    elements = y.numel() + sum(value.numel() for value in tensors.values())
    measure(
        lambda: pointwise_conv_(y, **tensors, allow_tf32=allow_tf32, backend=backend),
        bytes_moved=elements * dtype.itemsize,
    )
