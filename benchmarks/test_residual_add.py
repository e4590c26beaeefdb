"""The residual sum with a bias, plain and into a padded image, of the CIFAR-10 and the 256-pixel U-Net."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels.residual_add import residual_add_
from measuring import ARMS, Session, image, op_candidate
from torch import Tensor


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
        "fp16 256x128x32x32 padded": Example(torch.float16, (256, 128, 32), 1),
        "fp16 16x128x256x256": Example(torch.float16, (16, 128, 256), 0),
        "fp16 1x128x32x32": Example(torch.float16, (1, 128, 32), 0),
    },
}


@pytest.mark.parametrize("arm", ARMS)
def test_residual_add(example: Example, arm: str, session: Session, compare: Callable[..., None]) -> None:
    device, dtype, (n, c, side), border = session.device, example.dtype, example.shape, example.border

    def make() -> dict[str, Tensor]:
        y = torch.zeros(n, side + border, side + border, c, device=device, dtype=dtype).permute(0, 3, 1, 2)
        x, residual = (image(device, dtype, n, c, side) for _ in range(2))
        return {"y": y, "x": x, "residual": residual, "bias": torch.randn(c, device=device).to(dtype)}

    def run(tensors: dict[str, Tensor], backend: str) -> Tensor:
        rest = dict(tensors)
        residual_add_(rest.pop("y"), rest.pop("x"), **rest, backend=backend)
        return tensors["y"]

    def plain(tensors: dict[str, Tensor]) -> Tensor:
        value = tensors["x"] + tensors["residual"] + tensors["bias"][:, None, None]
        return F.pad(value, (0, border, 0, border)) if border else value

    size = 3 * n * c * side * side * dtype.itemsize
    compare(lambda arm: op_candidate(session, arm, "residual_add_", dtype, make, run, plain, size=size))
