"""Every row of the tables, executed in float64, is one step of diffusers' scheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from fastddpm.coefficients import PREDICTION_TYPES, StepTable, ddim_table, ddpm_table
from fastddpm.schedule import NoiseSchedule

SHAPE = (2, 3, 4, 4)


def execute(table: StepTable, index: int, x: Tensor, out: Tensor, z: Tensor, clip: float | None) -> Tensor:
    """The definition of a row, in float64."""
    a, b, c, d, e, _, s = table.rows[index].tolist()
    if table.log_variance is not None:
        out, v = out.chunk(2, dim=1)
        low, high = table.log_variance[index].tolist()
        std = s * torch.exp(0.5 * ((v + 1) / 2 * high + (1 - v) / 2 * low))
    else:
        std = torch.full_like(x, s)
    x0 = a * x + b * out
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    return c * x0 + d * x + e * out + std * z


def in_float64(scheduler: DDPMScheduler | DDIMScheduler, schedule: NoiseSchedule) -> None:
    """Lets diffusers' scheduler compute from our float64 tables, so that only the formulas are compared."""
    scheduler.betas = schedule.betas
    scheduler.alphas = 1 - schedule.betas
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    if isinstance(scheduler, DDIMScheduler):
        scheduler.final_alpha_cumprod = scheduler.one


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("count", "spacing"), [(1000, "leading"), (10, "leading"), (7, "trailing"), (6, "linspace")])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_ddpm_rows_are_steps_of_diffusers(
    variance_type: str,
    prediction_type: str,
    count: int,
    spacing: str,
    clip: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule = NoiseSchedule.linear()
    theirs = DDPMScheduler(
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_sample=clip is not None,
        timestep_spacing=spacing,
    )
    theirs.set_timesteps(count)
    in_float64(theirs, schedule)
    timesteps = schedule.timesteps(count, spacing)
    table = ddpm_table(schedule, timesteps, prediction_type=prediction_type, variance_type=variance_type)
    learned = variance_type == "learned_range"
    for index in sorted({0, 1, count // 2, count - 2, count - 1}):
        x, z = torch.randn(2, *SHAPE, dtype=torch.float64)
        out = torch.randn(2, 6 if learned else 3, 4, 4, dtype=torch.float64)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=z, **__: z)
        expected = theirs.step(out, theirs.timesteps[index], x).prev_sample
        torch.testing.assert_close(execute(table, index, x, out, z, clip), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("rederive", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_ddim_rows_are_steps_of_diffusers(eta: float, prediction_type: str, rederive: bool, clip: float | None) -> None:
    schedule = NoiseSchedule.cosine()
    theirs = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=clip is not None
    )
    theirs.set_timesteps(10)
    in_float64(theirs, schedule)
    timesteps = schedule.timesteps(10)
    table = ddim_table(schedule, timesteps, prediction_type=prediction_type, eta=eta, use_clipped_model_output=rederive)
    for index, t in enumerate(timesteps.tolist()):
        x, out, z = torch.randn(3, *SHAPE, dtype=torch.float64)
        expected = theirs.step(
            out, t, x, eta=eta, use_clipped_model_output=rederive, variance_noise=z if eta > 0 else None
        ).prev_sample
        torch.testing.assert_close(execute(table, index, x, out, z, clip), expected, rtol=1e-9, atol=1e-9)


def test_posterior_is_that_of_bayes() -> None:
    """Mean and variance of q(x_{t-1} | x_t, x_0) from the product of two Gaussians."""
    schedule = NoiseSchedule.linear(50)
    timesteps = schedule.timesteps()
    table = ddpm_table(schedule, timesteps, prediction_type="sample")
    bar = schedule.alphas_cumprod
    for index, t in enumerate(timesteps.tolist()[:-1]):
        alpha, beta = 1 - schedule.betas[t], schedule.betas[t]
        # prior N(sqrt(bar_prev) x0, 1 - bar_prev), likelihood of x_t: N(sqrt(alpha) x_prev, beta)
        precision = 1 / (1 - bar[t - 1]) + alpha / beta
        _, _, c, d, _, _, s = table.rows[index]
        torch.testing.assert_close(c, bar[t - 1].sqrt() / (1 - bar[t - 1]) / precision, rtol=1e-9, atol=0)
        torch.testing.assert_close(d, alpha.sqrt() / beta / precision, rtol=1e-9, atol=0)
        torch.testing.assert_close(s, precision.rsqrt(), rtol=1e-9, atol=0)


def test_last_step_gives_x0_without_noise() -> None:
    schedule = NoiseSchedule.linear()
    for table in (ddpm_table(schedule, schedule.timesteps()), ddim_table(schedule, schedule.timesteps(), eta=1.0)):
        _, _, c, d, e, f, s = table.rows[-1].tolist()
        assert c == pytest.approx(1, abs=1e-12)
        assert (d, e, f, s) == pytest.approx((0, 0, 0, 0), abs=1e-12)
        assert table.levels[-1].tolist() == [1, 0]


def test_levels_are_those_of_the_state_after_the_step() -> None:
    schedule = NoiseSchedule.linear()
    timesteps = schedule.timesteps(10)
    levels = ddpm_table(schedule, timesteps).levels
    torch.testing.assert_close(levels[:-1, 0], schedule.alphas_cumprod[timesteps[1:]].sqrt())
    torch.testing.assert_close(levels.square().sum(1), torch.ones(10, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "score"}, "prediction_type is 'score', must be one of epsilon, sample, v_prediction"),
        ({"variance_type": "fixed"}, "variance_type is 'fixed', must be one of"),
    ],
)
def test_unknown_types_are_named(change: dict[str, str], message: str) -> None:
    schedule = NoiseSchedule.linear()
    with pytest.raises(ValueError, match=message):
        ddpm_table(schedule, schedule.timesteps(5), **change)


@pytest.mark.parametrize("eta", [-0.1, float("nan"), float("inf")])
def test_bad_eta_is_named(eta: float) -> None:
    schedule = NoiseSchedule.linear()
    with pytest.raises(ValueError, match="eta is"):
        ddim_table(schedule, schedule.timesteps(5), eta=eta)
