"""Bad settings and arguments: each is refused in one line that names it, what it was and what it may be."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from unets import TINY

from fastddpm import NoiseSchedule, Sampler, UNet
from fastddpm.process.tables import ddim_inversion_table, ddim_table, ddpm_table
from fastddpm.sampling.editing import encode, image_to_image, inpaint, interpolate, super_resolution

LINEAR = NoiseSchedule.linear()
TABLE = ddim_table(LINEAR, [500, 0])
LEARNED = ddpm_table(LINEAR, [500, 0], variance_type="learned_range")


def toy(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
    return torch.tanh(x)


def doubled(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([x, x], 1)


def configured(**config: int) -> Callable[..., Tensor]:
    """A model with a config, that predicts two channels from whatever it reads."""

    def model(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return torch.tanh(x[:, :2])

    model.config = SimpleNamespace(**config)  # type: ignore[attr-defined]
    return model


CLASSES = {"model": configured(num_class_embeds=4, null_class=3)}
IDENTITY, TIMESTEP = (
    {"model": UNet(**TINY, class_embed_type=kind), "num_samples": 3} for kind in ("identity", "timestep")
)
FIVE = {"model": UNet(**TINY, num_class_embeds=5)}
MASK = {"known": torch.zeros(2, 4), "known_mask": torch.full((2, 4), 5.0)}

# The settings of a sampler, then the arguments of `sample`; a part of the message. TypeError where it is marked.
SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"method": "euler?"}, "method is 'euler?', must be one of ddpm, ddim"),
    ({"num_inference_steps": 0}, "num_inference_steps is 0"),
    ({"num_inference_steps": 1001}, "from 1 to 1000"),
    ({"timesteps": [5, 0]}, "num_inference_steps is 2 but timesteps are given"),
    ({"steps_offset": 1.5}, "steps_offset is 1.5, must be an integer"),
    ({"prediction_type": "score"}, "prediction_type is 'score'"),
    ({"variance_type": "none"}, "variance_type is 'none'"),
    ({"method": "ddim", "variance_type": "none"}, "variance_type is 'none'"),
    ({"eta": 0.5}, "eta is 0.5 but method is 'ddpm'; eta is a setting of method 'ddim'"),
    ({"method": "dpmsolver++", "eta": 0.5}, "eta is 0.5 but method is 'dpmsolver++'"),
    ({"method": "ddim", "solver_order": 1}, "solver_order is 1 but method is 'ddim'"),
    ({"use_clipped_model_output": True}, "use_clipped_model_output is True but method is 'ddpm'"),
    ({"method": "ddim", "convention": "guided_diffusion"}, "convention is 'guided_diffusion' but method is"),
    ({"beta": 1}, "TypeError: beta is no setting of a method; method 'ddpm' has prediction_type, variance_type"),
    ({"schedule": TABLE, "num_inference_steps": 2}, "num_inference_steps is 2 but schedule is a StepTable"),
    ({"schedule": TABLE, "num_inference_steps": None, "eta": 0.0}, "eta is 0.0 but schedule is a StepTable"),
    ({"schedule": TABLE, "num_inference_steps": None, "method": "ddim"}, "method is 'ddim' but schedule is"),
    ({"schedule": TABLE, "num_inference_steps": None, "dtype": "auto"}, "dtype is 'auto' but schedule is a StepTable"),
    ({"schedule": torch.linspace(0, 1, 10)}, "TypeError: schedule is a Tensor, must be a NoiseSchedule or a StepTable"),
    ({"model": "model"}, "TypeError: model is a str"),
    ({"guidance_scale": 2.0}, "guidance_scale needs a null_class"),
    ({"guidance_scale": float("nan"), "null_class": 0}, "guidance_scale is nan"),
    ({"guidance_scale": "2"}, "TypeError: guidance_scale is '2', must be a number"),
    ({"guidance_interval": (5, 0)}, "guidance_interval is (5, 0), must be (lowest, highest)"),
    ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5, must be from 0 to 1"),
    ({"null_class": 0.5}, "null_class is 0.5, must be an integer"),
    # In a table of time and class it would be read as another step's row.
    *(({**FIVE, "null_class": wrong}, f"null_class is {wrong}, must be a label from 0 to 4") for wrong in (5, -1)),
    ({**FIVE, "null_class": True}, "null_class is True, must be a label from 0 to 4"),
    ({"classifier_fn": 3}, "TypeError: classifier_fn is a int"),
    ({"classifier_scale": 2.0}, "classifier_scale is 2.0 but classifier_fn is None"),
    ({"clip_sample_range": 0.0}, "clip_sample_range is 0.0"),
    ({"sample_max_value": 2.0}, "sample_max_value is 2.0 but thresholding is False"),
    ({"thresholding": True, "sample_max_value": 0.0}, "sample_max_value is 0.0, must be"),
    ({"thresholding": True, "dynamic_thresholding_ratio": 0.0}, "dynamic_thresholding_ratio is 0.0, must be"),
    ({"variance_type": "learned", "model": configured(out_channels=3)}, "'learned' but the model has out_channels 3"),
    ({"dtype": torch.int8}, "dtype is torch.int8"),
    ({"device": "nowhere"}, "device is 'nowhere'"),
    ({"device": "meta"}, "device is 'meta'"),
    ({"backend": "fast"}, "backend is 'fast'"),
    ({"cuda_graph": "sometimes"}, "cuda_graph is 'sometimes'"),
    ({"guidance_scale": 10**400}, "guidance_scale is inf, must be a finite number"),
]
ARGUMENTS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"num_samples": 0}, "num_samples is 0, must be a positive integer"),
    ({}, {"num_samples": 1.5}, "num_samples is 1.5"),
    *(
        ({}, {"batch_size": wrong}, f"batch_size is {wrong!r}, must be a positive integer, 'auto' or None")
        for wrong in (0, -1, True, 1.5, "all", "AUTO", [2])
    ),
    ({}, {"shape": None}, "shape is None, must be given"),
    ({}, {"shape": (1, -2)}, "every size of shape is -2"),
    *(({}, {"shape": wrong}, "must be the sizes of one sample") for wrong in ((), 5)),
    ({}, {"seed": -1}, "seed"),
    ({}, {"seed": 2**64}, "seed is 18446744073709551616, must be from 0 to"),
    ({}, {"seed": 1.0}, "TypeError: seed is 1.0, must be from 0 to"),
    ({}, {"seed": True}, "TypeError: seed is True, must be from 0 to"),
    ({}, {"seeds": [1]}, "seeds has 1 entries, must have one per sample, 2"),
    ({}, {"seeds": [1, 2.5]}, "TypeError: seeds[1] is 2.5, must be from 0 to"),
    ({**FIVE, "null_class": 4}, {"class_labels": 1, "guidance_scale": 10**400}, "guidance_scale is inf, must be"),
    (
        {**FIVE, "null_class": 4},
        {"class_labels": 1, "guidance_scale": torch.tensor([1.0, torch.nan])},
        "guidance_scale has nan, every one must be a finite number",
    ),
    *(
        ({}, {"first_sample": wrong}, f"first_sample is {wrong}, must be an integer from 0 to 4294967294")
        for wrong in (-1, 2**32 - 1, 1.0, True)
    ),
    ({}, {"seeds": [1, 2], "first_sample": 1}, "first_sample is 1 but seeds are given"),
    ({}, {"x_T": torch.zeros(2, 3, 3)}, "x_T has shape [2, 3, 3], must have [2, 2, 4]"),
    ({}, {"x_T": torch.zeros(2, 2, 4, dtype=torch.int64)}, "TypeError: x_T is of torch.int64"),
    ({}, {"noise": torch.zeros(2, 2, 4)}, "noise has shape [2, 2, 4], must have [2, 2, 2, 4]"),
    ({}, {"noise": lambda index, shape: torch.zeros(1)}, "noise of step 0 has shape"),
    ({}, {"noise": lambda index, shape: torch.zeros(shape), "batch_size": 1}, "noise is a function but batch_size"),
    ({}, {"noise": 3}, "TypeError: noise is a int, must be a tensor or a function"),
    ({}, {"class_labels": [0.5, 1.5]}, "TypeError: class_labels has dtype"),
    ({}, {"class_labels": [1, 2, 3]}, "class_labels has shape"),
    *((CLASSES, {"class_labels": [0, bad]}, f"class_labels has {bad}, every label must be from 0") for bad in (-1, 4)),
    (IDENTITY, {}, "TypeError: class_labels is NoneType, must be numbers [3, 32]: the model's class_embed_type is 'id"),
    (IDENTITY, {"class_labels": [1, 2, 3]}, "class_labels has shape [3], must be numbers [3, 32]"),
    (IDENTITY, {"class_labels": torch.zeros(3, 31)}, "class_labels has shape [3, 31], must be numbers [3, 32]"),
    (IDENTITY, {"class_labels": torch.zeros(3, 32) > 0}, "TypeError: class_labels has dtype torch.bool"),
    (TIMESTEP, {"class_labels": [1.0, 2.0]}, "class_labels has shape [2], must be one number or one per sample (3)"),
    (TIMESTEP, {"class_labels": "three"}, "TypeError: class_labels is str, must be one number"),
    (CLASSES | {"guidance_scale": 2.0}, {}, "guidance_scale needs class_labels"),
    ({}, {"guidance_scale": 2.0, "class_labels": 0}, "guidance_scale needs a null_class"),
    ({"null_class": 0}, {"guidance_scale": [1.0, 2.0, 3.0], "class_labels": 0}, "guidance_scale has shape [3]"),
    ({"null_class": 0}, {"guidance_scale": "high", "class_labels": 0}, "TypeError: guidance_scale is 'high', must be"),
    ({"guidance_interval": (0, 5)}, {}, "guidance_interval is (0, 5) but guidance_scale is None"),
    ({"guidance_rescale": 0.7}, {}, "guidance_rescale is 0.7 but guidance_scale is None"),
    ({"classifier_fn": lambda x, t, y: x}, {}, "classifier_fn needs class_labels"),
    ({"classifier_fn": lambda x, t, y: x[:1]}, {"class_labels": 0}, "classifier_fn returned [1, 2, 4], must return"),
    ({"model": configured(in_channels=3)}, {}, "condition has 0 channels but the model reads 3"),
    (
        {"model": configured(in_channels=2)},
        {"condition": torch.zeros(2, 1, 4)},
        "condition has 1 channels but the model reads 2",
    ),
    ({}, {"condition": torch.zeros(2, 1, 5)}, "condition has shape [2, 1, 5] but the samples have [2, 2, 4]"),
    ({}, {"condition": torch.zeros(2, 1, 4).long()}, "TypeError: condition is of torch.int64"),
    ({}, {"known": torch.zeros(2, 4)}, "known is given but known_mask is None"),
    ({}, {"known_mask": torch.zeros(2, 4)}, "known_mask is given but known is None"),
    ({}, {"known_noise": torch.zeros(2, 2, 2, 4)}, "known_noise is given but known is None"),
    ({}, {"known": torch.zeros(2, 4), "known_mask": torch.zeros(2, 5)}, "known_mask has shape [2, 5] but the samples"),
    ({}, {"known": [0.0], "known_mask": torch.zeros(4)}, "TypeError: known is of list"),
    ({}, MASK, "known_mask has values outside"),
    ({}, {"start": 1}, "start is 1 but x_T is None"),
    ({}, {"start": 2, "x_T": torch.zeros(2, 2, 4)}, "start is 2, must be from 0 to 1"),
    ({}, {"table": LEARNED}, "table has a learned variance but variance_type is 'fixed_small'"),
    ({}, {"table": ddim_inversion_table(LINEAR, [500, 0])}, "table starts from clean samples but x_T is None"),
    ({}, {"table": LINEAR}, "TypeError: table is a NoiseSchedule"),
    ({}, {"return_trajectory": 0}, "return_trajectory is 0"),
    ({"variance_type": "learned_range"}, {}, "'learned_range' but the model returned 2 channels for samples of 2"),
    ({"model": doubled}, {}, "'fixed_small' but the model returned 4 channels for samples of 2"),
    ({"model": lambda x, t: x[:, :1]}, {}, "model returned shape [2, 1, 4], must return [2, 2, 4]"),
    ({"model": lambda x, t: None}, {}, "TypeError: model returned a NoneType"),
]


def refused(call: Callable[[], object], message: str) -> None:
    kind, _, rest = message.rpartition("TypeError: ")
    with pytest.raises(TypeError if "TypeError: " in message else ValueError) as caught:
        call()
    assert kind == ""
    assert rest in str(caught.value)
    assert "\n" not in str(caught.value)


def make(settings: dict[str, Any]) -> Sampler:
    given = {"model": toy, "schedule": LINEAR, "num_inference_steps": 2, **settings}
    given.pop("num_samples", None)
    return Sampler(**given)


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=[message[:50] for _, message in SETTINGS])
def test_settings(settings: dict[str, Any], message: str) -> None:
    refused(lambda: make(settings), message)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"), ARGUMENTS, ids=[message[:50] for _, _, message in ARGUMENTS]
)
def test_arguments(settings: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    count = settings.get("num_samples", 2)
    shape = (1, 8, 8) if isinstance(settings.get("model"), UNet) else (2, 4)
    draw = make(settings)
    refused(lambda: draw.sample(**{"num_samples": count, "shape": shape, **arguments}), message)


IMAGES = torch.zeros(2, 1, 8, 8)
ONE = torch.ones(1)
READER = configured(sample_size=8, in_channels=2, out_channels=1)  # type: ignore[arg-type]
DDIM, SCHEDULED = {"method": "ddim"}, {"num_inference_steps": 10}
EDITING: list[tuple[dict[str, Any], Callable[[Sampler], Any], str]] = [
    *(({}, lambda s, v=v: image_to_image(s, IMAGES, v), f"strength is {v}, must be in (0, 1]") for v in (0.0, 1.5)),
    ({}, lambda s: image_to_image(s, IMAGES, float("nan")), "strength is nan, must be in (0, 1]"),
    ({}, lambda s: image_to_image(s, IMAGES[0, 0, 0]), "images has shape [8], must be [N, ...]"),
    ({}, lambda s: image_to_image(s, IMAGES[:0]), "images has shape [0, 1, 8, 8], must be [N, ...]"),
    ({}, lambda s: image_to_image(s, IMAGES + torch.inf), "images is not finite everywhere"),
    ({}, lambda s: image_to_image(s, IMAGES + 255), "images reaches 255 but clip_sample_range is 1"),
    ({}, lambda s: image_to_image(s, IMAGES, 0.5, seeds=[1]), "seeds has 1 entries, must have one per"),
    ({}, lambda s: image_to_image(s, IMAGES.byte()), "TypeError: images is of torch.uint8, must be a floating-point"),
    ({}, lambda s: inpaint(s, IMAGES, torch.ones(3, 8)), "mask has shape [3, 8] and images [2, 1, 8, 8]; the"),
    ({}, lambda s: inpaint(s, IMAGES, torch.full((1,), 255.0)), "mask has values outside [0, 1]"),
    ({}, lambda s: inpaint(s, IMAGES, [1.0]), "TypeError: mask is of list"),  # type: ignore[arg-type]
    ({}, lambda s: inpaint(s, IMAGES, ONE, jump_length=0), "jump_length is 0, must be a positive integer"),
    ({}, lambda s: inpaint(s, IMAGES, ONE, jump_n_sample=1.5), "jump_n_sample is 1.5"),  # type: ignore[arg-type]
    (DDIM, lambda s: inpaint(s, IMAGES, ONE), "jump_n_sample is 10 but method is 'ddim'"),
    (SCHEDULED, lambda s: inpaint(s, IMAGES, ONE, jump_n_sample=2), "jump_length is 10 but there are 10 steps; with"),
    ({}, lambda s: encode(s, IMAGES), "method is 'ddpm' with noise at its steps, but encoding needs one without"),
    (DDIM | {"eta": 0.5}, lambda s: encode(s, IMAGES), "'ddim' with noise at its steps"),
    ({"schedule": TABLE, "num_inference_steps": None}, lambda s: encode(s, IMAGES), "sampler was made of a StepTable"),
    ({}, lambda s: interpolate(s, IMAGES, IMAGES), "method is 'ddpm' with noise at its steps, but interpolation via"),
    ({}, lambda s: interpolate(s, IMAGES, IMAGES[:1]), "a has shape [2, 1, 8, 8] and b [1, 1, 8, 8]"),
    ({}, lambda s: interpolate(s, IMAGES, IMAGES, 1), "steps is 1, must be at least 2"),
    ({}, lambda s: interpolate(s, IMAGES, IMAGES, via="magic"), "via is 'magic', must be"),  # type: ignore[arg-type]
    (DDIM, lambda s: interpolate(s, IMAGES, IMAGES, return_trajectory=2), "TypeError: interpolate takes no return"),
    ({}, lambda s: super_resolution(s, IMAGES[0]), "low has shape [1, 8, 8], must be [N, C, h, w]"),
    ({}, lambda s: super_resolution(s, IMAGES, noise_level=-1.0), "noise_level is -1.0, must be a finite number"),
    ({}, lambda s: super_resolution(s, IMAGES), "size is None, must be given"),
    ({"model": READER}, lambda s: super_resolution(s, torch.zeros(1, 2, 2, 2)), "low has 2 channels but the model"),
]


@pytest.mark.parametrize(("settings", "call", "message"), EDITING, ids=[message[:50] for *_, message in EDITING])
def test_editing(settings: dict[str, Any], call: Callable[[Sampler], Any], message: str) -> None:
    draw = make({"num_inference_steps": 50, **settings})
    refused(lambda: call(draw), message)
