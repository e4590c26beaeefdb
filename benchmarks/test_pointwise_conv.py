"""1x1 convolutions and projections of the CIFAR-10 and the 256-pixel U-Net, with concatenation, bias and residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from gpu.op_cases import pointwise_case
from measuring import ARMS, Session, case_candidate


class Example(NamedTuple):
    dtype: torch.dtype
    # (N, C, C2, O, side): channels of x, of the skip that is concatenated, and of the result.
    shape: tuple[int, int, int, int, int]
    residual: bool


SHAPES = {
    "cifar 32x32 shortcut batch 1": (1, 128, 128, 128, 32),
    "cifar 32x32 shortcut batch 256": (256, 128, 128, 128, 32),
    "cifar 16x16 shortcut batch 1": (1, 256, 256, 256, 16),
    "cifar 16x16 qkv batch 256": (256, 256, 0, 768, 16),
    "cifar 16x16 out batch 256": (256, 256, 0, 256, 16),
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
    case = pointwise_case(session.device, example.dtype, example.shape, residual=example.residual)
    compare(lambda arm: case_candidate(session, arm, case))
