"""Self-attention over the pixels, with norm and residual, as the U-Nets of DDPM have it at 16x16 pixels.

Its kernel is torch's own in every arm; "fused" has the fused norm before it. A frozen U-Net goes further (one product
for query, key and value, the projection of the result folded into the value's): that is timed in `test_unet_step.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from fastddpm_kernels.testing import assert_close
from gpu.op_cases import image
from measuring import ARMS, Candidate, Session, compiled, fused_backend, peer
from torch import Tensor, nn

from fastddpm.layers import Attention


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
