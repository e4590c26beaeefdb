"""The tables against guided-diffusion and denoising_diffusion_pytorch, whose formulas are restated here in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import StepTable, ddim_inversion_table, ddim_table, ddpm_table

SHAPE = (2, 3, 4, 4)


def execute(table: StepTable, index: int, x: np.ndarray, out: np.ndarray, z: np.ndarray, clip: float) -> np.ndarray:
    """The definition of a row; x0 is always clipped, as both libraries do."""
    a, b, c, d, e, f, s = table.rows[index].tolist()
    assert f == 0
    std: np.ndarray | float = s
    if table.log_variance is not None:
        out, v = np.split(out, 2, axis=1)
        low, high = table.log_variance[index].tolist()
        std = s * np.exp(0.5 * ((v + 1) / 2 * high + (1 - v) / 2 * low))
    x0 = np.clip(a * x + b * out, -clip, clip)
    return c * x0 + d * x + e * out + std * z


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


def draws(seed: int, doubled: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, out and z."""
    rng = np.random.default_rng(seed)
    out = rng.standard_normal((2, 6, 4, 4) if doubled else SHAPE)
    return rng.standard_normal(SHAPE), out, rng.standard_normal(SHAPE)


def same(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("respacing", ["1000", "25", "10,10,5", "ddim25"])
@pytest.mark.parametrize("predicts", ["epsilon", "sample"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
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
    count = len(timesteps)
    for index in {0, 1, count // 2, count - 2, count - 1}:
        x, out, z = draws(index, doubled=variance.startswith("learned"))
        same(execute(table, index, x, out, z, 1), theirs.p_sample(x, count - 1 - index, out, z, predicts, variance))


@pytest.mark.parametrize("respacing", ["ddim25", "25", "10,10,5"])
@pytest.mark.parametrize("predicts", ["epsilon", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_that_of_guided_diffusion(respacing: str, predicts: str, eta: float) -> None:
    schedule = NoiseSchedule.cosine()
    timesteps = schedule.timesteps(respacing, "guided_diffusion")
    theirs = GuidedDiffusion(schedule.betas.numpy(), timesteps.tolist())
    table = ddim_table(schedule, timesteps, prediction_type=predicts, eta=eta, use_clipped_model_output=True)
    for index in range(25):
        x, out, z = draws(index)
        same(execute(table, index, x, out, z, 1), theirs.ddim_sample(x, 24 - index, out, z, predicts, eta))


@pytest.mark.parametrize("predicts", ["epsilon", "sample"])
def test_inversion_is_that_of_guided_diffusion(predicts: str) -> None:
    schedule = NoiseSchedule.linear()
    timesteps = schedule.timesteps("ddim25", "guided_diffusion")
    theirs = GuidedDiffusion(schedule.betas.numpy(), timesteps.tolist())
    table = ddim_inversion_table(
        schedule, timesteps, prediction_type=predicts, use_clipped_model_output=True, set_alpha_to_one=False
    )
    for index in range(1, 25):  # guided-diffusion takes the image to be at level 0, where our first row leads
        x, out, z = draws(index)
        same(execute(table, index, x, out, z, 1), theirs.ddim_reverse_sample(x, index - 1, out, predicts))


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
    for index in range(100):
        t = 99 - index
        x, out, z = draws(index)
        _, x0 = lucidrains_predictions(x, out, bars[t], objective)
        prev = bars[t - 1] if t > 0 else 1.0
        mean = betas[t] * math.sqrt(prev) / (1 - bars[t]) * x0
        mean = mean + (1 - prev) * math.sqrt(1 - betas[t]) / (1 - bars[t]) * x
        variance = max(betas[t] * (1 - prev) / (1 - bars[t]), 1e-20)
        expected = mean + math.exp(0.5 * math.log(variance)) * (z if t > 0 else 0)
        same(execute(table, index, x, out, z, 1), expected)


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
    for index, (time, time_next) in enumerate(pairwise(times)):
        x, out, z = draws(index)
        noise, x0 = lucidrains_predictions(x, out, bars[time], objective)
        if time_next < 0:
            expected = x0
        else:
            bar, bar_next = bars[time], bars[time_next]
            sigma = eta * math.sqrt((1 - bar / bar_next) * (1 - bar_next) / (1 - bar))
            expected = x0 * math.sqrt(bar_next) + math.sqrt(1 - bar_next - sigma**2) * noise + sigma * z
        same(execute(table, index, x, out, z, 1), expected)


def test_unknown_convention_is_named() -> None:
    with pytest.raises(ValueError, match="convention is 'openai', must be one of diffusers, guided_diffusion"):
        ddpm_table(NoiseSchedule.linear(), [5, 0], convention="openai")
