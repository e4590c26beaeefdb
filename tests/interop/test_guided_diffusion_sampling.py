"""Samplers of guided-diffusion's and improved-diffusion's models against their loops, restated, at equal noise."""

from __future__ import annotations

import math
import re
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddpm.interop.guided_diffusion import load_classifier, load_sampler

FLAGS: dict[str, Any] = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1"}
FLAGS |= {"attention_resolutions": "4", "resblock_updown": True}
RESTATED: dict[str, Any] = {"channels": 32, "mult": (1, 1), "layers": 1, "reductions": (2,), "updown": True}
IMPROVED: dict[str, Any] = {"library": "improved_diffusion", "image_size": 32, "num_channels": 32, "num_res_blocks": 1}
IMPROVED |= {"attention_resolutions": "16"}
IMPROVED_RESTATED: dict[str, Any] = {"channels": 32, "mult": (1, 2, 2, 2), "layers": 1, "reductions": (2,)}
ENCODER: dict[str, Any] = {"channels": 64, "mult": (1, 2, 3, 4), "layers": 1, "reductions": (2,), "pool": "adaptive"}
SCALE = 30.0
# Which timesteps a respacing keeps, worked out by hand.
KEPT = {
    ("4", 100): [0, 33, 66, 99],
    ("ddim4", 100): [0, 25, 50, 75],
    ("3,2", 50): [0, 12, 24, 25, 49],
    ("", 21): list(range(21)),
}
# By name: respacing, timesteps, flags and what else the sampler is told, and what that means for the restatement.
LOOPS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "learned": ("4", 100, FLAGS | {"learn_sigma": "True", "noise_schedule": "cosine", "class_cond": "True"}, {}),
    "all_steps": ("", 21, FLAGS | {"predict_xstart": True}, {}),
    "sections": ("3,2", 50, FLAGS | {"learn_sigma": True, "rescale_timesteps": "True", "use_kl": True}, {}),
    "not_clipped": ("4", 100, FLAGS | {"clip_denoised": False}, {"clip": False}),
    "ddim": ("ddim4", 100, FLAGS | {"learn_sigma": True, "class_cond": True}, {}),
    "ddim_with_noise": ("4", 100, FLAGS | {"use_ddim": True, "eta": 0.7, "predict_xstart": "y"}, {"eta": 0.7}),
    "ancestral_on_the_grid_of_ddim": ("ddim4", 100, FLAGS | {"use_ddim": False}, {}),
    "improved": ("3,2", 50, IMPROVED | {"sigma_small": True}, {}),
    "improved_ddim": ("ddim4", 100, IMPROVED | {"learn_sigma": "True"}, {}),
}
# The same, guided by a classifier, also of networks that know no classes.
GUIDED = {
    "learned": ("4", 100, FLAGS | {"learn_sigma": True, "class_cond": True}, {}),
    "fixed_large": ("4", 100, FLAGS | {"rescale_timesteps": True}, {}),
    "fixed_small": ("3,2", 50, IMPROVED | {"sigma_small": True, "rescale_timesteps": False}, {}),
    "ddim": ("ddim4", 100, FLAGS | {"class_cond": True}, {}),
    "ddim_learned_x0": ("ddim4", 100, FLAGS | {"learn_sigma": True, "predict_xstart": True, "eta": 0.5}, {"eta": 0.5}),
    "ddim_not_clipped": ("ddim4", 100, FLAGS | {"clip_denoised": False}, {"clip": False}),
}


def betas(flags: dict[str, Any], steps: int) -> np.ndarray:
    if flags.get("noise_schedule") != "cosine":
        return np.linspace(0.1 / steps, 20 / steps, steps)
    bars = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return np.array([min(1 - b / a, 0.999) for a, b in pairwise(bars)])


def true(value: Any) -> bool:
    return str(value) in ("True", "y")


class Case:
    """A loop restated, and our sampler with the same weights and noise.

    `w` and `classifier` are weights for the networks; with the latter the loop is guided.
    """

    def __init__(
        self, openai: ModuleType, case: tuple[str, int, dict[str, Any], dict[str, Any]], classifier: Any = None
    ) -> None:
        self.openai, self.classifier, self.w = openai, classifier, openai.Weights()
        respacing, steps, self.flags, self.told = case
        flags, kept = self.flags, KEPT[respacing, steps]
        improved = "library" in flags
        self.arguments = IMPROVED_RESTATED if improved else RESTATED
        learned, self.conditional = true(flags.get("learn_sigma", False)), true(flags.get("class_cond", False))
        self.out = 6 if learned else 3
        self.y = torch.tensor([7, 999])
        torch.manual_seed(1)
        self.x_T, self.noise = torch.randn(2, 3, 8, 8), torch.randn(len(kept), 2, 3, 8, 8)
        self.diffusion = diffusion = openai.Diffusion(
            betas(flags, steps),
            kept,
            predicts="sample" if true(flags.get("predict_xstart", False)) else "epsilon",
            variance="learned_range" if learned else "fixed_small" if flags.get("sigma_small") else "fixed_large",
            rescale=true(flags.get("rescale_timesteps", improved)),
        )
        ddim = flags.get("use_ddim", respacing.startswith("ddim"))
        self.loop = diffusion.ddim_sample_loop if ddim else diffusion.p_sample_loop
        self.sampler = partial(load_sampler, self.w, respacing, diffusion_steps=steps, **flags)

    @torch.no_grad()
    def restated(self, dtype: torch.dtype) -> Tensor:
        """The images of the library, computed in `dtype`."""
        w = self.w.to(dtype)

        def model(x: Tensor, t: Tensor) -> Tensor:
            return self.openai.unet_model(w, x, t, self.y if self.conditional else None, out=self.out, **self.arguments)

        cond_fn = None if self.classifier is None else partial(self.gradient, self.classifier.to(dtype))
        images = self.loop(model, self.x_T.to(dtype), self.noise.to(dtype), cond_fn=cond_fn, **self.told)
        self.w.update(w)
        return images.double()

    def gradient(self, w: Any, x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = torch.log_softmax(self.openai.encoder_model(w, x, t, **ENCODER), 1)
            return SCALE * torch.autograd.grad(log_p[[0, 1], self.y].sum(), x)[0]

    def ours(self, **settings: Any) -> Tensor:
        """The images of our sampler."""
        sampler = self.sampler(**settings)
        assert sampler.network.frozen is not None
        labels = self.y if self.conditional or settings else None
        images = sampler.sample(2, shape=(3, 8, 8), x_T=self.x_T, noise=self.noise, class_labels=labels)
        return images.double()


def assert_equal(case: Case, expected: Tensor, actual: Tensor) -> None:
    """Within 8 times what float32 costs the library itself.

    Prepared for sampling, a network rounds up to 3 times as much in one evaluation: convolutions by Winograd's
    algorithm, and without native kernels torch's channels-last GroupNorm, which at 1x1 pixels has 2 values in a group.
    The rest is luck: of each rounding there is one draw.
    """
    lost = rms(case.restated(torch.float32) - expected) / max(rms(expected), 1)
    assert lost < 1e-5, "the case is too sensitive to tell anything"
    assert rms(actual - expected) / max(rms(expected), 1) <= 8 * lost


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_equal(openai: ModuleType, name: str) -> None:
    case = Case(openai, LOOPS[name])
    expected = case.restated(torch.float64)  # which draws the weights
    assert_equal(case, expected, case.ours())


@pytest.fixture(scope="module")
def classifier(openai: ModuleType) -> Any:
    w = openai.Weights(seed=1)
    openai.encoder_model(w, torch.zeros(1, 3, 8, 8, dtype=torch.float64), torch.zeros(1), **ENCODER)
    return w


@pytest.mark.parametrize("name", GUIDED)
def test_guided_loops_are_equal(openai: ModuleType, classifier: Any, name: str) -> None:
    """`classifier_sample.py`: condition_mean, or condition_score where it is DDIM."""
    _, steps, flags, _ = GUIDED[name]
    case = Case(openai, GUIDED[name], classifier)
    expected = case.restated(torch.float64)
    loaded = load_classifier(
        classifier, classifier_width=64, classifier_depth=1, classifier_attention_resolutions="32",
        classifier_pool="adaptive", dtype=torch.float32, diffusion_steps=steps,
        rescale_timesteps=flags.get("rescale_timesteps", False),
    )  # fmt: skip
    images = case.ours(classifier_fn=loaded.gradient, classifier_scale=SCALE)
    assert_equal(case, expected, images)
    assert rms(images - case.ours()) > 1e-2


@pytest.mark.parametrize(
    ("respacing", "more", "kind", "message"),
    [
        ("ddim30", {}, ValueError, "timestep_respacing is 'ddim30': no integer stride over 100 steps takes 30 steps"),
        ("101", {}, ValueError, "timestep_respacing is '101': 101 steps do not fit in a section of 100"),
        ("1,x", {}, ValueError, "timestep_respacing is '1,x', must be a number, 'ddim' and a number, or numbers with"),
        ("", {"noise_schedule": "sqrt"}, ValueError, "noise_schedule is 'sqrt', must be 'linear' or 'cosine'"),
        (
            "",
            {"diffusion_steps": 20},
            ValueError,
            "diffusion_steps is 20, must be above 20 for noise_schedule 'linear'",
        ),
        ("", {"method": "ddim"}, TypeError, "method is no flag of guided_diffusion, which has image_size"),
        ("", {"eta": 1.0}, ValueError, "eta is 1.0 but method is 'ddpm'; eta is a setting of method 'ddim'"),
    ],
)
def test_bad_settings(
    openai: ModuleType, respacing: str, more: dict[str, Any], kind: type[Exception], message: str
) -> None:
    w = openai.Weights()
    openai.unet_model(w, torch.zeros(1, 3, 8, 8, dtype=torch.float64), torch.zeros(1), **RESTATED)
    with pytest.raises(kind, match=f"^{re.escape(message)}") as raised:
        load_sampler(w, respacing, **FLAGS | {"diffusion_steps": 100} | more)
    assert "\n" not in str(raised.value)
