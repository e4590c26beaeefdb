"""The further diffusion classes of denoising_diffusion_pytorch against these objects, at equal random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("denoising_diffusion_pytorch", reason="needs denoising_diffusion_pytorch")

import denoising_diffusion_pytorch as library
from denoising_diffusion_pytorch import guided_diffusion, learned_gaussian_diffusion, repaint, simple_diffusion
from lucidrains_objects import CLOSE, STEPS, both, fast, same, unet

from fastddpm.interop.lucidrains import accelerate
from fastddpm.interop.lucidrains.elucidated import heun


def learned(**options: Any) -> Any:
    model = unet(learned_variance=True)
    return library.LearnedGaussianDiffusion(model, image_size=8, timesteps=STEPS, **options).eval()


def continuous(kind: Any, model: nn.Module | None = None, **options: Any) -> Any:
    model = model or unet(learned_sinusoidal_cond=True)
    return kind(model, **{"image_size": 8, "num_sample_steps": 12, **options}).eval()


def elucidated(*, self_condition: bool = False, **options: Any) -> Any:
    model = unet(random_fourier_features=True, self_condition=self_condition)
    return library.ElucidatedDiffusion(model, image_size=8, **{"num_sample_steps": 6, **options}).eval()


class Own(nn.Module):
    """A network that takes x and t, and nothing else."""

    channels = out_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) + t.view(-1, 1, 1, 1).cos()


@pytest.mark.parametrize(("objective", "options"), [("pred_x0", {}), ("pred_v", {"freeze": False})])
def test_learned_variance(objective: str, options: dict[str, Any]) -> None:
    """Whatever the objective says, its network predicts noise."""
    theirs = learned(objective=objective)
    same(both(theirs, fast(theirs, **options), "sample", 2, return_all_timesteps=True))


def test_learned_variance_interpolates() -> None:
    theirs = learned()
    first, second = torch.rand(2, 2, 3, 8, 8).mul(2).sub(1)
    same(both(theirs, fast(theirs), "interpolate", first, second, 9, 0.3), 2 * CLOSE)


@pytest.mark.parametrize("options", [{}, {"freeze": False}])
def test_learned_variance_with_ddim(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The original fails for want of two names; with them it does what ours does."""
    torch.manual_seed(0)
    theirs = learned(objective="pred_noise", sampling_timesteps=6, ddim_sampling_eta=0.5)
    with pytest.raises(NameError, match="'identity'|'partial'"):
        theirs.sample(2)
    for name in ("partial", "identity"):
        own = getattr(library.denoising_diffusion_pytorch, name)
        monkeypatch.setattr(learned_gaussian_diffusion, name, own, raising=False)
    # A frozen network rounds in another order, and x0 from noise amplifies what it says; a network as it is does not.
    amplified = float(theirs.sqrt_recip_alphas_cumprod[-1]) if not options else 0.0
    close = max(CLOSE, amplified * 2 * torch.finfo(torch.float32).eps)
    same(both(theirs, fast(theirs, **options), "sample", 2, return_all_timesteps=True), close)
    other = fast(learned(sampling_timesteps=6))
    with pytest.raises(ValueError, match="objective is 'pred_v', must be 'pred_noise' .*a learned_gaussian"):
        other.sample(2)


@pytest.mark.parametrize("options", [{}, {"freeze": False, "dtype": "bfloat16"}])
def test_weighted_objective(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's p_sample passes an argument too many and expects a value too many; mended, it is ours."""
    kind = library.WeightedObjectiveGaussianDiffusion
    theirs = kind(unet(out_dim=8), image_size=8, timesteps=STEPS).eval()
    with pytest.raises(TypeError, match="x_self_cond"):
        theirs.sample(2)
    ours = fast(theirs, **options)
    torch.manual_seed(7)
    images = ours.sample(2)
    own = kind.p_mean_variance

    def mended(self: Any, x: Tensor, t: Tensor, x_self_cond: None, clip_denoised: bool) -> tuple[Tensor | None, ...]:
        values = own(self, x=x, t=t, clip_denoised=clip_denoised)
        return *(value.contiguous() for value in values), None  # noise has the order of memory

    with monkeypatch.context() as patch:
        patch.setattr(kind, "p_mean_variance", mended)
        torch.manual_seed(7)
        expected = theirs.sample(2)
    torch.testing.assert_close(images, expected, rtol=0, atol=0.1 if "dtype" in options else CLOSE)
    with torch.no_grad():  # buffers and weights are read at every call
        theirs.sqrt_recip_alphas_cumprod.mul_(0.9)
        theirs.model.final_conv.bias.add_(0.1)
    torch.manual_seed(7)
    changed = ours.sample(2)
    assert not torch.allclose(changed, images, atol=1e-3)
    torch.manual_seed(7)
    assert torch.equal(fast(theirs, **options).sample(2), changed)
    theirs.sampling_timesteps = 6
    with pytest.raises(ValueError, match="sampling_timesteps is 6, must be num_timesteps, 24, for a weighted"):
        ours.ddim_sample((2, 3, 8, 8))


CONTINUOUS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (library.ContinuousTimeGaussianDiffusion, {}),
    "cosine": (library.ContinuousTimeGaussianDiffusion, {"noise_schedule": "cosine"}),
    "learned": (library.ContinuousTimeGaussianDiffusion, {"noise_schedule": "learned"}),
    "not clipped": (library.ContinuousTimeGaussianDiffusion, {"clip_sample_denoised": False}),
    "one step": (library.ContinuousTimeGaussianDiffusion, {"num_sample_steps": 1}),
    "v": (library.VParamContinuousTimeGaussianDiffusion, {}),
    "v not clipped": (library.VParamContinuousTimeGaussianDiffusion, {"clip_sample_denoised": False}),
}


@pytest.mark.parametrize(("name", "options"), [("linear", {"freeze": False}), *((name, {}) for name in CONTINUOUS)])
def test_continuous_time(name: str, options: dict[str, Any]) -> None:
    kind, fields = CONTINUOUS[name]
    theirs = continuous(kind, **fields)
    # Not clipped, or in one step, x0 of noise is multiplied by up to 1 / alpha, 150, and rounding with it.
    same(both(theirs, fast(theirs, **options), "sample", 2), 1e-4 if name in ("not clipped", "one step") else CLOSE)
    if name == "linear":
        same(both(theirs, fast(theirs, **options), "p_sample_loop", (1, 3, 16, 8)))


@pytest.mark.parametrize(
    "fields",
    [{}, {"noise_d": 4}, {"noise_d_low": 4, "noise_d_high": 16}, {"clip_sample_denoised": False},
     {"pred_objective": "eps"}, {"pred_objective": "eps", "clip_sample_denoised": False}],
)  # fmt: skip
def test_simple_diffusion(fields: dict[str, Any]) -> None:
    theirs = continuous(simple_diffusion.GaussianDiffusion, Own(), **{"pred_objective": "v", **fields})
    same(both(theirs, fast(theirs), "sample", 2))


def test_simple_diffusion_of_a_transformer() -> None:
    model = simple_diffusion.UViT(dim=8, channels=3, vit_depth=1, attn_dim_head=8, attn_heads=2, dim_mults=(1, 2))
    theirs = continuous(simple_diffusion.GaussianDiffusion, model, image_size=16)
    same(both(theirs, fast(theirs), "sample", 2))


@pytest.mark.parametrize(("self_condition", "options"), [(False, {"freeze": False}), (True, {})])
def test_elucidated(self_condition: bool, options: dict[str, Any]) -> None:
    theirs = elucidated(self_condition=self_condition)
    ours = fast(theirs, **options)
    same(both(theirs, ours, "sample", 2))
    # Not clamped, x is up to 80 where its rounding counts.
    same(both(theirs, ours, "sample", 2, num_sample_steps=3, clamp=False), 2e-4)
    for steps in (2, 7):
        same(both(theirs, ours, "sample_using_dpmpp", 2, num_sample_steps=steps))


@pytest.mark.parametrize(
    "fields",
    [{"S_churn": 0}, {"S_churn": 4, "S_tmin": 0.0}, {"S_tmax": 1000, "S_noise": 1.0}, {"sigma_max": 5, "rho": 3},
     {"sigma_data": 1.0, "num_sample_steps": 9}],
)  # fmt: skip
def test_settings_of_elucidated(fields: dict[str, Any]) -> None:
    theirs = elucidated(**fields)
    same(both(theirs, fast(theirs), "sample", 2), 2 * CLOSE)


def test_elucidated_draws_unit_noise_per_sample() -> None:
    """With Philox the samples of a seed do not depend on how many there are, and differ."""
    ours = fast(elucidated(), noise="philox")
    images = ours.sample(3, seed=5)
    torch.testing.assert_close(ours.sample(2, seed=5), images[:2], rtol=0, atol=CLOSE)
    assert not torch.allclose(images[0], images[1], atol=0.1)
    assert len(heun(ours.diffusion, 6).table) == 11


def test_in_place_and_training() -> None:
    for make, method in ((elucidated, "sample_using_dpmpp"), (learned, "sample")):
        theirs = make()
        torch.manual_seed(7)
        expected = getattr(theirs, method)(2)
        assert accelerate(theirs, inplace=True, noise="torch", progress=False) is theirs
        torch.manual_seed(7)
        torch.testing.assert_close(getattr(theirs, method)(2), expected, rtol=0, atol=CLOSE)
        theirs(torch.rand(2, 3, 8, 8)).backward()


REPAINT = [{}, {"resample": False}, {"resample_iter": 2, "resample_jump": 3, "resample_every": 7}]


@pytest.mark.parametrize("self_condition", [False, True])
def test_repaint(self_condition: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = repaint.Unet(8, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2, self_condition=self_condition)
    theirs = repaint.GaussianDiffusion(model, image_size=8, timesteps=STEPS, sampling_timesteps=6).eval()
    ours = fast(theirs)
    same(both(theirs, ours, "sample", 2, True))  # by DDPM, whatever sampling_timesteps
    same(both(theirs, ours, "ddim_sample", (2, 3, 8, 8)))
    gt, mask = torch.rand(2, 3, 8, 8), (torch.rand(2, 1, 8, 8) > 0.5).float()
    for options in REPAINT if self_condition else REPAINT[-1:]:
        same(both(theirs, ours, "sample", gt=gt, mask=mask, **options))
    same(both(theirs, fast(theirs, freeze=False), "p_sample_loop", (2, 3, 8, 8), gt=gt, mask=mask, resample=False))
    assert caplog.text.count("mask is given: the original p_sample_loop runs, with fastddpm's network") == 2
    with pytest.raises(ValueError, match="gt is None but mask is given"):
        ours.sample(mask=mask)
    with pytest.raises(ValueError, match="resample_jump is 24, must be from 0 to 23"):
        ours.sample(gt=gt, mask=mask, resample_jump=24)
    with pytest.raises(ValueError, match="mask is given, which no step table holds"):
        fast(theirs, allow_general=False).sample(gt=gt, mask=mask)


def test_classifier_guidance() -> None:
    theirs = guided_diffusion.GaussianDiffusion(
        guided_diffusion.Unet(8, dim_mults=(1, 2)), image_size=8, timesteps=STEPS, ddim_sampling_eta=0.4
    ).eval()
    ours = fast(theirs)
    same(both(theirs, ours, "sample", 2, True))
    named = {"cond_fn": lambda x, t, scale: scale * x, "guidance_kwargs": {"scale": 0.1}}
    same(both(theirs, ours, "sample", 2, **named))
    theirs.sampling_timesteps, theirs.is_ddim_sampling = 6, True
    for all_states in (False, True):
        same(both(theirs, ours, "sample", 2, all_states, **named))


def test_classes_of_the_users(caplog: pytest.LogCaptureFixture) -> None:
    """Their own loops run around the prepared network; a timestep of its own for every sample, too."""

    class Loop(library.GaussianDiffusion):
        def p_sample(self, x: Tensor, t: int, x_self_cond: Tensor | None = None) -> Any:
            image, x_start = super().p_sample(x, t, x_self_cond)
            times = torch.arange(len(x))
            return 0.9 * image + 0.01 * self.model(x, times, x_self_cond), x_start

    for options in ({"self_condition": True}, {"freeze": False}):
        theirs = Loop(unet(self_condition=options.pop("self_condition", False)), image_size=8, timesteps=STEPS).eval()
        ours = fast(theirs, **options)
        same(both(theirs, ours, "sample", 2, return_all_timesteps=True))
        first, second = torch.rand(2, 2, 3, 8, 8)
        same(both(theirs, ours, "interpolate", first, second, 4))
    assert "test_lucidrains_classes.test_classes_of_the_users.<locals>.Loop has its own p_sample" in caplog.text
    with pytest.raises(ValueError, match=r"Loop has its own p_sample, which would not be called; .* allow_general"):
        fast(theirs, allow_general=False)
    expected = both(theirs, fast(theirs, inplace=True), "sample", 2)
    assert torch.equal(*expected)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no steps": (
        library.ContinuousTimeGaussianDiffusion, {"num_sample_steps": 0}, "num_sample_steps is 0, must be a posit"),
    "half a step": (
        library.ElucidatedDiffusion, {"num_sample_steps": 1}, "num_sample_steps is 1, must be an integer of at le"),
    "levels": (
        library.ElucidatedDiffusion, {"sigma_max": 0.001},
        "sigma_min 0.002, sigma_max 0.001, rho 7 give levels that do not fall"),
    "rising": (
        simple_diffusion.GaussianDiffusion, {"noise_schedule": lambda t: t},
        "log_snr falls from 0.9166.* to 1.0 between times 0.9166.* and 1, must be finite and fall"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_sampled_are_named(name: str) -> None:
    kind, fields, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as raised:
        accelerate(continuous(kind, **fields))
    assert "\n" not in str(raised.value)
