"""`accelerate` on denoising_diffusion_pytorch's objects against these objects themselves, at equal random numbers."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("denoising_diffusion_pytorch", reason="needs denoising_diffusion_pytorch")

from denoising_diffusion_pytorch import (
    GaussianDiffusion,
    GaussianDiffusion1D,
    LearnedGaussianDiffusion,
    Trainer,
    Unet,
    Unet1D,
)
from denoising_diffusion_pytorch import classifier_free_guidance as cfg

from fastddpm import interop
from fastddpm.coefficients import StepTable, ddim_table, ddpm_table
from fastddpm.cuda_graph import explain
from fastddpm.interop import lucidrains
from fastddpm.interop.lucidrains import AcceleratedDiffusion, accelerate, load_trainer_checkpoint
from fastddpm.interop.lucidrains_models import (
    FusedBlock,
    FusedRMSNorm,
    GuidedPredictor,
    Predictor,
    cast_embeddings,
    fuse_norms,
)
from fastddpm.interop.lucidrains_tables import OBJECTIVES, ddim_sample_table, p_sample_table
from fastddpm.schedule import NoiseSchedule

ROOT = Path(__file__).parents[2]
STEPS = 24  # of the linear schedule, with 20 nothing of x_0 is left at the end
CLOSE = 1e-5  # images are within [0, 1]; float32 rounds each of the steps to about 1e-7
SCHEDULES = ("linear", "cosine", "sigmoid")


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")


def unet(**options: Any) -> Unet:
    return Unet(**{"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2, **options})


def diffusion(model: nn.Module | None = None, **options: Any) -> GaussianDiffusion:
    return GaussianDiffusion(model or unet(), **{"image_size": 8, "timesteps": STEPS, **options}).eval()


def guided_diffusion(**options: Any) -> Any:
    model = cfg.Unet(dim=8, num_classes=5, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2)
    return cfg.GaussianDiffusion(model, **{"image_size": 8, "timesteps": STEPS, **options}).eval()


def diffusion_1d(**options: Any) -> GaussianDiffusion1D:
    model = Unet1D(dim=8, dim_mults=(1, 2), channels=3, attn_dim_head=8, attn_heads=2, self_condition=True)
    return GaussianDiffusion1D(model, **{"seq_length": 16, "timesteps": STEPS, **options}).eval()


def fast(theirs: Any, **options: Any) -> Any:
    return accelerate(theirs, **{"noise": "torch", "progress": False, **options})


def both(
    theirs: Any, ours: Any, method: str, *arguments: Any, after: bool = True, **named: Any
) -> tuple[Any, Any]:
    """What a method of both gives from the same seed; torch's generator must then be where it is after theirs."""
    results, following = [], []
    for obj in (theirs, ours):
        torch.manual_seed(7)
        results.append(getattr(obj, method)(*arguments, **named))
        following.append(torch.randn(4))
    assert not after or torch.equal(*following)
    return results[0], results[1]


def same(pair: tuple[Tensor, Tensor], close: float = CLOSE) -> None:
    theirs, ours = pair
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=close)


# -- equal images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_samples_are_theirs_at_every_step(objective: str, schedule: str, self_condition: bool) -> None:
    theirs = diffusion(unet(self_condition=self_condition), objective=objective, beta_schedule=schedule)
    # x0 of a predicted epsilon is multiplied by up to 1 / sqrt(abar_T), and the network's rounding with it.
    close = 10 * CLOSE if objective == "pred_noise" else CLOSE
    pair = both(theirs, fast(theirs), "sample", 2, return_all_timesteps=True)
    assert pair[0].shape == (2, STEPS + 1, 3, 8, 8)
    same(pair, close)
    for steps, eta in ((7, 0.0), (7, 0.6), (1, 1.0)):
        theirs = diffusion(
            theirs.model,
            objective=objective,
            beta_schedule=schedule,
            sampling_timesteps=steps,
            ddim_sampling_eta=eta,
        )
        pair = both(theirs, fast(theirs), "sample", 2, return_all_timesteps=True)
        assert pair[0].shape == (2, steps + 1, 3, 8, 8)
        same(pair, close)


@pytest.mark.parametrize("steps", [None, 5])
def test_arguments_and_shapes(steps: int | None) -> None:
    theirs = diffusion(sampling_timesteps=steps, image_size=(8, 12))
    ours = fast(theirs)
    pair = both(theirs, ours, "sample", batch_size=3)
    assert pair[0].shape == (3, 3, 8, 12)
    same(pair)
    assert 0 <= float(pair[1].min()) <= float(pair[1].max()) <= 1
    for method in ("p_sample_loop", "ddim_sample"):
        same(both(theirs, ours, method, (2, 3, 8, 8)))
        same(both(theirs, ours, method, (1, 3, 16, 8), True))
    torch.manual_seed(0)
    assert ours.sample().shape[0] == 16


def test_without_auto_normalize() -> None:
    theirs = diffusion(auto_normalize=False)
    pair = both(theirs, fast(theirs), "sample", 2)
    same(pair)
    assert float(pair[1].min()) < 0


def test_settings_are_read_at_every_call() -> None:
    theirs = diffusion(sampling_timesteps=6)
    ours = fast(theirs)
    same(both(theirs, ours, "sample", 2))
    ours.sampling_timesteps, ours.ddim_sampling_eta = 4, 0.9
    assert (theirs.sampling_timesteps, theirs.ddim_sampling_eta) == (4, 0.9)
    pair = both(theirs, ours, "sample", 2, return_all_timesteps=True)
    assert pair[1].shape[1] == 5
    same(pair)


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize(("t", "lam"), [(None, 0.5), (9, 0.2), (1, 0.5), (0, 0.3)])
def test_interpolate(self_condition: bool, t: int | None, lam: float) -> None:
    theirs = diffusion(unet(self_condition=self_condition))
    first, second = torch.rand(2, 2, 3, 8, 8).mul(2).sub(1)
    pair = both(theirs, fast(theirs), "interpolate", first, second, t, lam)
    same(pair, 2 * CLOSE)  # within [-1, 1]
    philox = fast(theirs, noise="philox")
    again = [philox.interpolate(first, second, t, lam, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])


def test_interpolate_of_an_immiscible_diffusion() -> None:
    theirs = diffusion(immiscible=True)
    first, second = torch.rand(2, 3, 3, 8, 8).mul(2).sub(1)
    same(both(theirs, fast(theirs), "interpolate", first, second, 12), 2 * CLOSE)


def test_other_networks_are_called_as_theirs() -> None:
    class Own(nn.Module):
        channels, out_dim, self_condition = 3, 3, True

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 3, 3, padding=1)

        def forward(self, images: Tensor, times: Tensor, before: Tensor | None) -> Tensor:
            before = torch.zeros_like(images) if before is None else before
            return self.conv(torch.cat([before, images], 1)) + times.view(-1, 1, 1, 1) / STEPS

    theirs = diffusion(Own())
    same(both(theirs, fast(theirs), "sample", 2))


# -- the tables -------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A network without weights, in any dtype."""

    channels = out_dim = 3
    self_condition = False

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return (0.9 * x + (t.view(-1, 1, 1, 1) / STEPS).to(x)).cos()


def execute(table: StepTable, x: Tensor, model: nn.Module, noises: list[Tensor]) -> list[Tensor]:
    """The definition of the rows, in x's dtype; noise of every row, used or not."""
    states = []
    for row, t, z in zip(table.rows.tolist(), table.timesteps, noises, strict=True):
        a, b, c, d, e, _, s = row
        out = model(x, t.expand(len(x)))
        x = c * (a * x + b * out).clamp(-1, 1) + d * x + e * out + s * z
        states.append(x)
    return states


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_rows_are_their_steps_to_the_last_digit(objective: str, schedule: str) -> None:
    """In float64, where the buffers are float32 values: no rounding stands between both."""
    theirs = diffusion(Fixed(), objective=objective, beta_schedule=schedule, auto_normalize=False).double()
    torch.set_default_dtype(torch.float64)
    try:
        for method, steps, eta in (("p_sample_loop", STEPS, 0.0), ("ddim_sample", 9, 0.0), ("ddim_sample", 9, 0.8)):
            theirs.sampling_timesteps, theirs.ddim_sampling_eta = steps, eta
            torch.manual_seed(1)
            expected = getattr(theirs, method)((2, 3, 4, 4), return_all_timesteps=True)
            torch.manual_seed(1)
            noises = list(torch.stack([torch.randn(2, 3, 4, 4) for _ in range(steps)]))
            ddpm = method == "p_sample_loop"
            table = p_sample_table(theirs) if ddpm else ddim_sample_table(theirs, rederive=True)
            states = execute(table, noises[0], theirs.model, [*noises[1:], torch.full_like(noises[0], torch.pi)])
            torch.testing.assert_close(torch.stack(states, 1), expected[:, 1:], rtol=1e-10, atol=1e-10)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("schedule", ["cosine", "sigmoid"])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_tables_are_those_of_the_package(objective: str, schedule: str) -> None:
    """`ddpm_table` and `ddim_table` in float64, but for float32 in their buffers."""
    theirs = diffusion(Fixed(), timesteps=200, objective=objective, beta_schedule=schedule)
    theirs.sampling_timesteps, theirs.ddim_sampling_eta = 30, 0.7
    make = {
        "cosine": "cosine_beta_schedule",
        "sigmoid": "sigmoid_beta_schedule",
    }[schedule]
    betas = getattr(sys.modules[GaussianDiffusion.__module__], make)(200)
    ours = NoiseSchedule.from_betas(betas)
    predicts = OBJECTIVES[objective]
    expected = ddpm_table(
        ours, ours.timesteps(), prediction_type=predicts, convention="denoising_diffusion_pytorch"
    )
    table = p_sample_table(theirs)
    assert torch.equal(table.timesteps, expected.timesteps)
    torch.testing.assert_close(table.rows, expected.rows, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(table.levels, expected.levels, rtol=1e-5, atol=1e-5)
    timesteps = ours.timesteps(30, "denoising_diffusion_pytorch")
    for rederive in (True, False):
        clipped = rederive or objective != "pred_noise"
        expected = ddim_table(
            ours, timesteps, prediction_type=predicts, eta=0.7, use_clipped_model_output=clipped
        )
        table = ddim_sample_table(theirs, rederive=rederive)
        assert torch.equal(table.timesteps, expected.timesteps)
        # 1 - alphas_cumprod of float32 near 1 has four digits.
        torch.testing.assert_close(table.rows, expected.rows, rtol=2e-4, atol=2e-4)


# -- noise ------------------------------------------------------------------------------------------------------------


def test_philox_noise_is_that_of_the_sampler() -> None:
    theirs = diffusion()
    ours = fast(theirs, noise="philox", batch_size=2)
    torch.manual_seed(0)
    first, second = ours.sample(3), ours.sample(3)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(ours.sample(3), first)
    seeded = ours.sample(4, seed=5)
    torch.testing.assert_close(ours.sample(2, seed=5), seeded[:2], rtol=0, atol=CLOSE)
    states = ours.sample(4, True, seed=5)
    assert states.shape == (4, STEPS + 1, 3, 8, 8)
    torch.testing.assert_close(states[:, -1], seeded, rtol=0, atol=CLOSE)
    assert not torch.equal(states[0, 0], states[1, 0])


def test_noise_of_one_call() -> None:
    theirs = diffusion()
    ours = fast(theirs, noise="philox")
    torch.manual_seed(7)
    expected = theirs.sample(2)
    torch.manual_seed(7)
    torch.testing.assert_close(ours.sample(2, noise="torch"), expected, rtol=0, atol=CLOSE)


def test_progress_is_shown_where_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    ours = accelerate(diffusion(sampling_timesteps=4))
    ours.sample(1)
    assert "4/4" in capfd.readouterr().err
    ours.sample(1, progress=False)
    assert capfd.readouterr().err == ""


# -- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("steps", [None, 6])
def test_guided_samples_are_theirs(objective: str, steps: int | None) -> None:
    theirs = guided_diffusion(objective=objective, sampling_timesteps=steps)
    ours = fast(theirs)
    classes = torch.tensor([0, 4, 2])
    for cond_scale, rescaled_phi in ((6.0, 0.7), (3.0, 0.0), (0.0, 1.0), (2.5, 0.3)):
        same(both(theirs, ours, "sample", classes, cond_scale=cond_scale, rescaled_phi=rescaled_phi), 5 * CLOSE)
    same(both(theirs, ours, "sample", classes), 5 * CLOSE)
    same(both(theirs, ours, "p_sample_loop", classes, (3, 3, 8, 8), 2.0, 0.5), 5 * CLOSE)
    same(both(theirs, ours, "ddim_sample", classes, (3, 3, 8, 8), 2.0, 0.5), 5 * CLOSE)
    if objective != "pred_noise":  # which from random weights grows without bound
        same(both(theirs, ours, "ddim_sample", classes, (3, 3, 8, 8), 2.0, 0.5, False), 5 * CLOSE)


def test_guided_scale_of_one_is_the_conditional_network() -> None:
    theirs = guided_diffusion()
    ours = fast(theirs)
    calls = []
    theirs.model.register_forward_hook(lambda module, inputs, out: calls.append(len(inputs[0])))
    classes = torch.tensor([1, 3])
    torch.manual_seed(7)
    images = ours.sample(classes, cond_scale=1.0)
    assert calls == [2] * STEPS
    calls.clear()
    ours.sample(classes, cond_scale=2.0)
    assert calls == [4] * STEPS

    class Conditional(nn.Module):
        channels = out_dim = 3
        self_condition = False

        def forward(self, x: Tensor, t: Tensor, _: None) -> Tensor:
            return theirs.model(x, t, classes, cond_drop_prob=0.0)

    alone = diffusion(Conditional(), objective="pred_noise", beta_schedule="cosine")
    torch.manual_seed(7)
    torch.testing.assert_close(images, alone.sample(2), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_guided_interpolate(offset: float) -> None:
    theirs = guided_diffusion(offset_noise_strength=offset)
    first, second = torch.rand(2, 2, 3, 8, 8).mul(2).sub(1)
    classes = torch.tensor([0, 3])
    ours = fast(theirs)
    same(both(theirs, ours, "interpolate", first, second, classes, 8, 0.4), 1e-4)
    results = [ours.interpolate(first, second, classes, 8, noise="philox", seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_philox_interpolation_noises_as_q_sample() -> None:
    """With t = 0 nothing is denoised: what is returned is the mixture of both noised images."""
    theirs = guided_diffusion(offset_noise_strength=0.5)
    ours = fast(theirs, noise="philox")
    images, classes = torch.zeros(64, 3, 8, 8), torch.zeros(64, dtype=torch.int64)
    noised = ours.interpolate(images, images, classes, 0, 0.0, seed=1) / float(theirs.sqrt_one_minus_alphas_cumprod[0])
    # noise of variance 1, and per channel an offset of standard deviation 0.5
    assert float(noised.var(dim=(2, 3)).mean()) == pytest.approx(1, abs=0.05)
    assert float(noised.mean(dim=(2, 3)).var()) == pytest.approx(0.25 + 1 / 64, abs=0.06)


def test_guidance_plus_plus(caplog: pytest.LogCaptureFixture) -> None:
    theirs = guided_diffusion(use_cfg_plus_plus=True, sampling_timesteps=6)
    classes = torch.tensor([0, 3])
    same(both(theirs, fast(theirs), "p_sample_loop", classes, (2, 3, 8, 8)), 5 * CLOSE)  # DDPM has no use for it
    with pytest.raises(ValueError, match="use_cfg_plus_plus is True, .* allow_general=True"):
        fast(theirs).sample(classes)
    general = fast(theirs, allow_general=True)
    with caplog.at_level("WARNING"):
        pair = both(theirs, general, "sample", classes)
    assert torch.equal(*pair)
    assert "use_cfg_plus_plus is True: the original ddim_sample runs" in caplog.text
    with pytest.raises(ValueError, match="seed is given but use_cfg_plus_plus is True"):
        general.sample(classes, seed=1)


# -- one dimension ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("steps", [None, 6])
def test_sequences_are_theirs(objective: str, steps: int | None) -> None:
    theirs = diffusion_1d(objective=objective, sampling_timesteps=steps, ddim_sampling_eta=0.4)
    ours = fast(theirs)
    same(both(theirs, ours, "sample", 2))
    (images, noise), (our_images, our_noise) = both(theirs, ours, "sample", 2, return_noise=True)
    same((images, our_images))
    torch.manual_seed(7)
    assert torch.equal(our_noise, torch.randn(2, 3, 16))
    assert torch.equal(our_noise, noise) == (steps is None)  # theirs is then that of a step
    same(both(theirs, ours, "ddim_sample", (2, 3, 8)))
    if objective != "pred_noise":
        same(both(theirs, ours, "ddim_sample", (2, 3, 16), False))
    first, second = torch.rand(2, 2, 3, 16).mul(2).sub(1)
    same(both(theirs, ours, "interpolate", first, second, 10), 2 * CLOSE)


def test_sequences_with_channels_last() -> None:
    class Own(nn.Module):
        channels, out_dim, self_condition = 3, 3, False

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
            return self.linear(x) + t.view(-1, 1, 1) / STEPS + shift

    theirs = GaussianDiffusion1D(Own(), seq_length=5, timesteps=STEPS, channel_first=False).eval()
    ours = fast(theirs)
    pair = both(theirs, ours, "sample", 2)
    assert pair[1].shape == (2, 5, 3)
    same(pair)
    more = {"model_forward_kwargs": {"shift": 0.5}}
    with pytest.raises(ValueError, match="model_forward_kwargs is .'shift': 0.5., .* allow_general=True"):
        ours.sample(2, **more)
    general = fast(theirs, allow_general=True)
    for method in ("p_sample_loop", "ddim_sample"):
        pair = both(theirs, general, method, (2, 5, 3), **more)
        assert torch.equal(*pair)


# -- what the object stays ------------------------------------------------------------------------------------------


def test_everything_else_is_the_original() -> None:
    theirs = diffusion()
    ours = fast(theirs)
    assert isinstance(ours, AcceleratedDiffusion)
    assert ours.model is theirs.model
    assert (ours.image_size, ours.channels, ours.num_timesteps) == ((8, 8), 3, STEPS)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert "GaussianDiffusion" in repr(ours)
    with pytest.raises(AttributeError, match="nothing"):
        _ = ours.nothing
    images = torch.rand(2, 3, 8, 8)
    losses = both(theirs, ours, "__call__", images)
    assert torch.equal(*losses)
    losses[1].backward()
    assert theirs.model.init_conv.weight.grad is not None
    assert ours.train() is ours
    assert theirs.training
    assert ours.eval() is ours
    assert not theirs.training
    assert ours.to("cpu") is ours.cpu() is ours
    assert "sample" not in vars(theirs)


def test_sampling_leaves_the_mode_alone() -> None:
    theirs = diffusion(unet(dropout=0.5)).train()
    ours = fast(theirs)
    first, second = (both(theirs, ours, "sample", 2, after=False)[1] for _ in range(2))
    assert torch.equal(first, second)
    assert all(module.training for module in theirs.modules())
    same(both(theirs.eval(), ours, "sample", 2))


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"channels_last": True}, {"fuse_norms": True}])
def test_training_goes_on(options: dict[str, Any]) -> None:
    """New weights are sampled with, also where the sampler has a copy of them; other layers too."""
    theirs = diffusion()
    ours = fast(theirs, noise="philox", **options)
    before = ours.sample(2, seed=0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    after = ours.sample(2, seed=0)
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(after, fast(theirs, noise="philox", **options).sample(2, seed=0))
    theirs.model.final_conv = nn.Conv2d(8, 3, 1)
    other = ours.sample(2, seed=0)
    assert not torch.allclose(other, after, atol=1e-3)
    assert torch.equal(other, fast(theirs, noise="philox", **options).sample(2, seed=0))


@pytest.mark.parametrize("fuse_norms", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_that_of_autocast(dtype: str, fuse_norms: bool) -> None:
    """It loses at most twice what the library's own way to lower precision does."""
    theirs = diffusion(sampling_timesteps=6)
    ours = fast(theirs, dtype=dtype, fuse_norms=fuse_norms)
    expected, images = both(theirs, ours, "sample", 4)
    with torch.autocast("cpu", getattr(torch, dtype)):
        torch.manual_seed(7)
        cast = theirs.sample(4)
    assert images.dtype == torch.float32
    assert 0 < float((images - expected).square().mean()) < 4 * float((cast - expected).square().mean())
    assert theirs.model.init_conv.weight.dtype == torch.float32


@pytest.mark.parametrize("make", [diffusion_1d, guided_diffusion])
def test_lower_precision_of_the_others(make: Callable[..., Any]) -> None:
    theirs = make(sampling_timesteps=6)
    argument = torch.tensor([1, 2]) if make is guided_diffusion else 2
    expected, images = both(theirs, fast(theirs, dtype="bfloat16"), "sample", argument)
    assert 0 < float((images - expected).abs().mean()) < 0.05


@pytest.mark.parametrize("make", [diffusion, diffusion_1d])
def test_in_place(make: Callable[[], Any]) -> None:
    theirs = make()
    torch.manual_seed(7)
    expected = theirs.sample(2)
    assert fast(theirs, inplace=True) is theirs
    fast(theirs, inplace=True)  # again, as with other options
    torch.manual_seed(7)
    images = theirs.sample(2)
    torch.testing.assert_close(images, expected, rtol=0, atol=CLOSE)
    assert isinstance(theirs.sample.__self__, AcceleratedDiffusion)
    copied = copy.deepcopy(theirs)
    assert copied.sample.__self__.diffusion is copied
    torch.manual_seed(7)
    assert torch.equal(copied.sample(2), images)
    for name in lucidrains.METHODS:
        delattr(theirs, name)
    torch.manual_seed(7)
    assert torch.equal(theirs.sample(2), expected)


def test_inside_inference_mode() -> None:
    """As the library's Trainer calls `sample`; what is kept from there serves outside."""
    theirs = diffusion()
    ours = fast(theirs)
    with torch.inference_mode():
        first, second = torch.rand(2, 2, 3, 8, 8)
        same(both(theirs, ours, "sample", 2))
        same(both(theirs, ours, "interpolate", first, second, 5), 2 * CLOSE)
    same(both(theirs, ours, "sample", 2))


@pytest.mark.parametrize("make", [diffusion, diffusion_1d, guided_diffusion])
def test_accelerate_knows_them(make: Callable[[], Any]) -> None:
    assert isinstance(interop.accelerate(make(), progress=False), AcceleratedDiffusion)


def test_the_library_is_not_imported() -> None:
    code = "import sys, fastddpm, fastddpm.interop; sys.exit('denoising_diffusion_pytorch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- fused norms ------------------------------------------------------------------------------------------------------


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "Unet": lambda: (unet(self_condition=True, full_attn=(False, True)), (torch.randn(2, 3, 8, 8),)),
    "Unet1D": lambda: (diffusion_1d().model, (torch.randn(2, 3, 16),)),
    "guided": lambda: (guided_diffusion().model, (torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_fused_norms_are_theirs(name: str) -> None:
    model, (x, *more) = NETWORKS[name]()
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    kinds = {type(module).__name__ for module in model.modules()}
    fused, count = fuse_norms(model)
    assert {type(module).__name__ for module in model.modules()} == kinds
    blocks = sum(isinstance(module, FusedBlock) for module in fused.modules())
    norms = sum(isinstance(module, FusedRMSNorm) for module in fused.modules())
    assert blocks == sum(type(module).__name__ == "Block" for module in model.modules()) > 0
    assert blocks + norms == count == sum(type(module).__name__ == "RMSNorm" for module in model.modules())
    assert fused.state_dict().keys() == model.state_dict().keys()
    assert all(mine is theirs for mine, theirs in zip(fused.parameters(), model.parameters(), strict=True))
    t = torch.tensor([3, 17])
    named = {"cond_drop_prob": 0.0} if more else {}
    torch.set_default_dtype(torch.float64)  # which is that of their time embedding
    try:
        expected, out = (network(x.double(), t, *more, **named) for network in (model, fused))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_fused_norms_in_triton(backend: str) -> None:
    theirs = diffusion(unet(dim_mults=(1,)), sampling_timesteps=2)
    same(both(theirs, fast(theirs, fuse_norms=True, backend=backend), "sample", 1))


def test_channels_last() -> None:
    theirs = diffusion(sampling_timesteps=5)
    ours = fast(theirs, channels_last=True, fuse_norms=True)
    formats = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
        if isinstance(module, FusedBlock)
        else None
    )
    try:
        same(both(theirs, ours, "sample", 2))
    finally:
        hook.remove()
    assert formats
    assert all(formats)
    assert theirs.model.init_conv.weight.is_contiguous()


def test_modules_that_are_listened_to_stay() -> None:
    model = unet()
    model.mid_block1.block1.register_forward_hook(lambda *_: None)
    fused, count = fuse_norms(model)
    assert type(fused.mid_block1.block1).__name__ == "Block"
    assert count == fuse_norms(unet())[1]  # its norm is replaced instead


def test_fused_norms_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = diffusion()
    monkeypatch.setattr(FusedBlock, "forward", lambda self, x, scale_shift=None: self.proj(x))
    with pytest.raises(RuntimeError, match="differs by .* at timestep 0; fuse_norms=False"):
        fast(theirs, fuse_norms=True)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("images")
    for index in range(100):
        Image.new("RGB", (8, 8), (index, 2 * index, 50)).save(folder / f"{index}.png")
    result = Trainer(
        diffusion(objective="pred_x0", beta_schedule="cosine", min_snr_loss_weight=True),
        folder,
        num_samples=1,
        calculate_fid=False,
        results_folder=str(tmp_path_factory.mktemp("results")),
        ema_update_every=1,
    )
    for _ in range(3):
        with torch.no_grad():
            for parameter in result.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        result.ema.step.fill_(1000)  # past its warm-up, in which it only copies
        result.ema.update()
    result.save(1)
    return result


@pytest.fixture(scope="module")
def checkpoint(trainer: Trainer) -> Path:
    return trainer.results_folder / "model-1.pt"


@pytest.mark.parametrize("weights", ["ema", "model"])
@pytest.mark.parametrize("built", [False, True])
def test_trainer_checkpoint(trainer: Trainer, checkpoint: Path, weights: str, built: bool) -> None:
    saved = trainer.ema.ema_model if weights == "ema" else trainer.model
    options = {"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2}
    if built:
        loaded = load_trainer_checkpoint(checkpoint, options, weights=weights, image_size=8)
    else:
        template = diffusion(objective="pred_x0", beta_schedule="linear")
        before = copy.deepcopy(template.state_dict())
        loaded = load_trainer_checkpoint(checkpoint, template, weights=weights)
        assert all(torch.equal(before[name], value) for name, value in template.state_dict().items())
    assert isinstance(loaded, GaussianDiffusion)
    assert not loaded.training
    assert loaded.objective == "pred_x0"
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not torch.equal(trainer.ema.ema_model.model.init_conv.weight, trainer.model.model.init_conv.weight)
    same(both(saved.eval(), fast(loaded), "sample", 2))


def test_trainer_samples_in_place(trainer: Trainer) -> None:
    """What `Trainer.train` does every save_and_sample_every steps."""
    averaged = trainer.ema.ema_model
    fast(averaged, inplace=True)
    try:
        with torch.inference_mode():
            torch.manual_seed(3)
            images = averaged.sample(batch_size=2)
        torch.manual_seed(3)
        expected = type(averaged).sample(averaged, 2)
        torch.testing.assert_close(images, expected, rtol=0, atol=CLOSE)
    finally:
        for name in lucidrains.METHODS:
            delattr(averaged, name)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [STEPS, 1000])
def test_the_objective_is_known_from_the_file(tmp_path: Path, objective: str, schedule: str, timesteps: int) -> None:
    theirs = diffusion(
        objective=objective, beta_schedule=schedule, timesteps=timesteps, min_snr_loss_weight=schedule == "cosine"
    )
    torch.save({"model": theirs.state_dict()}, tmp_path / "model-2.pt")
    options = {"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2}
    loaded = load_trainer_checkpoint(tmp_path / "model-2.pt", options, weights="model", image_size=8)
    assert (loaded.objective, loaded.num_timesteps) == (objective, timesteps)


def test_checkpoint_errors_name_what_is_wrong(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model-9.pt is not a file"):
        load_trainer_checkpoint(checkpoint.with_name("model-9.pt"), diffusion())
    with pytest.raises(ValueError, match="objective is 'pred_v' but .*model-1.pt was trained with 'pred_x0'"):
        load_trainer_checkpoint(checkpoint, diffusion())
    with pytest.raises(ValueError, match="is of 24 timesteps but the diffusion has 30"):
        load_trainer_checkpoint(checkpoint, diffusion(objective="pred_x0", timesteps=30))
    with pytest.raises(ValueError, match="lacks model.downs.0.2.to_out.weight, .* and 3 more and also has .*: the"):
        load_trainer_checkpoint(checkpoint, diffusion(unet(dim_mults=(1,)), objective="pred_x0"))
    with pytest.raises(ValueError, match=r"init_conv.weight of shape \[8, 3, 7, 7\], the diffusion has \[16, 3"):
        load_trainer_checkpoint(checkpoint, diffusion(unet(dim=16), objective="pred_x0"))
    with pytest.raises(ValueError, match="weights is 'online', must be one of ema, model"):
        load_trainer_checkpoint(checkpoint, diffusion(), weights="online")
    with pytest.raises(TypeError, match="image_size is missing"):
        load_trainer_checkpoint(checkpoint, {"dim": 8})
    with pytest.raises(TypeError, match="image_size is given along with a diffusion"):
        load_trainer_checkpoint(checkpoint, diffusion(), image_size=8)
    with pytest.raises(TypeError, match="diffusion is a int"):
        load_trainer_checkpoint(checkpoint, 8)
    torch.save({"model": diffusion().state_dict()}, tmp_path / "model-1.pt")
    with pytest.raises(ValueError, match="has model, must have 'ema'"):
        load_trainer_checkpoint(tmp_path / "model-1.pt", diffusion())
    torch.save({"ema": {"step": torch.tensor(1)}}, tmp_path / "model-2.pt")
    with pytest.raises(ValueError, match="has no ema_model.betas"):
        load_trainer_checkpoint(tmp_path / "model-2.pt", diffusion())
    torch.save({"ema": Fixed()}, tmp_path / "model-3.pt")
    with pytest.raises(ValueError, match="model-3.pt cannot be read as weights"):
        load_trainer_checkpoint(tmp_path / "model-3.pt", diffusion())


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_graph_can_hold_the_networks(name: str) -> None:
    model, (x, *more) = NETWORKS[name]()
    t = torch.tensor([3, 17])
    for network in (model, cast_embeddings(fuse_norms(model)[0])):
        for guided in (True, False):
            predictor: nn.Module = Predictor(network)
            if more:
                predictor = GuidedPredictor(network, guided=guided, rescaled=True, device=x.device)
            with torch.no_grad():
                assert explain(partial(predictor.eval(), x, t, *more)) is None


def test_guidance_of_a_network_that_takes_no_mask() -> None:
    """As in earlier versions of the library: two evaluations, the same prediction."""
    model, (x, classes) = NETWORKS["guided"]()
    predictor = GuidedPredictor(model, guided=True, rescaled=True, device=x.device).eval()
    predictor.set_scales(4.0, 0.7)
    arguments = (x, torch.tensor([3, 17]), classes)
    masked = predictor(*arguments)
    predictor._masks = False
    torch.testing.assert_close(predictor(*arguments), masked, rtol=0, atol=CLOSE)
    expected, _ = model.forward_with_cond_scale(*arguments, cond_scale=4.0, rescaled_phi=0.7)
    torch.testing.assert_close(masked, expected, rtol=0, atol=CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [None, 6])
def test_samples_on_a_gpu(steps: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # for theirs
    theirs = diffusion(unet(self_condition=True), sampling_timesteps=steps).cuda()
    same(both(theirs, fast(theirs, dtype="float32"), "sample", 2), 10 * CLOSE)
    ours = fast(theirs, noise="philox", channels_last=True)
    torch.testing.assert_close(ours.sample(2, seed=1), ours.sample(2, seed=1), rtol=0, atol=CLOSE)
    guided = guided_diffusion(sampling_timesteps=steps).cuda()
    accelerated, classes = fast(guided, dtype="float32"), torch.tensor([1, 2], device="cuda")
    for cond_scale in (2.0, 5.0):  # of one captured graph
        same(both(guided, accelerated, "sample", classes, cond_scale), 10 * CLOSE)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_other_objects_are_named() -> None:
    with pytest.raises(TypeError, match="obj is a Unet, must be a denoising_diffusion_pytorch.*GaussianDiffusion or a"):
        accelerate(unet())
    learned = LearnedGaussianDiffusion(unet(learned_variance=True), image_size=8, timesteps=STEPS)
    with pytest.raises(ValueError, match="LearnedGaussianDiffusion has its own p_mean_variance, model_predictions"):
        accelerate(learned)

    class Own(GaussianDiffusion):
        def q_posterior(self, *arguments: Any, **named: Any) -> Any:
            return super().q_posterior(*arguments, **named)

        def p_losses(self, *arguments: Any, **named: Any) -> Any:  # of training, which stays its own
            return super().p_losses(*arguments, **named)

    with pytest.raises(ValueError, match="Own has its own q_posterior, which would not be called"):
        accelerate(Own(unet(), image_size=8))
    theirs = diffusion()
    theirs.p_sample = lambda *_: None
    with pytest.raises(ValueError, match="has its own p_sample,"):
        accelerate(theirs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nosie": "torch"}, TypeError, "nosie is no option, must be one of dtype, device, "),
        ({"noise": "numpy"}, ValueError, "noise is 'numpy', must be 'philox' or 'torch'"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"dtype": torch.float64}, ValueError, "dtype is torch.float64"),
        ({"cuda_graph": "sometimes"}, ValueError, "cuda_graph is 'sometimes'"),
        ({"device": "nowhere"}, RuntimeError, "nowhere"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        accelerate(diffusion(), **options)


def test_options_that_are_not_for_an_object() -> None:
    with pytest.raises(ValueError, match="fuse_norms is True but the diffusion's model, a Fixed, has no norms"):
        accelerate(diffusion(Fixed()), fuse_norms=True)
    with pytest.raises(ValueError, match="channels_last is True but the diffusion is one-dimensional"):
        accelerate(diffusion_1d(), channels_last=True)


def test_settings_that_cannot_be_sampled_are_named() -> None:
    for name, value, message in (
        ("objective", "pred_xprev", "objective is 'pred_xprev', must be one of pred_noise, pred_x0, pred_v"),
        ("posterior_mean_coef1", torch.ones(3), r"posterior_mean_coef1 has shape \[3\], must be a tensor of .* 24"),
    ):
        theirs = diffusion()
        setattr(theirs, name, value)
        with pytest.raises(ValueError, match=message):
            accelerate(theirs)
    ours = fast(diffusion(sampling_timesteps=5))
    for name, value, message in (
        ("sampling_timesteps", 25, "sampling_timesteps is 25, must be an integer from 1 to 24"),
        ("ddim_sampling_eta", 40.0, "ddim_sampling_eta is 40.0, too large"),
    ):
        before = getattr(ours, name)
        setattr(ours, name, value)
        with pytest.raises(ValueError, match=message):
            ours.sample(1)
        setattr(ours, name, before)
    with pytest.raises(ValueError, match=r"alphas_cumprod\[19\] is 0.0, .*fewer than 21 timesteps of the linear"):
        accelerate(diffusion(timesteps=20, beta_schedule="linear", objective="pred_noise"))


def test_arguments_are_checked() -> None:
    ours = fast(diffusion(), batch_size=2)
    for call, error, message in (
        (lambda: ours.sample(0), ValueError, "batch_size is 0"),
        (lambda: ours.sample(1, seeds=[1]), TypeError, "seeds is no argument"),
        (lambda: ours.sample(1, noise="gauss"), ValueError, "noise is 'gauss'"),
        (lambda: ours.sample(1, seed=1), ValueError, "seed is 1 but noise is 'torch'"),
        (lambda: ours.sample(3), ValueError, "batch_size is 2 for 3 samples but noise is 'torch'"),
    ):
        with pytest.raises(error, match=message):
            call()
    images = torch.zeros(1, 3, 8, 8)
    for arguments, error, message in (
        ((images, images, 24), ValueError, "t is 24, must be an integer from 0 to 23"),
        ((images, images[:, :1]), ValueError, "x2 has shape"),
        ((images, images, 3, float("nan")), ValueError, "lam is nan"),
        ((8, images), TypeError, "x1 is of int"),
    ):
        with pytest.raises(error, match=message):
            ours.interpolate(*arguments)
    guided = fast(guided_diffusion())
    for classes, error, message in (
        (torch.tensor([0, 5]), ValueError, "class_labels has 5, every label must be from 0 to 4"),
        ([0, 1], TypeError, "classes must be an integer tensor"),
        (torch.tensor([0.5]), TypeError, "must be integers"),
    ):
        with pytest.raises(error, match=message):
            guided.sample(classes)
    with pytest.raises(ValueError, match="cond_scale is inf"):
        guided.sample(torch.tensor([0]), cond_scale=float("inf"))


# -- the example ------------------------------------------------------------------------------------------------------


def test_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "examples" / "accelerate_denoising_diffusion_pytorch.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 31
    monkeypatch.setattr(
        sys, "argv", [path.name, "--dim", "8", "--image-size", "8", "--steps", "3", "--batch-size", "2"]
    )
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), {"__name__": "__main__"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["before", "after", "largest difference"]
    assert float(lines[2].split(":")[1]) < 1e-5
