"""Accelerated pipelines against diffusers' own, at the same generators; and what of diffusers' behaviour they keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
)
from diffusers_objects import CLOSE, ddpm, draw, quiet, seeded, unet
from torch import Tensor

from fastddpm.interop import accelerate
from fastddpm.interop.diffusers.scheduler import recognise
from fastddpm.interop.shared import StepNoise
from fastddpm.networks.precision import tf32


def check_equal(pipeline: Any, **arguments: Any) -> None:
    """An accelerated pipeline gives the images of the original, and leaves the generator where that does."""
    theirs, ours = seeded(), seeded()
    expected = draw(pipeline, generator=theirs, **arguments)
    actual = draw(accelerate(pipeline), generator=ours, **arguments)
    # Images that are nothing but 0 and 1 would hide differences.
    assert float(((expected > 0.01) & (expected < 0.99)).float().mean()) > 0.1
    assert actual.dtype == expected.dtype
    assert float((actual - expected).abs().max()) < CLOSE
    assert torch.equal(ours.get_state(), theirs.get_state())


V = {"prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
GENTLE = {"beta_end": 1e-3}  # not much noise: without clipping, an untrained network stays within the image's range
SCHEDULES: list[dict[str, Any]] = [
    {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.linspace(1e-4, 0.3, 50), "num_train_timesteps": 50},
    {"num_train_timesteps": 30},
]
COMMON: list[dict[str, Any]] = [
    {},
    V,
    {"prediction_type": "sample"},
    {"clip_sample_range": 2.0},
    {"clip_sample": False, **V},
    THRESHOLD,
    ZERO_SNR,
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"steps_offset": 1},
    *SCHEDULES,
]


def ids(settings: Any) -> str:
    return ",".join(f"{name}={np.shape(v) or v}" for name, v in settings.items()) or "defaults"


@pytest.mark.parametrize(
    "settings",
    [
        *COMMON,
        {"variance_type": "fixed_small_log"},
        {"variance_type": "fixed_large"},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace"},
    ],
    ids=ids,
)
def test_ddpm_scheduler(settings: dict[str, Any]) -> None:
    check_equal(ddpm(**settings))


def test_ddpm_at_its_full_length() -> None:
    check_equal(ddpm(variance_type="fixed_large", num_train_timesteps=200), num_inference_steps=200)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_ddpm_learned_variance(variance_type: str) -> None:
    model = unet(out_channels=6)
    with torch.no_grad():  # variances, or shares between two, that are positive
        model.conv_out.weight[3:] *= 0.01
        model.conv_out.bias[3:] = 0.3
    check_equal(quiet(DDPMPipeline(model, DDPMScheduler(variance_type=variance_type))))


# Those of a call change the columns of x0, x_t and the output: together with what is predicted and how x0 is bounded.
CALLS: list[dict[str, Any]] = [{"eta": 0.5}, {"eta": 0.9, "use_clipped_model_output": True}]


@pytest.mark.parametrize(
    ("settings", "call"),
    [
        *((settings, {}) for settings in [*COMMON, {"set_alpha_to_one": False}]),
        *zip((*COMMON[:3], THRESHOLD, ZERO_SNR), [*CALLS, *CALLS, CALLS[0]], strict=True),
        (THRESHOLD, CALLS[0]),
        ({}, {"eta": 1.0}),
        ({}, {"use_clipped_model_output": False}),
    ],
    ids=ids,
)
def test_ddim_scheduler(settings: dict[str, Any], call: dict[str, Any]) -> None:
    check_equal(quiet(DDIMPipeline(unet(), DDIMScheduler(**settings))), **call)


@pytest.mark.parametrize(
    ("spacing", "steps"),
    [("leading", 7), ("leading", 30), ("trailing", 7), ("trailing", 30), ("linspace", 1), ("linspace", 30)],
)
def test_ddim_steps_that_do_not_divide(spacing: str, steps: int) -> None:
    """diffusers' DDIM steps by T // S, wherever the next timestep is."""
    scheduler = DDIMScheduler(num_train_timesteps=50, timestep_spacing=spacing)
    check_equal(quiet(DDIMPipeline(unet(), scheduler)), num_inference_steps=steps, eta=0.3)


@pytest.mark.parametrize(
    "settings",
    [
        GENTLE,
        V,
        {"prediction_type": "sample"},
        THRESHOLD,
        ZERO_SNR,
        *({**schedule, **V} for schedule in SCHEDULES),
        {**GENTLE, "solver_order": 1},
        {**GENTLE, "timestep_spacing": "leading", "steps_offset": 1},
        {**GENTLE, "timestep_spacing": "trailing"},
        {**GENTLE, "final_sigmas_type": "sigma_min"},
        {**GENTLE, "final_sigmas_type": "sigma_min", "lower_order_final": False},
    ],
    ids=ids,
)
def test_dpmsolver_scheduler(settings: dict[str, Any]) -> None:
    for steps in (9, 16) if "final_sigmas_type" in settings else (9,):  # below 15 the last step may be of a lower order
        check_equal(quiet(DDPMPipeline(unet(), DPMSolverMultistepScheduler(**settings))), num_inference_steps=steps)


def test_singlestep_sde_solver_of_first_order() -> None:
    """Of higher order its groups begin anew from a state that noise has covered: the pipeline keeps its own loop."""
    scheduler = DPMSolverSinglestepScheduler(**GENTLE, algorithm_type="sde-dpmsolver++", solver_order=1)
    check_equal(quiet(DDPMPipeline(unet(), scheduler)))
    accelerate(quiet(DDPMPipeline(unet(), scheduler)), allow_general=False)


def test_dpmsolver_beside_a_learned_variance() -> None:
    scheduler = DPMSolverMultistepScheduler(**GENTLE, variance_type="learned_range")
    check_equal(quiet(DDPMPipeline(unet(out_channels=6), scheduler)))


@pytest.mark.parametrize("settings", [{}, {"prediction_type": "sample"}], ids=ids)
def test_ddim_scheduler_in_ddpm_pipeline(settings: dict[str, Any]) -> None:
    check_equal(quiet(DDPMPipeline(unet(), DDIMScheduler(**settings))))


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_size": (8, 4)},
        {"in_channels": 1, "out_channels": 1},
        {"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
        {"resnet_time_scale_shift": "scale_shift", "center_input_sample": True, "norm_eps": 1e-3},
    ],
    ids=ids,
)
def test_unets(changes: dict[str, Any]) -> None:
    check_equal(quiet(DDPMPipeline(unet(**changes), DDPMScheduler())))


# -- random numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "generators",
    [
        lambda: [seeded(k) for k in (5, 6, 7)],
        lambda: [seeded(5)],
        lambda: torch.manual_seed(5),
        lambda: [seeded(k) for k in (5, 6, 7, 8)],
    ],
    ids=["one each", "a list of one", "the global one", "more than images"],
)
def test_kinds_of_generators(generators: Callable[[], Any]) -> None:
    pipeline = ddpm()
    expected = draw(pipeline, batch_size=3, generator=generators())
    actual = draw(accelerate(pipeline), batch_size=3, generator=generators())
    assert float((actual - expected).abs().max()) < CLOSE


def test_a_generator_per_image_makes_it_independent_of_the_others() -> None:
    fast = accelerate(ddpm())
    both = draw(fast, generator=[seeded(1), seeded(2)])
    torch.testing.assert_close(draw(fast, batch_size=1, generator=seeded(2)), both[1:], rtol=0, atol=CLOSE)


def test_philox_noise_without_a_generator() -> None:
    fast = accelerate(ddpm())
    torch.manual_seed(3)
    first, second = draw(fast, generator=None), draw(fast, generator=None)
    assert float((first - second).abs().max()) > 0.1
    torch.manual_seed(3)
    assert torch.equal(draw(fast, generator=None), first)
    torch.manual_seed(3)  # an image does not depend on how many are drawn with it
    torch.testing.assert_close(draw(fast, batch_size=5, generator=None)[:2], first, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline])
def test_torch_noise_without_a_generator(kind: Any) -> None:
    scheduler = DDPMScheduler() if kind is DDPMPipeline else DDIMScheduler()
    call = {} if kind is DDPMPipeline else {"eta": 1.0}
    pipeline = quiet(kind(unet(), scheduler))
    torch.manual_seed(3)
    expected = [draw(pipeline, generator=None, **call) for _ in range(2)]
    fast = accelerate(pipeline, noise="torch")
    torch.manual_seed(3)
    for images in expected:  # the second call begins where the first has left the generator
        assert float((draw(fast, generator=None, **call) - images).abs().max()) < CLOSE


def test_step_noise_is_drawn_in_order() -> None:
    drawn: list[int] = []

    def one() -> Tensor:
        drawn.append(len(drawn))
        return torch.tensor(float(drawn[-1]))

    noise = StepNoise([True, False, True, True, True], one)
    assert float(noise(0, ())) == 0
    assert float(noise(3, ())) == 2  # that of row 2 is drawn, and not used
    noise.finish()
    assert drawn == [0, 1, 2, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_generators_on_a_gpu(device: str) -> None:
    pipeline = ddpm(prediction_type="v_prediction").to("cuda")
    with tf32(False):  # which diffusers' convolutions would else round to
        expected, actual = (
            draw(p, generator=[torch.Generator(device).manual_seed(k) for k in range(2)])
            for p in (pipeline, accelerate(pipeline))
        )
    assert actual.device == expected.device
    assert float((actual - expected).abs().max()) < CLOSE


def test_levels_are_the_schedulers_own() -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    levels = recognise(scheduler).schedule.alphas_cumprod
    torch.testing.assert_close(levels, scheduler.alphas_cumprod.double(), rtol=1e-12, atol=0)
