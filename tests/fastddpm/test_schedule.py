"""Schedules and timesteps against diffusers, closed forms and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from fastddpm.schedule import NoiseSchedule


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
@given(st.data(), st.integers(1, 1500), st.sampled_from(["leading", "trailing", "linspace"]))
def test_timesteps_fall_and_stay_in_range(data: st.DataObject, total: int, spacing: str) -> None:
    count = data.draw(st.integers(1, total))
    steps = NoiseSchedule.from_betas(np.full(total, 0.01)).timesteps(count, spacing)
    assert len(steps) == count
    assert bool((steps.diff() < 0).all())
    assert 0 <= int(steps[-1]) <= int(steps[0]) < total


def test_all_steps_by_default() -> None:
    assert NoiseSchedule.linear(20).timesteps().tolist() == list(range(19, -1, -1))


@pytest.mark.parametrize("count", [0, -1, 1001, 2.0, "10", True])
def test_bad_step_counts_are_named(count: object) -> None:
    with pytest.raises(ValueError, match=r"num_inference_steps is .* from 1 to 1000"):
        NoiseSchedule.linear().timesteps(count)  # type: ignore[arg-type]


def test_offset_past_the_end_is_named() -> None:
    with pytest.raises(ValueError, match="steps_offset is 1"):
        NoiseSchedule.linear().timesteps(1000, "leading", 1)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, float("nan")], r"betas\[1\] is nan, every beta must be finite"),
        ([0.1, float("inf")], r"betas\[1\] is inf"),
        ([0.1, 0.0], r"betas\[1\] is 0, every beta must be in \(0, 1\)"),
        ([1.5], r"betas\[0\] is 1.5"),
        ([[0.1]], "betas has shape"),
        ([], "betas has shape"),
        (["a"], "betas must be a sequence of numbers"),
        ([0.999] * 2000, "underflows"),
    ],
)
def test_bad_betas_are_named(betas: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_betas(betas)  # type: ignore[arg-type]


def test_bad_names_and_ranges_are_named() -> None:
    with pytest.raises(ValueError, match="beta_schedule is 'quadratic', must be"):
        NoiseSchedule.from_name("quadratic")
    with pytest.raises(ValueError, match="timestep_spacing is 'karras', must be one of"):
        NoiseSchedule.linear().timesteps(10, "karras")
    with pytest.raises(ValueError, match="beta_end is 1.5"):
        NoiseSchedule.linear(10, 0.1, 1.5)
    with pytest.raises(ValueError, match="num_train_timesteps is 0"):
        NoiseSchedule.cosine(0)
    with pytest.raises(ValueError, match="max_beta is 1"):
        NoiseSchedule.cosine(10, max_beta=1)
