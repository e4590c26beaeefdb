"""GroupNorm and RMSNorm with SiLU, forward and backward, on feature maps of the CIFAR-10 and the 256-pixel U-Net.

Forward is the form in place that a sampling step runs, its sum with a residual included; backward is autograd's, of
the plain function. diffusers has none of its own, it is "eager"; denoising_diffusion_pytorch has RMSNorm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_,
    group_norm_silu_workspace,
    rms_norm_silu,
    rms_norm_silu_,
)
from fastddpm_kernels.testing import assert_close
from measuring import ARMS, Candidate, Session, Unavailable, compiled, fused_backend, image, peer
from torch import Tensor

GROUPS = 32
LUCIDRAINS = "denoising_diffusion_pytorch"


class Example(NamedTuple):
    norm: str  # "group" or "rms"
    dtype: torch.dtype
    batch: int
    channels: int
    more: int  # channels of a skip connection that is concatenated
    side: int
    residual: bool = False  # the sum that ends the block before


EXAMPLES = {
    "small": {
        "group fp32 4x128x32x32": Example("group", torch.float32, 4, 128, 0, 32),
        "group fp32 4x128+128x16x16 residual": Example("group", torch.float32, 4, 128, 128, 16, residual=True),
        "rms fp32 4x64x32x32": Example("rms", torch.float32, 4, 64, 0, 32),
    },
    "full": {
        "group fp16 1x128x32x32": Example("group", torch.float16, 1, 128, 0, 32),
        "group fp16 256x128x32x32": Example("group", torch.float16, 256, 128, 0, 32),
        "group fp16 256x128+128x32x32 residual": Example("group", torch.float16, 256, 128, 128, 32, residual=True),
        "group fp16 256x256x8x8": Example("group", torch.float16, 256, 256, 0, 8),
        "group fp16 1x128x256x256": Example("group", torch.float16, 1, 128, 0, 256),
        "group fp16 16x128x256x256": Example("group", torch.float16, 16, 128, 0, 256),
        "rms fp16 256x64x32x32": Example("rms", torch.float16, 256, 64, 0, 32),
    },
}
Tensors = dict[str, Tensor]


def tensors_of(of: Example, device: torch.device) -> Tensors:
    """Return the arguments of the plain function, channels-last, and `residual`."""
    total = of.channels + of.more

    def vector(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(of.dtype)

    tensors = {"x": image(device, of.dtype, of.batch, of.channels, of.side), "weight": vector(total)}
    if of.norm == "group":
        tensors |= {"bias": vector(total), "time_bias": vector(of.batch, total)}
    if of.more:
        tensors["x2"] = image(device, of.dtype, of.batch, of.more, of.side)
    if of.norm == "rms" or of.more:
        tensors |= {"scale": vector(of.batch, total), "shift": vector(of.batch, total)}
    if of.residual:
        tensors["residual"] = torch.randn_like(tensors["x"])
    return tensors


def plain(of: Example, tensors: Tensors, backend: str, dtype: torch.dtype | None = None) -> Tensor:
    """Compute the function in `dtype`; the sum with a residual is rounded as the op's is."""
    rest = dict(tensors)
    if of.residual:
        rest["x"] = rest["x"] + rest.pop("residual")
    rest = {name: value.to(dtype or value.dtype) for name, value in rest.items()}
    if of.norm == "rms":
        return rms_norm_silu(**rest, backend=backend)
    return group_norm_silu(**rest, num_groups=GROUPS, backend=backend)


def in_place(of: Example, backend: str, device: torch.device) -> Callable[[Tensors], Tensor]:
    """Return the op as a frozen network runs it: it writes into a given place, and returns that."""
    channels = of.channels + of.more
    y = image(device, of.dtype, of.batch, channels, of.side)
    total = image(device, of.dtype, of.batch, of.channels, of.side) if of.residual else None
    needed = group_norm_silu_workspace(image(device, of.dtype, of.batch, of.channels, of.side), channels, GROUPS)
    workspace = torch.empty(needed, device=device)

    def run(tensors: Tensors) -> Tensor:
        if of.norm == "rms":
            rms_norm_silu_(y, **tensors, backend=backend)
        else:
            group_norm_silu_(y, **tensors, num_groups=GROUPS, total=total, workspace=workspace, backend=backend)
        return y

    return run


def lucidrains(of: Example, device: torch.device) -> Callable[[Tensors], Tensor]:
    """Return RMSNorm, FiLM and SiLU as denoising_diffusion_pytorch's `Block` has them behind its convolution."""
    peer(LUCIDRAINS)
    if of.norm != "rms":
        raise Unavailable(f"{LUCIDRAINS} normalises by RMSNorm")
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import RMSNorm

    module = RMSNorm(of.channels).to(device)

    def run(tensors: Tensors) -> Tensor:
        module.g.data = tensors["weight"].view(1, -1, 1, 1)
        scale, shift = (tensors[name][:, :, None, None] for name in ("scale", "shift"))
        return F.silu(module(tensors["x"]) * (scale + 1) + shift)

    return run


@pytest.mark.parametrize("arm", [*ARMS, LUCIDRAINS])
def test_forward(example: Example, arm: str, session: Session, compare: Callable[..., None]) -> None:
    elements = example.batch * example.side**2
    # All channels read and written; the residual read and its sum written.
    size = elements * (2 * (example.channels + example.more) + 2 * example.channels * example.residual)
    size *= example.dtype.itemsize

    def build(arm: str) -> Candidate:
        run, settings = forward(session, arm, example)

        def call(tensors: Tensors) -> None:
            with torch.no_grad():
                run(tensors)

        def check() -> None:
            tensors = tensors_of(example, session.device)
            with torch.no_grad():
                expected = plain(example, tensors, "reference", torch.float64)
                assert_close(run(dict(tensors)), expected, eager=plain(example, tensors, "eager"))

        inputs = [tensors_of(example, session.device) for _ in range(session.sets(size))]
        calls = [partial(call, tensors) for tensors in inputs]
        return Candidate(calls, check, bytes=size, settings=settings, graph=True)

    compare(build)


def forward(session: Session, arm: str, of: Example) -> tuple[Callable[[Tensors], Tensor], dict[str, Any]]:
    """Return what an arm calls, and its settings."""
    if arm == "fused":
        backend = fused_backend("group_norm_silu_", session.device, of.dtype)
        return in_place(of, backend, session.device), {"backend": backend}
    if arm == LUCIDRAINS:
        return lucidrains(of, session.device), {"call": "RMSNorm, then Block's scale, shift and SiLU"}
    if arm == "reference":
        return lambda tensors: plain(of, tensors, "reference", torch.float64), {"dtype": "float64"}

    def eager(tensors: Tensors) -> Tensor:
        return plain(of, tensors, "eager")

    return (eager, {}) if arm == "eager" else compiled(session, eager)


@pytest.mark.parametrize("arm", ARMS)
def test_backward(example: Example, arm: str, session: Session, compare: Callable[..., None]) -> None:
    if example.residual:
        pytest.skip("a residual is summed by autograd, outside of the op")
    elements = example.batch * example.side**2 * (example.channels + example.more)

    def build(arm: str) -> Candidate:
        run, settings = differentiable(session, arm, example)
        dtype = torch.float64 if arm == "reference" else example.dtype

        def backward(tensors: Tensors, run: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], Any]:
            leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in tensors.items()}
            # Compiled, what is kept for the gradient may be overwritten by it; here it is wanted many times.
            with patch("torch._functorch.config.donated_buffer", False):
                y = run(leaves)
            dy = torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(example.dtype).to(dtype)
            dy = dy.movedim(1, -1).contiguous().movedim(-1, 1)
            return lambda: torch.autograd.grad(y, tuple(leaves.values()), dy, retain_graph=True)

        def check() -> None:
            tensors = tensors_of(example, session.device)
            reference, eager = (partial(plain, example, backend=name) for name in ("reference", "eager"))
            got = backward(tensors, run, dtype)()
            expected = backward(tensors, reference, torch.float64)()
            granted = backward(tensors, eager, example.dtype)()
            # Compiled, sums over all pixels are in one order where eager's are pairwise: that alone loses some bits.
            factor = 8.0 if arm == "compiled" else 2.0
            for name, *values in zip(tensors, got, expected, granted, strict=True):
                assert_close(values[0], values[1], eager=values[2], factor=factor, name=f"gradient of {name}")

        size = 3 * elements * example.dtype.itemsize  # x and the gradient read, its own gradient written
        sets = session.sets(size)
        inputs = [tensors_of(example, session.device) for _ in range(sets)]
        calls = [backward(tensors, run, dtype) for tensors in inputs]
        return Candidate(calls, check, bytes=size, settings=settings, graph=True)

    compare(build)


def differentiable(session: Session, arm: str, of: Example) -> tuple[Callable[[Tensors], Tensor], dict[str, Any]]:
    """Return what an arm differentiates, and its settings."""
    if arm == "fused":
        if session.device.type == "cpu":
            raise Unavailable("the native norms on the CPU are for sampling: they have no gradient")
        backend = fused_backend("group_norm_silu", session.device, of.dtype)
        return partial(plain, of, backend=backend), {"backend": backend}
    if arm == "reference":
        return partial(plain, of, backend="reference"), {"dtype": "float64"}
    eager = partial(plain, of, backend="eager")
    return (eager, {}) if arm == "eager" else compiled(session, eager)
