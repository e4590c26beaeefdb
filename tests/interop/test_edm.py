"""Accelerated networks of EDM and PhysicsNeMo draw what the libraries' samplers draw, from the same random numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from edm_restated import EDM, PHYSICSNEMO, close, drawing, heun, of_paths
from torch import Tensor

from fastddpm.interop import accelerate

SIZE = 8


def denoiser(lib: Any = EDM, precond: str = "EDMPrecond", model: str = "SongUNet", labels: int = 0, **more: Any) -> Any:
    torch.manual_seed(0)
    channels = 6 if precond == "iDDPMPrecond" else 3
    unet = getattr(lib, model)(SIZE, 3, channels, labels, **more)
    return getattr(lib, precond)(unet, SIZE, 3, labels).eval()


def corrdiff(**more: Any) -> tuple[Any, Any]:
    """A regression and a diffusion that read two channels of weather, two of positions and the regression's mean."""
    torch.manual_seed(0)
    lib = PHYSICSNEMO
    unet = lib.SongUNetPosEmbd(SIZE, 3 + 3 + 2 + 2, 3, N_grid_channels=2, **more)
    diffusion = lib.EDMPrecondSuperResolution(unet, SIZE, 7, 3)
    unet = lib.SongUNetPosEmbd(SIZE, 3 + 2 + 2, 3, N_grid_channels=2, embedding_type="zero")
    return lib.CorrDiffRegressionUNet(unet, SIZE, 4, 3).eval(), diffusion.eval()


def karras(net: Any, steps: int, low: float, high: float, rho: float = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    low, high = max(low, net.sigma_min), min(high, net.sigma_max)
    ramp = torch.arange(steps, dtype=dtype) / (steps - 1)
    sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([net.round_sigma(sigmas), torch.zeros(1, dtype=dtype)])


@pytest.mark.parametrize(
    ("precond", "model", "labels", "churn"),
    [
        ("EDMPrecond", "SongUNet", 0, {}),
        ("EDMPrecond", "DhariwalUNet", 4, {"churn": 6.0, "low": 0.05, "high": 50.0, "noise": 1.003}),
        ("VPPrecond", "SongUNet", 4, {"churn": 2.0}),
        ("VEPrecond", "SongUNet", 0, {"churn": 100.0}),  # more than sqrt(2)
        ("iDDPMPrecond", "DhariwalUNet", 0, {"churn": 3.0}),  # rounds levels, predicts twice the channels
    ],
)
def test_edm_sampler_draws_the_original_images(precond: str, model: str, labels: int, churn: dict[str, float]) -> None:
    """The state is float64 there and float32 here; the generator ends where the original's does."""
    net = denoiser(precond=precond, model=model, labels=labels)
    latents = torch.randn(2, 3, SIZE, SIZE)
    one_hot = torch.eye(labels)[torch.tensor([1, 3])] if labels else None
    sampler = accelerate(net)
    sigmas = karras(net, 6, 0.002, 80)
    theirs_drawn, ours_drawn = drawing(3), drawing(3)
    rounded = {"rounded": net.round_sigma}
    expected = heun(lambda x, s: net(x, s, one_hot), latents.double(), sigmas, theirs_drawn, **churn, **rounded)
    names = {"churn": "S_churn", "low": "S_min", "high": "S_max", "noise": "S_noise"}
    settings = {names[name]: value for name, value in churn.items()}
    close(sampler.edm_sampler(latents, one_hot, randn_like=ours_drawn, num_steps=6, **settings), expected)
    assert torch.equal(theirs_drawn(latents), ours_drawn(latents)), "drew another number of random numbers"
    assert sampler.img_resolution == SIZE
    close(sampler(latents, torch.tensor(2.0), one_hot), net(latents, torch.tensor(2.0), one_hot), 0)


@pytest.mark.parametrize("discretization", ["vp", "ve", "iddpm", "edm"])
@pytest.mark.parametrize(
    ("schedule", "scaling", "solver", "alpha"),
    [("linear", "none", "euler", 1.0), ("ve", "none", "heun", 0.7), ("vp", "vp", "heun", 1.0)],
)
def test_ablation_sampler_follows_every_path(
    discretization: str, schedule: str, scaling: str, solver: str, alpha: float
) -> None:
    net = denoiser()
    latents, sampler = torch.randn(1, 3, SIZE, SIZE), accelerate(net)
    settings = {"discretization": discretization, "schedule": schedule, "scaling": scaling, "solver": solver}
    drawn = sampler.ablation_sampler(latents, num_steps=5, alpha=alpha, **settings)
    low, high = {"vp": (None, None), "ve": (0.02, 100), "iddpm": (0.002, 81), "edm": (0.002, 80)}[discretization]
    if low is None:
        low, high = (math.sqrt(math.exp(0.5 * 19.9 * t * t + 0.1 * t) - 1) for t in (1e-3, 1.0))
    beta_d = 2 * (math.log(low**2 + 1) / 1e-3 - math.log(high**2 + 1)) / (1e-3 - 1)
    beta_min, ramp = math.log(high**2 + 1) - 0.5 * beta_d, torch.arange(5, dtype=torch.float64) / 4
    if discretization == "vp":
        t = 1 + ramp * (1e-3 - 1)
        sigmas = ((0.5 * beta_d * t**2 + beta_min * t).exp() - 1).sqrt()
    elif discretization == "ve":
        sigmas = high * (low / high) ** ramp
    elif discretization == "iddpm":
        u = [0.0]
        bar = (0.5 * math.pi * torch.arange(1001, dtype=torch.float64) / 1000 / 1.008).sin().square()
        for j in range(1000, 0, -1):
            u.insert(0, math.sqrt((u[0] ** 2 + 1) / max(float(bar[j - 1] / bar[j]), 0.001) - 1))
        inside = torch.tensor([level for level in u if low <= level <= high], dtype=torch.float64)
        sigmas = inside[((len(inside) - 1) * ramp).round().long()]
    else:
        sigmas = karras(net, 5, low, high)[:-1]
    expected = of_paths(
        lambda x, s: net(x, s), latents.double(), sigmas, schedule=schedule, scaling=scaling, solver=solver,
        alpha=alpha, beta_d=beta_d, beta_min=beta_min,
    )  # fmt: skip
    close(drawn, expected)


def drawing_one(seed: int) -> Callable[[Tensor], Tensor]:
    """Noise [1, ...] from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape[1:], generator=generator, dtype=like.dtype)[None]


def test_corrdiff_draws_an_ensemble_in_one_batch() -> None:
    """Regression, then members of the diffusion with a generator each, as PhysicsNeMo's generation draws them."""
    regression, diffusion = corrdiff()
    fast_regression, fast = accelerate(regression), accelerate(diffusion)
    weather, seeds = torch.randn(1, 2, SIZE, SIZE), [7, 2**32 + 5, 11]
    zeros = torch.zeros(1, 3, SIZE, SIZE)
    with torch.no_grad():
        mean = regression(zeros, weather)
    close(fast_regression(x=zeros, img_lr=weather), mean)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return diffusion(x, torch.cat([mean, weather], 1), sigma)

    settings = {"num_steps": 4, "S_churn": 3.0, "mean_hr": mean}
    members = fast.generate(seeds, img_lr=weather, **settings)
    sigmas = karras(diffusion, 4, 0.002, 800, dtype=torch.float32)
    for seed, member in zip(seeds, members, strict=True):
        close(fast.generate([seed], img_lr=weather, **settings)[0], member)  # whatever else is drawn with it
        draw = drawing_one(seed % 2**32)
        latents = draw(zeros)
        expected = heun(denoise, latents, sigmas, draw, churn=3.0, bound=math.inf)
        close(member[None], expected, 1e-4)  # the original's state is float32 too
    one = fast.deterministic_sampler(latents, weather, mean_hr=mean[0], num_steps=3, solver="euler")
    sigmas = karras(diffusion, 3, 0.002, 80)
    close(one, heun(denoise, latents.double(), sigmas, torch.zeros_like, solver="euler"))


def test_lead_times_choose_channels() -> None:
    torch.manual_seed(0)
    unet = PHYSICSNEMO.SongUNetPosEmbd(SIZE, 3 + 2 + 2, 3, lead_time_channels=2, prob_channels=(0, 1))
    net = PHYSICSNEMO.EDMPrecondSuperResolution(unet, SIZE, 4, 3).eval()
    fast, weather, latents = accelerate(net), torch.randn(2, 2, SIZE, SIZE), torch.randn(2, 3, SIZE, SIZE)
    hours = torch.tensor([2, 0])
    drawn = fast.stochastic_sampler(latents, weather, randn_like=torch.zeros_like, lead_time_label=hours, num_steps=3)
    sigmas = karras(net, 3, 0.002, 800, dtype=torch.float32)
    expected = heun(lambda x, s: net(x, weather, s, lead_time_label=hours), latents, sigmas, torch.zeros_like)
    close(drawn, expected, 1e-4)
    with pytest.raises(ValueError, match="lead_time_label is None, must be from 0 to 2, one per sample"):
        fast.stochastic_sampler(latents, weather, num_steps=3)


def test_generate_draws_latents_labels_and_steps_per_seed() -> None:
    net = denoiser(labels=5)
    fast = accelerate(net)
    found = fast.generate([1, 2, 3], num_steps=3, S_churn=2.0, batch=2)
    for seed, image in zip([1, 2, 3], found, strict=True):
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(3, SIZE, SIZE, generator=generator)[None]
        label = torch.eye(5)[torch.randint(5, (), generator=generator)][None]
        noise = [torch.randn(latents.shape[1:], generator=generator, dtype=torch.float64)[None] for _ in range(3)]
        draws = iter(noise)
        expected = heun(
            partial(net, class_labels=label), latents.double(), karras(net, 3, 0.002, 80), lambda _, d=draws: next(d),
            churn=2.0,
        )  # fmt: skip
        close(image[None], expected)
    zero, one = (fast.generate([1], class_idx=index, num_steps=3) for index in (0, 1))
    assert not torch.allclose(zero, one)


def test_weights_are_shared_and_a_network_may_be_accelerated_in_place() -> None:
    net = denoiser()
    fast, latents = accelerate(net), torch.randn(1, 3, SIZE, SIZE)
    before = fast.edm_sampler(latents, num_steps=2)
    with torch.no_grad():
        net.model.map_layer0.weight.mul_(2)
    after = fast.edm_sampler(latents, num_steps=2)
    assert not torch.allclose(before, after)
    assert accelerate(net, inplace=True) is net
    close(net.edm_sampler(latents, num_steps=2), after, 0)
    assert fast._prepared().network.frozen is not None


def test_a_network_that_cannot_be_frozen_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    net = denoiser(PHYSICSNEMO)
    net.model.register_forward_hook(lambda *_: None)
    fast, latents = accelerate(net), torch.randn(1, 3, SIZE, SIZE)
    assert "a SongUNet, is not prepared for sampling: it runs as it is" in caplog.text
    expected = heun(net, latents.double(), karras(net, 3, 0.002, 80), torch.zeros_like)
    close(fast.edm_sampler(latents, randn_like=torch.zeros_like, num_steps=3), expected)
    with pytest.raises(ValueError, match="is not prepared for sampling, must be"):
        accelerate(net, allow_general=False)


class Wrong(EDM.EDMPrecond):  # type: ignore[misc, name-defined]
    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **more: Any) -> Tensor:
        return 1.1 * super().forward(x, sigma, class_labels, **more)


LATENTS = torch.zeros(2, 3, SIZE, SIZE)
BAD: list[tuple[str, Callable[[Any, Any], Any], str]] = [
    ("sigmas", lambda f, _: f.edm_sampler(LATENTS, sigma_min=3.0, sigma_max=2.0), "sigma_min is 3.0 and sigma_max 2.0"),
    ("sigma_0", lambda f, _: f.edm_sampler(LATENTS, sigma_min=0.0), "sigma_min is 0.0 and sigma_max 80"),
    ("steps", lambda f, _: f.edm_sampler(LATENTS, num_steps=1), "num_steps is 1, must be an integer of at least 2"),
    ("rho", lambda f, _: f.edm_sampler(LATENTS, rho=0), "rho is 0, must be a positive finite number"),
    ("churn", lambda f, _: f.edm_sampler(LATENTS, S_churn=-1), "S_churn is -1, must be a finite number of at least 0"),
    ("range", lambda f, _: f.edm_sampler(LATENTS, S_min=2, S_max=1), "S_min is 2 and S_max 1, must be from low"),
    ("latents", lambda f, _: f.edm_sampler(LATENTS[:, :2]), r"latents have shape \(2, 2, 8, 8\), must be \[N, 3, H"),
    ("solver", lambda f, _: f.ablation_sampler(LATENTS, solver="rk4"), "solver is 'rk4', must be one of euler, heun"),
    ("extra", lambda f, _: f.stochastic_sampler(LATENTS, LATENTS), "img_lr has 3 channels, must have 0"),
    ("patches", lambda _, c: c.stochastic_sampler(LATENTS, LATENTS, patching=3), "patching is a int, must be None"),
    ("missing", lambda _, c: c.stochastic_sampler(LATENTS), "img_lr has 0 channels, must have 5"),
    ("fewer", lambda _, c: c.stochastic_sampler(LATENTS, torch.zeros(1, 5, 8, 8)), "as many as latents"),
    ("lead", lambda _, c: c.stochastic_sampler(LATENTS, torch.zeros(2, 5, 8, 8), lead_time_label=torch.zeros(2)),
     "lead_time_label is given but the network, a SongUNetPosEmbd, takes none"),
    ("size", lambda _, c: c.stochastic_sampler(torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, 4, 4)),
     "latents are 4x4 but the network's positional embeddings are 8x8"),
    ("class", lambda f, _: f.generate([1], class_idx=0), "class_idx is 0"),
    ("seeds", lambda f, _: f.generate([]), "seeds is empty"),
]  # fmt: skip


@pytest.fixture(scope="module")
def fast_ones() -> tuple[Any, Any]:
    return accelerate(denoiser()), accelerate(corrdiff()[1])


@pytest.mark.parametrize(("call", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_one_line(call: Any, message: str, fast_ones: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call(*fast_ones)
    assert "\n" not in str(caught.value)


def test_what_is_not_taken() -> None:
    with pytest.raises(ValueError, match="is a Wrong whose result differs by .* must be the library's own"):
        accelerate(Wrong(denoiser().model, SIZE, 3))
    net = denoiser()
    net.scale_cond_input = True
    with pytest.raises(ValueError, match="scale_cond_input is True, must be False"):
        accelerate(net)
    with pytest.raises(TypeError, match="a network of EDM or PhysicsNeMo"):
        accelerate(denoiser().model)


def test_an_accelerated_network_is_copied_with_its_weights() -> None:
    fast, latents = accelerate(denoiser()), torch.randn(1, 3, SIZE, SIZE)
    copied = copy.deepcopy(fast)
    close(copied.edm_sampler(latents, num_steps=2), fast.edm_sampler(latents, num_steps=2), 0)
    assert copied.net is not fast.net
