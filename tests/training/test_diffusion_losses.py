"""The training losses: formulas against high precision, and whole losses against the libraries they come from."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from fastddpm import GaussianDiffusion, NoiseSchedule, UNet
from fastddpm.training.objective.losses import discretized_gaussian_log_likelihood, normal_kl, pointwise
from fastddpm.training.objective.weighting import WEIGHTINGS, loss_weights

OBJECTIVES = {"epsilon": "pred_noise", "sample": "pred_x0", "v_prediction": "pred_v"}
T = 50


class Tiny(nn.Module):
    """A network with the attributes that denoising_diffusion_pytorch asks for."""

    random_or_learned_sinusoidal_cond = False

    def __init__(self, out: int = 3, *, self_condition: bool = False) -> None:
        super().__init__()
        self.channels, self.out_dim, self.self_condition = 3, out, self_condition
        self.conv = nn.Conv2d(6 if self_condition else 3, out, 3, padding=1)
        self.told: list[Tensor | None] = []

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        self.told.append(x_self_cond)
        if self.self_condition:
            x = torch.cat([torch.zeros_like(x) if x_self_cond is None else x_self_cond, x], dim=1)
        return torch.tanh(self.conv(x)) * (1 + 0.02 * time.view(-1, 1, 1, 1))


def images(count: int = 5, size: int = 4) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size)).double() / 127.5 - 1


def lucidrains(model: nn.Module, kind: str = "GaussianDiffusion", **options: Any) -> Any:
    import denoising_diffusion_pytorch as ddp
    from denoising_diffusion_pytorch.learned_gaussian_diffusion import LearnedGaussianDiffusion

    cls = LearnedGaussianDiffusion if kind == "learned" else ddp.GaussianDiffusion
    return cls(model, image_size=4, timesteps=T, beta_schedule="cosine", **options).double()


# -- formulas ----------------------------------------------------------------------------------------------------------


def exact_bin(x: float, mean: float, std: float) -> float:
    """The log-mass of a bin, to 60 digits."""
    with mpmath.workdps(60):
        x, mean, std, half = (mpmath.mpf(v) for v in (x, mean, std, mpmath.mpf(1) / 255))
        upper = mpmath.mpf(1) if x > 0.999 else mpmath.ncdf((x + half - mean) / std)
        lower = mpmath.mpf(0) if x < -0.999 else mpmath.ncdf((x - half - mean) / std)
        if x > mean and x - half > mean:  # 1 - (almost 1) would lose even 60 digits
            tail = mpmath.mpf(0) if x > 0.999 else mpmath.ncdf(-(x + half - mean) / std)
            return float(mpmath.log(mpmath.ncdf(-(x - half - mean) / std) - tail))
        return float(mpmath.log(upper - lower))


@pytest.mark.parametrize("std", [0.003, 0.02, 0.5, 30.0])
def test_decoder_to_the_far_tails(std: float) -> None:
    levels = torch.tensor([0, 1, 100, 127, 128, 254, 255]).double() / 127.5 - 1
    for mean in (-1.0, -0.21, 0.004, 1.0, 1.3):
        x = levels.clone().requires_grad_()
        center = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
        actual = discretized_gaussian_log_likelihood(x, center, torch.tensor(2 * math.log(std), dtype=torch.float64))
        expected = torch.tensor([exact_bin(float(level), mean, std) for level in levels], dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
        actual.sum().backward()
        assert center.grad is not None
        assert bool(center.grad.isfinite())


@pytest.mark.parametrize("std", [0.004, 0.1, 3.0])
def test_decoder_is_a_distribution(std: float) -> None:
    levels = torch.arange(256).double() / 127.5 - 1
    log_variance = torch.tensor(2 * math.log(std), dtype=torch.float64)
    mass = discretized_gaussian_log_likelihood(levels, torch.tensor(0.37, dtype=torch.float64), log_variance).exp()
    assert float(mass.sum()) == pytest.approx(1, abs=1e-12)


def test_decoder_and_its_gradient_are_finite_however_far_away() -> None:
    mean, log_variance = torch.tensor([1e6, -1e9], requires_grad=True), torch.zeros(2, requires_grad=True)
    likelihood = discretized_gaussian_log_likelihood(torch.tensor(1 / 255), mean, log_variance)
    torch.testing.assert_close(likelihood, torch.tensor([-0.5e12, -0.5e18]), rtol=1e-5, atol=0)
    for gradient in torch.autograd.grad(likelihood.sum(), (mean, log_variance)):
        assert bool(gradient.isfinite().all())


def test_kl_of_normals() -> None:
    m1, l1, m2, l2 = torch.randn(4, 50, dtype=torch.float64)
    p, q = (torch.distributions.Normal(m, (log / 2).exp()) for m, log in ((m1, l1), (m2, l2)))
    torch.testing.assert_close(normal_kl(m1, l1, m2, l2), torch.distributions.kl_divergence(p, q))


def test_pointwise_by_hand() -> None:
    prediction, target = torch.tensor([[3.0, -1.0]]), torch.tensor([[0.0, -0.9]])
    assert float(pointwise("mse", prediction, target, 0.5)) == pytest.approx((9 + 0.01) / 2)
    assert float(pointwise("l1", prediction, target, 0.5)) == pytest.approx((3 + 0.1) / 2)
    assert float(pointwise("huber", prediction, target, 0.5)) == pytest.approx((0.5 * (3 - 0.25) + 0.01 / 2) / 2)


# -- weightings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "uniform"])
def test_a_weighting_is_one_loss_whatever_is_predicted(weighting: str) -> None:
    schedule = NoiseSchedule.linear(T)
    bar = schedule.alphas_cumprod
    signal, sigma = bar.sqrt(), (1 - bar).sqrt()
    losses = []
    for kind in OBJECTIVES:  # the same error of 0.3 in x0, at given x_t
        of_x0 = {"epsilon": signal / sigma, "sample": torch.ones_like(bar), "v_prediction": 1 / sigma}[kind]
        losses.append(loss_weights(schedule, weighting, kind, p2_gamma=0.7, p2_k=2.0) * (0.3 * of_x0).square())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-10, atol=0)


def test_p2_and_min_snr_as_published() -> None:
    schedule = NoiseSchedule.linear(T)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    torch.testing.assert_close(loss_weights(schedule, "p2", "epsilon", p2_gamma=0.5, p2_k=1.0), (1 + snr) ** -0.5)
    torch.testing.assert_close(loss_weights(schedule, "min_snr", "sample", min_snr_gamma=3), snr.clamp(max=3))
    assert bool((loss_weights(schedule, "uniform", "v_prediction") == 1).all())


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_weights_where_nothing_of_x0_is_left(kind: str) -> None:
    schedule = NoiseSchedule.linear(T).rescale_zero_terminal_snr()
    for weighting in WEIGHTINGS:
        assert bool(loss_weights(schedule, weighting, kind).isfinite().all())


# -- denoising_diffusion_pytorch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", OBJECTIVES)
@pytest.mark.parametrize("min_snr", [True, False])
def test_losses_are_those_of_denoising_diffusion_pytorch(prediction_type: str, min_snr: bool) -> None:
    net = Tiny()
    theirs = lucidrains(net, objective=OBJECTIVES[prediction_type], min_snr_loss_weight=min_snr, min_snr_gamma=4)
    ours = GaussianDiffusion(
        net,
        NoiseSchedule.cosine(T),
        prediction_type=prediction_type,
        weighting="min_snr" if min_snr else "snr",
        min_snr_gamma=4,
    )
    x0, noise, t = images(), torch.randn(5, 3, 4, 4).double(), torch.tensor([0, 1, 20, 48, 49])
    expected = theirs.p_losses(x0, t, noise=noise.clone(), loss_reduction="none")
    # their tables are float32
    torch.testing.assert_close(ours.losses(x0, t, noise=noise), expected, rtol=1e-5, atol=0)


def test_hybrid_is_their_learned_variance() -> None:
    net = Tiny(6)
    theirs = lucidrains(net, "learned", objective="pred_noise", vb_loss_weight=0.3)
    ours = GaussianDiffusion(
        net, NoiseSchedule.cosine(T), variance_type="learned_range", loss="hybrid", vlb_weight=0.3 / T
    )
    x0, noise, t = images(), torch.randn(5, 3, 4, 4).double(), torch.tensor([1, 2, 20, 40, 49])  # t = 0: see below
    expected = theirs.p_losses(x0, t, noise=noise, loss_reduction="none")
    torch.testing.assert_close(ours.losses(x0, t, noise=noise), expected, rtol=1e-5, atol=0)
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), list(net.parameters()))])
        for loss in (theirs.p_losses(x0, t, noise=noise, loss_reduction="none"), ours.losses(x0, t, noise=noise))
    ]
    # that of v is a difference: 1 - the ratio of variances - ..., each of them off by a float32's rounding
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-5 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("conditioned", [True, False])
def test_self_conditioning_is_theirs(conditioned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import denoising_diffusion_pytorch.denoising_diffusion_pytorch as module

    net = Tiny(self_condition=True)
    monkeypatch.setattr(module, "random", lambda: 0.0 if conditioned else 1.0)
    theirs = lucidrains(net, objective="pred_v")
    ours = GaussianDiffusion(net, NoiseSchedule.cosine(T), prediction_type="v_prediction", weighting="snr")
    assert ours.self_condition
    x0, noise, t = images(), torch.randn(5, 3, 4, 4).double(), torch.tensor([0, 1, 20, 48, 49])
    expected = theirs.p_losses(x0, t, noise=noise, loss_reduction="none")
    actual = ours.losses(x0, t, noise=noise, self_condition=conditioned)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_forward_process_and_posterior_are_theirs() -> None:
    theirs = lucidrains(Tiny(), objective="pred_noise")
    ours = GaussianDiffusion(Tiny(), NoiseSchedule.cosine(T))
    x0, noise, t = images(), torch.randn(5, 3, 4, 4).double(), torch.tensor([1, 2, 20, 40, 49])
    x_t = ours.q_sample(x0, t, noise)
    torch.testing.assert_close(x_t, theirs.q_sample(x0, t, noise), rtol=1e-6, atol=1e-6)
    for actual, expected in zip(ours.q_posterior(x0, x_t, t), theirs.q_posterior(x0, x_t, t), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    mean, variance, log_variance = ours.q_mean_variance(x0, t)
    bar = NoiseSchedule.cosine(T).alphas_cumprod[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(mean, bar.sqrt() * x0)
    torch.testing.assert_close(variance, 1 - bar)
    torch.testing.assert_close(log_variance, (1 - bar).log())


# -- diffusers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", OBJECTIVES)
def test_losses_are_those_of_diffusers_training_loop(prediction_type: str) -> None:
    net = Tiny()
    scheduler = DDPMScheduler(T, prediction_type=prediction_type)
    x0, noise, t = images().float(), torch.randn(5, 3, 4, 4), torch.tensor([0, 1, 20, 48, 49])
    x_t = scheduler.add_noise(x0, noise, t)
    target = {"epsilon": noise, "sample": x0}.get(prediction_type)
    expected = F.mse_loss(net(x_t, t), scheduler.get_velocity(x0, noise, t) if target is None else target)
    actual = GaussianDiffusion(net, NoiseSchedule.linear(T), prediction_type=prediction_type).losses(x0, t, noise=noise)
    torch.testing.assert_close(actual.mean(), expected, rtol=1e-5, atol=0)


# -- guided-diffusion's variational bound, restated --------------------------------------------------------------------


def restated_bound(x0: Tensor, noise: Tensor, t: Tensor, net: nn.Module, variance_type: str) -> Tensor:
    """KL between Gaussians in bits per dimension, decoder at t = 0, from betas alone; scipy's normal distribution."""
    from scipy.stats import norm

    betas = NoiseSchedule.cosine(T).betas
    alpha = 1 - betas
    bar = torch.cumprod(alpha, 0)
    before = torch.cat([torch.ones(1).double(), bar[:-1]])
    rows = []
    for n, step in enumerate(t.tolist()):
        a, a_prev, b = bar[step], before[step], betas[step]
        x_t = a.sqrt() * x0[n] + (1 - a).sqrt() * noise[n]
        eps = net(x_t[None], t[n : n + 1])[0]
        eps, v = eps.chunk(2) if variance_type == "learned_range" else (eps, torch.zeros_like(x_t))
        pred = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
        means = [
            b * a_prev.sqrt() / (1 - a) * x + (1 - a_prev) * alpha[step].sqrt() / (1 - a) * x_t for x in (x0[n], pred)
        ]
        posterior = betas[1:] * (1 - before[1:]) / (1 - bar[1:])
        small, large = posterior[max(step - 1, 0)], b
        if variance_type == "learned_range":
            variance = (small.log() * (1 - v) / 2 + large.log() * (1 + v) / 2).exp()
        else:
            variance = (large if variance_type == "fixed_large" and step > 0 else small).expand_as(x_t)
        if step == 0:
            m, s = means[1].detach().numpy(), variance.detach().sqrt().numpy()
            x = x0[n].numpy()
            upper = norm.cdf(x + 1 / 255, m, s)
            lower = norm.cdf(x - 1 / 255, m, s)
            upper[x > 0.999], lower[x < -0.999] = 1, 0
            rows.append(-torch.from_numpy(upper - lower).log().mean() / math.log(2))
        else:
            kl = (variance / small).log() + small / variance - 1 + (means[0] - means[1]) ** 2 / variance
            rows.append((kl / 2).mean() / math.log(2))
    return torch.stack(rows)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_variational_bound(variance_type: str) -> None:
    net = Tiny(6 if variance_type == "learned_range" else 3).double()
    x0, noise, t = images(), torch.randn(5, 3, 4, 4).double() * 0.3, torch.tensor([0, 1, 2, 30, 49])
    net.conv.weight.data *= 0.1
    expected = restated_bound(x0, noise, t, net, variance_type)
    schedule = NoiseSchedule.cosine(T)
    for loss, factor in (("kl", 1), ("rescaled_kl", T)):
        ours = GaussianDiffusion(net, schedule, variance_type=variance_type, loss=loss)
        torch.testing.assert_close(ours.losses(x0, t, noise=noise), factor * expected, rtol=2e-6, atol=0)
    if variance_type != "learned_range":
        return
    simple = GaussianDiffusion(net, schedule, variance_type=variance_type, loss="rescaled_mse")
    x_t = simple.q_sample(x0, t, noise)
    mse = (net(x_t, t)[:, :3] - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(simple.losses(x0, t, noise=noise), mse + T / 1000 * expected, rtol=2e-6, atol=0)


# -- bad input ---------------------------------------------------------------------------------------------------------


def unet(**fields: Any) -> UNet:
    return UNet(sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), norm_num_groups=4,
                up_block_types=("UpBlock2D",), **fields)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mae"}, "loss is 'mae', must be one of mse"),
        ({"weighting": "edm"}, "weighting is 'edm', must be one of uniform"),
        ({"prediction_type": "x0"}, "prediction_type is 'x0', must be one of epsilon"),
        ({"variance_type": "learned"}, "variance_type is 'learned', must be one of fixed_small"),
        ({"variance_type": "learned_range"}, "trains no variance.*'hybrid'"),
        ({"loss": "hybrid"}, "variance_type is 'fixed_small', must be 'learned_range'"),
        ({"variance_type": "learned_range", "loss": "hybrid"}, "3 channels for data of 3, must return 6"),
        ({"loss": "kl", "weighting": "p2"}, "weighting is 'p2', must be 'uniform'"),
        ({"timestep_sampling": "random"}, "timestep_sampling is 'random', must be one of uniform"),
        ({"label_dropout": 1.5}, "label_dropout is 1.5"),
        ({"label_dropout": 0.1}, "no null_class"),
        ({"huber_delta": 0}, "huber_delta is 0.0"),
        ({"offset_noise": -0.1}, "offset_noise is -0.1"),
        ({"seed": -1}, "seed is -1"),
        ({"backend": "cuda"}, "backend is 'cuda', must be 'auto' or one of"),
        ({"immiscible": "yes"}, "immiscible is 'yes'"),
        ({"clip_sample": 1}, "clip_sample is 1"),
        ({"self_condition": "no"}, "self_condition is 'no'"),
        ({"self_condition": True}, "self_condition is True but the U-Net has 3 channels"),
        ({"null_class": 1.5}, "null_class is 1.5"),
        ({"null_class": -1}, "null_class is -1"),
        ({"null_class": 1, "label_dropout": 0.1}, "the U-Net has no classes"),
        ({"unet": unet(num_class_embeds=4), "null_class": 4, "label_dropout": 0.1}, "null_class is 4.*0 to 3"),
        ({"unet": math.exp}, "unet is a builtin_function_or_method, must be an nn.Module"),
        ({"schedule": NoiseSchedule.linear(T).betas}, "schedule is a Tensor, must be a NoiseSchedule"),
        ({"schedule": NoiseSchedule.linear(T).rescale_zero_terminal_snr()}, "zero terminal SNR"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        GaussianDiffusion(**{"unet": unet(), "schedule": NoiseSchedule.linear(10), **options})


X = torch.zeros(5, 3, 4, 4)


@pytest.mark.parametrize(
    ("x0", "arguments", "message"),
    [
        (X, {"step": torch.zeros(1)}, "step is torch.float32"),
        (X, {"step": -1}, "step is -1"),
        (X, {"step": 1.5}, "step is 1.5"),
        (X, {"first_sample": -2}, "first_sample is -2"),
        (X, {"global_batch": 0}, "global_batch is 0"),
        (X.numpy(), {}, "x0 is a ndarray"),
        (X[:0], {}, r"x0 has shape \[0, 3, .*at least one"),
        (X, {"labels": [0, 1]}, "labels is a list"),
    ],
)
def test_bad_batches(x0: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        GaussianDiffusion(Tiny(), NoiseSchedule.linear(T))(x0, **arguments)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.tensor([0, 0, 0, 0, T]), f"t goes from 0 to {T}, must be from 0 to {T - 1}"),
        (torch.zeros(5), "t is torch.float32"),
        (torch.zeros(1, dtype=torch.int64), r"t has shape \[1\]"),
    ],
)
def test_bad_timesteps(t: Tensor, message: str) -> None:
    diffusion = GaussianDiffusion(Tiny(), NoiseSchedule.linear(T))
    for function in (diffusion.q_mean_variance, lambda x, t: diffusion.q_posterior(x, x, t), diffusion.p_mean_variance):
        with pytest.raises((ValueError, TypeError), match=message):
            function(X, t)


def test_a_network_of_other_channels_than_the_loss_needs() -> None:
    learned = GaussianDiffusion(Tiny(), NoiseSchedule.linear(T), variance_type="learned_range", loss="hybrid")
    with pytest.raises(ValueError, match="returns 3 channels for data of 3, must return 6"):
        learned(X)
