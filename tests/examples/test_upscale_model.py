"""The model in `fastddpm/assets/digits_upscale`, and that the report on it says what it claims to."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fastddpm.interop.pretrained import BUNDLED, Pretrained, load_pretrained

FOLDER = BUNDLED.parent / "digits_upscale"
WEIGHTS = FOLDER / "unet" / "diffusion_pytorch_model.safetensors"
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def upscaling() -> ModuleType:
    """`examples/train_upscale.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module("train_upscale")


@pytest.fixture(scope="module")
def model() -> Pretrained:
    return load_pretrained(FOLDER)


@pytest.fixture(scope="module")
def held_out(upscaling: ModuleType) -> tuple[Tensor, Tensor]:
    """Images that neither the model nor the classifier was trained on, and their labels."""
    counts, labels = upscaling.digits.source()
    unseen = upscaling.split()[1]
    return upscaling.digits.render(counts[unseen]), labels[unseen]


def test_weights_are_half_precision_and_small(model: Pretrained) -> None:
    assert WEIGHTS.stat().st_size <= 2_000_000
    with safe_open(WEIGHTS, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    assert (model.unet.config.in_channels, model.unet.config.out_channels) == (2, 1)


def test_recorded_report_is_good() -> None:
    """The figures that training printed, for the 540 held-out digits."""
    report = json.loads((FOLDER / "training.json").read_text())["report"]
    accuracy, rms = report["classifier_accuracy"], report["consistency_rms"]
    assert report["images"] == 540
    assert accuracy["samples"] > accuracy["bicubic"] + 0.1
    assert rms["samples"] < rms["bicubic"]
    assert 0.8 <= report["diversity"]["ratio"] <= 1.2
    nearest = report["nearest_training_image_median"]
    assert nearest["samples"] > 0.8 * nearest["truth"]


def test_held_out_digits_are_those_the_classifier_has_not_seen(
    upscaling: ModuleType, held_out: tuple[Tensor, Tensor]
) -> None:
    seen, unseen = upscaling.split()
    assert sorted([*seen, *unseen]) == list(range(1797))
    assert float(upscaling.digits.recognised(*held_out).mean()) == upscaling.digits.classifier()[1]


def test_upscales_to_what_was_given(model: Pretrained, upscaling: ModuleType, held_out: tuple[Tensor, Tensor]) -> None:
    truth, labels = (tensor[:60] for tensor in held_out)
    low = upscaling.shrink(truth)
    sampler = model.sampler(method="ddim", num_inference_steps=25)
    figures = upscaling.evaluate(upscaling.upscale(sampler, low, samples=2, seed=1), low, truth, labels)
    accuracy, rms = figures["classifier_accuracy"], figures["consistency_rms"]
    assert accuracy["samples"] > accuracy["bicubic"]
    assert rms["samples"] < 0.25 * rms["another_digit"]
    assert figures["diversity"]["ratio"] > 0.5


def test_report_tells_good_from_bad(upscaling: ModuleType, held_out: tuple[Tensor, Tensor]) -> None:
    truth, labels = (tensor[:100] for tensor in held_out)
    low = upscaling.shrink(truth)

    def figures(*samples: Tensor) -> dict:
        return upscaling.evaluate(torch.stack(samples, dim=1), low, truth, labels)

    blurred = upscaling.enlarge(low).clamp(-1, 1)
    same = figures(blurred, blurred)
    assert same["diversity"]["ratio"] == 0
    assert same["classifier_accuracy"]["samples"] == same["classifier_accuracy"]["bicubic"]
    assert same["consistency_rms"]["samples"] == pytest.approx(same["consistency_rms"]["bicubic"])

    others = figures(truth.roll(1, 0), truth.roll(2, 0))
    assert others["consistency_rms"]["samples"] > 0.8 * others["consistency_rms"]["another_digit"]
    assert others["classifier_accuracy"]["samples"] < 0.3

    # Samples of a known posterior: the truth is one more draw of the same kind, so the ratio is one.
    z = torch.randn(3, *truth.shape)
    exact = upscaling.evaluate(torch.stack([blurred + z[0], blurred + z[1]], dim=1), low, blurred + z[2], labels)
    assert exact["diversity"]["ratio"] == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_diffusers_loads_the_same_model(model: Pretrained) -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel.from_pretrained(FOLDER / "unet").float()
    x, t = torch.randn(4, 2, 16, 16), torch.tensor([0, 300, 700, 999])
    torch.testing.assert_close(model.unet(x, t), unet(x, t).sample, rtol=1e-4, atol=1e-5)
