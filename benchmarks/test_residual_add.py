"""The residual sum with a bias, plain and into a padded image, of the CIFAR-10 and the 256-pixel U-Net."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from gpu.op_cases import residual_add_case
from measuring import ARMS, Session, case_candidate


class Example(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, int, int]  # (N, C, side)
    border: int  # on the right and below


EXAMPLES = {
    "small": {
        "fp32 4x64x32x32": Example(torch.float32, (4, 64, 32), 0),
        "fp32 4x64x32x32 padded": Example(torch.float32, (4, 64, 32), 1),
    },
    "full": {
        "fp16 1x128x32x32": Example(torch.float16, (1, 128, 32), 0),
        "fp16 256x128x32x32 padded": Example(torch.float16, (256, 128, 32), 1),
        "fp16 16x128x256x256": Example(torch.float16, (16, 128, 256), 0),
    },
}


@pytest.mark.parametrize("arm", ARMS)
def test_residual_add(example: Example, arm: str, session: Session, compare: Callable[..., None]) -> None:
    case = residual_add_case(session.device, example.dtype, example.shape, example.border)
    compare(lambda arm: case_candidate(session, arm, case))
