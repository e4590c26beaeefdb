"""Tasks that start from images, against closed forms: for Gaussian data the best predictor is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastddpm_kernels import philox
from torch import Tensor

from fastddpm import NoiseSchedule, Sampler, load_pretrained
from fastddpm.process.methods import METHODS
from fastddpm.sampling.editing import encode, image_to_image, inpaint, interpolate, slerp, super_resolution
from fastddpm.sampling.trajectory import Trajectory

SCHEDULE = NoiseSchedule.linear(1000)
BAR = SCHEDULE.alphas_cumprod
MEAN, STD = 0.3, 0.5


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    """The best epsilon where x_0 is N(MEAN, STD^2) in every element."""
    bar = BAR[t].view(-1, *[1] * (x.ndim - 1))
    return ((1 - bar).sqrt() * (x - bar.sqrt() * MEAN) / (bar * STD**2 + 1 - bar)).to(x.dtype)


def flow(x: Tensor, start: int | None, end: int | None) -> Tensor:
    """What DDIM with infinitely many steps makes of `x` between two timesteps (None: x_0) with that predictor."""

    def moments(t: int | None) -> tuple[float, float]:
        bar = 1.0 if t is None else float(BAR[t])
        return bar**0.5 * MEAN, (bar * STD**2 + 1 - bar) ** 0.5

    (mean, std), (mean_end, std_end) = moments(start), moments(end)
    return mean_end + (x - mean) * std_end / std


def sampler(model: Callable[..., Any] = gaussian, **settings: Any) -> Sampler:
    return Sampler(model, SCHEDULE, **{"clip_sample": False, "num_inference_steps": 50, **settings})


def pictures(count: int, *shape: int) -> Tensor:
    return torch.rand(count, *(shape or (1, 8, 8))) * 2 - 1


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# -- image to image ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.1, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_noised_images(method: str, strength: float) -> None:
    """The steps left over are the method's own table, begun anew at the level that the images are noised to."""
    draw = sampler(lambda x, t: gaussian(x, t.long()), method=method, num_inference_steps=10)
    images = pictures(2)
    begins = draw.table.begins or tuple(range(len(draw.table)))
    start = begins[-round(strength * len(begins))]
    rest = draw.table.skip(start)
    signal, sigma = rest.start
    noise = philox.normal(philox.sample_keys([3, 3], [0, 1]), images.shape[1:], step=0, stream=philox.STREAM_INITIAL)
    edited = image_to_image(draw, images, strength, seed=3)
    assert edited.isfinite().all()
    if not bool((rest.rows[:, 6] != 0).any()) and rest.log_variance is None:
        x = (signal * images.double() + sigma * noise).float()
        torch.testing.assert_close(edited, draw.sample(2, x_T=x, table=rest), atol=1e-5, rtol=1e-5)
    if len(rest) != len(draw.table) - start:
        with pytest.raises(ValueError, match="where this table begins with other rows"):
            draw.sample(2, x_T=images, start=start)


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmsolver++"])
def test_full_strength_is_sampling_from_scratch(method: str) -> None:
    draw = sampler(method=method)
    images = image_to_image(draw, pictures(3), 1.0, seed=5, batch_size=2)
    assert torch.equal(images, draw.sample(3, shape=(1, 8, 8), seed=5))


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmsolver++"])
def test_the_weaker_the_closer_to_the_input(method: str) -> None:
    images = pictures(8)
    draw = sampler(method=method, num_inference_steps=1000 if method == "ddpm" else 100)
    strengths = (0.001, 0.05, 0.2, 0.4, 0.7)
    distances = [rms(image_to_image(draw, images, strength) - images) for strength in strengths]
    assert distances == sorted(distances)
    # One step from the lowest level, whose noise is sqrt(1 - abar): what it removes and leaves is of that size.
    assert distances[0] < 1.5 * float((1 - BAR[draw.timesteps[-1]]).sqrt()) + 1e-3
    assert distances[-1] > 0.4


def test_partial_strength_is_ddim_from_the_noised_input() -> None:
    images = pictures(4)
    draw = sampler(method="ddim", num_inference_steps=100)
    noise = philox.normal(philox.sample_keys([7] * 4, range(4)), (1, 8, 8), step=0, stream=philox.STREAM_INITIAL)
    x = (BAR[390].sqrt() * images.double()) + (1 - BAR[390]).sqrt() * noise.double()
    for t in range(390, -1, -10):
        bar, bar_next = BAR[t], BAR[t - 10] if t else torch.tensor(1.0)
        epsilon = gaussian(x, torch.tensor([t]))
        x = bar_next.sqrt() * (x - (1 - bar).sqrt() * epsilon) / bar.sqrt() + (1 - bar_next).sqrt() * epsilon
    torch.testing.assert_close(image_to_image(draw, images, 0.4, seed=7), x.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 50), (0.58, 29), (0.5, 25), (0.02, 1), (1e-9, 1)])
def test_strength_is_the_share_of_steps_that_run(strength: float, steps: int) -> None:
    told: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        told.append(int(t[0]))
        return gaussian(x, t)

    draw = sampler(model)
    image_to_image(draw, pictures(1), strength)
    assert told == draw.timesteps.tolist()[-steps:]


@pytest.mark.parametrize("shape", [(2, 33), (3, 4, 5, 6), (17, 3)])
def test_any_shape_of_data(shape: tuple[int, ...]) -> None:
    data = pictures(2, *shape)
    assert image_to_image(sampler(), data, 0.3).shape == data.shape
    assert torch.equal(inpaint(sampler(), data, torch.ones(shape), jump_n_sample=1), data)


# -- inpainting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "resamples"), [("ddpm", 1), ("ddpm", 3), ("ddim", 1), ("dpmsolver++", 1)])
def test_what_is_known_is_kept_exactly(method: str, resamples: int) -> None:
    images = pictures(3)
    mask = (torch.rand(1, 8, 8) > 0.5).float()
    draw = sampler(method=method)
    filled = inpaint(draw, images, mask, jump_length=5, jump_n_sample=resamples, seed=1)
    keep = mask.bool().expand_as(images)
    assert torch.equal(filled[keep], images[keep])
    assert rms((filled - images)[~keep]) > 0.3
    hidden = torch.where(keep, images, torch.nan)
    assert torch.equal(inpaint(draw, hidden, mask, jump_length=5, jump_n_sample=resamples, seed=1), filled)


def test_resampling_finds_the_conditional_distribution() -> None:
    """Two pixels of correlation 0.9, the first known to be 1.5: the second is N(1.35, 0.19)."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])

    def model(x: Tensor, t: Tensor) -> Tensor:
        bar = float(BAR[t[0]])
        total = bar * covariance + (1 - bar) * torch.eye(2)
        return (1 - bar) ** 0.5 * torch.linalg.solve(total, x[..., None])[..., 0]

    known, mask = torch.tensor([[1.5, 0.0]]).expand(2000, 2), torch.tensor([1.0, 0.0])
    draw = sampler(model, num_inference_steps=100)
    plain = inpaint(draw, known, mask, jump_n_sample=1)[:, 1]
    resampled = inpaint(draw, known, mask, jump_length=10, jump_n_sample=10)[:, 1]
    spread = math.sqrt(0.19 / 2000)  # of the mean, when the distribution is right
    assert abs(float(plain.mean()) - 1.35) > 20 * spread  # without resampling the known pixel is half ignored
    assert abs(float(resampled.mean()) - 1.35) < 5 * spread + 0.03
    assert abs(float(resampled.var()) / 0.19 - 1) < 0.15


# -- encoding and interpolation ---------------------------------------------------------------------------------------


def test_encoding_follows_the_flow_and_decodes_to_the_image() -> None:
    images = pictures(4)
    errors = []
    for steps in (100, 200, 1000):
        draw = sampler(method="ddim", num_inference_steps=steps)
        latents = encode(draw, images)
        top = int(draw.timesteps[0])
        torch.testing.assert_close(latents, flow(images, None, top), atol=5 / steps, rtol=0)
        errors.append(rms(draw.sample(4, x_T=latents) - images))
        assert errors[-1] < 3 / steps
    assert 1.6 < errors[0] / errors[1] < 2.6  # first order


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_encoding_with_every_prediction_type(prediction_type: str) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        bar = BAR[t].view(-1, 1, 1, 1)
        epsilon = gaussian(x, t)
        x0 = (x - (1 - bar).sqrt() * epsilon) / bar.sqrt()
        v = bar.sqrt() * epsilon - (1 - bar).sqrt() * x0
        return {"epsilon": epsilon, "sample": x0, "v_prediction": v}[prediction_type].to(x.dtype)

    images = pictures(4)
    draw = sampler(model, method="ddim", num_inference_steps=1000, prediction_type=prediction_type)
    assert rms(draw.sample(4, x_T=encode(draw, images)) - images) < 0.02


def test_encoding_part_of_the_way() -> None:
    images = pictures(2)
    draw = sampler(method="ddim", num_inference_steps=1000)
    latents = encode(draw, images, strength=0.3)
    torch.testing.assert_close(latents, flow(images, None, 299), atol=0.01, rtol=0)
    assert rms(draw.sample(2, x_T=latents, start=700) - images) < 0.002


def test_digits_come_back_from_their_encoding() -> None:
    model = load_pretrained()
    digits = model.sampler(method="dpmsolver++", num_inference_steps=20).sample(4, class_labels=[1, 3, 5, 8])
    draw = model.sampler(method="ddim", num_inference_steps=50, clip_sample=False)
    latents = encode(draw, digits)
    assert 0.7 < float(latents.std()) < 1.2
    assert rms(draw.sample(4, x_T=latents) - digits) < 0.05
    assert rms(draw.sample(4, x_T=latents.flip(0)) - digits) > 0.5


@pytest.mark.parametrize("method", ["ddim", "dpmsolver++"])
def test_ends_of_a_path_are_the_reconstructions(method: str) -> None:
    a, b = pictures(3), pictures(3)
    draw = sampler(method=method, num_inference_steps=200)
    path = interpolate(draw, a, b, 5, batch_size=4)
    assert path.shape == (3, 5, 1, 8, 8)
    for end, image in ((path[:, 0], a), (path[:, -1], b)):
        torch.testing.assert_close(end, draw.sample(3, x_T=encode(draw, image)), atol=1e-5, rtol=0)
        assert rms(end - image) < 0.02
    # The predictor is affine, so that the middle is the image of the middle of the arc.
    middle = slerp(encode(draw, a), encode(draw, b), torch.tensor([0.5]))[:, 0]
    torch.testing.assert_close(path[:, 2], draw.sample(3, x_T=middle), atol=1e-5, rtol=0)


def test_paths_via_noise_begin_and_end_as_images_do_alone() -> None:
    a, b = pictures(2), pictures(2)
    draw = sampler()
    path = interpolate(draw, a, b, 4, via="noise", strength=0.4, seed=9)
    for end, images in ((path[:, 0], a), (path[:, -1], b)):
        assert torch.equal(end, image_to_image(draw, images, 0.4, seeds=[9, 10]))
    # Equal noise and an affine predictor: the path is a straight line.
    torch.testing.assert_close(path[:, 1], torch.lerp(path[:, 0], path[:, 3], 1 / 3), atol=1e-5, rtol=0)


def test_labels_of_paths_belong_to_their_pairs() -> None:
    seen: list[list[int]] = []

    def model(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        seen.append(class_labels.tolist())
        return gaussian(x, t)

    draw = sampler(model, method="ddim", num_inference_steps=2)
    interpolate(draw, pictures(2), pictures(2), 3, class_labels=[4, 7])
    assert seen[0] == [4, 7, 4, 7]
    assert seen[-1] == [4, 4, 4, 7, 7, 7]


def test_slerp() -> None:
    a, b = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    path = slerp(a, b, torch.tensor([0.0, 1 / 3, 1.0]))
    expected = torch.tensor([[[1.0, 0, 0], [math.cos(math.pi / 6), 2 * math.sin(math.pi / 6), 0], [0, 2.0, 0]]])
    torch.testing.assert_close(path, expected)
    x, y = torch.randn(2, 5, 3, 16, 16)
    x, y = x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1), y / y.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(slerp(x, y, torch.linspace(0, 1, 7)).flatten(2).norm(dim=2), torch.ones(5, 7))
    # Parallel, opposite and zero vectors have no arc: the chord.
    for other in (a, -a, 0 * a):
        torch.testing.assert_close(slerp(a, other, torch.tensor([0.25]))[:, 0], torch.lerp(a, other, 0.25))


# -- super-resolution -------------------------------------------------------------------------------------------------


class Reader:
    """A model that reads a condition beside x_t, and keeps it."""

    def __init__(self, channels: int = 1) -> None:
        self.config = SimpleNamespace(sample_size=8, in_channels=1 + channels, out_channels=1)
        self.conditions: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.conditions.append(x[:, 1:].clone())
        return gaussian(x[:, :1], t)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_small_image_is_given_enlarged(channels: int) -> None:
    model, low = Reader(channels), pictures(2, channels, 2, 2)
    images = super_resolution(sampler(model, num_inference_steps=3), low)
    assert images.shape == (2, 1, 8, 8)
    enlarged = torch.nn.functional.interpolate(low, size=(8, 8), mode="bicubic", align_corners=False)
    assert len(model.conditions) == 3
    for condition in model.conditions:
        torch.testing.assert_close(condition, enlarged)


def test_noise_augmentation_has_its_level_and_follows_the_seed() -> None:
    low = torch.zeros(50, 1, 8, 8)
    first, again = Reader(), Reader()
    for model in (first, again):
        super_resolution(sampler(model, num_inference_steps=1), low, noise_level=0.25, seed=3, batch_size=20)
    given = torch.cat(first.conditions)
    assert float(given.std()) == pytest.approx(0.25, rel=0.05)  # of 3200
    assert torch.equal(given, torch.cat(again.conditions))
    assert given.unique(dim=0).shape[0] == 50


# -- all --------------------------------------------------------------------------------------------------------------


def test_trajectories_and_early_stops_pass_through() -> None:
    draw, images = sampler(), pictures(2)
    result = image_to_image(draw, images, 0.5, return_trajectory=10)
    assert isinstance(result, Trajectory)
    assert torch.equal(result.x[-1], image_to_image(draw, images, 0.5))
    filled = inpaint(draw, images, torch.ones(1), jump_n_sample=2, return_trajectory=20)
    assert torch.equal(filled.x[-1], images)
    seen: list[int] = []
    image_to_image(draw, images, 0.5, callback=lambda index, t, x: bool(seen.append(t)) or len(seen) == 3)
    assert len(seen) == 3


def test_inputs_stay_as_they_are() -> None:
    images, mask = pictures(2), torch.ones(1, 8, 8)
    before = images.clone()
    draw = sampler(method="ddim", num_inference_steps=3)
    image_to_image(draw, images, 0.5)
    inpaint(draw, images, mask, jump_n_sample=1)
    interpolate(draw, images, images.flip(0), 2)
    assert torch.equal(images, before)
