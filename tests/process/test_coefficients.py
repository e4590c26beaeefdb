"""Every row of the tables, executed in float64, is one step of the libraries' samplers, with the same noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from torch import Tensor

from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import PREDICTION_TYPES, StepTable, ddim_inversion_table, ddim_table, ddpm_table

SHAPE = (2, 3, 4, 4)


def execute(table: StepTable, index: int, x: Tensor, out: Tensor, z: Tensor, clip: float | None) -> Tensor:
    """The definition of a row, in float64."""
    a, b, c, d, e, _, s = table.rows[index].tolist()
    if table.log_variance is not None:
        out, v = out.chunk(2, dim=1)
        low, high = table.log_variance[index].tolist()
        if table.learned == "variance":
            v = v.log()
        std = s * torch.exp(0.5 * ((v + 1) / 2 * high + (1 - v) / 2 * low))
    else:
        std = torch.full_like(x, s)
    x0 = a * x + b * out
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    return c * x0 + d * x + e * out + std * z


def in_float64(scheduler: Any, schedule: NoiseSchedule) -> None:
    """Lets diffusers' scheduler compute from our float64 tables, so that only the formulas are compared."""
    scheduler.betas = schedule.betas
    scheduler.alphas = 1 - schedule.betas
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    one = torch.tensor(1.0, dtype=torch.float64)
    if isinstance(scheduler, DDPMScheduler):
        scheduler.one = one
    else:
        last = one if scheduler.config.set_alpha_to_one else schedule.alphas_cumprod[0]
        scheduler.final_alpha_cumprod = scheduler.initial_alpha_cumprod = last


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"])
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
    learned = variance_type.startswith("learned")
    for index in sorted({0, 1, count // 2, count - 2, count - 1}):
        x, z = torch.randn(2, *SHAPE, dtype=torch.float64)
        out = torch.randn(2, 6 if learned else 3, 4, 4, dtype=torch.float64)
        if variance_type == "learned":
            out[:, 3:] = out[:, 3:].exp()  # a variance
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=z, **__: z)
        expected = theirs.step(out, theirs.timesteps[index], x).prev_sample
        torch.testing.assert_close(execute(table, index, x, out, z, clip), expected, rtol=1e-9, atol=1e-9)


def test_ddpm_on_a_list_of_timesteps_is_that_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, visited = NoiseSchedule.linear(), [999, 900, 500, 7, 3]
    theirs = DDPMScheduler(clip_sample=False)
    theirs.set_timesteps(timesteps=visited)
    in_float64(theirs, schedule)
    table = ddpm_table(schedule, visited)
    assert table.timesteps.tolist() == visited
    for index, t in enumerate(visited):
        x, out, z = torch.randn(3, *SHAPE, dtype=torch.float64)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=z, **__: z)
        expected = theirs.step(out, t, x).prev_sample
        torch.testing.assert_close(execute(table, index, x, out, z, None), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("rederive", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(("to_one", "offset"), [(True, 0), (False, 1)])
def test_ddim_rows_are_steps_of_diffusers(
    eta: float, prediction_type: str, rederive: bool, clip: float | None, to_one: bool, offset: int
) -> None:
    schedule = NoiseSchedule.cosine()
    theirs = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        clip_sample=clip is not None,
        set_alpha_to_one=to_one,
        steps_offset=offset,
    )
    theirs.set_timesteps(10)
    in_float64(theirs, schedule)
    table = ddim_table(
        schedule,
        schedule.timesteps(10, steps_offset=offset),
        prediction_type=prediction_type,
        eta=eta,
        use_clipped_model_output=rederive,
        set_alpha_to_one=to_one,
    )
    assert table.timesteps.tolist() == theirs.timesteps.tolist()
    for index, t in enumerate(table.timesteps.tolist()):
        x, out, z = torch.randn(3, *SHAPE, dtype=torch.float64)
        expected = theirs.step(
            out, t, x, eta=eta, use_clipped_model_output=rederive, variance_noise=z if eta > 0 else None
        ).prev_sample
        torch.testing.assert_close(execute(table, index, x, out, z, clip), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr_is_that_of_diffusers(
    kind: Any, prediction_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = NoiseSchedule.scaled_linear(beta_start=0.00085, beta_end=0.012).rescale_zero_terminal_snr()
    theirs = kind(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(10)
    in_float64(theirs, schedule)
    build = ddpm_table if kind is DDPMScheduler else ddim_table
    table = build(schedule, schedule.timesteps(10, "trailing"), prediction_type=prediction_type)
    assert table.start == (0, 1)
    for index, t in enumerate(theirs.timesteps.tolist()):
        x, out, z = torch.randn(3, *SHAPE, dtype=torch.float64)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, z=z, **__: z)
        expected = theirs.step(out, t, x).prev_sample
        torch.testing.assert_close(execute(table, index, x, out, z, 1.0), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("build", [ddpm_table, ddim_table])
def test_epsilon_without_signal_is_named(build: Any) -> None:
    schedule = NoiseSchedule.linear().rescale_zero_terminal_snr()
    with pytest.raises(ValueError, match=r"prediction_type is 'epsilon' but .* zero terminal SNR .* timestep 999"):
        build(schedule, schedule.timesteps(10, "trailing"))
    build(schedule, schedule.timesteps(10, "leading"))  # starts where there is signal


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_inversion_rows_are_steps_of_diffusers(
    prediction_type: str, to_one: bool, clip: float | None, spacing: str
) -> None:
    schedule = NoiseSchedule.linear()
    theirs = DDIMInverseScheduler(
        prediction_type=prediction_type,
        clip_sample=clip is not None,
        set_alpha_to_one=to_one,
        timestep_spacing=spacing,
    )
    theirs.set_timesteps(10)
    in_float64(theirs, schedule)
    timesteps = schedule.timesteps(10, spacing)
    if prediction_type == "sample" and to_one:
        with pytest.raises(ValueError, match="prediction_type is 'sample' but set_alpha_to_one is True"):
            ddim_inversion_table(schedule, timesteps, prediction_type=prediction_type)
        return
    table = ddim_inversion_table(schedule, timesteps, prediction_type=prediction_type, set_alpha_to_one=to_one)
    assert table.timesteps.tolist() == sorted(timesteps.tolist())
    for index, t in enumerate(table.timesteps.tolist()):
        x, out, z = torch.randn(3, *SHAPE, dtype=torch.float64)
        expected = theirs.step(out, t, x).prev_sample
        torch.testing.assert_close(execute(table, index, x, out, z, clip), expected, rtol=1e-9, atol=1e-9)


def test_inversion_undoes_ddim_where_epsilon_does_not_change() -> None:
    schedule = NoiseSchedule.linear()
    timesteps = schedule.timesteps(20)
    x, out = torch.randn(2, *SHAPE, dtype=torch.float64)
    up, down = ddim_inversion_table(schedule, timesteps), ddim_table(schedule, timesteps)
    assert up.start == (1, 0)
    assert up.levels[-1].tolist() == pytest.approx(down.start)
    state = x
    for table in (up, down):
        for index in range(len(table)):
            state = execute(table, index, state, out, x, None)
    torch.testing.assert_close(state, x, rtol=0, atol=1e-9)


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
