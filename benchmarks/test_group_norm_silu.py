"""GroupNorm and RMSNorm with SiLU, forward and backward, on feature maps of the CIFAR-10 and the 256-pixel U-Net."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastddpm_kernels import _backend
from fastddpm_kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_,
    group_norm_silu_workspace,
    rms_norm_silu,
)
from fastddpm_kernels.testing import assert_close
from torch import Tensor

# (N, C, C2, side): of x, of the skip that is concatenated, and of the image.
SIZES = {
    "cuda": {
        "cifar 32x32 batch 1": (1, 128, 0, 32),
        "cifar 32x32": (256, 128, 0, 32),
        "cifar 32x32 concat": (256, 128, 128, 32),
        "cifar 8x8": (256, 256, 0, 8),
        "celeba 256x256 batch 1": (1, 128, 0, 256),
        "celeba 256x256": (16, 128, 0, 256),
        "celeba 64x64 concat": (16, 256, 256, 64),
    },
    "cpu": {"small": (2, 64, 0, 16), "small concat": (2, 64, 32, 16)},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


@pytest.fixture(params=_backend.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    # The interpreter's speed says nothing: on the CPU the kernels are not timed.
    if request.param == "triton" and (DEVICE == "cpu" or _backend.why_not("triton", DEVICE)):
        pytest.skip("triton is timed on a GPU only")
    return request.param


def example(size: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Arguments of a U-Net's layer, channels-last: those of both ops, and those of group_norm_silu alone."""
    n, c, c2, side = SIZES[DEVICE][size]

    def image(channels: int) -> Tensor:
        return torch.randn(n, side, side, channels, device=DEVICE, dtype=DTYPE).movedim(-1, 1)

    def vector(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=DTYPE)

    both = {"x": image(c), "weight": vector(c + c2)}
    if c2:
        both |= {"x2": image(c2), "scale": vector(n, c + c2), "shift": vector(n, c + c2)}
    return both, {"bias": vector(c + c2), "time_bias": vector(n, c + c2)}


def call(op: str, tensors: dict[str, Tensor], backend: str) -> Tensor:
    if op == "rms_norm":
        return rms_norm_silu(**tensors, backend=backend)
    return group_norm_silu(**tensors, num_groups=32, backend=backend)


@pytest.mark.parametrize("size", SIZES[DEVICE])
@pytest.mark.parametrize("op", ["group_norm", "rms_norm"])
def test_forward(op: str, size: str, backend: str, measure: Callable[..., Any]) -> None:
    both, group_norm_only = example(size)
    tensors = both if op == "rms_norm" else both | group_norm_only
    expected = call(op, {name: value.double() for name, value in tensors.items()}, "reference")
    assert_close(call(op, tensors, backend), expected, eager=call(op, tensors, "eager"), name=op)
    elements = expected.numel()
    del expected
    with torch.no_grad():
        measure(lambda: call(op, tensors, backend), bytes_moved=2 * elements * DTYPE.itemsize)


@pytest.mark.parametrize("size", SIZES[DEVICE])
def test_residual(size: str, backend: str, measure: Callable[..., Any]) -> None:
    """The sum that ends a residual block, with the norm that starts the next one, in place."""
    both, group_norm_only = example(size)
    tensors = both | group_norm_only
    x, residual = tensors["x"], torch.randn_like(tensors["x"])
    summed = tensors | {"x": x + residual}
    expected = call("group_norm", {name: value.double() for name, value in summed.items()}, "reference")
    y = expected.to(DTYPE).fill_(float("nan"))
    total = torch.empty_like(x)
    needed = group_norm_silu_workspace(x, y.shape[1], 32)
    workspace = torch.empty(needed, device=DEVICE)

    def step() -> None:
        group_norm_silu_(
            y, **tensors, num_groups=32, residual=residual, total=total, workspace=workspace, backend=backend
        )

    step()
    assert_close(y, expected, eager=call("group_norm", summed, "eager"), name="y")
    assert torch.equal(total, summed["x"])
    del expected, summed
    measure(step, bytes_moved=(2 * y.numel() + 2 * x.numel()) * DTYPE.itemsize)


@pytest.mark.parametrize("size", SIZES[DEVICE])
@pytest.mark.parametrize("op", ["group_norm", "rms_norm"])
def test_backward(op: str, size: str, backend: str, measure: Callable[..., Any]) -> None:
    both, group_norm_only = example(size)
    tensors = both if op == "rms_norm" else both | group_norm_only

    def gradients(backend: str, dtype: torch.dtype) -> tuple[Callable[[], tuple[Tensor, ...]], int]:
        leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in tensors.items()}
        y = call(op, leaves, backend)
        dy = torch.cos(torch.arange(y.numel(), device=DEVICE)).view(y.shape).to(DTYPE).to(dtype)
        dy = dy.movedim(1, -1).contiguous().movedim(-1, 1)
        return lambda: torch.autograd.grad(y, tuple(leaves.values()), dy, retain_graph=True), y.numel()

    backward, elements = gradients(backend, DTYPE)
    expected = gradients("reference", torch.float64)[0]()
    eager = gradients("eager", DTYPE)[0]()
    for name, *values in zip(tensors, backward(), expected, eager, strict=True):
        assert_close(values[0], values[1], eager=values[2], name=f"gradient of {name}")
    del expected, eager
    measure(backward, bytes_moved=3 * elements * DTYPE.itemsize)
