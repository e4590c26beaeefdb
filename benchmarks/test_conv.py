"""3x3 convolutions of the CIFAR-10 U-Net on the CPU: each native algorithm beside torch's (oneDNN)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from fastddpm_kernels import backend as _backend
from fastddpm_kernels.conv import ALGORITHMS, conv_, error_factor, pack, possible_algorithms
from fastddpm_kernels.testing import assert_close
from measuring import PRECISIONS, Candidate, Unavailable, image

CPU = torch.device("cpu")


class Example(NamedTuple):
    batch: int
    in_channels: int
    out_channels: int
    side: int
    upsample: bool = False
    dtype: torch.dtype = torch.float32


EXAMPLES = {
    "small": {
        "32x32 batch 1": Example(1, 128, 128, 32),
        "8x8 batch 1": Example(1, 256, 256, 8),
        "4x4 batch 1": Example(1, 256, 256, 4),
        "16x16 upsampled batch 1": Example(1, 256, 256, 16, True),
    },
    "full": {
        "32x32 batch 16": Example(16, 128, 128, 32),
        "16x16 batch 16": Example(16, 256, 256, 16),
        "8x8 batch 16": Example(16, 256, 256, 8),
    },
}
for examples in EXAMPLES.values():
    examples |= {f"{name} bf16": example._replace(dtype=torch.bfloat16) for name, example in examples.items()}
EXAMPLES["full"] |= EXAMPLES["small"]


@pytest.mark.parametrize("arm", ["eager", *ALGORITHMS])
def test_conv(example: Example, arm: str, compare: Callable[..., Any]) -> None:
    n, c, o, side, upsample, dtype = example

    def build(arm: str) -> Candidate:
        if arm != "eager" and (reason := _backend.why_not("native", "cpu", "conv", dtype)):
            raise Unavailable(reason)
        if arm != "eager" and arm not in (possible := possible_algorithms(upsample, dtype)):
            raise Unavailable(f"there is {' or '.join(possible)} for it")
        out = side * (1 + upsample)
        x, plain = image(CPU, dtype, n, c, side), torch.randn(o, c, 3, 3) / (9 * c) ** 0.5
        last = plain.to(dtype, memory_format=torch.channels_last)
        weight = last if arm == "eager" else pack(plain, arm, upsample, dtype=dtype)
        y, eager, expected = (image(CPU, of, n, o, out) for of in (dtype, dtype, torch.float64))
        conv_(expected, x.double(), plain.double(), upsample=upsample, backend="reference")
        conv_(eager, x, last, upsample=upsample, backend="eager")

        def run() -> None:
            conv_(y, x, weight, upsample=upsample, backend="eager" if arm == "eager" else "native")

        def check() -> None:
            run()
            mean, worst = (1.0, 1.0) if arm == "eager" else (error_factor(arm), error_factor(arm, worst=True))
            assert_close(y, expected, eager=eager, factor=2 * mean, max_factor=2 * worst)

        moved = (x.numel() + y.numel() + plain.numel()) * dtype.itemsize
        flops, precision = 2 * 9 * y.numel() * c, PRECISIONS[dtype]
        return Candidate([run], check, bytes=moved, flops=flops, precision=precision, device=CPU)

    compare(build)
