"""Training in float16: what its scaler skips, and what it can never make finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from training_objects import trainer, weights

from fastddpm import GaussianDiffusion, NoiseSchedule, Trainer
from fastddpm.training import DivergedError, TrainerSettings
from fastddpm.training import trainer as module


class _Steep(torch.autograd.Function):
    """Itself, with another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return (gradient.half() * ctx.factor).to(gradient.dtype), None


class Net(nn.Module):
    """A network whose gradient is `factor` times what it should be, computed in float16."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return _Steep.apply(self.weight * x, self.factor)


def half(settings: TrainerSettings) -> Accelerator:
    """An accelerator that scales gradients, on the CPU, as others do on CUDA."""
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    accelerator.scaler = torch.amp.GradScaler("cpu")
    accelerator.native_amp = True
    return accelerator


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.rand(8, 1, 4, 4) * 2 - 1)
    monkeypatch.setattr(module, "make_accelerator", half)
    diffusion = GaussianDiffusion(Net(), NoiseSchedule.linear(50))
    return trainer(tmp_path, diffusion, data, train_num_steps=40, max_bad_steps=3, max_grad_norm=None)


def test_a_scale_that_is_looked_for_is_no_divergence(run: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights(run.diffusion)
    monkeypatch.setattr(Net, "factor", 2000.0)  # fits at a scale that is several times halved
    run.train()
    assert run.accelerator.scaler is not None
    assert 1 < run.accelerator.scaler.get_scale() < 2**13
    assert run._training.bad.tolist() == [0, 0]
    assert not weights(run.diffusion).equal(before)


def test_overflow_at_every_scale_ends_the_run(run: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights(run.diffusion)
    monkeypatch.setattr(Net, "factor", float("inf"))
    with pytest.raises(DivergedError, match="for 3 steps in a row, from step 17 on"):  # 16 halvings of 2^16 before
        run.train()
    assert weights(run.diffusion).equal(before)


def test_a_loss_that_is_not_finite_counts_at_any_scale(run: Trainer) -> None:
    with torch.no_grad():
        run.diffusion.unet.weight.fill_(float("nan"))  # type: ignore[operator,union-attr]
    with pytest.raises(DivergedError, match="for 3 steps in a row, from step 1 on"):
        run.train()
