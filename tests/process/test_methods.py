"""Every method against diffusers' scheduler, step by step in float64 at injected noise, and its grid of levels.

The options are crossed; a seeded share of all combinations runs.
"""

from __future__ import annotations

import importlib
import itertools
import random
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from table_rows import walk

from fastddpm.interop.diffusers.scheduler import Recognised
from fastddpm.networks.frozen import FrozenUNet
from fastddpm.networks.unet.model import UNet
from fastddpm.process.grids import SigmaGrid, lcm_grid, plms_grid, sigma_grid
from fastddpm.process.methods import METHODS, method_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling.sampler import Sampler

LINEAR = NoiseSchedule.linear()
THEIRS: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
PREDICTS, SPACINGS = ("epsilon", "v_prediction"), ("linspace", "leading", "trailing")
ORDERS: dict[str, Any] = {"solver_order": (1, 2, 3), "lower_order_final": (True, False)}
SIGMAS = (None, "karras", "exponential", "beta")
OF_SOLVERS: dict[str, Any] = {"prediction_type": PREDICTS, "timestep_spacing": SPACINGS}
IN_SIGMA: dict[str, Any] = {**OF_SOLVERS, "sigma_schedule": SIGMAS}
STORES = {"stores": ("x0", "epsilon")}


class Case(NamedTuple):
    """A method, diffusers' scheduler of it, and the values of the settings to cross.

    Attributes:
        tolerance: how far apart states may be, relative to the largest value. diffusers integrates LMS numerically
            and takes logarithms of float32 for the levels between those of DPM2.
        fixed: fields of the scheduler that are no settings of the method.
        share: of the combinations to run.
    """

    method: str
    scheduler: str
    settings: dict[str, tuple[Any, ...]]
    share: float
    tolerance: float = 1e-9
    fixed: Mapping[str, Any] = types.MappingProxyType({})
    steps: tuple[int, ...] = (1, 2, 5, 20)


def dpm(algorithm: str, share: float) -> Case:
    orders = (1, 2) if algorithm == "sde-dpmsolver" else (1, 2, 3)
    settings = {
        **IN_SIGMA, **ORDERS, "solver_order": orders, "solver_type": ("midpoint", "heun"),
        "sigma_schedule": (*SIGMAS, "lu", "flow"), "euler_at_final": (False, True),
    }  # fmt: skip
    return Case(algorithm, "DPMSolverMultistep", settings, share, fixed={"algorithm_type": algorithm})


def single(algorithm: str, share: float) -> Case:
    settings = {
        **ORDERS, "solver_type": ("midpoint", "heun"), "prediction_type": PREDICTS, "sigma_schedule": (None, "karras")
    }  # fmt: skip
    fixed = {"algorithm_type": algorithm}
    return Case(
        f"{algorithm}_singlestep", "DPMSolverSinglestep", settings, share, fixed=fixed, steps=(1, 2, 3, 5, 6, 7, 20)
    )


CASES = [
    *(dpm(algorithm, 0.01) for algorithm in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")),
    *(single(algorithm, 0.05) for algorithm in ("dpmsolver++", "dpmsolver")),
    Case("deis", "DEISMultistep", {**OF_SOLVERS, **ORDERS}, 0.1, 1e-8),
    Case(
        "unipc", "UniPCMultistep",
        {**OF_SOLVERS, **ORDERS, "predict_x0": (True, False), "solver_type": ("bh1", "bh2"),
         "disable_corrector": ((), (0, 2))}, 0.025, 1e-7,
    ),
    Case("euler", "EulerDiscrete", IN_SIGMA, 0.15),
    Case("euler_a", "EulerAncestralDiscrete", OF_SOLVERS, 0.5),
    Case("heun", "HeunDiscrete", {**IN_SIGMA, **STORES}, 0.05),
    Case("lms", "LMSDiscrete", IN_SIGMA, 0.12, 1e-6),
    Case("dpm2", "KDPM2Discrete", {**IN_SIGMA, **STORES}, 0.08, 3e-5, steps=(5, 12)),
    Case("dpm2_a", "KDPM2AncestralDiscrete", {**IN_SIGMA, **STORES}, 0.08, 3e-5, steps=(5, 12)),
    Case("lcm", "LCM", {"prediction_type": (*PREDICTS, "sample")}, 1.0, 1e-6, steps=(1, 2, 4, 8)),
    Case(
        "plms", "PNDM", {"prediction_type": PREDICTS, "set_alpha_to_one": (False, True)}, 1.0, 1e-6,
        {"skip_prk_steps": True}, (2, 3, 4, 5, 8, 20),
    ),
]  # fmt: skip


class InFloat64(types.ModuleType):
    """torch, whose float32 is float64: schedulers round samples to it on their way."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def combinations(case: Case) -> Iterator[tuple[int, dict[str, Any]]]:
    rng = random.Random(case.method)
    for count, *values in itertools.product(case.steps, *case.settings.values()):
        settings = dict(zip(case.settings, values, strict=True))
        of_epsilon = case.method.split("_")[0] in ("dpmsolver", "sde-dpmsolver")
        ends_at_zero = settings.get("predict_x0", True) and not of_epsilon
        if case.method == "unipc":  # without lower orders at the end, and with bh1, diffusers divides by zero there
            ends_at_zero = ends_at_zero and settings["lower_order_final"] and settings["solver_type"] == "bh2"
        if case.method not in ("euler_a", "heun", "dpm2", "dpm2_a", "lms", "lcm", "plms", "deis"):
            settings["final_sigmas_type"] = "zero" if ends_at_zero else "sigma_min"
        if case.method.startswith("dpm2") and settings["sigma_schedule"] == "karras":
            settings["round_timesteps"] = True
        settings.setdefault("timestep_spacing", "linspace" if case.method.endswith("singlestep") else "leading")
        if rng.random() < case.share:
            yield count, settings


def theirs_of(case: Case, count: int, settings: dict[str, Any]) -> Any:
    fields = {**THEIRS, **case.fixed, **settings}
    fields = {name: value for name, value in fields.items() if name not in ("round_timesteps", "stores")}
    if case.method.endswith("singlestep"):
        fields.pop("timestep_spacing")
    if (sigmas := fields.pop("sigma_schedule", None)) is not None:
        fields["use_lu_lambdas" if sigmas == "lu" else f"use_{sigmas}_sigmas"] = True
    if case.method == "lcm":
        fields["clip_sample"] = False
    if "disable_corrector" in fields:
        fields["disable_corrector"] = list(fields["disable_corrector"])
    scheduler = getattr(diffusers, f"{case.scheduler}Scheduler")(**fields)
    scheduler.set_timesteps(count)
    return scheduler


def grid_of(case: Case, count: int, settings: dict[str, Any]) -> SigmaGrid:
    """Return the grid that `method_table` lays."""
    method = METHODS[case.method]
    own = {name: value for name, value in {**method.defaults, **settings}.items() if name in method.grid_settings}
    assert method.grid is not None
    return method.grid(LINEAR, count, settings["timestep_spacing"], **own)


def levels_of(case: Case, scheduler: Any) -> np.ndarray:
    sigmas = scheduler.sigmas.double().numpy()
    if case.method == "heun":
        return np.concatenate([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])
    return np.append(sigmas[:1], sigmas[1:-1:2]) if case.method.startswith("dpm2") else sigmas


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.method)
def test_method(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = 0
    for count, settings in combinations(case):
        scheduler, grid = theirs_of(case, count, settings), grid_of(case, count, settings)
        if len(grid.sigmas) > 1 and np.isclose(grid.sigmas[-1], grid.sigmas[-2], rtol=1e-5):
            continue  # a spread ends at the level of "sigma_min": diffusers then divides by a step of no length
        table = method_table(case.method, LINEAR, num_inference_steps=count, **settings)
        told, close = table.timesteps.double().numpy(), 0.02
        if case.method.startswith("dpm2"):
            # diffusers finds the inner levels in float32, ancestral ones as roots of differences that almost cancel.
            close = 0.1
            own = Recognised(case.scheduler, case.method, LINEAR, {})._grid(scheduler)
            own = own._replace(init_noise_sigma=grid.init_noise_sigma)
            more = {name: settings[name] for name in ("prediction_type", "stores")}
            table = METHODS[case.method].table(LINEAR, own, **more, **METHODS[case.method].fixed)
        np.testing.assert_allclose(told, scheduler.timesteps.double().numpy(), rtol=1e-5, atol=close)
        module = importlib.import_module(type(scheduler).__module__)
        monkeypatch.setattr(module, "torch", InFloat64("torch"))
        if case.method in ("lcm", "plms"):
            scheduler.alphas_cumprod = LINEAR.alphas_cumprod
            to_one = settings.get("set_alpha_to_one", True)
            scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64) if to_one else LINEAR.alphas_cumprod[0]
        else:
            np.testing.assert_allclose(levels_of(case, scheduler), grid.sigmas, rtol=1e-4, atol=1e-6)
            if case.method == "heun":
                inner = torch.from_numpy(grid.sigmas[1:-1]).repeat_interleave(2)
                ends = torch.from_numpy(grid.sigmas[[0, -1]])
                scheduler.sigmas = torch.cat([ends[:1], inner, ends[1:]])
            elif not case.method.startswith("dpm2"):
                scheduler.sigmas = torch.from_numpy(grid.sigmas)
        rng = np.random.default_rng(count)
        start = rng.normal(size=(2, 4))
        weights, noises = rng.normal(size=(2, len(table), 2, 4))

        def network(row: int, x: np.ndarray, weights: np.ndarray = weights) -> np.ndarray:
            return np.tanh(0.7 * x + 0.3 * weights[row])

        states = walk(table, start * table.init_noise_sigma, network, noises)
        drawn: list[np.ndarray] = []
        monkeypatch.setattr(module, "randn_tensor", lambda *_, d=drawn, **__: torch.from_numpy(d[-1]), raising=False)
        x = torch.from_numpy(start) * float(scheduler.init_noise_sigma)
        for row, t in enumerate(scheduler.timesteps):
            read = scheduler.scale_model_input(x, t)
            largest = np.abs(states[row]).max()
            assert np.abs(read.numpy() - states[row]).max() <= case.tolerance * largest, (count, settings, row)
            drawn.append(noises[row])
            x = scheduler.step(torch.from_numpy(network(row, read.numpy())), t, x).prev_sample
        if case.method in ("euler", "heun", "lms", "dpm2") and grid.sigmas[-1] > 0:
            x = x * grid.signal[-1]
        largest = np.abs(states[-1]).max()
        assert np.abs(x.numpy() - states[-1]).max() <= case.tolerance * largest, (count, settings)
        ran += 1
    assert ran >= 6, ran


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.grid is not None])
def test_a_table_starts_anew_where_a_step_begins(method: str) -> None:
    """The rest of a table is that of the rest of its levels, and refuses to start inside a step."""
    steps = 4 if method == "lcm" else 6
    table = method_table(method, LINEAR, num_inference_steps=steps)
    begins = table.begins
    assert len(begins) == steps
    rest = table.skip(begins[2])
    assert len(rest) in (len(table) - begins[2], len(table) - begins[2] + 1)  # PLMS begins with two evaluations
    signal, noise = rest.start
    assert (signal, noise) == pytest.approx(table.levels[begins[2] - 1].tolist())
    assert rest.rows[0, 5] == 0
    assert bool(torch.isfinite(rest.rows).all())
    assert table.skip(0) is table
    for inside in set(range(len(table))) - set(begins):
        with pytest.raises(ValueError, match=f"index is {inside}, inside a step; a step begins at 0, "):
            table.skip(inside)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("dpmsolver++", {"solver_order": 4}, "solver_order is 4, must be 1, 2 or 3"),
        ("dpmsolver++", {"solver_order": True}, "solver_order is True"),
        ("dpmsolver++", {"solver_type": "bh2"}, "solver_type is 'bh2', must be 'midpoint' or 'heun'"),
        ("dpmsolver++", {"sigma_schedule": "cosine"}, "sigma_schedule is 'cosine', must be None or one of karras"),
        ("dpmsolver++", {"sigma_schedule": "karras", "sigma_min": 0.0}, "sigma_min is 0.0, must be positive"),
        ("dpmsolver++", {"sigma_schedule": "karras", "rho": -1.0}, "rho is -1.0, must be positive"),
        ("dpmsolver", {"final_sigmas_type": "zero"}, "cannot end at zero noise: final_sigmas_type must be 'sigma_min'"),
        ("sde-dpmsolver", {"solver_order": 3}, "solver_order is 3 but algorithm_type is 'sde-dpmsolver'"),
        ("unipc", {"solver_type": "heun"}, "solver_type is 'heun', must be 'bh1' or 'bh2'"),
        ("unipc", {"lower_order_final": False}, "lower_order_final is False but the grid ends at zero noise"),
        ("deis", {"final_sigmas_type": "zero"}, "method 'deis' cannot end at zero noise"),
        ("plms", {"prediction_type": "sample"}, "prediction_type is 'sample', must be 'epsilon' or 'v_prediction'"),
        ("euler", {"sigma_schedule": "flow"}, "sigma_schedule is 'flow', must be another"),
        ("euler", {"s_churn": -1.0}, "s_churn is -1.0, must be a finite number"),
        ("euler_a", {"eta": float("nan")}, "eta is nan, must be a finite number"),
        ("lms", {"order": 5}, "order is 5, must be an integer from 1 to 4"),
        ("lcm", {"original_inference_steps": 3}, "original_inference_steps is 3, must be from 5"),
        ("heun", {"steps_offset": 0.5}, "steps_offset is 0.5, must be an integer"),
        ("ddim", {"steps_offset": 2**63, "timestep_spacing": "leading"}, "steps_offset is 9223372036854775808"),
        ("heun", {"eta": 0.5}, "eta is 0.5 but method is 'heun'; eta is a setting of method 'ddim', 'euler_a'"),
        ("heun", {"num_inference_steps": 0}, "num_inference_steps is 0, must be an integer of at least 1"),
        ("heun", {"prediction_type": "score"}, "prediction_type is 'score', must be one of epsilon"),
        ("heun", {"stores": "out"}, "stores is 'out', must be 'x0' or 'epsilon'"),
    ],
)
def test_bad_settings(method: str, settings: dict[str, Any], message: str) -> None:
    given = {"num_inference_steps": 5, **settings}
    if METHODS[method].grid in (lcm_grid, plms_grid):
        given.setdefault("timestep_spacing", "leading")
    with pytest.raises(ValueError, match=message):
        method_table(method, LINEAR, **given)


def test_ends_of_a_spread_may_be_given() -> None:
    grid = sigma_grid(LINEAR, 4, sigma_schedule="exponential", sigma_min=0.1, sigma_max=100.0)
    np.testing.assert_allclose(grid.sigmas, [100, 10, 1, 0.1, 0], rtol=1e-12)


def test_long_steps_round_less_with_epsilon_stored() -> None:
    """In float32, where the first step's ratio of sigmas multiplies the rounding of what it stored."""
    rng = np.random.default_rng(0)
    start, noises = rng.normal(size=(2, 4)), np.zeros((3, 2, 4))

    def network(row: int, x: np.ndarray) -> np.ndarray:
        return np.tanh(x)

    def in_float32(row: int, x: np.ndarray) -> np.ndarray:
        return np.tanh(x.astype(np.float32)).astype(np.float32)

    errors = {}
    for stores in ("x0", "epsilon"):
        table = method_table("heun", LINEAR, num_inference_steps=2, stores=stores)
        exact = walk(table, start, network, noises)[-1]
        rounded = [row.astype(np.float32) for row in table.rows.numpy()]
        x, before = start.astype(np.float32), np.zeros((2, 4), np.float32)
        for row, (a, b, c, d, e, f, _) in enumerate(rounded):
            out = in_float32(row, x)
            stored = a * x + b * out
            x, before = c * stored + d * x + e * out + f * before, stored
        errors[stores] = np.abs(x - exact).max() / np.abs(exact).max()
    assert errors["epsilon"] < 1e-4, errors
    assert errors["x0"] > 10 * errors["epsilon"], errors


def test_timesteps_between_trained_ones_reach_the_network() -> None:
    """As diffusers passes them, to a network as it is and to a frozen one."""
    scheduler = diffusers.EulerDiscreteScheduler(**THEIRS, timestep_spacing="linspace")
    scheduler.set_timesteps(8)
    seen: list[float] = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.dtype == torch.float32
        seen.append(float(t[0]))
        return torch.zeros_like(x)

    Sampler(model, LINEAR, "euler", 8).sample(1, shape=(1, 2, 2))
    np.testing.assert_allclose(seen, scheduler.timesteps.numpy(), rtol=1e-7)
    assert seen[1] != round(seen[1])
    torch.manual_seed(0)
    widths = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet(in_channels=1, out_channels=1, sample_size=8, **widths, **kinds).double().eval()
    timesteps = torch.tensor(seen[:2], dtype=torch.float32)
    frozen, x = FrozenUNet(unet), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    program = frozen.bind(inputs, timesteps)
    for row, t in enumerate(timesteps):
        with torch.no_grad():
            expected = unet(x, t)
        torch.testing.assert_close(program(torch.tensor([row])), expected, rtol=1e-12, atol=1e-12)
