"""Every row of the tables, executed in float64, is one step of diffusers' schedulers, and keeps to its levels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    RePaintScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from table_rows import SHAPE, compare, execute
from torch import Tensor

from fastddpm.process.methods import METHODS, method_table, own_settings, owners
from fastddpm.process.multistep import dpmsolver_table
from fastddpm.process.repaint import repaint_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import PREDICTION_TYPES, ddim_inversion_table, ddim_table, ddpm_table

LINEAR = NoiseSchedule.linear()
ZERO_SNR = NoiseSchedule.scaled_linear(beta_start=0.00085, beta_end=0.012).rescale_zero_terminal_snr()
ONE = torch.tensor(1.0, dtype=torch.float64)


def in_float64(scheduler: Any, schedule: NoiseSchedule) -> Any:
    """Let diffusers' scheduler compute from our float64 tables, so that only the formulas are compared."""
    bar = schedule.alphas_cumprod
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = schedule.betas, 1 - schedule.betas, bar
    if isinstance(scheduler, DDPMScheduler):
        scheduler.one = ONE
    elif isinstance(scheduler, DPMSolverMultistepScheduler):
        bar = torch.where(bar == 0, 2.0**-24, bar)
        last = ((1 - bar[:1]) / bar[:1]).sqrt() * (scheduler.config.final_sigmas_type == "sigma_min")
        visited = bar[scheduler.timesteps]
        scheduler.sigmas = torch.cat([((1 - visited) / visited).sqrt(), last])
    else:
        to_one = scheduler.config.get("set_alpha_to_one", True)
        scheduler.final_alpha_cumprod = scheduler.initial_alpha_cumprod = ONE if to_one else bar[0]
    return scheduler


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What diffusers' `randn_tensor` returns: the last of the list."""
    drawn: list[Tensor] = []
    for name in ("ddpm", "repaint"):
        monkeypatch.setattr(f"diffusers.schedulers.scheduling_{name}.randn_tensor", lambda *_, **__: drawn[-1])
    return drawn


# The variance, what is predicted, the grid and clipping act on different columns: each is varied alone.
DDPM: dict[str, tuple[dict[str, Any], int, str, bool]] = {
    **{variance: ({"variance_type": variance}, 10, "leading", True) for variance in (
        "fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"
    )},
    **{predicts: ({"prediction_type": predicts}, 10, "leading", False) for predicts in PREDICTION_TYPES},
    "all steps": ({"variance_type": "learned_range"}, 1000, "leading", True),
    "trailing": ({}, 7, "trailing", True),
    "linspace": ({"variance_type": "fixed_large"}, 6, "linspace", False),
}  # fmt: skip


@pytest.mark.parametrize("case", DDPM)
def test_ddpm(case: str, draws: list[Tensor]) -> None:
    options, count, spacing, clip = DDPM[case]
    theirs = DDPMScheduler(clip_sample=clip, timestep_spacing=spacing, **options)
    theirs.set_timesteps(count)
    in_float64(theirs, LINEAR)

    def step(index: int, x: Tensor, out: Tensor, z: Tensor) -> Tensor:
        draws.append(z)
        return theirs.step(out, theirs.timesteps[index], x).prev_sample

    learned = options.get("variance_type", "").startswith("learned")
    compare(
        ddpm_table(LINEAR, LINEAR.timesteps(count, spacing), **options),
        step,
        clip=1.0 if clip else None,
        channels=6 if learned else 3,
        variance=case == "learned",
        rows=(0, 1, count // 2, count - 2, count - 1),
    )


def test_ddpm_on_a_list_of_timesteps(draws: list[Tensor]) -> None:
    visited = [999, 900, 500, 7, 3]
    theirs = DDPMScheduler(clip_sample=False)
    theirs.set_timesteps(timesteps=visited)
    in_float64(theirs, LINEAR)

    def step(index: int, x: Tensor, out: Tensor, z: Tensor) -> Tensor:
        draws.append(z)
        return theirs.step(out, visited[index], x).prev_sample

    table = ddpm_table(LINEAR, visited)
    assert table.timesteps.tolist() == visited
    compare(table, step)


# eta and how epsilon is found act on the same columns, for each prediction type; where the table ends does not.
@pytest.mark.parametrize("rederive", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("eta", "clip", "to_one", "offset"), [(0.0, 1.0, True, 0), (0.3, None, False, 1), (1.0, 1.0, True, 0)]
)
def test_ddim(rederive: bool, prediction_type: str, eta: float, clip: float | None, to_one: bool, offset: int) -> None:
    schedule = NoiseSchedule.cosine()
    options: dict[str, Any] = {"prediction_type": prediction_type, "set_alpha_to_one": to_one}
    theirs = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=clip is not None, steps_offset=offset, **options
    )
    theirs.set_timesteps(10)
    in_float64(theirs, schedule)
    timesteps = schedule.timesteps(10, steps_offset=offset)
    table = ddim_table(schedule, timesteps, eta=eta, use_clipped_model_output=rederive, **options)
    assert table.timesteps.tolist() == theirs.timesteps.tolist()

    def step(index: int, x: Tensor, out: Tensor, z: Tensor) -> Tensor:
        noise = z if eta > 0 else None
        more = {"eta": eta, "use_clipped_model_output": rederive, "variance_noise": noise}
        return theirs.step(out, theirs.timesteps[index], x, **more).prev_sample

    compare(table, step, clip=clip)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("to_one", "clip", "spacing"), [(True, None, "trailing"), (False, 1.0, "leading")])
def test_inversion(prediction_type: str, to_one: bool, clip: float | None, spacing: str) -> None:
    options: dict[str, Any] = {"prediction_type": prediction_type, "set_alpha_to_one": to_one}
    timesteps = LINEAR.timesteps(10, spacing)
    if prediction_type == "sample" and to_one:
        with pytest.raises(ValueError, match="prediction_type is 'sample' but set_alpha_to_one is True"):
            ddim_inversion_table(LINEAR, timesteps, **options)
        return
    theirs = DDIMInverseScheduler(clip_sample=clip is not None, timestep_spacing=spacing, **options)
    theirs.set_timesteps(10)
    in_float64(theirs, LINEAR)
    table = ddim_inversion_table(LINEAR, timesteps, **options)
    visited = table.timesteps.tolist()
    assert visited == sorted(timesteps.tolist())
    compare(table, lambda i, x, out, z: theirs.step(out, visited[i], x).prev_sample, clip=clip)


# The order, the end and the number of steps decide together; what is predicted does not touch that.
@pytest.mark.parametrize("count", [1, 2, 3, 14, 20])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(("order", "lower"), [(1, True), (2, True), (2, False)])
def test_dpmsolver(count: int, final: str, order: int, lower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run, each step from the same x and the same past."""
    options: dict[str, Any] = {
        "final_sigmas_type": final,
        "lower_order_final": lower,
        "solver_order": order,
        "prediction_type": PREDICTION_TYPES[count % 3],
    }
    theirs = DPMSolverMultistepScheduler(**options)
    theirs.set_timesteps(count)
    in_float64(theirs, LINEAR)
    table = dpmsolver_table(LINEAR, theirs.timesteps, **options)
    assert table.multistep == bool((table.rows[:, 5] != 0).any())
    monkeypatch.setattr(torch, "float32", torch.float64)  # their step rounds the sample to float32 on its way
    compare(table, lambda i, x, out, z: theirs.step(out, theirs.timesteps[i], x).prev_sample)


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmsolver++"])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_terminal_snr(
    method: str, prediction_type: str, draws: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: dict[str, Any] = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}
    theirs = kinds[method](
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type,
        rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip
    theirs.set_timesteps(10)
    in_float64(theirs, ZERO_SNR)
    table = method_table(method, ZERO_SNR, ZERO_SNR.timesteps(10, "trailing"), prediction_type=prediction_type)
    if method != "dpmsolver++":
        assert table.start == (0, 1)
    monkeypatch.setattr(torch, "float32", torch.float64)

    def step(index: int, x: Tensor, out: Tensor, z: Tensor) -> Tensor:
        draws.append(z)
        return theirs.step(out, theirs.timesteps[index], x).prev_sample

    compare(table, step, clip=None if method == "dpmsolver++" else 1.0)
    if method != "dpmsolver++":  # which starts at abar 2**-24, as diffusers does
        with pytest.raises(ValueError, match=r"prediction_type is 'epsilon' but .* zero terminal SNR .* timestep 999"):
            method_table(method, ZERO_SNR, ZERO_SNR.timesteps(10, "trailing"))
        method_table(method, ZERO_SNR, ZERO_SNR.timesteps(10, "leading"))  # starts where there is signal


# -- against papers ---------------------------------------------------------------------------------------------------


def test_inversion_undoes_ddim_where_epsilon_does_not_change() -> None:
    timesteps = LINEAR.timesteps(20)
    x, out = torch.randn(2, *SHAPE, dtype=torch.float64)
    up, down = ddim_inversion_table(LINEAR, timesteps), ddim_table(LINEAR, timesteps)
    assert up.start == (1, 0)
    assert up.levels[-1].tolist() == pytest.approx(down.start)
    state = x
    for table in (up, down):
        for index in range(len(table)):
            state, _ = execute(table, index, state, out)
    torch.testing.assert_close(state, x, rtol=0, atol=1e-9)


def test_posterior_is_that_of_bayes() -> None:
    """Mean and variance of q(x_{t-1} | x_t, x_0) from the product of two Gaussians."""
    schedule = NoiseSchedule.linear(50)
    timesteps = schedule.timesteps()
    table, bar = ddpm_table(schedule, timesteps, prediction_type="sample"), schedule.alphas_cumprod
    for index, t in enumerate(timesteps.tolist()[:-1]):
        alpha, beta = 1 - schedule.betas[t], schedule.betas[t]
        # prior N(sqrt(bar_prev) x0, 1 - bar_prev), likelihood of x_t: N(sqrt(alpha) x_prev, beta)
        precision = 1 / (1 - bar[t - 1]) + alpha / beta
        of_x0, of_x = bar[t - 1].sqrt() / (1 - bar[t - 1]) / precision, alpha.sqrt() / beta / precision
        expected = torch.stack([of_x0, of_x, precision.rsqrt()])
        torch.testing.assert_close(table.rows[index, [2, 3, 6]], expected, rtol=1e-9, atol=0)


def test_second_order_is_the_formula_of_the_paper() -> None:
    """Lu et al. 2022b, algorithm 2, for the middle step of three."""
    schedule, timesteps = NoiseSchedule.cosine(), [900, 600, 250]
    signal, noise = schedule.alphas_cumprod.sqrt(), (1 - schedule.alphas_cumprod).sqrt()
    lam = (signal / noise).log()
    s1, s0, t = timesteps
    h = lam[t] - lam[s0]
    r = (lam[s0] - lam[s1]) / h
    x, x0, x0_prev = torch.randn(3, *SHAPE, dtype=torch.float64)
    slope = (1 + 1 / (2 * r)) * x0 - x0_prev / (2 * r)
    expected = noise[t] / noise[s0] * x - signal[t] * torch.expm1(-h) * slope
    table = dpmsolver_table(schedule, timesteps, prediction_type="sample")
    torch.testing.assert_close(execute(table, 1, x, x0, x0_prev=x0_prev)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_first_order_is_ddim(prediction_type: str) -> None:
    first = dpmsolver_table(LINEAR, LINEAR.timesteps(12), prediction_type=prediction_type, solver_order=1)
    ddim = ddim_table(LINEAR, LINEAR.timesteps(12), prediction_type=prediction_type)
    assert not first.multistep
    compare(first, lambda i, x, out, z: execute(ddim, i, x, out)[0])


def test_last_step_gives_x0_without_noise() -> None:
    for table in (ddpm_table(LINEAR, LINEAR.timesteps()), ddim_table(LINEAR, LINEAR.timesteps(), eta=1.0)):
        assert table.rows[-1, 2:].tolist() == pytest.approx([1, 0, 0, 0, 0], abs=1e-12)
        assert table.levels[-1].tolist() == [1, 0]


def test_skipping_starts_with_a_first_order_step() -> None:
    timesteps = LINEAR.timesteps(20, multistep=True)
    table = dpmsolver_table(LINEAR, timesteps)
    rest = table.skip(5)
    assert len(rest) == 15
    torch.testing.assert_close(rest.rows, dpmsolver_table(LINEAR, timesteps[5:]).rows, rtol=1e-12, atol=1e-15)
    bar = LINEAR.alphas_cumprod[timesteps[5]]
    assert rest.start == pytest.approx((float(bar.sqrt()), float((1 - bar).sqrt())))
    assert rest.timesteps.tolist() == timesteps[5:].tolist()
    assert rest.needs_network.all()
    assert table.skip(0) is table
    learned = ddpm_table(LINEAR, timesteps, variance_type="learned_range").skip(3)
    assert learned.log_variance is not None
    assert len(learned.log_variance) == len(learned.levels) == 17
    assert learned.shifts == "mean"


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
        table = table.skip(data.draw(st.integers(0, len(table) - 1)))
        before = torch.cat([torch.tensor([table.start], dtype=torch.float64), table.levels[:-1]])
        for row, (signal, noise), after in zip(table.rows.tolist(), before.tolist(), table.levels, strict=True):
            a, b, c, d, e, f, s = row
            # what the network says of x = signal * x0 + noise * epsilon, by x0 and by epsilon
            out_x0, out_eps = {"epsilon": (0, 1), "sample": (1, 0), "v_prediction": (-noise, signal)}[prediction_type]
            if b != 0 or a != 0:
                assert (a * signal + b * out_x0, a * noise + b * out_eps) == pytest.approx((1, 0), abs=1e-9)
            reached = (c + f + d * signal + e * out_x0, math.hypot(d * noise + e * out_eps, s))
            assert reached == pytest.approx(after.tolist(), rel=1e-7, abs=1e-7)


# -- RePaint ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "jump_length", "jump_n_sample"), [(50, 10, 10), (20, 5, 3), (20, 1, 2), (7, 3, 2), (5, 5, 4), (6, 2, 1)]
)
def test_repaint_walk_is_that_of_diffusers(count: int, jump_length: int, jump_n_sample: int) -> None:
    theirs = RePaintScheduler(num_train_timesteps=count)
    theirs.set_timesteps(count, jump_length, jump_n_sample)
    jumps = {"jump_length": jump_length, "jump_n_sample": jump_n_sample}
    table = repaint_table(NoiseSchedule.linear(count), list(range(count))[::-1], **jumps)  # type: ignore[arg-type]
    visited, last = [], theirs.timesteps[0].item() + 1
    for t in theirs.timesteps.tolist():  # as its pipeline does: a timestep that rises undoes the one before
        visited.append((t, True) if t < last else (last, False))
        last = t
    assert list(zip(table.timesteps.tolist(), table.needs_network.tolist(), strict=True)) == visited


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_repaint_steps_are_those_of_diffusers(eta: float, draws: list[Tensor]) -> None:
    """Down and up, with a mask that keeps nothing, so that only the unknown region is compared."""
    schedule = NoiseSchedule.linear(20)
    theirs = RePaintScheduler(num_train_timesteps=20, eta=eta, clip_sample=False)
    theirs.set_timesteps(20, 5, 3)
    theirs.betas, theirs.alphas_cumprod, theirs.final_alpha_cumprod = schedule.betas, schedule.alphas_cumprod, ONE
    visited, nothing = [20, *theirs.timesteps.tolist()], torch.zeros(SHAPE, dtype=torch.float64)

    def step(index: int, x: Tensor, out: Tensor, z: Tensor) -> Tensor:
        draws.append(z)
        last, t = visited[index : index + 2]
        return theirs.step(out, t, x, nothing, nothing).prev_sample if t < last else theirs.undo_step(x, last)

    compare(repaint_table(schedule, schedule.timesteps(), jump_length=5, jump_n_sample=3, eta=eta), step)


@pytest.mark.parametrize(("jump_length", "jump_n_sample"), [(10, 10), (3, 4), (1, 2)])
def test_repaint_walk_is_that_of_the_paper(jump_length: int, jump_n_sample: int) -> None:
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
    assert table.needs_network.tolist() == (torch.tensor(levels).diff() <= 0).tolist()


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_repaint_rows(variance_type: str) -> None:
    """Rows down are DDPM's; a row up leads exactly from one strided level to the next."""
    timesteps = LINEAR.timesteps(10)
    down = ddpm_table(LINEAR, timesteps, variance_type=variance_type)
    table = repaint_table(LINEAR, timesteps, jump_length=2, jump_n_sample=3, variance_type=variance_type)
    assert table.needs_network[table.rows[:, 0] != 0].all()
    before = [table.start, *map(tuple, table.levels.tolist())]
    for index, ((signal, noise), needed) in enumerate(zip(before, table.needs_network.tolist(), strict=False)):
        source = timesteps.tolist().index(int(table.timesteps[index]))
        d, s = table.rows[index, [3, 6]].tolist()
        if needed:
            assert torch.equal(table.rows[index], down.rows[source])
        else:
            assert not bool(table.rows[index, [0, 1, 2, 4, 5]].any())
            assert (d * signal, math.hypot(d * noise, s)) == pytest.approx(table.levels[index].tolist(), rel=1e-9)
        if table.log_variance is not None and down.log_variance is not None:
            expected = down.log_variance[source].tolist() if needed else [0, 0]
            assert table.log_variance[index].tolist() == expected
    assert table.levels[-1].tolist() == [1, 0]


# -- methods and bad settings -----------------------------------------------------------------------------------------


def test_a_method_has_the_settings_of_its_function() -> None:
    assert METHODS["ddim"].settings == {
        "prediction_type": "epsilon", "eta": 0.0, "use_clipped_model_output": False, "set_alpha_to_one": True
    }  # fmt: skip
    assert "dpmsolver++" in owners("solver_order")
    assert "ddpm" not in owners("solver_order")
    # What describes the network may be said for every method, and so may a setting at its owner's default.
    table = method_table("ddim", LINEAR, [5, 0], eta=0.5, variance_type="learned", solver_order=2)
    assert torch.equal(table.rows, ddim_table(LINEAR, [5, 0], eta=0.5).rows)
    given = {"eta": 0.5, "convention": "diffusers", "variance_type": "learned", "clip_sample": False}
    assert own_settings("ddim", given) == {"eta": 0.5, "variance_type": "learned", "clip_sample": False}


@pytest.mark.parametrize(
    ("build", "change", "message"),
    [
        (ddpm_table, {"prediction_type": "score"}, "'score', must be one of epsilon, sample, v_prediction"),
        (ddpm_table, {"variance_type": "fixed"}, "variance_type is 'fixed', must be one of"),
        (ddpm_table, {"convention": "openai"}, "'openai', must be one of diffusers, guided_diffusion"),
        *((ddim_table, {"eta": eta}, "eta is") for eta in (-0.1, float("nan"), float("inf"))),
        (dpmsolver_table, {"solver_order": 4}, "solver_order is 4, must be 1, 2 or 3"),
        (dpmsolver_table, {"solver_order": True}, "solver_order is True"),
        (dpmsolver_table, {"final_sigmas_type": "one"}, "'one', must be 'zero' or 'sigma_min'"),
        (dpmsolver_table, {"prediction_type": "score"}, "prediction_type is 'score'"),
        (repaint_table, {"jump_length": 0}, "jump_length is 0, must be an integer of at least 1"),
        (repaint_table, {"jump_n_sample": 1.5}, "jump_n_sample is 1.5"),
        (repaint_table, {"order": "random"}, "order is 'random', must be 'diffusers' or 'repaint'"),
        (repaint_table, {"variance_type": "learned_range", "eta": 1.0}, "variance_type is 'learned_range' but eta"),
        (repaint_table, {"variance_type": "fixed"}, "variance_type is 'fixed'"),
        (lambda *_, **__: ddpm_table(LINEAR, [3, 0]).skip(-1), {}, "index is -1, must be from 0 to 1"),
        (lambda *_, **__: ddpm_table(LINEAR, [3, 0]).skip(2), {}, "index is 2, must be from 0 to 1"),
        (lambda *_, **__: method_table("euler?", LINEAR, [3, 0]), {}, "'euler[?]', must be one of ddpm, ddim, dpm"),
    ],
)
def test_bad_settings(build: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(LINEAR, LINEAR.timesteps(5), **change)
