"""DPM-Solver++ and RePaint against diffusers, the papers' formulas, and their own definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, RePaintScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastddpm.process.multistep import dpmsolver_table
from fastddpm.process.repaint import repaint_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import PREDICTION_TYPES, StepTable, ddim_inversion_table, ddim_table, ddpm_table

SHAPE = (2, 3, 4, 4)


def execute(
    table: StepTable, index: int, x: Tensor, out: Tensor, x0_prev: Tensor | None = None, z: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of a row, in float64: (next, x0)."""
    a, b, c, d, e, f, s = table.rows[index].tolist()
    x0 = a * x + b * out
    following = c * x0 + d * x + e * out
    if f != 0:
        assert x0_prev is not None
        following = following + f * x0_prev
    return following if z is None else following + s * z, x0


def diffusers_solver(schedule: NoiseSchedule, count: int, **options: Any) -> DPMSolverMultistepScheduler:
    """diffusers' scheduler with float64 noise levels, so that only the formulas are compared."""
    theirs = DPMSolverMultistepScheduler(num_train_timesteps=schedule.num_train_timesteps, **options)
    theirs.set_timesteps(count)
    bar = schedule.alphas_cumprod
    bar = torch.where(bar == 0, 2.0**-24, bar)
    last = torch.zeros(1, dtype=torch.float64)
    if options.get("final_sigmas_type") == "sigma_min":
        last = ((1 - bar[:1]) / bar[:1]).sqrt()
    visited = bar[theirs.timesteps]
    theirs.sigmas = torch.cat([((1 - visited) / visited).sqrt(), last])
    return theirs


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("count", [1, 2, 5, 14, 15, 20, 50, 250])
def test_timesteps_are_those_of_diffusers(spacing: str, count: int) -> None:
    theirs = DPMSolverMultistepScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(count)
    assert NoiseSchedule.linear().timesteps(count, spacing, multistep=True).tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("solver_order", [1, 2])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 14, 20])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("lower_order_final", [True, False])
def test_steps_are_those_of_diffusers(
    solver_order: int,
    prediction_type: str,
    count: int,
    final: str,
    lower_order_final: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole run, each step from the same x and the same past."""
    schedule = NoiseSchedule.linear()
    options: dict[str, Any] = {
        "final_sigmas_type": final,
        "lower_order_final": lower_order_final,
        "solver_order": solver_order,
    }
    theirs = diffusers_solver(schedule, count, prediction_type=prediction_type, **options)
    table = dpmsolver_table(schedule, theirs.timesteps, prediction_type=prediction_type, **options)
    assert table.multistep == bool((table.rows[:, 5] != 0).any())
    monkeypatch.setattr(torch, "float32", torch.float64)  # their step rounds the sample to float32 on its way
    x0_prev = None
    for index, t in enumerate(theirs.timesteps):
        x, out = torch.randn(2, *SHAPE, dtype=torch.float64)
        following, x0_prev = execute(table, index, x, out, x0_prev)
        torch.testing.assert_close(following, theirs.step(out, t, x).prev_sample, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr_is_that_of_diffusers(prediction_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = NoiseSchedule.linear().rescale_zero_terminal_snr()
    options: dict[str, Any] = {"prediction_type": prediction_type}
    theirs = diffusers_solver(schedule, 10, timestep_spacing="trailing", rescale_betas_zero_snr=True, **options)
    table = dpmsolver_table(schedule, schedule.timesteps(10, "trailing"), **options)
    monkeypatch.setattr(torch, "float32", torch.float64)
    x0_prev = None
    for index, t in enumerate(theirs.timesteps):
        x, out = torch.randn(2, *SHAPE, dtype=torch.float64)
        following, x0_prev = execute(table, index, x, out, x0_prev)
        torch.testing.assert_close(following, theirs.step(out, t, x).prev_sample, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="prediction_type is 'epsilon' but the schedule has zero terminal SNR"):
        dpmsolver_table(schedule, schedule.timesteps(10, "trailing"))


def test_second_order_is_the_formula_of_the_paper() -> None:
    """Lu et al. 2022b, algorithm 2, for the middle step of three."""
    schedule = NoiseSchedule.cosine()
    timesteps = [900, 600, 250]
    signal = schedule.alphas_cumprod.sqrt()
    noise = (1 - schedule.alphas_cumprod).sqrt()
    lam = (signal / noise).log()
    s1, s0, t = timesteps
    h, h_before = lam[t] - lam[s0], lam[s0] - lam[s1]
    r = h_before / h
    x, x0, x0_prev = torch.randn(3, *SHAPE, dtype=torch.float64)
    slope = (1 + 1 / (2 * r)) * x0 - x0_prev / (2 * r)
    expected = noise[t] / noise[s0] * x - signal[t] * torch.expm1(-h) * slope
    table = dpmsolver_table(schedule, timesteps, prediction_type="sample")
    torch.testing.assert_close(execute(table, 1, x, x0, x0_prev)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_first_order_is_ddim(prediction_type: str) -> None:
    schedule = NoiseSchedule.linear()
    first = dpmsolver_table(schedule, schedule.timesteps(12), prediction_type=prediction_type, solver_order=1)
    ddim = ddim_table(schedule, schedule.timesteps(12), prediction_type=prediction_type)
    assert not first.multistep
    for index in range(12):
        x, out = torch.randn(2, *SHAPE, dtype=torch.float64)
        torch.testing.assert_close(
            execute(first, index, x, out)[0], execute(ddim, index, x, out)[0], rtol=1e-9, atol=1e-9
        )


def test_skipping_starts_with_a_first_order_step() -> None:
    schedule = NoiseSchedule.linear()
    timesteps = schedule.timesteps(20, multistep=True)
    table = dpmsolver_table(schedule, timesteps)
    rest = table.skip(5)
    assert len(rest) == 15
    torch.testing.assert_close(rest.rows, dpmsolver_table(schedule, timesteps[5:]).rows, rtol=1e-12, atol=1e-15)
    bar = schedule.alphas_cumprod[timesteps[5]]
    assert rest.start == pytest.approx((float(bar.sqrt()), float((1 - bar).sqrt())))
    assert rest.timesteps.tolist() == timesteps[5:].tolist()
    assert rest.needs_network.all()
    assert table.skip(0) is table
    learned = ddpm_table(schedule, timesteps, variance_type="learned_range").skip(3)
    assert learned.log_variance is not None
    assert len(learned.log_variance) == len(learned.levels) == 17
    for index in (-1, 20):
        with pytest.raises(ValueError, match=f"index is {index}, must be from 0 to 19"):
            table.skip(index)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_every_row_keeps_to_its_levels(prediction_type: str, data: st.DataObject) -> None:
    """With the true x0 and epsilon a row leads from its level to the next, in signal and in variance."""
    build = {"linear": NoiseSchedule.linear, "cosine": NoiseSchedule.cosine, "sigmoid": NoiseSchedule.sigmoid}
    schedule = build[data.draw(st.sampled_from(sorted(build)))](data.draw(st.integers(2, 300)))
    total = schedule.num_train_timesteps
    visited = sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1, max_size=20)), reverse=True)
    common: dict[str, Any] = {"prediction_type": prediction_type}
    tables = [
        ddpm_table(schedule, visited, **common),
        ddim_table(schedule, visited, eta=data.draw(st.floats(0, 1)), **common),
        ddim_table(schedule, visited, use_clipped_model_output=True, set_alpha_to_one=False, **common),
        ddim_inversion_table(schedule, visited, set_alpha_to_one=False, **common),
        dpmsolver_table(schedule, visited, solver_order=data.draw(st.integers(1, 2)), **common),
        repaint_table(schedule, visited, jump_length=2, jump_n_sample=3, **common),
    ]
    for table in tables:
        start = data.draw(st.integers(0, len(table) - 1))
        table = table.skip(start)
        before = torch.cat([torch.tensor([table.start], dtype=torch.float64), table.levels[:-1]])
        for row, (signal, noise), after in zip(table.rows.tolist(), before.tolist(), table.levels, strict=True):
            a, b, c, d, e, f, s = row
            # what the network says of x = signal * x0 + noise * epsilon, by x0 and by epsilon
            out_x0, out_eps = {"epsilon": (0, 1), "sample": (1, 0), "v_prediction": (-noise, signal)}[prediction_type]
            if b != 0 or a != 0:
                assert (a * signal + b * out_x0, a * noise + b * out_eps) == pytest.approx((1, 0), abs=1e-9)
            reached = (c + f + d * signal + e * out_x0, math.hypot(d * noise + e * out_eps, s))
            assert reached == pytest.approx(after.tolist(), rel=1e-7, abs=1e-7)


# -- RePaint --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "jump_length", "jump_n_sample"), [(50, 10, 10), (20, 5, 3), (20, 1, 2), (7, 3, 2), (5, 5, 4), (6, 2, 1)]
)
def test_walk_is_that_of_diffusers(count: int, jump_length: int, jump_n_sample: int) -> None:
    theirs = RePaintScheduler(num_train_timesteps=count)
    theirs.set_timesteps(count, jump_length, jump_n_sample)
    table = repaint_table(
        NoiseSchedule.linear(count), list(range(count))[::-1], jump_length=jump_length, jump_n_sample=jump_n_sample
    )
    visited, last = [], theirs.timesteps[0].item() + 1
    for t in theirs.timesteps.tolist():  # as its pipeline does: a timestep that rises undoes the one before
        visited.append((t, True) if t < last else (last, False))
        last = t
    assert list(zip(table.timesteps.tolist(), table.needs_network.tolist(), strict=True)) == visited


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_steps_are_those_of_diffusers_repaint(eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down and up, with a mask that keeps nothing, so that only the unknown region is compared."""
    schedule = NoiseSchedule.linear(20)
    theirs = RePaintScheduler(num_train_timesteps=20, eta=eta, clip_sample=False)
    theirs.set_timesteps(20, 5, 3)
    theirs.betas, theirs.alphas_cumprod = schedule.betas, schedule.alphas_cumprod
    theirs.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    table = repaint_table(schedule, schedule.timesteps(), jump_length=5, jump_n_sample=3, eta=eta)
    last, nothing = 20, torch.zeros(SHAPE, dtype=torch.float64)
    for index, t in enumerate(theirs.timesteps.tolist()):
        x, out, z = torch.randn(3, *SHAPE, dtype=torch.float64)
        monkeypatch.setattr("diffusers.schedulers.scheduling_repaint.randn_tensor", lambda *_, z=z, **__: z)
        down = t < last
        expected = theirs.step(out, t, x, nothing, nothing).prev_sample if down else theirs.undo_step(x, last)
        torch.testing.assert_close(execute(table, index, x, out, z=z)[0], expected, rtol=1e-9, atol=1e-9)
        last = t


@pytest.mark.parametrize(("jump_length", "jump_n_sample"), [(10, 10), (3, 4), (1, 2)])
def test_walk_is_that_of_the_paper(jump_length: int, jump_n_sample: int) -> None:
    """`get_schedule_jump` of the original: the levels that x passes through, -1 being the finished image."""
    count = 30
    jumps = dict.fromkeys(range(0, count - jump_length, jump_length), jump_n_sample - 1)
    t, levels = count, []
    while t >= 1:
        t -= 1
        levels.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump_length):
                t += 1
                levels.append(t)
    levels.append(-1)
    schedule = NoiseSchedule.linear(count)
    table = repaint_table(
        schedule, schedule.timesteps(), jump_length=jump_length, jump_n_sample=jump_n_sample, order="repaint"
    )
    bar = torch.cat([schedule.alphas_cumprod, torch.ones(1, dtype=torch.float64)])
    torch.testing.assert_close(table.levels[:, 0], bar[levels[1:]].sqrt(), rtol=1e-12, atol=0)
    assert table.start[0] == pytest.approx(float(bar[levels[0]].sqrt()))
    up = torch.tensor(levels).diff() > 0
    assert table.needs_network.tolist() == (~up).tolist()


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_rows_of_repaint(variance_type: str) -> None:
    """Rows down are DDPM's; a row up leads exactly from one strided level to the next."""
    schedule = NoiseSchedule.linear()
    timesteps = schedule.timesteps(10)
    down = ddpm_table(schedule, timesteps, variance_type=variance_type)
    table = repaint_table(schedule, timesteps, jump_length=2, jump_n_sample=3, variance_type=variance_type)
    assert table.needs_network[table.rows[:, 0] != 0].all()
    before = [table.start, *map(tuple, table.levels.tolist())]
    for index in range(len(table)):
        signal, noise = before[index]
        if table.needs_network[index]:
            source = timesteps.tolist().index(int(table.timesteps[index]))
            assert torch.equal(table.rows[index], down.rows[source])
            if down.log_variance is not None:
                assert torch.equal(table.log_variance[index], down.log_variance[source])
        else:
            a, b, c, d, e, f, s = table.rows[index].tolist()
            assert a == b == c == e == f == 0
            assert (d * signal, math.hypot(d * noise, s)) == pytest.approx(table.levels[index].tolist(), rel=1e-9)
            if table.log_variance is not None:
                assert table.log_variance[index].tolist() == [0, 0]
    assert table.levels[-1].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("build", "change", "message"),
    [
        (dpmsolver_table, {"solver_order": 3}, "solver_order is 3, must be 1 or 2"),
        (dpmsolver_table, {"solver_order": True}, "solver_order is True"),
        (dpmsolver_table, {"final_sigmas_type": "one"}, "final_sigmas_type is 'one', must be 'zero' or 'sigma_min'"),
        (dpmsolver_table, {"prediction_type": "score"}, "prediction_type is 'score'"),
        (repaint_table, {"jump_length": 0}, "jump_length is 0, must be an integer of at least 1"),
        (repaint_table, {"jump_n_sample": 1.5}, "jump_n_sample is 1.5"),
        (repaint_table, {"order": "random"}, "order is 'random', must be 'diffusers' or 'repaint'"),
        (repaint_table, {"variance_type": "learned_range", "eta": 1.0}, "variance_type is 'learned_range' but eta"),
        (repaint_table, {"variance_type": "fixed"}, "variance_type is 'fixed'"),
    ],
)
def test_bad_settings_are_named(build: Any, change: dict[str, Any], message: str) -> None:
    schedule = NoiseSchedule.linear()
    with pytest.raises(ValueError, match=message):
        build(schedule, schedule.timesteps(5), **change)
