"""What follows the convolutions of a diffusion policy's network: group norm, Mish, FiLM and residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.group_norm_mish import group_norm_mish_
from measuring import ARMS, Session, op_candidate
from torch import Tensor


class Example(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, int, int]  # (N, C, L), in 8 groups


EXAMPLES = {
    "small": {
        "fp32 1x512x16": Example(torch.float32, (1, 512, 16)),
        "bf16 1x2048x4": Example(torch.bfloat16, (1, 2048, 4)),
    },
    "full": {
        "fp16 1x2048x4": Example(torch.float16, (1, 2048, 4)),
        "fp16 64x1024x32": Example(torch.float16, (64, 1024, 32)),
    },
}


@pytest.mark.parametrize("arm", ARMS)
def test_group_norm_mish(example: Example, arm: str, session: Session, compare: Callable[..., None]) -> None:
    device, dtype, (n, channels, length) = session.device, example.dtype, example.shape

    def make() -> dict[str, Tensor]:
        tensors = {name: torch.randn(n, length, channels, device=device).to(dtype) for name in ("x", "residual", "y")}
        tensors = {name: value.transpose(1, 2) for name, value in tensors.items()}
        tensors |= {name: torch.randn(channels, device=device) for name in ("weight", "bias")}
        return tensors | {name: torch.randn(n, channels, device=device) for name in ("scale", "shift")}

    def run(tensors: dict[str, Tensor], backend: str) -> Tensor:
        rest = dict(tensors)
        y, x, weight, bias = (rest.pop(name) for name in ("y", "x", "weight", "bias"))
        group_norm_mish_(y, x, weight, bias, 8, **rest, backend=backend)
        return y

    def plain(tensors: dict[str, Tensor]) -> Tensor:
        t = {name: value.to(dtype) for name, value in tensors.items()}
        h = F.mish(F.group_norm(t["x"], 8, t["weight"], t["bias"]))
        return h * t["scale"][..., None] + t["shift"][..., None] + t["residual"]

    size = 3 * n * channels * length * dtype.itemsize
    compare(lambda arm: op_candidate(session, arm, "group_norm_mish_", dtype, make, run, plain, size=size))
