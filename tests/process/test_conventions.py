"""The tables against guided-diffusion and denoising_diffusion_pytorch, whose formulas are restated here in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from table_rows import compare
from torch import Tensor

from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import StepTable, ddim_inversion_table, ddim_table, ddpm_table


class GuidedDiffusion:
    """`SpacedDiffusion`: betas of the visited steps, and the formulas over them."""

    def __init__(self, betas: np.ndarray, visited: list[int]) -> None:
        bars = np.cumprod(1 - betas)
        last, spaced = 1.0, []
        for t in sorted(visited):
            spaced.append(1 - bars[t] / last)
            last = bars[t]
        self.betas = np.array(spaced)
        self.bar = np.cumprod(1 - self.betas)
        self.bar_prev = np.append(1.0, self.bar[:-1])
        self.bar_next = np.append(self.bar[1:], 0.0)
        self.posterior = self.betas * (1 - self.bar_prev) / (1 - self.bar)
        self.log_posterior = np.log(np.append(self.posterior[1], self.posterior[1:]))
        self.coef1 = self.betas * np.sqrt(self.bar_prev) / (1 - self.bar)
        self.coef2 = (1 - self.bar_prev) * np.sqrt(1 - self.betas) / (1 - self.bar)

    def x_start(self, x: np.ndarray, t: int, out: np.ndarray, predicts: str) -> np.ndarray:
        if predicts == "epsilon":
            out = np.sqrt(1 / self.bar[t]) * x - np.sqrt(1 / self.bar[t] - 1) * out
        return np.clip(out, -1, 1)

    def p_sample(
        self, x: np.ndarray, t: int, out: np.ndarray, z: np.ndarray, predicts: str, variance: str
    ) -> np.ndarray:
        if variance.startswith("learned"):
            out, values = np.split(out, 2, axis=1)
        if variance == "learned":
            log_variance = values
        elif variance == "learned_range":
            fraction = (values + 1) / 2
            log_variance = fraction * np.log(self.betas[t]) + (1 - fraction) * self.log_posterior[t]
        elif variance == "fixed_large":
            log_variance = np.log(np.append(self.posterior[1], self.betas[1:]))[t]
        else:
            log_variance = self.log_posterior[t]
        mean = self.coef1[t] * self.x_start(x, t, out, predicts) + self.coef2[t] * x
        return mean + float(t != 0) * np.exp(0.5 * log_variance) * z

    def ddim_sample(
        self, x: np.ndarray, t: int, out: np.ndarray, z: np.ndarray, predicts: str, eta: float
    ) -> np.ndarray:
        x0 = self.x_start(x, t, out, predicts)
        eps = (np.sqrt(1 / self.bar[t]) * x - x0) / np.sqrt(1 / self.bar[t] - 1)
        sigma = eta * np.sqrt((1 - self.bar_prev[t]) / (1 - self.bar[t]))
        sigma *= np.sqrt(1 - self.bar[t] / self.bar_prev[t])
        mean = x0 * np.sqrt(self.bar_prev[t]) + np.sqrt(1 - self.bar_prev[t] - sigma**2) * eps
        return mean + float(t != 0) * sigma * z

    def ddim_reverse_sample(self, x: np.ndarray, t: int, out: np.ndarray, predicts: str) -> np.ndarray:
        x0 = self.x_start(x, t, out, predicts)
        eps = (np.sqrt(1 / self.bar[t]) * x - x0) / np.sqrt(1 / self.bar[t] - 1)
        return x0 * np.sqrt(self.bar_next[t]) + np.sqrt(1 - self.bar_next[t]) * eps


def rows_are(table: StepTable, step: Callable[..., np.ndarray], **options: Any) -> None:
    """`compare` with a step in numpy; x0 is always clipped, as both libraries do."""

    def in_torch(index: int, x: Tensor, out: Tensor, z: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(step(index, x.numpy(), out.numpy(), z.numpy())))

    compare(table, in_torch, clip=1.0, **options)


@pytest.mark.parametrize(
    ("respacing", "predicts", "variance"),
    [
        ("1000", "epsilon", "learned_range"),
        ("25", "epsilon", "fixed_small"),
        ("25", "sample", "fixed_large"),
        ("10,10,5", "epsilon", "learned"),
        ("ddim25", "sample", "learned_range"),
    ],
)
def test_ddpm_is_that_of_guided_diffusion(respacing: str, predicts: str, variance: str) -> None:
    schedule = NoiseSchedule.linear()
    timesteps = schedule.timesteps(respacing, "guided_diffusion")
    theirs = GuidedDiffusion(schedule.betas.numpy(), timesteps.tolist())
    table = ddpm_table(
        schedule, timesteps, prediction_type=predicts, variance_type=variance, convention="guided_diffusion"
    )
    if variance == "learned_range":
        np.testing.assert_allclose(table.log_variance.flip(0)[:, 0], theirs.log_posterior, rtol=1e-9)
        np.testing.assert_allclose(table.log_variance.flip(0)[:, 1], np.log(theirs.betas), rtol=1e-9)
    last = len(timesteps) - 1
    rows_are(
        table,
        lambda i, x, out, z: theirs.p_sample(x, last - i, out, z, predicts, variance),
        channels=6 if variance.startswith("learned") else 3,
        rows=(0, 1, last // 2, last - 1, last),
    )


@pytest.mark.parametrize("respacing", ["ddim25", "10,10,5"])
@pytest.mark.parametrize(("predicts", "eta"), [("epsilon", 0.0), ("epsilon", 0.5), ("sample", 1.0)])
def test_ddim_is_that_of_guided_diffusion(respacing: str, predicts: str, eta: float) -> None:
    schedule = NoiseSchedule.cosine()
    timesteps = schedule.timesteps(respacing, "guided_diffusion")
    theirs = GuidedDiffusion(schedule.betas.numpy(), timesteps.tolist())
    table = ddim_table(schedule, timesteps, prediction_type=predicts, eta=eta, use_clipped_model_output=True)
    rows_are(table, lambda i, x, out, z: theirs.ddim_sample(x, 24 - i, out, z, predicts, eta))


@pytest.mark.parametrize("predicts", ["epsilon", "sample"])
def test_inversion_is_that_of_guided_diffusion(predicts: str) -> None:
    schedule = NoiseSchedule.linear()
    timesteps = schedule.timesteps("ddim25", "guided_diffusion")
    theirs = GuidedDiffusion(schedule.betas.numpy(), timesteps.tolist())
    table = ddim_inversion_table(
        schedule, timesteps, prediction_type=predicts, use_clipped_model_output=True, set_alpha_to_one=False
    )
    # guided-diffusion takes the image to be at level 0, where our first row leads
    rows_are(table, lambda i, x, out, z: theirs.ddim_reverse_sample(x, i - 1, out, predicts), rows=range(1, 25))


def lucidrains_predictions(x: np.ndarray, out: np.ndarray, bar: float, objective: str) -> tuple[np.ndarray, np.ndarray]:
    """`model_predictions(..., clip_x_start=True, rederive_pred_noise=True)`: (pred_noise, x_start)."""
    if objective == "epsilon":
        x0 = math.sqrt(1 / bar) * x - math.sqrt(1 / bar - 1) * out
    elif objective == "sample":
        x0 = out
    else:
        x0 = math.sqrt(bar) * x - math.sqrt(1 - bar) * out
    x0 = x0.clip(-1, 1)
    return (math.sqrt(1 / bar) * x - x0) / math.sqrt(1 / bar - 1), x0


@pytest.mark.parametrize("objective", ["epsilon", "sample", "v_prediction"])
def test_ddpm_is_that_of_denoising_diffusion_pytorch(objective: str) -> None:
    schedule = NoiseSchedule.sigmoid(100)
    betas, bars = schedule.betas.numpy(), schedule.alphas_cumprod.numpy()
    table = ddpm_table(
        schedule, schedule.timesteps(), prediction_type=objective, convention="denoising_diffusion_pytorch"
    )

    def p_sample(index: int, x: np.ndarray, out: np.ndarray, z: np.ndarray) -> np.ndarray:
        t = 99 - index
        _, x0 = lucidrains_predictions(x, out, bars[t], objective)
        prev = bars[t - 1] if t > 0 else 1.0
        mean = betas[t] * math.sqrt(prev) / (1 - bars[t]) * x0
        mean = mean + (1 - prev) * math.sqrt(1 - betas[t]) / (1 - bars[t]) * x
        variance = max(betas[t] * (1 - prev) / (1 - bars[t]), 1e-20)
        return mean + math.exp(0.5 * math.log(variance)) * (z if t > 0 else 0)

    rows_are(table, p_sample)


@pytest.mark.parametrize("objective", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_that_of_denoising_diffusion_pytorch(objective: str, eta: float) -> None:
    schedule = NoiseSchedule.sigmoid(1000)
    bars = schedule.alphas_cumprod.numpy()
    times = list(reversed(torch.linspace(-1, 999, steps=31).int().tolist()))
    table = ddim_table(
        schedule,
        schedule.timesteps(30, "denoising_diffusion_pytorch"),
        prediction_type=objective,
        eta=eta,
        use_clipped_model_output=True,
    )
    assert table.timesteps.tolist() == times[:-1]

    def ddim_sample(index: int, x: np.ndarray, out: np.ndarray, z: np.ndarray) -> np.ndarray:
        time, time_next = times[index : index + 2]
        noise, x0 = lucidrains_predictions(x, out, bars[time], objective)
        if time_next < 0:
            return x0
        bar, bar_next = bars[time], bars[time_next]
        sigma = eta * math.sqrt((1 - bar / bar_next) * (1 - bar_next) / (1 - bar))
        return x0 * math.sqrt(bar_next) + math.sqrt(1 - bar_next - sigma**2) * noise + sigma * z

    rows_are(table, ddim_sample)
