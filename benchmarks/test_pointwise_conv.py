"""1x1 convolutions and projections of the CIFAR-10 and the 256-pixel U-Net, with concatenation, bias and residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.pointwise_conv import pointwise_conv_
from measuring import ARMS, Session, image, op_candidate
from torch import Tensor


class Example(NamedTuple):
    dtype: torch.dtype
    # (N, C, C2, O, side): channels of x, of the skip that is concatenated, and of the result.
    shape: tuple[int, int, int, int, int]
    residual: bool


SHAPES = {
    "cifar 32x32 shortcut batch 256": (256, 128, 128, 128, 32),
    "cifar 16x16 qkv batch 256": (256, 256, 0, 768, 16),
    "cifar 16x16 out batch 256": (256, 256, 0, 256, 16),
    "cifar 32x32 shortcut batch 1": (1, 128, 128, 128, 32),
    "cifar 16x16 shortcut batch 1": (1, 256, 256, 256, 16),
    "cifar 4x4 shortcut batch 1": (1, 256, 256, 256, 4),
    "celeba 256x256 shortcut batch 16": (16, 128, 128, 128, 256),
    "celeba 16x16 qkv batch 1": (1, 512, 0, 1536, 16),
}
EXAMPLES = {
    "small": {
        "fp32 shortcut": Example(torch.float32, (2, 64, 32, 64, 32), False),
        "fp32 out with residual": Example(torch.float32, (2, 256, 0, 256, 16), True),
    },
    "full": {f"fp16 {name}": Example(torch.float16, shape, residual=" out " in name) for name, shape in SHAPES.items()},
}
EXAMPLES["full"]["fp32 cifar 32x32 shortcut batch 64"] = Example(torch.float32, (64, 128, 128, 128, 32), False)


@pytest.mark.parametrize("arm", ARMS)
def test_pointwise_conv(example: Example, arm: str, session: Session, compare: Callable[..., None]) -> None:
    device, dtype, (n, c, c2, o, side) = session.device, example.dtype, example.shape

    def weight(inputs: int) -> Tensor:
        return (torch.randn(o, inputs, device=device) * (c + c2) ** -0.5).to(dtype)

    def make() -> dict[str, Tensor]:
        tensors = {"y": image(device, dtype, n, o, side), "x": image(device, dtype, n, c, side), "weight": weight(c)}
        tensors["bias"] = torch.randn(o, device=device).to(dtype)
        if c2:
            tensors |= {"x2": image(device, dtype, n, c2, side), "weight2": weight(c2)}
        if example.residual:
            tensors["residual"] = image(device, dtype, n, o, side)
        return tensors

    def run(tensors: dict[str, Tensor], backend: str) -> Tensor:
        rest = dict(tensors)
        pointwise_conv_(rest.pop("y"), rest.pop("x"), rest.pop("weight"), **rest, backend=backend)
        return tensors["y"]

    def plain(tensors: dict[str, Tensor]) -> Tensor:
        x, weight = tensors["x"], tensors["weight"]
        if c2:
            x, weight = torch.cat([x, tensors["x2"]], 1), torch.cat([weight, tensors["weight2"]], 1)
        y = F.conv2d(x, weight[:, :, None, None], tensors["bias"])
        return y + tensors["residual"] if example.residual else y

    pixels = n * side * side
    size = (pixels * (c + c2 + o * (1 + example.residual)) + o * (c + c2)) * dtype.itemsize
    flops = 2 * pixels * (c + c2) * o
    compare(lambda arm: op_candidate(session, arm, "pointwise_conv_", dtype, make, run, plain, size=size, flops=flops))
