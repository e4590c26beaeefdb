"""Guidance and conditioning: against diffusers, restated papers and libraries, and closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from guided_models import LINEAR, NULL, Labelled, doubled, label, toy
from torch import Tensor

from fastddpm.sampling.guidance import DynamicThreshold, learned_std
from fastddpm.sampling.sampler import Sampler

# -- classifier-free guidance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, [1.0, 1.0], torch.ones(2)], ids=["number", "list", "tensor"])
def test_scale_one_costs_no_second_half(scale: Any) -> None:
    model = Labelled()
    sampler = Sampler(model, LINEAR, num_inference_steps=3, null_class=NULL)
    one = sampler.sample(2, shape=(2, 4), class_labels=[0, 2], guidance_scale=scale)
    assert model.seen == [[0, 2]] * 3
    assert torch.equal(one, sampler.sample(2, shape=(2, 4), class_labels=[0, 2]))
    # A null class is not needed either.
    Sampler(model, LINEAR, num_inference_steps=1, guidance_scale=1.0).sample(1, shape=(2, 4), class_labels=0)


def test_scales_per_sample() -> None:
    sampler = Sampler(Labelled(), LINEAR, num_inference_steps=4, null_class=NULL, guidance_scale=9.0)
    scales = [0.0, 1.0, 2.5]
    together = sampler.sample(3, shape=(2, 4), class_labels=[0, 1, 2], guidance_scale=scales, batch_size=2)
    for index, scale in enumerate(scales):
        alone = sampler.sample(3, shape=(2, 4), class_labels=[0, 1, 2], guidance_scale=scale)
        torch.testing.assert_close(together[index], alone[index], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_interval(backend: str, device: torch.device) -> None:
    """Outside the interval only the conditional half is computed, and the result is guidance with scale 1 there."""
    if backend == "triton":
        pytest.importorskip("triton")
    model = Labelled()
    # Without graphs, since the models note on the host what they see.
    settings: dict[str, Any] = {"num_inference_steps": 5, "backend": backend, "device": device, "cuda_graph": False}
    sampler = Sampler(model, LINEAR, guidance_scale=4.0, guidance_interval=(400, 600), null_class=NULL, **settings)
    labels = torch.tensor([0, 2])
    images = sampler.sample(2, shape=(2, 4), class_labels=labels, seed=1)
    assert model.times == [800, 600, 400, 200, 0]
    assert [len(batch) for batch in model.seen] == [2, 4, 4, 2, 2]
    plain = Labelled()

    def guided(x: Tensor, t: Tensor) -> Tensor:
        conditional = plain(x, t, labels.to(x.device))
        null = plain(x, t, label(x, NULL).to(x.device))
        return null + 4 * (conditional - null) if 400 <= int(t[0]) <= 600 else conditional

    expected = Sampler(guided, LINEAR, **settings).sample(2, shape=(2, 4), seed=1)
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-6)


def test_rescaled_guidance_is_that_of_the_paper() -> None:
    """Lin et al. 2024, section 3.4, around diffusers' scheduler."""
    model, labels = Labelled(), torch.tensor([0, 2, 1])
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    scheduler.set_timesteps(8)
    x = x_T = torch.randn(3, 2, 6, 6)
    for t in scheduler.timesteps:
        conditional, null = model(x, t.expand(3), labels), model(x, t.expand(3), label(x, NULL))
        out = null + 6 * (conditional - null)
        rescaled = out * conditional.std((1, 2, 3), keepdim=True) / out.std((1, 2, 3), keepdim=True)
        out = 0.7 * rescaled + 0.3 * out
        x = scheduler.step(out, t, x).prev_sample
    sampler = Sampler(
        model,
        LINEAR,
        "ddim",
        8,
        prediction_type="v_prediction",
        clip_sample=False,
        guidance_scale=6.0,
        guidance_rescale=0.7,
        null_class=NULL,
    )
    torch.testing.assert_close(sampler.sample(3, x_T=x_T, class_labels=labels), x, rtol=0, atol=2e-5)


def test_rescaled_guidance_leaves_the_learned_variance() -> None:
    """With rescale 1 every prediction has the standard deviation of the conditional one, and v is as it was."""
    model = Labelled(channels=4)
    settings: dict[str, Any] = {"variance_type": "learned_range", "num_inference_steps": 4, "clip_sample": False}
    labels = torch.tensor([0, 2])
    sampler = Sampler(model, LINEAR, guidance_scale=5.0, guidance_rescale=1.0, null_class=NULL, **settings)
    images = sampler.sample(2, shape=(2, 6), class_labels=labels, seed=4)

    def rescaled(x: Tensor, t: Tensor) -> Tensor:
        conditional, null = model(x, t, labels), model(x, t, label(x, NULL))
        guided = null[:, :2] + 5 * (conditional - null)[:, :2]
        ratio = conditional[:, :2].std((1, 2), keepdim=True) / guided.std((1, 2), keepdim=True)
        return torch.cat([guided * ratio, conditional[:, 2:]], 1)

    expected = Sampler(rescaled, LINEAR, **settings).sample(2, shape=(2, 6), seed=4)
    torch.testing.assert_close(images, expected, rtol=5e-6, atol=2e-6)


# -- dynamic thresholding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7, 999])
def test_threshold_is_the_quantile(ratio: float, size: int) -> None:
    x0 = 3 * torch.randn(4, size, 1)
    expected = torch.quantile(x0.flatten(1).double().abs(), ratio, dim=1).clamp(1, 4)
    torch.testing.assert_close(DynamicThreshold(ratio, 4.0)(x0).double(), expected, rtol=1e-6, atol=0)


def test_thresholding_under_guidance() -> None:
    """The threshold is that of the guided prediction."""
    model, labels = Labelled(), torch.tensor([0, 2])
    settings: dict[str, Any] = {"method": "ddim", "num_inference_steps": 4, "thresholding": True, "sample_max_value": 9}

    def guided(x: Tensor, t: Tensor) -> Tensor:
        conditional, null = model(x, t, labels), model(x, t, label(x, NULL))
        return null + 5 * (conditional - null)

    sampler = Sampler(model, LINEAR, guidance_scale=5.0, null_class=NULL, **settings)
    images = sampler.sample(2, shape=(2, 9), class_labels=labels)
    expected = Sampler(guided, LINEAR, **settings).sample(2, shape=(2, 9))
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)


# -- conditions -------------------------------------------------------------------------------------------------------


def test_self_conditioning_by_name_and_by_channels_are_the_same() -> None:
    """That by name is held to denoising_diffusion_pytorch's own loop in interop/test_lucidrains.py."""

    def named(x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return torch.tanh(x + 0.7 * (0 * x if x_self_cond is None else x_self_cond))

    def concatenated(x: Tensor, t: Tensor) -> Tensor:
        return named(x[:, 1:], t, x[:, :1])

    one, other, without = (
        Sampler(model, LINEAR, num_inference_steps=5, self_condition=told).sample(2, shape=(1, 8, 8))
        for model, told in ((named, True), (concatenated, True), (named, False))
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert float((one - without).abs().max()) > 1e-2


def test_self_condition_goes_to_both_halves() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor, class_labels: Tensor, x_self_cond: Tensor) -> Tensor:
        seen.append(x_self_cond.clone())
        return torch.tanh(x + x_self_cond) + class_labels.view(-1, 1, 1)

    sampler = Sampler(model, LINEAR, num_inference_steps=3, guidance_scale=2.0, null_class=NULL, self_condition=True)
    trajectory = sampler.sample(2, shape=(2, 4), class_labels=[0, 1], return_trajectory=1)
    for index, given in enumerate(seen):
        expected = torch.zeros(2, 2, 4) if index == 0 else trajectory.x0[index - 1]
        assert torch.equal(given, torch.cat([expected, expected]))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_condition_stands_beside_the_state(backend: str, device: torch.device) -> None:
    """In every chunk and both halves the model sees [x, condition], and the state's channels are the loop's."""
    if backend == "triton":
        pytest.importorskip("triton")
    condition = torch.randn(3, 1, 4, device=device)
    labels = torch.tensor([0, 1, 2])
    # Without graphs, since the model notes on the host what it sees.
    settings: dict[str, Any] = {"num_inference_steps": 3, "backend": backend, "device": device, "cuda_graph": False}
    seen: list[int] = []

    def reads(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        assert x.shape[1:] == (3, 4)
        seen.append(len(x))
        return torch.tanh(x[:, :2] * x[:, 2:]) + class_labels.view(-1, 1, 1)

    sampler = Sampler(reads, LINEAR, guidance_scale=3.0, null_class=NULL, **settings)
    images = sampler.sample(3, shape=(2, 4), class_labels=labels, condition=condition, batch_size=2, seed=6)
    assert seen == [4] * 3 + [2] * 3

    def knows(x: Tensor, t: Tensor) -> Tensor:
        conditional, null = (torch.tanh(x * condition) + value for value in (labels.to(device).view(-1, 1, 1), NULL))
        return null + 3 * (conditional - null)

    expected = Sampler(knows, LINEAR, **settings).sample(3, shape=(2, 4), seed=6)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


# -- learned variances ------------------------------------------------------------------------------------------------


def test_learned_variance_itself_and_its_logarithm_are_the_same() -> None:
    """diffusers reads the variance from the network, guided-diffusion its logarithm."""

    def variance(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([toy(x, t), 0.01 + x.square()], 1)

    def logarithm(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([toy(x, t), (0.01 + x.square()).log()], 1)

    settings: dict[str, Any] = {"num_inference_steps": 5, "variance_type": "learned"}
    one = Sampler(variance, LINEAR, **settings).sample(2, shape=(2, 4), seed=1)
    other = Sampler(logarithm, LINEAR, convention="guided_diffusion", **settings).sample(2, shape=(2, 4), seed=1)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["ddim", "dpmsolver++"])
def test_other_methods_do_not_read_the_learned_variance(method: str) -> None:
    one = Sampler(doubled, LINEAR, method, 5, variance_type="learned_range").sample(2, shape=(2, 4))
    assert torch.equal(one, Sampler(toy, LINEAR, method, 5).sample(2, shape=(2, 4)))


def test_learned_std_reads_the_conditional_half() -> None:
    out = torch.cat([torch.full((2, 4, 3), 9.0), torch.full((2, 4, 3), 0.5)])
    std = learned_std(out[-2:], 2, torch.tensor([[-4.0, -2.0]]))
    torch.testing.assert_close(std, torch.full((2, 2, 3), math.exp(-2.5 / 2)))
