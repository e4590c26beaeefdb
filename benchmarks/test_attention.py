"""Self-attention over the pixels, as the U-Nets of DDPM have it at 16x16 pixels: queries, keys and values side by side.

The layer around it, with its norm and products, is timed as a part of the networks in `test_unet_step.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from fastddpm_kernels.attention import attention_
from fastddpm_kernels.testing import assert_close
from measuring import PRECISIONS, Candidate, Session, fused_backend, image
from torch import Tensor


class Example(NamedTuple):
    dtype: torch.dtype
    batch: int
    heads: int
    head_dim: int
    side: int


EXAMPLES = {
    "small": {
        "fp32 2x256x16x16 one head": Example(torch.float32, 2, 1, 256, 16),
        "bf16 2x256x16x16 one head": Example(torch.bfloat16, 2, 1, 256, 16),
        "fp32 1x128x32x32 heads of 32": Example(torch.float32, 1, 4, 32, 32),
    },
    "full": {
        "fp16 1x256x16x16 one head": Example(torch.float16, 1, 1, 256, 16),
        "fp16 256x256x16x16 one head": Example(torch.float16, 256, 1, 256, 16),
        "fp16 256x256x16x16 heads of 64": Example(torch.float16, 256, 4, 64, 16),
        "fp16 32x512x32x32 one head": Example(torch.float16, 32, 1, 512, 32),
    },
}


@pytest.mark.parametrize("arm", ["fused", "eager", "reference"])
def test_attention(example: Example, arm: str, session: Session, compare: Callable[..., None]) -> None:
    device, (dtype, n, heads, d, side) = session.device, example
    pixels, channels = side**2, heads * d
    size = 4 * n * channels * pixels * dtype.itemsize  # queries, keys and values read once, the result written

    def build(arm: str) -> Candidate:
        backend = fused_backend("attention", device, dtype) if arm == "fused" else arm
        own = torch.float64 if arm == "reference" else dtype

        def call(qkv: Tensor, y: Tensor, backend: str = backend) -> Tensor:
            attention_(y, qkv, heads, d, backend=backend)
            return y

        def operands() -> tuple[Tensor, Tensor]:
            return image(device, own, n, 3 * channels, side), image(device, own, n, channels, side)

        def check() -> None:
            qkv, y = operands()
            exact = call(qkv.double(), y.double(), "reference")
            assert_close(call(qkv, y), exact, eager=call(qkv, torch.empty_like(y), "eager"))

        calls = [partial(call, *operands()) for _ in range(session.sets(size))]
        flops = 4 * n * heads * pixels**2 * d
        return Candidate(calls, check, 1, size, flops, PRECISIONS[dtype], {"backend": backend}, graph=True)

    compare(build)
