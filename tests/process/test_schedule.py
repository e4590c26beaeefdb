"""Schedules and timesteps against diffusers, closed forms and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.timesteps import TIMESTEP_SPACINGS, spaced_timesteps


@pytest.mark.parametrize(
    ("name", "diffusers_name"),
    [
        ("linear", "linear"),
        ("scaled_linear", "scaled_linear"),
        ("cosine", "squaredcos_cap_v2"),
        ("sigmoid", "sigmoid"),
    ],
)
@pytest.mark.parametrize("steps", [1000, 37])
def test_betas_are_those_of_diffusers(name: str, diffusers_name: str, steps: int) -> None:
    ours = NoiseSchedule.from_name(name, steps)
    theirs = DDPMScheduler(num_train_timesteps=steps, beta_schedule=diffusers_name)
    assert ours.betas.dtype == torch.float64
    assert ours.beta_schedule == diffusers_name
    # diffusers computes in float32; its cosine even cancels 1 - cos/cos, so the bound is float32's
    torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=3e-6, atol=1.2e-7)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-3, atol=1e-9)


def test_cosine_follows_its_closed_form() -> None:
    bar = NoiseSchedule.cosine(1000).alphas_cumprod
    t = torch.arange(1, 990, dtype=torch.float64)
    curve = torch.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(bar[:989], curve, rtol=1e-10, atol=0)


def test_tables_agree_with_their_definition() -> None:
    schedule = NoiseSchedule.linear(1000)
    product, bars = 1.0, []
    for beta in np.linspace(1e-4, 0.02, 1000):
        product *= 1 - beta
        bars.append(product)
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), bars, rtol=1e-13)
    table = schedule.q_sample_table()
    assert table.shape == (1000, 2)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table.double().square().sum(1), torch.ones(1000, dtype=torch.float64), rtol=0, atol=2e-7)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 50, 250, 999, 1000])
def test_timesteps_are_those_of_diffusers(spacing: str, count: int) -> None:
    theirs = DDPMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(count)
    assert NoiseSchedule.linear().timesteps(count, spacing).tolist() == theirs.timesteps.tolist()


def test_steps_offset_is_that_of_diffusers() -> None:
    theirs = DDPMScheduler(steps_offset=1)
    theirs.set_timesteps(50)
    assert NoiseSchedule.linear().timesteps(50, "leading", 1).tolist() == theirs.timesteps.tolist()


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(1, 1500), st.sampled_from(TIMESTEP_SPACINGS), st.booleans())
def test_timesteps_fall_and_stay_in_range(data: st.DataObject, total: int, spacing: str, multistep: bool) -> None:
    count = data.draw(st.integers(1, total))
    steps = spaced_timesteps(total, count, spacing, multistep=multistep)
    assert len(steps) == count
    assert bool((steps.diff() < 0).all())
    assert 0 <= int(steps[-1]) <= int(steps[0]) < total


@pytest.mark.parametrize("count", [1, 2, 7, 30, 100, 250, 999, 1000])
def test_grid_of_denoising_diffusion_pytorch(count: int) -> None:
    times = list(reversed(torch.linspace(-1, 999, steps=count + 1).int().tolist()))
    assert NoiseSchedule.linear().timesteps(count, "denoising_diffusion_pytorch").tolist() == times[:-1]


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [
        (5, 10, [9, 7, 4, 2, 0]),  # 2.25 apart, rounded to even
        ("5", 10, [9, 7, 4, 2, 0]),
        ("ddim5", 10, [8, 6, 4, 2, 0]),
        ("ddim4", 10, [9, 6, 3, 0]),
        ("1", 10, [0]),
        ("2,1", 11, [6, 5, 0]),  # sections of 6 and 5
        ("10,15,20", 300, None),
    ],
)
def test_grid_of_guided_diffusion(count: int | str, total: int, expected: list[int] | None) -> None:
    steps = NoiseSchedule.linear(total).timesteps(count, "guided_diffusion").tolist()
    if expected is None:
        sections = [[s for s in steps if 100 * k <= s < 100 * (k + 1)] for k in range(3)]
        assert [len(section) for section in sections] == [10, 15, 20]
        assert [(section[-1], section[0]) for section in sections] == [(0, 99), (100, 199), (200, 299)]
    else:
        assert steps == expected


def test_explicit_timesteps() -> None:
    schedule = NoiseSchedule.linear()
    for steps_given in ([999, 5, 0], np.array([999, 5, 0]), torch.tensor([999, 5, 0], dtype=torch.int32)):
        steps = schedule.check_timesteps(steps_given)
        assert steps.dtype == torch.int64
        assert steps.tolist() == [999, 5, 0]


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_zero_terminal_snr(name: str) -> None:
    schedule = NoiseSchedule.from_name(name, 1000)
    rescaled = schedule.rescale_zero_terminal_snr()
    assert rescaled.betas[-1] == 1
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.zero_terminal_snr
    assert not schedule.zero_terminal_snr
    torch.testing.assert_close(rescaled.betas[0], schedule.betas[0], rtol=1e-9, atol=0)
    # sqrt(abar) moves linearly: the same share of the way from first to last
    old, new = schedule.alphas_cumprod.sqrt(), rescaled.alphas_cumprod.sqrt()
    torch.testing.assert_close((new - new[-1]) / (new[0] - new[-1]), (old - old[-1]) / (old[0] - old[-1]))
    if name.endswith("linear"):  # diffusers' DDIM has no sigmoid, and in its cosine float32 cancels
        theirs = DDIMScheduler(beta_schedule=name, rescale_betas_zero_snr=True)
        torch.testing.assert_close(rescaled.betas.float(), theirs.betas, rtol=1e-3, atol=2e-7)


def test_only_the_last_beta_may_be_one() -> None:
    assert NoiseSchedule.from_betas([0.1, 1.0]).alphas_cumprod.tolist() == [0.9, 0]


def test_all_steps_by_default() -> None:
    assert NoiseSchedule.linear(20).timesteps().tolist() == list(range(19, -1, -1))


def timesteps(*arguments: object, **more: object) -> Callable[[], object]:
    return lambda: NoiseSchedule.linear().timesteps(*arguments, **more)  # type: ignore[arg-type]


def sections(text: str) -> Callable[[], object]:
    return timesteps(text, "guided_diffusion")


def visited(steps: object) -> Callable[[], object]:
    return lambda: NoiseSchedule.linear().check_timesteps(steps)  # type: ignore[arg-type]


def betas(values: object) -> Callable[[], object]:
    return lambda: NoiseSchedule.from_betas(values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (sections("ddim999"), "'ddim999': no integer stride over 1000 steps takes 999"),
        (sections("600,1"), "'600,1': 600 steps do not fit in a section of 500"),
        *((sections(text), "must be a number, 'ddim' and a number") for text in ("ten", "10,,5", "0", "ddim")),
        (timesteps("10"), "num_inference_steps is '10' but timestep_spacing is 'leading'"),
        *((timesteps(count), f"num_inference_steps is {count!r}") for count in (0, -1, 1001, 2.0, True)),
        (timesteps(1000, "leading", 1), "steps_offset is 1"),
        (timesteps(10, "karras"), "timestep_spacing is 'karras', must be one of"),
        (visited([]), "timesteps has shape"),
        (visited([[1, 0]]), "timesteps has shape"),
        (visited([1000, 0]), "timesteps has 1000, every one must be from 0 to 999"),
        (visited([3, -1]), "timesteps has -1"),
        (visited([3, 3]), "timesteps has 3 before 3, every one must be lower"),
        (visited([0, 5]), "timesteps has 0 before 5, every one must be lower"),
        (visited([3.0, 1.0]), "timesteps has dtype torch.float32, must be integers"),
        (visited(["a"]), "timesteps must be a sequence of integers"),
        (betas([0.1, float("nan")]), "betas[1] is nan, every beta must be finite"),
        (betas([0.1, float("inf")]), "betas[1] is inf"),
        (betas([0.1, 0.0]), "betas[1] is 0, every beta must be in (0, 1)"),
        (betas([1.0, 0.5]), "betas[0] is 1, every beta must be in (0, 1)"),
        (betas([1.5]), "betas[0] is 1.5"),
        (betas([[0.1]]), "betas has shape"),
        (betas([]), "betas has shape"),
        (betas(["a"]), "betas is a list, must be a sequence of numbers"),
        (betas([0.999] * 2000), "underflows"),
        (betas([0.999] * 2000 + [1.0]), "underflows"),
        (lambda: NoiseSchedule.from_name("quadratic"), "beta_schedule is 'quadratic', must be"),
        (lambda: NoiseSchedule.linear(10, 0.1, 1.5), "beta_end is 1.5"),
        (lambda: NoiseSchedule.cosine(0), "num_train_timesteps is 0"),
        (lambda: NoiseSchedule.cosine(10, max_beta=1), "max_beta is 1"),
        (lambda: NoiseSchedule.linear(1).rescale_zero_terminal_snr(), "num_train_timesteps is 1, must be at least 2"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
