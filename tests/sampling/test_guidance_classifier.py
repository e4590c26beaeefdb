"""Guidance by a classifier's gradient: against restated papers and libraries, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from guided_models import LINEAR, NULL, Labelled, doubled, gradient, toy
from torch import Tensor

from fastddpm.process.tables import ddim_inversion_table, ddpm_table
from fastddpm.sampling.guidance import score_shift
from fastddpm.sampling.sampler import Sampler


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("given", [True, False], ids=["given noise", "drawn noise"])
def test_classifier_moves_the_mean_of_ddpm(variance_type: str, given: bool) -> None:
    """Dhariwal & Nichol 2021, algorithm 1: x_{t-1} ~ N(mu + s Sigma g, Sigma), restated in float64."""
    steps, scale, labels = 6, 4.0, torch.tensor([1, 0, 2])
    learned = variance_type == "learned_range"
    model: Callable[..., Tensor] = doubled if learned else toy
    sampler = Sampler(
        model, LINEAR, "ddpm", steps, variance_type=variance_type, classifier_fn=gradient, classifier_scale=scale
    )
    x_T, noise = torch.randn(3, 2, 5), torch.randn(steps, 3, 2, 5)
    bar = LINEAR.alphas_cumprod
    unguided = Sampler(model, LINEAR, "ddpm", steps, variance_type=variance_type)
    if not given:  # the drawn noise itself: what a network that predicts nothing makes of nothing
        nothing = Sampler(lambda x, t: torch.zeros_like(x), LINEAR, "ddpm", steps)
        states: list[Tensor] = [torch.zeros_like(x_T)]
        nothing.sample(3, x_T=states[0], seed=5, callback=lambda i, t, x: states.append(x.clone()))
        for index, row in enumerate(nothing.table.rows.tolist()[:-1]):
            mean = row[2] * (row[0] * states[index]).clamp(-1, 1) + row[3] * states[index]
            noise[index] = (states[index + 1] - mean) / row[6]
    images = sampler.sample(3, x_T=x_T, noise=noise if given else None, seed=5, class_labels=labels)
    x = x_T.double()
    for index, t in enumerate(sampler.timesteps.tolist()):
        before = float(bar[sampler.timesteps[index + 1]]) if index + 1 < steps else 1.0
        now = float(bar[t])
        beta = 1 - now / before
        out = model(x, torch.full((3,), t))
        x0 = ((x - math.sqrt(1 - now) * out[:, :2]) / math.sqrt(now)).clamp(-1, 1)
        mean = (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x) / (1 - now)
        small = max(beta * (1 - before) / (1 - now), 1e-20)
        if learned:
            weight = (out[:, 2:] + 1) / 2
            variance = torch.exp(weight * math.log(beta) + (1 - weight) * math.log(small))
        else:
            variance = torch.full_like(x, small if variance_type == "fixed_small" else beta)
        with torch.enable_grad():
            g = gradient(x.detach(), torch.full((3,), t), labels)
        x = mean
        if t > 0:
            x = mean + variance * scale * g + variance.sqrt() * noise[index].double()
    torch.testing.assert_close(images.double(), x, rtol=0, atol=2e-5 if given else 1e-4)
    assert float((images - unguided.sample(3, x_T=x_T, noise=noise, class_labels=labels)).abs().max()) > 0.05


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("method", ["ddim", "dpmsolver++"])
def test_classifier_moves_epsilon_of_the_others(prediction_type: str, method: str) -> None:
    """Algorithm 2: eps - sqrt(1 - abar) s g is what diffusers' scheduler is given, whatever the network predicts."""
    labels, scale = torch.tensor([1, 0, 2]), 3.0
    scheduler = (
        DDIMScheduler(clip_sample=False)
        if method == "ddim"
        else DPMSolverMultistepScheduler(1000, 1e-4, 0.02, "linear")
    )
    scheduler.set_timesteps(10)
    sampler = Sampler(
        toy,
        LINEAR,
        method,
        10,
        prediction_type=prediction_type,
        clip_sample=False,
        classifier_fn=gradient,
        classifier_scale=scale,
    )
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist() or method == "dpmsolver++"
    sampler = Sampler(
        toy,
        LINEAR,
        method,
        prediction_type=prediction_type,
        clip_sample=False,
        classifier_fn=gradient,
        classifier_scale=scale,
        timesteps=scheduler.timesteps.tolist(),
    )
    x = x_T = torch.randn(3, 2, 5, dtype=torch.float64)
    for t in scheduler.timesteps:
        bar = LINEAR.alphas_cumprod[t]
        out = toy(x, t.expand(3))
        epsilon = {
            "epsilon": out,
            "sample": (x - bar.sqrt() * out) / (1 - bar).sqrt(),
            "v_prediction": bar.sqrt() * out + (1 - bar).sqrt() * x,
        }[prediction_type]
        with torch.enable_grad():
            g = gradient(x.detach(), t.expand(3), labels)
        x = scheduler.step(epsilon - (1 - bar).sqrt() * scale * g, t, x).prev_sample
    images = sampler.sample(3, x_T=x_T, class_labels=labels)
    torch.testing.assert_close(images.double(), x, rtol=2e-4, atol=2e-4)  # the scheduler's tables are float32


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_classifier_guidance_draws_from_the_posterior(method: str) -> None:
    """Data N(m, v), an observation y of it with variance r: everything is linear, so the result is known.

    The exact recursion of mean and variance is what is sampled (five standard errors), and with many steps it ends
    at Bayes' posterior.
    """
    m, v, r, y = 0.2, 0.3, 0.1, 0.9
    bar = LINEAR.alphas_cumprod

    def moments(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """x0 | x_t ~ N(slope x + offset, ...): slope, and the conditional mean."""
        b = bar[t].to(x).view(-1, *[1] * (x.ndim - 1))
        slope = b.sqrt() * v / (b * v + 1 - b)
        return slope, m + slope * (x - b.sqrt() * m)

    def network(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return moments(t, x)[1]

    def observed(x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        slope, mean = moments(t, x)
        b = bar[t].to(x).view(-1, *[1] * (x.ndim - 1))
        return (y - mean) * slope / (v * (1 - b) / (b * v + 1 - b) + r)

    sampler = Sampler(
        network,
        LINEAR,
        method,
        1000 if method == "ddpm" else 250,
        prediction_type="sample",
        clip_sample=False,
        classifier_fn=observed,
    )
    mean, variance = 0.0, 1.0
    shifts = score_shift(sampler.table).tolist()
    for row, shift, t in zip(sampler.table.rows.tolist(), shifts, sampler.timesteps, strict=True):

        def step(x: float, t: Tensor = t, row: list[float] = row, shift: float = shift) -> float:
            """The mean of the next x, given x."""
            a, b, c, d, e, _, s = row
            given = torch.tensor([[x]], dtype=torch.float64)
            g = float(observed(given, t.expand(1), None))
            out = float(moments(t.expand(1), given)[1]) + (shift * g if method == "ddim" else 0)
            return c * (a * x + b * out) + d * x + e * out + (s**2 * g if method == "ddpm" else 0)

        slope = step(1.0) - step(0.0)
        mean, variance = slope * mean + step(0.0), slope**2 * variance + row[6] ** 2
    count = 8_000
    x = sampler.sample(count // 10, shape=(10,), class_labels=0, seed=2).double()
    assert abs(float(x.mean()) - mean) < 5 * math.sqrt(variance / count)
    assert abs(float(x.var()) - variance) < 5 * variance * math.sqrt(2 / count)
    assert mean == pytest.approx((m * r + y * v) / (v + r), abs=0.02)
    assert variance == pytest.approx(v * r / (v + r), rel=0.05)


def test_classifier_with_guidance_sees_the_conditional_labels() -> None:
    model, seen = Labelled(), []

    def watch(x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        assert class_labels is not None
        seen.append((list(x.shape), t.tolist(), class_labels.tolist(), x.dtype))
        return torch.zeros_like(x)

    settings: dict[str, Any] = {"method": "ddim", "num_inference_steps": 2, "guidance_scale": 2.0, "null_class": NULL}
    images = Sampler(model, LINEAR, classifier_fn=watch, **settings).sample(2, shape=(2, 4), class_labels=[0, 2])
    assert seen == [([2, 2, 4], [t, t], [0, 2], torch.float32) for t in (500, 0)]
    assert torch.equal(images, Sampler(model, LINEAR, **settings).sample(2, shape=(2, 4), class_labels=[0, 2]))


def test_score_shift_at_pure_noise_is_nothing() -> None:
    schedule = LINEAR.rescale_zero_terminal_snr()
    table = ddpm_table(schedule, [999, 500, 0], prediction_type="v_prediction")
    assert float(score_shift(table)[0]) == 0
    assert bool(score_shift(table).isfinite().all())


def test_where_x_is_clean_the_prediction_stays_as_it_is() -> None:
    """DDIM's inversion begins there: x0 is x, whatever is predicted, and does not tell it."""
    settings: dict[str, Any] = {"method": "ddim", "num_inference_steps": 4, "clip_sample": False}
    x = torch.randn(2, 3)

    def encoded(**more: Any) -> Tensor:
        sampler = Sampler(lambda x, t, class_labels: 0.1 * x, LINEAR, **settings, **more)
        table = ddim_inversion_table(LINEAR, sampler.timesteps)
        return sampler.sample(2, shape=(3,), x_T=x, table=table, class_labels=0)

    guided = encoded(classifier_fn=lambda x, t, y: torch.zeros_like(x), use_clipped_model_output=True)
    torch.testing.assert_close(guided, encoded(), rtol=0, atol=1e-5)
