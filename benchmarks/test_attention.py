"""Self-attention over the pixels, as the U-Nets of DDPM have it at 16x16 pixels: the op, and the layer around it.

`test_attention` has the layer, with norm and residual. Its kernel is torch's own in every arm; "fused" has the fused
norm before it. A frozen U-Net goes further (one product for query, key and value, the projection of the result folded
into the value's): that is timed in `test_unet_step.py`. What it runs on the CPU is in `test_attention_op`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from fastddpm_kernels import backend as _backend
from fastddpm_kernels.attention import attention_
from fastddpm_kernels.testing import assert_close
from gpu.arms import Unavailable
from gpu.op_cases import image
from measuring import ARMS, Candidate, Session, compiled, fused_backend, peer
from torch import Tensor, nn

from fastddpm.networks.unet.layers import Attention


class Example(NamedTuple):
    dtype: torch.dtype
    batch: int
    channels: int
    side: int
    head_dim: int | None = None  # None: one head


EXAMPLES = {
    "small": {
        "fp32 2x256x16x16 one head": Example(torch.float32, 2, 256, 16),
        "fp32 1x128x32x32 heads of 32": Example(torch.float32, 1, 128, 32, 32),
    },
    "full": {
        "fp16 1x256x16x16 one head": Example(torch.float16, 1, 256, 16),
        "fp16 256x256x16x16 one head": Example(torch.float16, 256, 256, 16),
        "fp16 256x256x16x16 heads of 64": Example(torch.float16, 256, 256, 16, 64),
        "fp16 32x512x32x32 one head": Example(torch.float16, 32, 512, 32),
    },
}


def layer_of(of: Example, device: torch.device) -> Attention:
    """Ours, with random weights in float32."""
    layer = Attention(of.channels, head_dim=of.head_dim, groups=32, eps=1e-5)
    assert layer.group_norm is not None
    nn.init.normal_(layer.group_norm.weight, 1.0, 0.1)
    nn.init.normal_(layer.group_norm.bias, 0.0, 0.1)
    layer.backend = "eager"
    return layer.to(device).eval().requires_grad_(False)


def diffusers_layer(of: Example, layer: Attention) -> Any:
    """diffusers' with the same weights and its best processor: projections fused, torch's attention.

    Raises:
        Missing: diffusers is not installed.
    """
    peer("diffusers")
    from diffusers.models.attention_processor import Attention as Theirs
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    theirs = Theirs(
        of.channels, heads=layer.heads, dim_head=layer.head_dim, eps=1e-5, norm_num_groups=32,
        residual_connection=True, bias=True, upcast_softmax=True, _from_deprecated_attn_block=True,
    )  # fmt: skip
    theirs.load_state_dict(layer.state_dict(), strict=False)
    theirs.fuse_projections(fuse=True)
    theirs.set_processor(FusedAttnProcessor2_0())
    return theirs.eval().requires_grad_(False)


def attending(session: Session, arm: str, of: Example, layer: Attention) -> tuple[Callable[..., Tensor], dict]:
    """What an arm calls, and its settings; `layer` is in float32."""
    if arm == "reference":
        exact = deepcopy(layer).double()
        exact.backend = "reference"
        return lambda x: exact(x.double()), {"dtype": "float64"}
    if arm == "diffusers":
        theirs = diffusers_layer(of, layer).to(session.device, of.dtype)
        return theirs, {"processor": "FusedAttnProcessor2_0", "projections": "fused"}
    own = deepcopy(layer).to(of.dtype)
    if arm == "fused":
        own.backend = fused_backend("group_norm_silu", session.device, of.dtype)
        return own, {"backend": own.backend}
    return (own, {}) if arm == "eager" else compiled(session, own)


@pytest.mark.parametrize("arm", [*ARMS, "diffusers"])
def test_attention(example: Example, arm: str, session: Session, compare: Callable[..., None]) -> None:
    n, c, pixels = example.batch, example.channels, example.side**2
    layer = layer_of(example, session.device)
    inner = layer.heads * layer.head_dim
    # The image read twice (norm, residual) and written once, and the weights; q, k and v never leave the chip at best.
    size = (3 * n * c * pixels + 4 * c * inner) * example.dtype.itemsize
    flops = 2 * n * pixels * (4 * c * inner + 2 * pixels * inner)

    def inputs() -> Tensor:
        return image(session.device, example.dtype, n, c, example.side)

    def build(arm: str) -> Candidate:
        run, settings = attending(session, arm, example, layer)

        def call(x: Tensor) -> Tensor:
            with torch.no_grad():
                return run(x)

        def check() -> None:
            x = inputs()
            expected = attending(session, "reference", example, layer)[0](x)
            assert_close(call(x), expected, eager=attending(session, "eager", example, layer)[0](x))

        calls = [partial(call, inputs()) for _ in range(session.sets(size))]
        precision = {torch.float16: "fp16", torch.float32: "fp32"}[example.dtype]
        return Candidate(calls, check, 1, size, flops, precision, settings, graph=True)

    compare(build)


class Operands(NamedTuple):
    """Of the op: one head, whose queries, keys and values are as wide."""

    dtype: torch.dtype
    batch: int
    head_dim: int
    side: int


OPERANDS = {
    "fp32 2x256x16x16 one head": Operands(torch.float32, 2, 256, 16),
    "bf16 2x256x16x16 one head": Operands(torch.bfloat16, 2, 256, 16),
}


@pytest.mark.parametrize("arm", ["fused", "eager", "reference"])
@pytest.mark.parametrize("of", OPERANDS.values(), ids=OPERANDS)
def test_attention_op(of: Operands, arm: str, session: Session, compare: Callable[..., None]) -> None:
    n, d, pixels, cpu = of.batch, of.head_dim, of.side**2, torch.device("cpu")
    size = 4 * n * d * pixels * of.dtype.itemsize  # queries, keys and values read once, the result written

    def build(arm: str) -> Candidate:
        backend = _backend.resolve("attention", "auto", "cpu", of.dtype) if arm == "fused" else arm
        if (arm, backend) == ("fused", "eager"):
            reason = _backend.why_not("native", "cpu", "attention", of.dtype) or "torch's own is faster"
            raise Unavailable(f"no fused attention here: {reason}")

        def call(qkv: Tensor, y: Tensor, backend: str = backend) -> Tensor:
            attention_(y, qkv, 1, d, backend=backend)
            return y

        def operands() -> tuple[Tensor, Tensor]:
            return image(cpu, of.dtype, n, 3 * d, of.side), image(cpu, of.dtype, n, d, of.side)

        def check() -> None:
            qkv, y = operands()
            exact = call(qkv.double(), y.double(), "reference")
            assert_close(call(qkv, y), exact, eager=call(qkv, torch.empty_like(y), "eager"))

        calls = [partial(call, *operands()) for _ in range(session.sets(size))]
        flops, precision = 4 * n * pixels**2 * d, {torch.float32: "fp32", torch.bfloat16: "bf16"}[of.dtype]
        return Candidate(calls, check, 1, size, flops, precision, {"backend": backend}, device=cpu)

    compare(build)
