"""What a lower precision costs: on models whose error is known, and against samplers run one by one."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from unets import TINY

from fastddpm.common.images import to_uint8
from fastddpm.evaluation.comparison import PrecisionReport, PrecisionResult, check_precisions, compare_precisions
from fastddpm.networks.unet.model import UNet
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling.sampler import Sampler

SCHEDULE = NoiseSchedule.linear()
SHAPE = (1, 4, 4)


class Toy:
    """A network with errors of a known size: relative `error` in float16 only, at timesteps from `least` on."""

    def __init__(self, error: float = 0.0, least: int = 0) -> None:
        self.error, self.least = error, least
        self.calls: list[tuple[torch.dtype, int, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.calls.append((x.dtype, int(t[0]), x.clone()))
        out = (0.25 + t / 2000).view(-1, 1, 1, 1) * x.float()
        wrong = x.dtype == torch.float16 and int(t[0]) >= self.least
        return (out * (1 + self.error) if wrong else out).to(x.dtype)


class Views:
    """A judge that keeps what it is shown; features are the pixels."""

    name = "pixels"

    def __init__(self) -> None:
        self.shown: list[Tensor] = []
        self.real = np.random.default_rng(0).standard_normal((50, 16))

    def features(self, images: Tensor) -> np.ndarray:
        self.shown.append(images)
        return images.flatten(1).double().numpy()

    def recognised(self, images: Tensor, labels: Tensor) -> float | None:
        return float((images.mean((1, 2, 3)) > labels).float().mean())


def compare(model: Any, precisions: tuple[str, ...] = ("float16",), **options: Any) -> PrecisionReport:
    arguments = {"num_samples": 4, "steps": 5, "shape": SHAPE, "method": "ddim", **options}
    return compare_precisions(model, SCHEDULE, precisions, **arguments)


def rows(report: PrecisionReport) -> dict[str, PrecisionResult]:
    return {row.precision: row for row in report.results}


def test_finds_an_error_of_known_size() -> None:
    report = compare(Toy(error=0.05), ("float16", "bfloat16"))
    float32, float16, bfloat16 = report.results
    assert [row.precision for row in report.results] == ["float32", "float16", "bfloat16"]
    assert list(float16.prediction_error) == [800, 600, 400, 200, 0]
    for error in float16.prediction_error.values():
        assert error == pytest.approx(0.05, abs=2**-11)  # float16's own rounding
    assert float16.worst_prediction_error == max(v for v in float16.prediction_error.values() if v is not None)
    assert 2**-12 < (bfloat16.worst_prediction_error or 0) < 2**-8
    assert set(float32.prediction_error.values()) == {0.0}
    assert (float32.image_max, float32.pixels_differ) == (0.0, 0.0)


def test_finds_the_timesteps_that_are_wrong() -> None:
    errors = rows(compare(Toy(error=0.05, least=500)))["float16"].prediction_error
    assert [t for t, error in errors.items() if error is not None and error > 0.01] == [800, 600]


def test_predictions_are_for_the_states_of_float32() -> None:
    """An error at one step does not show in the states at which the next are compared."""
    model = Toy(error=0.5)
    compare(model)
    watched = model.calls[:10]  # float32 and float16 in turn, then the sampling in float16
    assert [(dtype, t) for dtype, t, _ in watched] == [
        (dtype, t) for t in (800, 600, 400, 200, 0) for dtype in (torch.float32, torch.float16)
    ]
    for (_, _, x), (_, _, half) in zip(watched[::2], watched[1::2], strict=True):
        assert torch.equal(x.half(), half)
    assert not torch.equal(model.calls[11][2], watched[3][2])  # on its own, float16 goes another way


def test_every() -> None:
    assert list(rows(compare(Toy(), every=2))["float16"].prediction_error) == [800, 400, 0]
    assert len(rows(compare(Toy(), steps=100))["float16"].prediction_error) == 10
    with pytest.raises(ValueError, match="every is 0"):
        compare(Toy(), every=0)


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmsolver++"])
def test_images_are_those_of_samplers(method: str) -> None:
    model, judge = Toy(error=0.1), Views()
    row = rows(compare(model, seed=3, method=method, judge=judge))["float16"]
    options: dict[str, Any] = {"method": method, "num_inference_steps": 5}
    expected, images = (
        Sampler(model, SCHEDULE, dtype=dtype, **options).sample(4, seed=3, shape=SHAPE)
        for dtype in (torch.float32, torch.float16)
    )
    assert any(torch.equal(shown, expected) for shown in judge.shown)
    assert any(torch.equal(shown, images) for shown in judge.shown)
    difference = (images - expected).double()
    assert row.image_rms == pytest.approx(float(difference.square().mean().sqrt()))
    assert row.image_max == pytest.approx(float(difference.abs().max()))
    levels = np.abs(to_uint8(images).astype(int) - to_uint8(expected).astype(int))
    assert row.pixels_differ == (levels > 0).mean() > 0
    assert row.pixels_differ_by_more == (levels > 1).mean()


def test_batches_change_nothing() -> None:
    whole, parts = (rows(compare(Toy(error=0.05), batch_size=size))["float16"] for size in (None, 3))
    assert parts.image_rms == pytest.approx(whole.image_rms)
    assert parts.prediction_error == {t: pytest.approx(error) for t, error in whole.prediction_error.items()}


def test_not_finite_is_said_and_not_averaged() -> None:
    report = compare(Toy(error=float("inf"), least=500), ("float16", "bfloat16"), judge=Views())
    float16, bfloat16 = rows(report)["float16"], rows(report)["bfloat16"]
    assert not float16.finite
    assert [t for t, error in float16.prediction_error.items() if error is None] == [800, 600]
    assert (float16.worst_prediction_error, float16.image_rms, float16.frechet_to_real) == (None, None, None)
    assert bfloat16.finite
    assert bfloat16.frechet_to_real is not None
    json.dumps(report.to_dict(), allow_nan=False)  # standard JSON has neither NaN nor Infinity


def test_float32_that_is_not_finite_is_nothing_to_compare_with() -> None:
    with pytest.raises(ValueError, match="not finite in float32"):
        compare(lambda x, t: x / 0)


def test_judge() -> None:
    judge = Views()
    report = compare(Toy(error=0.1), judge=judge, num_samples=20, class_labels=0)
    float32, float16 = report.results
    assert report.judge == "pixels"
    assert float32.frechet_to_float32 == pytest.approx(0, abs=1e-9)
    assert float16.frechet_to_float32 is not None
    assert 0 < float16.frechet_to_float32 < (float16.frechet_to_real or 0)
    assert float16.recognised == float((judge.shown[-1].mean((1, 2, 3)) > 0).float().mean())
    assert report.frechet_of_real is not None
    without = compare(Toy(error=0.1))
    assert (without.judge, without.frechet_of_real, without.results[1].frechet_to_real) == (None, None, None)


def unet(**changes: Any) -> UNet:
    torch.manual_seed(0)
    attends = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet(**{**TINY, "block_out_channels": (8, 8), **attends, **changes}).eval()


def test_unets_with_classes_guidance_and_variance() -> None:
    """What the sampler passes to a network besides x and t reaches every precision."""
    model, judge = unet(num_class_embeds=4, out_channels=2), Views()
    judge.real = np.random.default_rng(0).standard_normal((9, 64))
    settings: dict[str, Any] = {
        "method": "ddpm",
        "variance_type": "learned_range",
        "guidance_scale": 2.0,
        "guidance_interval": (300, 900),
        "null_class": 3,
    }
    labels = [0, 1, 2]
    report = compare(
        model, ("bfloat16",), num_samples=3, class_labels=labels, shape=None, steps=4, judge=judge, **settings
    )
    plain = copy.deepcopy(model)
    plain.__class__ = type("Plain", (UNet,), {})  # of another class, and so not folded: as what is watched
    expected = Sampler(plain, SCHEDULE, num_inference_steps=4, **settings).sample(3, class_labels=labels)
    assert torch.equal(judge.shown[0], expected)  # being watched changes nothing
    assert 1e-4 < (report.results[1].worst_prediction_error or 0) < 0.05
    assert 0 < (report.results[1].image_rms or 0) < 0.1
    assert report.largest_activation > 0.1
    assert report.module
    assert report.timestep in (750, 500, 250, 0)
    assert report.float16_headroom == pytest.approx(65504 / report.largest_activation)
    assert model.dtype == torch.float32
    assert not any(module._forward_hooks for module in model.modules())


def test_self_conditioning_reaches_every_precision() -> None:
    dtypes: list[tuple[torch.dtype, torch.dtype]] = []

    def model(x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        assert x_self_cond is not None
        dtypes.append((x.dtype, x_self_cond.dtype))
        return 0.5 * x + 0.1 * x_self_cond

    report = compare(model, ("bfloat16",), self_condition=True)
    assert set(dtypes) == {(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)}
    assert (report.results[1].worst_prediction_error or 1) < 0.01


def test_says_which_precision_cannot_run() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'\nmore lines")
        return x

    with pytest.raises(ValueError, match="precision is 'float16', which cpu cannot run: \"slow_conv2d_cpu\" not impl"):
        compare(model)
    assert len(compare(model, ("bfloat16",)).results) == 2

    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        compare(broken)


def test_precisions_are_checked_first() -> None:
    model = Toy()
    for precisions, message in (
        (("float16", "fp8"), "precisions is 'fp8', must be one of float32, tf32, float16, bfloat16"),
        (("tf32",), "precisions is 'tf32', which cpu cannot run"),
        ((), r"precisions is \(\), must be a list of at least one"),
        ("float16", "precisions is 'float16', must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(model, precisions)  # type: ignore[arg-type]
    assert model.calls == []
    assert check_precisions(["bfloat16", "float32", "bfloat16"], "cpu") == ["bfloat16", "float32"]


def test_report_is_plain() -> None:
    report = compare(Toy(), num_samples=2, seed=5)
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (content["num_samples"], content["steps"], content["seed"], content["method"]) == (2, 5, 5, "ddim")
    assert content["results"][1]["prediction_error"].keys() == {"800", "600", "400", "200", "0"}
    assert content["module"] == "output"


def test_points_instead_of_images() -> None:
    report = compare(lambda x, t: 0.5 * x, shape=(3,))
    assert report.results[1].pixels_differ is not None


@pytest.mark.parametrize("taken", [{"dtype": "float16"}, {"cuda_graph": False}, {"num_inference_steps": 3}])
def test_settings_that_are_not_the_callers_are_refused(taken: dict[str, Any]) -> None:
    name = next(iter(taken))
    with pytest.raises(ValueError, match=f"{name} is .*, must be left out"):
        compare_precisions(Toy(), NoiseSchedule.linear(), num_samples=2, shape=(1, 4, 4), **taken)
