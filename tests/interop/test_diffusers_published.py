"""Accelerated pipelines and schedulers against the results that diffusers publishes in its own tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    LCMScheduler,
    LDMPipeline,
    ModelMixin,
    UNet2DModel,
    UniPCMultistepScheduler,
    VQModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers_objects import CLOSE, ddpm, quiet, seeded, unet
from PIL import Image
from torch import Tensor, nn

from fastddpm.interop import accelerate
from fastddpm.interop.shared import StepNoise


def old_unet() -> UNet2DModel:
    return unet(sample_size=32, block_out_channels=(32, 64), layers_per_block=2, norm_num_groups=32)


def ldm(**settings: Any) -> Any:
    torch.manual_seed(0)
    decoder = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
    )
    return quiet(LDMPipeline(vqvae=decoder.eval(), unet=old_unet(), scheduler=DDIMScheduler(**settings)))


@pytest.mark.parametrize(
    ("make", "size", "expected", "tolerance"),
    [
        pytest.param(
            ddpm, 8, [0.0, 0.9996672, 0.00329116, 1.0, 0.9995991, 1.0, 0.0060907, 0.00115037, 0.0], 1e-2, id="DDPM"
        ),
        pytest.param(
            lambda: DDIMPipeline(unet(), DDIMScheduler()),
            8,
            [0.0, 9.979e-01, 0.0, 9.999e-01, 9.986e-01, 9.991e-01, 7.106e-04, 0.0, 0.0],
            1e-3,
            id="DDIM",
        ),
        pytest.param(
            lambda: DDIMPipeline(old_unet(), DDIMScheduler()),
            32,
            [1.0, 5.717e-01, 4.717e-01, 1.0, 0.0, 1.0, 3.0e-04, 0.0, 9.0e-04],
            1e-3,
            id="DDIM, an older test",
        ),
        pytest.param(ldm, 64, [0.8512, 0.818, 0.6411, 0.6808, 0.4465, 0.5618, 0.46, 0.6231, 0.5172], 1e-2, id="LDM"),
    ],
)
def test_published_slices(make: Callable[[], Any], size: int, expected: list[float], tolerance: float) -> None:
    """The numbers and tolerances of tests/pipelines/{ddpm,ddim,latent_diffusion} in diffusers."""
    pipeline = quiet(accelerate(make()))
    images = pipeline(generator=seeded(), num_inference_steps=2, output_type="np").images
    assert images.shape == (1, size, size, 3)
    assert np.abs(images[0, -3:, -3:, -1].flatten() - np.array(expected)).max() < tolerance
    as_tuple = pipeline(generator=seeded(), num_inference_steps=2, output_type="np", return_dict=False)[0]
    assert np.array_equal(as_tuple, images)


def test_ldm_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = ldm(prediction_type="sample")
    # Without the codebook: where two entries are equally near, rounding chooses.
    monkeypatch.setattr(pipeline.vqvae, "decode", partial(pipeline.vqvae.decode, force_not_quantize=True))
    fast = accelerate(pipeline)
    for call in ({}, {"eta": 0.8}):  # the noise of its steps is torch's own, whatever the generator
        torch.manual_seed(4)
        expected = pipeline(2, seeded(), num_inference_steps=4, output_type="np", **call).images
        torch.manual_seed(4)
        actual = fast(2, seeded(), num_inference_steps=4, output_type="np", **call).images
        assert np.abs(actual - expected).max() < CLOSE
    assert isinstance(fast(num_inference_steps=1).images[0], Image.Image)
    assert isinstance(fast(num_inference_steps=1, output_type="pt").images, np.ndarray)  # as in diffusers


# -- whole loops of schedulers ----------------------------------------------------------------------------------------


class Ramp(ModelMixin, ConfigMixin):
    """The network of diffusers' scheduler tests, x t / (t + 1)."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 3, out_channels: int = 3) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))  # tells device and dtype

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        t = timestep.view(-1, 1, 1, 1).to(sample)
        return UNet2DOutput(sample=sample * t / (t + 1))


def ramp(*, falling: bool = False) -> Tensor:
    """The samples, or the noise, of diffusers' scheduler tests: [4, 3, 8, 8] from 0 to 1."""
    values = torch.arange(4 * 3 * 8 * 8) / (4 * 3 * 8 * 8)
    return (values.flip(0) if falling else values).view(3, 8, 8, 4).permute(3, 0, 1, 2)


def check_magnitudes(x: Tensor, total: float | None, mean: float) -> None:
    assert total is None or abs(float(x.abs().sum()) - total) < 1e-2
    assert abs(float(x.abs().mean()) - mean) < 1e-3


ENDS: dict[str, Any] = {"final_sigmas_type": "sigma_min"}
DPM: dict[str, Any] = {"lower_order_final": False, **ENDS}
V: dict[str, Any] = {"prediction_type": "v_prediction"}
KARRAS: dict[str, Any] = {"use_karras_sigmas": True}


@pytest.mark.parametrize(
    ("scheduler", "steps", "total", "mean"),
    [
        (DDPMScheduler(), 1000, 258.9606, 0.3372),
        (DDPMScheduler(prediction_type="v_prediction"), 1000, 202.0296, 0.2631),
        (DDIMScheduler(), 10, 172.0067, 0.223967),
        (DDIMScheduler(prediction_type="v_prediction"), 10, 52.5302, 0.0684),
        (DDIMScheduler(beta_start=0.01), 10, 149.8295, 0.1951),
        (DDIMScheduler(beta_start=0.01, set_alpha_to_one=False), 10, 149.0784, 0.1941),
        (DPMSolverMultistepScheduler(**DPM), 10, None, 0.3301),
        (DPMSolverMultistepScheduler(**DPM, **V), 10, None, 0.2251),
        (DPMSolverMultistepScheduler(**DPM, **V, **KARRAS), 10, None, 0.2096),
        (DPMSolverMultistepScheduler(**DPM, **V, use_lu_lambdas=True), 10, None, 0.1554),
        (DPMSolverSinglestepScheduler(**ENDS), 10, None, 0.2791),
        (DPMSolverSinglestepScheduler(**ENDS, **KARRAS), 10, None, 0.2248),
        (DPMSolverSinglestepScheduler(**ENDS, **V), 10, None, 0.1453),
        (DPMSolverSinglestepScheduler(**ENDS, **V, **KARRAS), 10, None, 0.0649),
        (UniPCMultistepScheduler(**ENDS), 10, None, 0.2464),
        (UniPCMultistepScheduler(**ENDS, **KARRAS), 10, None, 0.2925),
        (UniPCMultistepScheduler(**ENDS, **V), 10, None, 0.1014),
        (UniPCMultistepScheduler(**ENDS, **V, **KARRAS), 10, None, 0.1966),
        (DEISMultistepScheduler(), 10, None, 0.23916),
        (DEISMultistepScheduler(**V), 10, None, 0.091),
        (LCMScheduler(), 1, 18.7097, 0.0244),
        (LCMScheduler(), 10, 197.7616, 0.2575),
        (
            DPMSolverMultistepScheduler(
                **DPM, thresholding=True, dynamic_thresholding_ratio=0.87, sample_max_value=0.5
            ),
            10,
            None,
            1.1364,
        ),
        (
            DPMSolverMultistepScheduler.from_config(
                DEISMultistepScheduler.from_config(DPMSolverMultistepScheduler(**DPM).config).config
            ),
            10,
            None,
            0.3301,
        ),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "config") else str(value),
)
def test_published_loops(
    scheduler: Any, steps: int, total: float | None, mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers and tolerances of tests/schedulers/test_scheduler_*.py in diffusers."""
    fast = quiet(accelerate((Ramp(), scheduler)))
    first = [ramp()]  # in place of the x_T that a pipeline draws; the noise of the steps follows from the generator

    def randn(*arguments: Any, **named: Any) -> Tensor:
        return first.pop() if first else randn_tensor(*arguments, **named)

    monkeypatch.setattr("fastddpm.interop.diffusers.randn_tensor", randn)
    plan = fast._plan()
    check_magnitudes(fast._denoise(plan, fast._table(plan, steps), (4, 3, 8, 8), seeded()), total, mean)
    assert not first


@pytest.mark.parametrize(
    ("scheduler", "steps", "start", "total", "mean"),
    [
        (DDPMScheduler(), 1000, 998, 387.9466, 0.5051),
        (DDIMScheduler(), 10, 8, 354.5418, 0.4616),
        (DPMSolverMultistepScheduler(**DPM), 10, 5, 318.4111, 0.4146),
    ],
    ids=["DDPM", "DDIM", "DPMSolver"],
)
def test_published_loops_from_noised_samples(scheduler: Any, steps: int, start: int, total: float, mean: float) -> None:
    """The last steps, of samples that the scheduler noised."""
    fast = accelerate((Ramp(), scheduler))
    plan = fast._plan()
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    table = plan.recognised.table(scheduler)
    noised = scheduler.add_noise(ramp(), ramp(falling=True), timesteps[start : start + 1])
    generator = seeded()
    noise = StepNoise([False] * steps, lambda: randn_tensor(noised.shape, generator=generator))
    sampler = fast._engine.sampler(plan, torch.device("cpu"), table)
    check_magnitudes(sampler.sample(4, x_T=noised, table=table, start=start, noise=noise), total, mean)
