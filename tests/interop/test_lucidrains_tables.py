"""The rows of the step tables are the steps of denoising_diffusion_pytorch's loops."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("denoising_diffusion_pytorch", reason="needs denoising_diffusion_pytorch")

from denoising_diffusion_pytorch import GaussianDiffusion
from lucidrains_objects import SCHEDULES, STEPS, Fixed, diffusion

from fastddpm.interop.lucidrains.tables import OBJECTIVES, ddim_sample_table, p_sample_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import StepTable, ddim_table, ddpm_table


def execute(table: StepTable, x: Tensor, model: nn.Module, noises: list[Tensor]) -> list[Tensor]:
    """The definition of the rows, in x's dtype; noise of every row, used or not."""
    states = []
    for row, t, z in zip(table.rows.tolist(), table.timesteps, noises, strict=True):
        a, b, c, d, e, _, s = row
        out = model(x, t.expand(len(x)))
        x = c * (a * x + b * out).clamp(-1, 1) + d * x + e * out + s * z
        states.append(x)
    return states


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_rows_are_their_steps_to_the_last_digit(objective: str, schedule: str) -> None:
    """In float64, where the buffers are float32 values: no rounding stands between both."""
    theirs = diffusion(Fixed(), objective=objective, beta_schedule=schedule, auto_normalize=False).double()
    torch.set_default_dtype(torch.float64)
    try:
        for method, steps, eta in (("p_sample_loop", STEPS, 0.0), ("ddim_sample", 9, 0.0), ("ddim_sample", 9, 0.8)):
            theirs.sampling_timesteps, theirs.ddim_sampling_eta = steps, eta
            torch.manual_seed(1)
            expected = getattr(theirs, method)((2, 3, 4, 4), return_all_timesteps=True)
            torch.manual_seed(1)
            noises = list(torch.stack([torch.randn(2, 3, 4, 4) for _ in range(steps)]))
            ddpm = method == "p_sample_loop"
            table = p_sample_table(theirs) if ddpm else ddim_sample_table(theirs, rederive=True)
            states = execute(table, noises[0], theirs.model, [*noises[1:], torch.full_like(noises[0], torch.pi)])
            torch.testing.assert_close(torch.stack(states, 1), expected[:, 1:], rtol=1e-10, atol=1e-10)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("schedule", ["cosine", "sigmoid"])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_tables_are_those_of_the_package(objective: str, schedule: str) -> None:
    """`ddpm_table` and `ddim_table` in float64, but for float32 in their buffers."""
    theirs = diffusion(Fixed(), timesteps=200, objective=objective, beta_schedule=schedule)
    theirs.sampling_timesteps, theirs.ddim_sampling_eta = 30, 0.7
    make = {
        "cosine": "cosine_beta_schedule",
        "sigmoid": "sigmoid_beta_schedule",
    }[schedule]
    betas = getattr(sys.modules[GaussianDiffusion.__module__], make)(200)
    ours = NoiseSchedule.from_betas(betas)
    predicts = OBJECTIVES[objective]
    expected = ddpm_table(ours, ours.timesteps(), prediction_type=predicts, convention="denoising_diffusion_pytorch")
    table = p_sample_table(theirs)
    assert torch.equal(table.timesteps, expected.timesteps)
    torch.testing.assert_close(table.rows, expected.rows, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(table.levels, expected.levels, rtol=1e-5, atol=1e-5)
    timesteps = ours.timesteps(30, "denoising_diffusion_pytorch")
    for rederive in (True, False):
        clipped = rederive or objective != "pred_noise"
        expected = ddim_table(ours, timesteps, prediction_type=predicts, eta=0.7, use_clipped_model_output=clipped)
        table = ddim_sample_table(theirs, rederive=rederive)
        assert torch.equal(table.timesteps, expected.timesteps)
        # 1 - alphas_cumprod of float32 near 1 has four digits.
        torch.testing.assert_close(table.rows, expected.rows, rtol=2e-4, atol=2e-4)
