"""3x3 convolutions of the CIFAR-10 U-Net on the CPU: each native algorithm beside torch's (oneDNN)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastddpm_kernels import _backend
from fastddpm_kernels.conv import ALGORITHMS, conv_, error_factor, pack
from fastddpm_kernels.testing import assert_close
from gpu.arms import Unavailable
from measuring import Candidate
from torch import Tensor

# (N, C, O, side, upsample)
EXAMPLES = {
    "small": {
        "32x32 batch 1": (1, 128, 128, 32, False),
        "8x8 batch 1": (1, 256, 256, 8, False),
        "4x4 batch 1": (1, 256, 256, 4, False),
        "16x16 upsampled batch 1": (1, 256, 256, 16, True),
    },
    "full": {
        "32x32 batch 16": (16, 128, 128, 32, False),
        "16x16 batch 16": (16, 256, 256, 16, False),
        "8x8 batch 16": (16, 256, 256, 8, False),
    },
}
EXAMPLES["full"] |= EXAMPLES["small"]


@pytest.mark.parametrize("arm", ["eager", *ALGORITHMS])
def test_conv(example: tuple[int, int, int, int, bool], arm: str, compare: Callable[..., Any]) -> None:
    n, c, o, side, upsample = example

    def build(arm: str) -> Candidate:
        if arm != "eager" and (reason := _backend.why_not("native", "cpu")):
            raise Unavailable(reason)
        if arm == "winograd2" and upsample:
            raise Unavailable("after upsampling there is winograd4 or direct")
        out = side * (1 + upsample)

        def image(channels: int, size: int) -> Tensor:
            return torch.randn(n, size, size, channels).permute(0, 3, 1, 2)

        x, plain = image(c, side), torch.randn(o, c, 3, 3) / (9 * c) ** 0.5
        weight = plain.contiguous(memory_format=torch.channels_last) if arm == "eager" else pack(plain, arm, upsample)
        y, eager, expected = image(o, out), image(o, out), image(o, out).double()
        conv_(expected, x.double(), plain.double(), upsample=upsample, backend="reference")
        conv_(eager, x, plain, upsample=upsample, backend="eager")

        def run() -> None:
            conv_(y, x, weight, upsample=upsample, backend="eager" if arm == "eager" else "native")

        def check() -> None:
            run()
            mean, worst = (1.0, 1.0) if arm == "eager" else (error_factor(arm), error_factor(arm, worst=True))
            assert_close(y, expected, eager=eager, factor=2 * mean, max_factor=2 * worst)

        moved = (x.numel() + y.numel() + plain.numel()) * 4
        return Candidate([run], check, bytes=moved, flops=2 * 9 * y.numel() * c, device=torch.device("cpu"))

    compare(build)
