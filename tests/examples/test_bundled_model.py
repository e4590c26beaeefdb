"""The model in `fastddpm/assets/digits`: what it is, what it draws, and that diffusers reads it too."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

from fastddpm.interop.pretrained import BUNDLED, Pretrained, load_pretrained

WEIGHTS = BUNDLED / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def bundled() -> Pretrained:
    return load_pretrained()


def test_weights_are_half_precision_and_small() -> None:
    assert WEIGHTS.stat().st_size <= 4_000_000
    with safe_open(WEIGHTS, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_is_class_conditional_and_grey(bundled: Pretrained) -> None:
    config = bundled.unet.config
    assert (config.sample_size, config.in_channels, config.out_channels) == (16, 1, 1)
    assert (config.num_class_embeds, config.null_class) == (11, 10)
    assert bundled.schedule.num_train_timesteps == 1000


def test_recorded_report_is_good() -> None:
    """The figures that training printed: 1000 samples of 1000 steps."""
    report = json.loads((BUNDLED / "training.json").read_text())["report"]
    assert report["samples"] == 1000
    assert report["classifier_accuracy_on_unseen_real"] >= 0.98
    assert report["recognised"] >= 0.95
    assert all(row["recognised"] >= 0.9 for row in report["per_class"])
    assert all(0.8 <= row["variance_ratio"] <= 1.2 for row in report["per_class"])
    nearest = report["nearest_training_image"]
    assert nearest["samples"]["median"] > nearest["nudged_copies_of_real"]["median"]
    assert nearest["samples_below_real_quantile_01"] <= 0.02


def test_guidance_draws_the_digits_asked_for(bundled: Pretrained, digits: ModuleType) -> None:
    labels = torch.arange(20) % 10
    sampler = bundled.sampler(method="ddim", num_inference_steps=25, guidance_scale=1.5)
    assert int(digits.recognised(sampler.sample(20, seed=2, class_labels=labels), labels).sum()) >= 19


@torch.no_grad()
def test_diffusers_loads_the_same_model(bundled: Pretrained) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DDPMPipeline.from_pretrained(BUNDLED)
    assert isinstance(pipeline.unet, diffusers.UNet2DModel)
    assert pipeline.scheduler.config.prediction_type == bundled.settings["prediction_type"]
    torch.testing.assert_close(
        pipeline.scheduler.alphas_cumprod.double(), bundled.schedule.alphas_cumprod, rtol=1e-3, atol=1e-6
    )
    x, t, labels = torch.randn(4, 1, 16, 16), torch.tensor([0, 300, 700, 999]), torch.tensor([0, 3, 9, 10])
    expected = pipeline.unet(x, t, class_labels=labels).sample
    torch.testing.assert_close(bundled.unet(x, t, labels), expected, rtol=1e-4, atol=1e-5)


def test_draws_the_digits_asked_for_that_are_no_copies(bundled: Pretrained, digits: ModuleType) -> None:
    labels = torch.arange(100) % 10
    # A tenth of the steps, for the time it takes; the recorded report is of all of them.
    images = bundled.sampler(num_inference_steps=100).sample(100, seed=3, class_labels=labels)
    assert images.shape == (100, 1, 16, 16)
    report = digits.evaluate(images, labels)
    assert report["recognised"] >= 0.95
    nearest = report["nearest_training_image"]
    assert nearest["samples"]["median"] > nearest["nudged_copies_of_real"]["median"]
