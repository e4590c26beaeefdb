"""Noise alone: how fast normals are made and written. "torch" is torch's own generator, which gives other numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fastddpm_kernels.philox import STREAM_STEP, normal, sample_keys
from measuring import Candidate, Session, fused_backend
from torch import Tensor

EXAMPLES = {
    "small": {"16x3x32x32": (16, 3, 32, 32)},
    "full": {"2048x3x64x64": (2048, 3, 64, 64), "1x3x32x32": (1, 3, 32, 32)},
}


@pytest.mark.parametrize("arm", ["fused", "eager", "reference", "torch"])
def test_normal(example: tuple[int, int, int, int], arm: str, session: Session, compare: Callable[..., None]) -> None:
    device, (batch, *shape) = session.device, example
    keys, step = sample_keys([0] * batch, range(batch), device), torch.tensor([7], device=device)

    def build(arm: str) -> Candidate:
        backend = fused_backend("philox", device, torch.float32) if arm == "fused" else arm

        def make() -> Tensor:
            if arm == "torch":
                return torch.randn(example, device=device)
            return normal(keys, shape, step=step, stream=STREAM_STEP, backend=backend)

        def check() -> None:
            expected = normal(keys[-2:], shape, step=step, stream=STREAM_STEP, backend="reference")
            torch.testing.assert_close(make()[-2:], expected, rtol=5e-7, atol=2e-15)  # 4 units in the last place

        calls, size = [make] * session.sets(4 * batch * torch.Size(shape).numel()), 4 * torch.Size(example).numel()
        return Candidate(calls, None if arm == "torch" else check, bytes=size, graph=True)

    compare(build)
