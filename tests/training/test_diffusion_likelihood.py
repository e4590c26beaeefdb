"""Bits per dimension against closed forms for Gaussian data, and against guided-diffusion's loop, restated."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from fastddpm_kernels.philox import STREAM_LIKELIHOOD, normal, sample_keys
from scipy.stats import norm
from torch import Tensor, nn

from fastddpm import GaussianDiffusion, NoiseSchedule, UNet

SCHEDULE = NoiseSchedule.linear(40, 1e-3, 0.25)
MEAN, STD = -0.2, 0.3  # of the data


class Optimal(nn.Module):
    """The best prediction of epsilon for pixels that are N(MEAN, STD^2), in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        bar = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1)
        x0 = MEAN + STD**2 * bar.sqrt() / (bar * STD**2 + 1 - bar) * (x - bar.sqrt() * MEAN)
        return (x - bar.sqrt() * x0) / (1 - bar).sqrt()


def images(count: int, size: int = 16) -> Tensor:
    x = MEAN + STD * torch.randn(count, 3, size, size, dtype=torch.float64)
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_terms_of_gaussian_data(variance_type: str) -> None:
    """Given x0 the error of the best x0 is q + p z, so that the mean of every term over the noise is known."""
    diffusion = GaussianDiffusion(Optimal(), SCHEDULE, variance_type=variance_type, clip_sample=False)
    x = images(6)
    result = diffusion.bits_per_dim(x, batch_size=4)
    bar, betas = SCHEDULE.alphas_cumprod, SCHEDULE.betas
    n = x[0].numel()
    for column, t in enumerate(result.timesteps.tolist()):
        a, b = float(bar[t]), float(betas[t])
        before = float(bar[t - 1]) if t else 1.0
        gain = STD**2 * math.sqrt(a) / (a * STD**2 + 1 - a)  # of x_t in the best x0
        of_x0 = 1 - gain * math.sqrt(a)
        fixed = (of_x0 * (x - MEAN)).square().flatten(1).mean(1)
        spread = gain**2 * (1 - a)
        x0_mse = fixed + spread
        # the square of a normal variable of mean m and variance s has the variance 2 s^2 + 4 s m^2
        error = ((2 * spread**2 + 4 * spread * fixed) / n).sqrt()
        assert bool(((result.x0_mse[:, column] - x0_mse).abs() < 5 * error).all()), t
        noise_mse = x0_mse * a / (1 - a)
        assert bool(((result.noise_mse[:, column] - noise_mse).abs() < 5 * error * a / (1 - a)).all()), t
        if t == 0:
            continue
        posterior = b * (1 - before) / (1 - a)
        variance = posterior if variance_type == "fixed_small" else b
        factor = before * b**2 / (1 - a) ** 2 / (2 * variance * math.log(2))
        offset = (math.log(variance / posterior) + posterior / variance - 1) / (2 * math.log(2))
        expected = factor * x0_mse + offset
        assert bool(((result.terms[:, column] - expected).abs() < 5 * factor * error).all()), t
    last = float(bar[-1])
    prior = (last * x.square().flatten(1).mean(1) + (1 - last) - 1 - math.log(1 - last)) / (2 * math.log(2))
    torch.testing.assert_close(result.prior, prior, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.total, result.terms.sum(1) + prior, rtol=1e-12, atol=0)


def test_the_bound_holds_and_is_tight_for_the_best_network() -> None:
    """No code is shorter than the data's entropy, and the best network with enough steps comes near it."""
    diffusion = GaussianDiffusion(Optimal(), SCHEDULE, variance_type="fixed_large", clip_sample=False)
    x = images(12)
    levels = torch.arange(256).double() / 127.5 - 1
    mass = np.diff(norm.cdf(np.concatenate([[-np.inf], (levels[:-1] + 1 / 255).numpy(), [np.inf]]), MEAN, STD))
    code = -torch.from_numpy(np.log2(mass))[((x + 1) * 127.5).round().long()].mean()
    total = diffusion.bits_per_dim(x).total.mean()
    assert 0 < float(total - code) < 0.35


def test_the_decoder_by_hand() -> None:
    diffusion = GaussianDiffusion(Optimal(), SCHEDULE, clip_sample=False)
    x = images(3, 4)
    result = diffusion.bits_per_dim(x, timesteps=torch.tensor([0]))
    z = normal(sample_keys([0] * 3, range(3)), (3, 4, 4), step=0, stream=STREAM_LIKELIHOOD).double()
    bar = SCHEDULE.alphas_cumprod
    x_t = bar[0].sqrt() * x + (1 - bar[0]).sqrt() * z
    mean = (x_t - (1 - bar[0]).sqrt() * Optimal()(x_t, torch.zeros(3, dtype=torch.int64))) / bar[0].sqrt()
    std = float(SCHEDULE.betas[1] * (1 - bar[0]) / (1 - bar[1])) ** 0.5
    upper, lower = (norm.cdf((x + sign / 255).numpy(), mean.numpy(), std) for sign in (1, -1))
    upper[x.numpy() > 0.999], lower[x.numpy() < -0.999] = 1, 0
    expected = -np.log2(upper - lower).mean((1, 2, 3))
    np.testing.assert_allclose(result.terms[:, 0].numpy(), expected, rtol=1e-9)
    # one timestep stands for all
    np.testing.assert_allclose(result.total.numpy(), 40 * expected + result.prior.numpy(), rtol=1e-9)


def unet(**fields: object) -> UNet:
    return UNet(sample_size=8, block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, layers_per_block=1,
                up_block_types=("UpBlock2D",) * 2, norm_num_groups=4, num_class_embeds=3, **fields)  # fmt: skip


def test_an_image_has_the_same_bits_in_any_batch() -> None:
    net = unet(out_channels=6, dropout=0.5)
    diffusion = GaussianDiffusion(net, SCHEDULE, variance_type="learned_range", loss="hybrid", seed=3)
    x, labels, timesteps = images(5, 8).float(), torch.tensor([0, 1, 2, 1, 0]), torch.tensor([39, 20, 3, 0])
    whole = diffusion.bits_per_dim(x, labels=labels, timesteps=timesteps)
    assert all(module.training for module in net.modules())
    small = diffusion.bits_per_dim(x, labels=labels, timesteps=timesteps, batch_size=2)
    rest = diffusion.bits_per_dim(x[3:], labels=labels[3:], timesteps=timesteps, first_sample=3)
    for name in ("total", "prior", "terms", "x0_mse", "noise_mse"):
        torch.testing.assert_close(getattr(small, name), getattr(whole, name), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(getattr(rest, name), getattr(whole, name)[3:], rtol=1e-4, atol=1e-6)
        assert getattr(whole, name).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        lower = diffusion.bits_per_dim(x, labels=labels, timesteps=timesteps)
    assert not torch.equal(lower.terms, whole.terms)
    torch.testing.assert_close(lower.terms, whole.terms, rtol=0.1, atol=0.01)


def test_the_x0_it_predicts_is_clipped_where_asked() -> None:
    class Far(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.full_like(x, 3.0)

    x_t, t = torch.zeros(2, 3, 4, 4), torch.tensor([0, 5])
    for clip, value in ((True, 1.0), (False, 3.0)):
        diffusion = GaussianDiffusion(Far(), SCHEDULE, prediction_type="sample", clip_sample=clip)
        prediction = diffusion.p_mean_variance(x_t, t)
        assert bool((prediction.pred_x0 == value).all())
        mean, _, _ = diffusion.q_posterior(torch.full_like(x_t, value), x_t, t)
        torch.testing.assert_close(prediction.mean, mean)
        torch.testing.assert_close(prediction.variance, prediction.log_variance.exp())


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.rand(2, 3, 4, 4), {}, "not 8-bit ones"),
        (torch.tensor([-1.0, 255.0]).view(1, 2, 1), {}, "values from -1 to 255"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), {}, "x is torch.uint8"),
        (torch.zeros(0, 3, 4, 4), {}, "at least one image"),
        (-torch.ones(1, 3, 4, 4), {"batch_size": 0}, "batch_size is 0"),
        (-torch.ones(1, 3, 4, 4), {"timesteps": torch.tensor([40])}, "timesteps"),
    ],
)
def test_bad_input(x: Tensor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        GaussianDiffusion(Optimal(), SCHEDULE).bits_per_dim(x, **arguments)
