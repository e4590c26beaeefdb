"""`accelerate` on denoising_diffusion_pytorch's objects against these objects themselves, at equal random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("denoising_diffusion_pytorch", reason="needs denoising_diffusion_pytorch")

from denoising_diffusion_pytorch import GaussianDiffusion1D
from lucidrains_objects import (
    CLOSE,
    SCHEDULES,
    STEPS,
    both,
    diffusion,
    diffusion_1d,
    fast,
    guided_diffusion,
    same,
    unet,
)

from fastddpm import interop
from fastddpm.interop.lucidrains import AcceleratedDiffusion, accelerate
from fastddpm.interop.lucidrains.tables import OBJECTIVES

# Every objective with every schedule; each of either with self-conditioning and without.
# DDIM's steps and eta go round.
DDIM = ((7, 0.0), (7, 0.6), (1, 1.0))
COMBINATIONS = [
    (objective, schedule, (i + j) % 2 == 1, *DDIM[(i + j) % 3])
    for i, objective in enumerate(OBJECTIVES)
    for j, schedule in enumerate(SCHEDULES)
]


@pytest.mark.parametrize(("objective", "schedule", "self_condition", "steps", "eta"), COMBINATIONS)
def test_samples_are_theirs_at_every_step(
    objective: str, schedule: str, self_condition: bool, steps: int, eta: float
) -> None:
    theirs = diffusion(unet(self_condition=self_condition), objective=objective, beta_schedule=schedule)
    # x0 of a predicted epsilon is multiplied by up to 1 / sqrt(abar_T), and the network's rounding with it.
    amplified = float(theirs.sqrt_recip_alphas_cumprod[-1]) if objective == "pred_noise" else 1.0
    close = max(CLOSE, amplified * 2 * torch.finfo(torch.float32).eps)
    pair = both(theirs, fast(theirs), "sample", 2, return_all_timesteps=True)
    assert pair[0].shape == (2, STEPS + 1, 3, 8, 8)
    same(pair, close)
    theirs = diffusion(
        theirs.model, objective=objective, beta_schedule=schedule, sampling_timesteps=steps, ddim_sampling_eta=eta
    )
    pair = both(theirs, fast(theirs), "sample", 2, return_all_timesteps=True)
    assert pair[0].shape == (2, steps + 1, 3, 8, 8)
    same(pair, close)


@pytest.mark.parametrize("self_condition", [False, True])
def test_networks_that_are_not_frozen(self_condition: bool) -> None:
    theirs = diffusion(unet(self_condition=self_condition))
    same(both(theirs, fast(theirs, freeze=False), "sample", 2, return_all_timesteps=True))
    theirs.sampling_timesteps = 7
    same(both(theirs, fast(theirs, freeze=False), "sample", 2))


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


@pytest.mark.parametrize(
    ("self_condition", "t", "lam"), [(False, None, 0.5), (True, 9, 0.2), (False, 1, 0.5), (True, 0, 0.3)]
)
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
    """At the first step, too, where x_self_cond is None and not zeros."""

    class Own(nn.Module):
        channels, out_dim, self_condition = 3, 3, True

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 3, 3, padding=1)

        def forward(self, images: Tensor, times: Tensor, before: Tensor | None) -> Tensor:
            before = images if before is None else before
            return self.conv(torch.cat([before, images], 1)) + times.view(-1, 1, 1, 1) / STEPS

    theirs = diffusion(Own())
    same(both(theirs, fast(theirs), "sample", 2))


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


@pytest.mark.parametrize(("objective", "steps"), [*((objective, 6) for objective in OBJECTIVES), ("pred_v", None)])
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
    for method in ("p_sample_loop", "ddim_sample"):
        same(both(theirs, ours, method, (2, 5, 3), **more))
    per_sample = {"model_forward_kwargs": {"shift": torch.rand(3, 1, 1)}}
    same(both(theirs, ours, "sample", 3, **per_sample))
    images = ours.sample(3, noise="philox", seed=4, **per_sample)
    assert torch.equal(ours.sample(3, noise="philox", seed=4, **per_sample), images)
    with pytest.raises(ValueError, match="batch_size is 2 for 3 samples but model_forward_kwargs are given"):
        fast(theirs, noise="philox", batch_size=2).sample(3, **per_sample)


@pytest.mark.parametrize("make", [diffusion, diffusion_1d, guided_diffusion])
def test_accelerate_knows_them(make: Callable[[], Any]) -> None:
    assert isinstance(interop.accelerate(make(), progress=False), AcceleratedDiffusion)
