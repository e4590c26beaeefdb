"""The convolutions of a diffusion policy's network, whose weights are most of what is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.conv1d import conv1d_, pack
from measuring import ARMS, Session, op_candidate
from torch import Tensor


class Example(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, int, int, int]  # (N, C, O, L), of kernel 5


EXAMPLES = {
    "small": {
        "fp32 1x64x64x16": Example(torch.float32, (1, 64, 64, 16)),
        "bf16 1x64x64x16": Example(torch.bfloat16, (1, 64, 64, 16)),
    },
    "full": {
        "fp16 1x2048x2048x4": Example(torch.float16, (1, 2048, 2048, 4)),
        "fp16 1x512x512x16": Example(torch.float16, (1, 512, 512, 16)),
        "fp16 64x1024x1024x32": Example(torch.float16, (64, 1024, 1024, 32)),
    },
}


@pytest.mark.parametrize("arm", ARMS)
def test_conv1d(example: Example, arm: str, session: Session, compare: Callable[..., None]) -> None:
    device, dtype, (n, channels, outputs, length) = session.device, example.dtype, example.shape

    def sequence(size: int) -> Tensor:
        return torch.randn(n, length, size, device=device).to(dtype).transpose(1, 2)

    def make() -> dict[str, Tensor]:
        weight = torch.randn(outputs, channels, 5, device=device) / (5 * channels) ** 0.5
        tensors = {"x": sequence(channels), "weight": weight.to(dtype), "y": sequence(outputs)}
        if arm in ("native", "triton"):
            tensors["packed"] = pack(tensors["weight"], arm, dtype=dtype).values
        return tensors

    def run(tensors: dict[str, Tensor], backend: str) -> Tensor:
        weight: object = tensors["weight"]
        if backend == arm and "packed" in tensors:
            from fastddpm_kernels.conv1d import PackedWeight

            weight = PackedWeight(tensors["packed"], backend, channels, outputs, 5)
        conv1d_(tensors["y"], tensors["x"], weight, padding=2, backend=backend)  # type: ignore[arg-type]
        return tensors["y"]

    def plain(tensors: dict[str, Tensor]) -> Tensor:
        return F.conv1d(tensors["x"], tensors["weight"], padding=2)

    size = (n * length * (channels + outputs) + 5 * channels * outputs) * dtype.itemsize
    compare(lambda arm: op_candidate(session, arm, "conv1d", dtype, make, run, plain, size=size))
