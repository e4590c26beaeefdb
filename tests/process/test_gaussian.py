"""Samplers against exact answers. For Gaussian data the best prediction has a closed form, and with it every sampler is
a chain of affine maps: the mean and covariance of what it returns are known, and so is the true solution of the ODE.

The recursions here are written from the papers, in terms of x_t and x_0, and share nothing with the tables.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from table_rows import walk
from torch import Tensor

from fastddpm.process.grids import SigmaGrid
from fastddpm.process.methods import METHODS
from fastddpm.process.multistep import dpmsolver_table
from fastddpm.process.repaint import repaint_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import PREDICTION_TYPES, StepTable, ddim_inversion_table, ddim_table, ddpm_table
from fastddpm.sampling.sampler import Sampler

# Of a correct sampler one of 27 statistics lies beyond 4.5 standard errors in 1 of 5000 runs (the seeds are fixed). An
# error in a mean of 2 % of the standard deviation is noticed, and one in a variance of 3 %.
SAMPLES, STANDARD_ERRORS = 50_000, 4.5

Level = tuple[float, float]  # (signal, noise)
SCHEDULE = NoiseSchedule.linear()


@dataclass(frozen=True)
class Data:
    """Independent normal variables; samples have shape [3, 2]."""

    mean: np.ndarray
    std: np.ndarray

    def denoiser(self, level: Level) -> tuple[np.ndarray, np.ndarray]:
        """(p, q) of E[x0 | x] = p x + q."""
        a, b = level
        p = a * self.std**2 / (a**2 * self.std**2 + b**2)
        return p, self.mean * (1 - p * a)

    def uncertainty(self, level: Level) -> np.ndarray:
        """Var[x0 | x]."""
        a, b = level
        return self.std**2 * b**2 / (a**2 * self.std**2 + b**2)

    def at(self, level: Level) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of x at a level of noise."""
        return level[0] * self.mean, np.hypot(level[0] * self.std, level[1])


DATA = Data(np.array([0.5, -1.0, 0.0, 2.0, -0.3, 0.8]), np.array([0.05, 0.3, 0.7, 1.0, 1.6, 0.02]))
NARROW = Data(DATA.mean, np.array([0.05, 0.3, 0.7, 1.0, 0.9, 0.02]))  # what a learned range can hold
NORMAL = Data(DATA.mean, np.ones(6))


def levels_of(schedule: NoiseSchedule, timesteps: Tensor, last: Level = (1.0, 0.0)) -> list[Level]:
    """The level at each timestep, and `last`."""
    bars = schedule.alphas_cumprod[timesteps].tolist()
    return [(math.sqrt(bar), math.sqrt(1 - bar)) for bar in bars] + [last]


def predictor(
    data: Data, schedule: NoiseSchedule, predicts: str, second_half: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The best network there is for `data`; `second_half(t)` gives its further channels, [3, 2]."""
    bars = schedule.alphas_cumprod

    def model(x: Tensor, t: Tensor) -> Tensor:
        bar = float(bars[t[0]])
        a, b = math.sqrt(bar), math.sqrt(1 - bar)
        p, q = (torch.from_numpy(v).view(3, 2) for v in data.denoiser((a, b)))
        wide = x.double()
        x0 = p * wide + q
        eps = (wide - a * x0) / b
        out = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - b * x0}[predicts]
        if second_half is not None:
            out = torch.cat([out, second_half(t[0]).expand_as(out)], dim=1)
        return out.float()

    return model


# -- the recursions ---------------------------------------------------------------------------------------------------


def ddpm_weights(data: Data, level: Level, following: Level, variance: str) -> tuple[float, float, Any]:
    """(of x0, of x, standard deviation) by Bayes' rule: prior q(x_prev | x0), likelihood q(x | x_prev)."""
    (a, _), (a2, b2) = level, following
    alpha = (a / a2) ** 2
    beta = 1 - alpha
    if b2 == 0:
        of_x0, of_x, small = 1.0, 0.0, 0.0
    else:
        precision = 1 / b2**2 + alpha / beta
        of_x0, of_x, small = a2 / b2**2 / precision, math.sqrt(alpha) / beta / precision, 1 / precision
    spread: Any = {"fixed_small": small, "fixed_large": beta}.get(variance)
    if variance == "exact":
        spread = small + of_x0**2 * data.uncertainty(level)
    return of_x0, of_x, np.sqrt(spread)


def ddim_weights(level: Level, following: Level, eta: float) -> tuple[float, float, float]:
    """(of x0, of x, standard deviation): Song et al. 2021, eq. 12 and 16, with epsilon = (x - a x0) / b."""
    (a, b), (a2, b2) = level, following
    std = eta * b2 / b * math.sqrt(1 - (a / a2) ** 2)
    towards = math.sqrt(max(b2**2 - std**2, 0.0))
    return a2 - towards * a / b, towards / b, std


def exact_moments(
    data: Data,
    levels: Sequence[Level],
    method: str,
    *,
    eta: float = 0.0,
    variance: str = "fixed_small",
    order: int = 2,
    noise_at_end: bool = False,
    up: Sequence[bool] = (),
    start: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [6] of what a sampler returns that walks `levels`.

    Tracks the joint moments of x and the x0 predicted before, from x_T ~ N(0, 1) or `start` (mean, std).
    """
    mean = np.zeros((6, 2))
    cov = np.zeros((6, 2, 2))
    mean[:, 0], cov[:, 0, 0] = (0, 1) if start is None else (start[0], start[1] ** 2)
    for index, (level, following) in enumerate(pairwise(levels)):
        (a, b), (a2, b2) = level, following
        of_before = 0.0
        if up and up[index]:
            of_x0, of_x, std = 0.0, a2 / a, math.sqrt(b2**2 - (a2 / a * b) ** 2)
        elif method == "ddpm":
            of_x0, of_x, std = ddpm_weights(data, level, following, variance)
            std = std if b2 > 0 or noise_at_end else 0.0
        elif method == "ddim":
            of_x0, of_x, std = ddim_weights(level, following, eta)
        else:  # Lu et al. 2022b, eq. 9 and algorithm 2
            h = math.log(a2 / b2) - math.log(a / b) if b2 > 0 else math.inf
            of_x, of_x0, std = b2 / b, a2 * (1 - math.exp(-h)), 0.0
            if order == 2 and index > 0 and b2 > 0:
                before = levels[index - 1]
                r = (math.log(a / b) - math.log(before[0] / before[1])) / h
                of_x0, of_before = of_x0 * (1 + 1 / (2 * r)), -of_x0 / (2 * r)
        p, q = data.denoiser(level)
        zero = np.zeros(6)
        # (next, x0) = matrix (x, x0 before) + shift
        matrix = np.stack([np.stack([of_x + of_x0 * p, zero + of_before], -1), np.stack([p, zero], -1)], 1)
        shift = np.stack([of_x0 * q, q], -1)
        mean = np.einsum("dij,dj->di", matrix, mean) + shift
        cov = np.einsum("dij,djk,dlk->dil", matrix, cov, matrix)
        cov[:, 0, 0] += np.square(std)
    return mean[:, 0], np.sqrt(cov[:, 0, 0])


def assert_distributed(samples: Tensor, mean: np.ndarray, std: np.ndarray) -> None:
    """Mean and whole covariance of samples [N, 3, 2] of independent normal variables, within `STANDARD_ERRORS`."""
    worst = largest_deviation(samples, mean, std)
    assert worst < STANDARD_ERRORS, f"{worst:.1f} standard errors"


def largest_deviation(samples: Tensor, mean: np.ndarray, std: np.ndarray) -> float:
    """Of the 6 means and 21 covariances the largest deviation, in standard errors."""
    x = (samples.flatten(1).double().numpy() - mean) / std
    n = len(x)
    means = np.abs(x.mean(0)) * math.sqrt(n)
    covariance = x.T @ x / n
    diagonal = np.abs(np.diag(covariance) - 1) * math.sqrt(n / 2)
    beside = np.abs(covariance[~np.eye(6, dtype=bool)]) * math.sqrt(n)
    return float(max(means.max(), diagonal.max(), beside.max()))


def draw(sampler: Sampler, count: int = SAMPLES, **arguments: Any) -> Tensor:
    return sampler.sample(count, shape=(3, 2), seed=7, **arguments)


# -- sampled against exact --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predicts", PREDICTION_TYPES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(predicts: str, variance: str) -> None:
    sampler = Sampler(
        predictor(DATA, SCHEDULE, predicts),
        SCHEDULE,
        num_inference_steps=12,
        prediction_type=predicts,
        variance_type=variance,
        clip_sample=False,
    )
    levels = levels_of(SCHEDULE, SCHEDULE.timesteps(12))
    samples = draw(sampler)
    assert_distributed(samples, *exact_moments(DATA, levels, "ddpm", variance=variance))
    other = {"fixed_small": "fixed_large", "fixed_large": "fixed_small"}[variance]
    assert largest_deviation(samples, *exact_moments(DATA, levels, "ddpm", variance=other)) > 2 * STANDARD_ERRORS


@pytest.mark.parametrize(
    ("predicts", "eta", "rederive"),
    [("epsilon", 0.5, False), ("epsilon", 1.0, True), ("sample", 0.5, True), ("v_prediction", 1.0, False)],
)
def test_stochastic_ddim(predicts: str, eta: float, rederive: bool) -> None:
    sampler = Sampler(
        predictor(DATA, SCHEDULE, predicts),
        SCHEDULE,
        method="ddim",
        num_inference_steps=6,
        timestep_spacing="trailing",
        prediction_type=predicts,
        eta=eta,
        use_clipped_model_output=rederive,
        clip_sample=False,
    )
    levels = levels_of(SCHEDULE, SCHEDULE.timesteps(6, "trailing"))
    samples = draw(sampler)
    assert_distributed(samples, *exact_moments(DATA, levels, "ddim", eta=eta))
    assert largest_deviation(samples, *exact_moments(DATA, levels, "ddim", eta=eta - 0.5)) > STANDARD_ERRORS


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpmsolver++", 1), ("dpmsolver++", 2)])
@pytest.mark.parametrize(
    ("predicts", "count"),
    [("epsilon", 1), ("sample", 2), ("v_prediction", 2), ("epsilon", 10), ("v_prediction", 10), ("sample", 50)],
)
def test_deterministic_samplers(predicts: str, method: str, order: int, count: int) -> None:
    """Each sample is a known function of its x_T: compared one by one."""
    settings: dict[str, Any] = {"method": method, "num_inference_steps": count, "timestep_spacing": "linspace"}
    if method == "dpmsolver++":
        settings["solver_order"] = order
    sampler = Sampler(
        predictor(DATA, SCHEDULE, predicts), SCHEDULE, prediction_type=predicts, clip_sample=False, **settings
    )
    levels = levels_of(SCHEDULE, SCHEDULE.timesteps(count, "linspace", multistep=method != "ddim"))
    start = torch.randn(64, 3, 2)
    moments = [
        exact_moments(DATA, levels, method, order=order, start=(point, np.zeros(6)))
        for point in start.flatten(1).double().numpy()
    ]
    expected = torch.from_numpy(np.stack([mean for mean, _ in moments])).view(-1, 3, 2)
    # x0 = x / a - b / a eps at the first steps loses 1 / a of float32's precision
    atol = 4e-7 / levels[0][0] if predicts == "epsilon" else 1e-5
    torch.testing.assert_close(draw(sampler, 64, x_T=start).double(), expected, rtol=1e-5, atol=atol)
    if count == 10:
        assert_distributed(draw(sampler), *exact_moments(DATA, levels, method, order=order))


def test_zero_terminal_snr() -> None:
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    for predicts in ("sample", "v_prediction"):
        sampler = Sampler(
            predictor(DATA, schedule, predicts),
            schedule,
            num_inference_steps=12,
            timestep_spacing="trailing",
            prediction_type=predicts,
            clip_sample=False,
        )
        levels = levels_of(schedule, schedule.timesteps(12, "trailing"))
        assert levels[0] == (0, 1)
        assert_distributed(draw(sampler), *exact_moments(DATA, levels, "ddpm"))


def test_repaint_walk() -> None:
    """Steps up are steps of the forward process: the walk's own recursion, level by level."""
    timesteps = SCHEDULE.timesteps(10)
    table = repaint_table(SCHEDULE, timesteps, jump_length=3, jump_n_sample=3)
    sampler = Sampler(predictor(DATA, SCHEDULE, "epsilon"), SCHEDULE, num_inference_steps=10, clip_sample=False)
    ladder = levels_of(SCHEDULE, timesteps)
    at, levels, up = 0, [ladder[0]], []
    for down in table.needs_network.tolist():
        at += 1 if down else -1
        up.append(not down)
        levels.append(ladder[at])
    assert_distributed(draw(sampler, table=table), *exact_moments(DATA, levels, "ddpm", up=up))


# -- exact where a sampler ought to be --------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["learned_range", "learned", "guided_diffusion"])
def test_best_mean_and_variance_give_the_data_in_any_number_of_steps(variance: str) -> None:
    """For Gaussian data q(x_prev | x) is Gaussian: with its mean and variance ancestral sampling has no error."""
    timesteps = torch.tensor([999, 700, 420, 60])
    levels = levels_of(SCHEDULE, timesteps)
    spread = {}
    for t, level, following in zip(timesteps.tolist(), levels[:-1], levels[1:], strict=True):
        small = max(ddpm_weights(NARROW, level, following, "fixed_small")[2] ** 2, 1e-20)
        beta = ddpm_weights(NARROW, level, following, "fixed_large")[2] ** 2
        exact = ddpm_weights(NARROW, level, following, "exact")[2] ** 2
        range_v = 2 * (np.log(exact) - math.log(small)) / (math.log(beta) - math.log(small)) - 1
        assert (range_v <= 1 + 1e-12).all()
        spread[t] = {"learned_range": range_v, "learned": exact, "guided_diffusion": np.log(exact)}[variance]

    def second_half(t: Tensor) -> Tensor:
        return torch.from_numpy(spread[int(t)]).view(3, 2)

    openai = variance == "guided_diffusion"
    sampler = Sampler(
        predictor(NARROW, SCHEDULE, "epsilon", second_half),
        SCHEDULE,
        timesteps=timesteps,
        variance_type="learned" if openai else variance,
        convention=variance if openai else "diffusers",
        clip_sample=False,
    )
    assert sampler.table.learned == {"learned_range": "range", "learned": "variance"}.get(variance, "log")
    begin = NARROW.at(levels[0])
    mean, std = exact_moments(NARROW, levels, "ddpm", variance="exact", noise_at_end=not openai, start=begin)
    if not openai:  # which adds no noise in its last step
        np.testing.assert_allclose(mean, NARROW.mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(std, NARROW.std, rtol=1e-9)
    x = torch.randn(SAMPLES, 6, dtype=torch.float64) * torch.from_numpy(begin[1]) + torch.from_numpy(begin[0])
    assert_distributed(draw(sampler, x_T=x.view(-1, 3, 2).float()), mean, std)


@pytest.mark.parametrize(
    ("data", "variance"), [(NORMAL, "fixed_large"), (Data(DATA.mean, np.full(6, 1e-8)), "fixed_small")]
)
def test_fixed_variances_are_exact_for_the_data_they_stand_for(data: Data, variance: str) -> None:
    """beta is the variance for data of unit variance, beta_tilde for a point (Ho et al. 2020, section 3.2)."""
    timesteps = torch.tensor([999, 500, 100])
    levels = levels_of(SCHEDULE, timesteps)
    table = ddpm_table(SCHEDULE, timesteps, prediction_type="sample", variance_type=variance)
    mean, std = moments_of_table(table, data, levels, start=data.at(levels[0]))
    np.testing.assert_allclose(mean, data.mean, atol=1e-12)
    np.testing.assert_allclose(std, data.std, rtol=1e-6, atol=1e-7)


# -- rates ------------------------------------------------------------------------------------------------------------


def moments_of_table(
    table: StepTable, data: Data, levels: Sequence[Level], start: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation that the rows of a table for "sample" give, in float64; `levels` before each row."""
    mean, variance = start[0], start[1] ** 2
    for (a, b, c, d, e, f, s), level in zip(table.rows.tolist(), levels, strict=False):
        assert (a, b, e, f) == (0, 1, 0, 0)
        p, q = data.denoiser(level)
        mean = c * (p * mean + q) + d * mean
        variance = (c * p + d) ** 2 * variance + s**2
    return mean, np.sqrt(variance)


POINTS = np.array([-1.5, 0.0, 1.0])[:, None] * np.ones(6)


def path_errors(build: Callable[[NoiseSchedule, Tensor], StepTable], counts: Sequence[int], *, up: bool) -> np.ndarray:
    """For each number of steps the largest error of a deterministic table against the ODE's exact solution.

    The ODE keeps (x - a mean) / sqrt(a^2 std^2 + b^2) (Song et al. 2021, section 4.3, for Gaussian data). Steps are
    equal in log(signal / noise), on a forward process so fine that the rounding of timesteps does not show.
    """
    schedule = NoiseSchedule.linear(200_000, 5e-7, 1e-4)
    bars = schedule.alphas_cumprod.numpy()
    log_snr = 0.5 * np.log(bars / (1 - bars))
    errors = []
    for count in counts:
        marks = np.linspace(log_snr[-1], log_snr[2000], count + 1)
        visited = torch.from_numpy(np.searchsorted(-log_snr, -marks).clip(max=len(bars) - 1))
        table = build(schedule, visited)
        walked = levels_of(schedule, visited)[:-1]
        if up:
            walked.reverse()
        (mean, std), (mean_after, std_after) = DATA.at(walked[0]), DATA.at(walked[-1])
        exact = mean_after + (POINTS - mean) / std * std_after
        errors.append(np.abs(walk_table(table, walked, up=up) - exact).max())
    return np.array(errors)


def walk_table(table: StepTable, levels: Sequence[Level], *, up: bool) -> np.ndarray:
    """`POINTS` taken through the levels by a table for "v_prediction": from `levels[0]` to `levels[-1]`."""
    x, x0_prev = POINTS, np.zeros_like(POINTS)
    rows = table.rows.tolist()
    rows = rows[1:] if up else rows[:-1]  # without the steps from and to x_0, which have no finite length
    for (a, b, c, d, e, f, s), level in zip(rows, levels[:-1], strict=True):
        assert s == 0
        p, q = DATA.denoiser(level)
        best = p * x + q
        eps = (x - level[0] * best) / level[1]
        out = level[0] * eps - level[1] * best
        x0 = a * x + b * out
        x, x0_prev = c * x0 + d * x + e * out + f * x0_prev, x0
    return x


def ddim(schedule: NoiseSchedule, timesteps: Tensor) -> StepTable:
    return ddim_table(schedule, timesteps, prediction_type="v_prediction")


def inversion(schedule: NoiseSchedule, timesteps: Tensor) -> StepTable:
    return ddim_inversion_table(schedule, timesteps, prediction_type="v_prediction")


def second_order(schedule: NoiseSchedule, timesteps: Tensor) -> StepTable:
    return dpmsolver_table(schedule, timesteps, prediction_type="v_prediction")


@pytest.mark.parametrize(("build", "up", "order"), [(ddim, False, 1), (inversion, True, 1), (second_order, False, 2)])
def test_error_falls_at_the_rate_of_the_order(build: Any, up: bool, order: int) -> None:
    counts = [40, 80, 160, 320]
    errors = path_errors(build, counts, up=up)
    slopes = -np.diff(np.log2(errors))
    assert np.abs(slopes - order).max() < 0.15, (errors, slopes)


def test_second_order_needs_fewer_steps() -> None:
    first, second = (path_errors(build, [20], up=False)[0] for build in (ddim, second_order))
    assert second < first / 3


def smooth_grid(steps: int, power: float) -> SigmaGrid:
    """Return levels from log(signal / noise) = -3.5 to 3, a smooth function of the step's number.

    The first step is of length O(steps^-power): a method that starts with lower orders loses nothing there.
    """
    log_snr = -3.5 + 6.5 * np.linspace(0, 1, steps + 1) ** power
    trained = np.exp(np.linspace(3.5, -3, 1000))[::-1].copy()
    return SigmaGrid(np.linspace(999, 1, steps).round(), np.exp(-log_snr), trained=trained)


def solver_errors(method: str, settings: dict[str, Any], counts: Sequence[int], power: float) -> np.ndarray:
    """As `path_errors`, for methods that lay levels of their own; to a level that still has noise."""
    errors, settings = [], {"prediction_type": "v_prediction", **settings}
    for count in counts:
        build = functools.partial(METHODS[method].table, SCHEDULE, smooth_grid(count, power))
        table = build(**METHODS[method].fixed, **settings)
        assert not table.rows[:, 6].any()
        levels = [table.start, *table.levels.tolist()]

        def network(row: int, x: np.ndarray, levels: list[Any] = levels) -> np.ndarray:
            a, b = levels[row]
            p, q = DATA.denoiser((a, b))
            best = p * x + q
            epsilon = (x - a * best) / b
            return epsilon if settings["prediction_type"] == "epsilon" else a * epsilon - b * best

        end = walk(table, POINTS, network, np.zeros(len(table)))[-1]
        (mean, std), (mean_after, std_after) = DATA.at(levels[0]), DATA.at(levels[-1])
        errors.append(np.abs(end - (mean_after + (POINTS - mean) / std * std_after)).max())
    return np.array(errors)


FULL_ORDER = {"lower_order_final": False}


@pytest.mark.parametrize(
    ("method", "settings", "order"),
    [
        ("euler", {}, 1),
        ("heun", {}, 2),
        ("edm", {}, 2),
        ("dpm2", {}, 2),
        ("dpmsolver++", {"solver_order": 1}, 1),
        ("dpmsolver++", {"solver_order": 2}, 2),
        ("dpmsolver++", {"solver_order": 2, "solver_type": "heun"}, 2),
        # The authors' code, as diffusers', weights half the second derivative as if it were the whole one.
        ("dpmsolver++", {"solver_order": 3}, 2),
        ("dpmsolver", {"solver_order": 2}, 2),
        ("dpmsolver++_singlestep", {"solver_order": 2, **FULL_ORDER}, 2),
        ("dpmsolver_singlestep", {"solver_order": 2, **FULL_ORDER}, 2),
        # Its weights are those of even steps in the variable of integration, which timesteps are not (Liu et al. 2022,
        # theorem 3.1: order 2). A v that is extrapolated between levels is the epsilon of neither.
        ("plms", {"prediction_type": "epsilon"}, 2),
        ("plms", {}, 1),
        ("deis", {"solver_order": 1}, 1),
        ("deis", {"solver_order": 2}, 2),
        ("deis", {"solver_order": 3}, 3),
        ("lms", {"order": 1}, 1),
        ("lms", {"order": 2}, 2),
        ("lms", {"order": 3}, 3),
        ("lms", {"order": 4}, 4),
        # The corrector adds one to the order of the predictor (Zhao et al. 2023, theorem 3.1).
        ("unipc", {"solver_order": 1, **FULL_ORDER}, 2),
        ("unipc", {"solver_order": 2, **FULL_ORDER}, 3),
        ("unipc", {"solver_order": 3, **FULL_ORDER}, 4),
    ],
)
def test_solvers_have_their_order_on_a_smooth_grid(method: str, settings: dict[str, Any], order: int) -> None:
    """On the grid of a schedule's timesteps rounding, and the first steps of lower order, hide the third and fourth."""
    errors = solver_errors(method, settings, [60, 120], power=2.0)
    slope = float(np.log2(errors[0] / errors[1]))
    assert abs(slope - order) < 0.25, (errors, slope)


def test_singlestep_solver_of_third_order() -> None:
    """It needs no start of lower order: equal steps of log(signal / noise)."""
    settings = {"solver_order": 3, **FULL_ORDER}
    errors = solver_errors("dpmsolver++_singlestep", settings, [60, 120], power=1.0)
    assert abs(np.log2(errors[0] / errors[1]) - 3) < 0.15, errors


def moments_of_rows(table: StepTable, start: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation that rows with a history give for "sample", in float64: tracked jointly."""
    size = 1 + 4  # x, and the predictions before
    mean, cov = np.zeros((6, size)), np.zeros((6, size, size))
    mean[:, 0], cov[:, 0, 0] = start[0], start[1] ** 2
    levels = [table.start, *table.levels.tolist()]
    for (a, b, c, d, e, f, s, *older), level in zip(table.rows.tolist(), levels, strict=False):
        p, q = DATA.denoiser(level)
        matrix, shift = np.zeros((6, size, size)), np.zeros((6, size))
        matrix[:, 0, 0], shift[:, 0] = c * (a + b * p) + d + e * p, (c * b + e) * q
        matrix[:, 0, 1 : 2 + len(older)] = f, *older
        matrix[:, 1, 0], shift[:, 1] = a + b * p, b * q
        matrix[:, 2:, 1:-1] = np.eye(size - 2)
        mean = np.einsum("dij,dj->di", matrix, mean) + shift
        cov = np.einsum("dij,djk,dlk->dil", matrix, cov, matrix)
        cov[:, 0, 0] += s**2
    return mean[:, 0], np.sqrt(cov[:, 0, 0])


def moment_errors(method: str, settings: dict[str, Any], steps: int) -> tuple[float, float]:
    """The error of the mean, in standard deviations, and the relative one of the variance: each the largest.

    The start is one standard deviation off. The SDE keeps cov(x_s, x_t) / var(x_t) times that.
    """
    grid = smooth_grid(steps, 1.0)
    table = METHODS[method].table(SCHEDULE, grid, prediction_type="sample", **METHODS[method].fixed, **settings)
    assert table.rows[:-1, 6].all()
    last = (float(grid.signal[-1]), float(grid.noise[-1]))
    (begin, spread), (exact_mean, exact_std) = DATA.at(table.start), DATA.at(last)
    mean, std = moments_of_rows(table, (begin + spread, spread))
    kept = table.start[0] / last[0] * exact_std**2 / spread
    return float(np.abs((mean - exact_mean - kept) / exact_std).max()), float(np.abs((std / exact_std) ** 2 - 1).max())


@pytest.mark.parametrize(
    ("method", "settings", "order", "most"),
    [
        ("euler_a", {}, 1, 0.02),
        ("sde-dpmsolver++", {"solver_order": 1}, 1, 0.02),
        ("sde-dpmsolver++", {"solver_order": 2}, 2, 2e-4),
    ],
)
def test_stochastic_solvers_tend_to_the_data(method: str, settings: dict[str, Any], order: int, most: float) -> None:
    """The mean has no error: along the SDE E[x0 | x] is a martingale, so that extrapolation does not move its mean."""
    (_, coarse), (mean, fine) = (moment_errors(method, settings, steps) for steps in (200, 400))
    assert mean < 1e-12
    assert fine < most
    assert abs(np.log2(coarse / fine) - order) < 0.1, (coarse, fine)
