"""The whole reverse loop: DDPM on all 1000 steps and DDIM on 50, one network in every arm; times are of one step.

"eager" is the loop as one writes it in torch, with the library's U-Net; "compiled" the same with that compiled;
"reference" the same in float64, at our noise. The peers are called as their users call them and draw their own noise:
their network's prediction is compared, and that what they return is an image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from gpu.baselines import plain_unet, predict, unet_name
from gpu.engine import philox_noise
from gpu.networks import Problem, make_problem
from measuring import ARMS, PEERS, Candidate, Session, assert_network_close, compiled_network, peer
from torch import Tensor, nn

from fastddpm import Sampler

TRAIN = 1000


class Example(NamedTuple):
    method: str  # "ddpm" or "ddim" (eta 0)
    steps: int
    network: str  # of gpu.networks.CONFIGS
    dtype: torch.dtype
    batch: int


EXAMPLES = {
    "small": {
        "ddpm 1000 steps fp32 batch 1": Example("ddpm", 1000, "small", torch.float32, 1),
        "ddim 50 steps fp32 batch 4": Example("ddim", 50, "small", torch.float32, 4),
    },
    "full": {
        "ddpm 1000 steps cifar10 fp16 batch 8": Example("ddpm", 1000, "cifar10", torch.float16, 8),
        "ddim 50 steps cifar10 fp16 batch 64": Example("ddim", 50, "cifar10", torch.float16, 64),
    },
}
SMOKE_STEPS = 5  # of a smoke test, which times nothing
PRECISIONS = {torch.float16: "fp16", torch.float32: "fp32"}
Noise = Callable[[int], Tensor]  # of a row; of -1 the state that is started from


def rows_of(of: Example, betas: Tensor) -> tuple[list[int], list[list[float]]]:
    """Timesteps of "leading" spacing and rows [a, b, c, d, e, s] in float64.

    x0 = clip(a x + b out), x_prev = c x0 + d x + e out + s z: Ho et al. 2020, eq. 7, with the posterior's variance;
    Song et al. 2021, eq. 12, with sigma 0.
    """
    abar, stride = torch.cumprod(1 - betas.double(), 0), TRAIN // of.steps
    timesteps, rows = [i * stride for i in range(of.steps)][::-1], []
    for t in timesteps:
        now, before = abar[t], abar[t - stride] if t >= stride else abar.new_ones(())
        a, b = now**-0.5, -((1 - now) / now).sqrt()
        zero, alpha = torch.zeros_like(now), now / before
        if of.method == "ddim":
            rows.append([a, b, before.sqrt(), zero, (1 - before).sqrt(), zero])
        else:
            variance = (1 - before) / (1 - now) * (1 - alpha)
            c, d = before.sqrt() * (1 - alpha) / (1 - now), alpha.sqrt() * (1 - before) / (1 - now)
            rows.append([a, b, c, d, zero, variance.sqrt() if t else zero])
    return timesteps, [[float(value) for value in row] for row in rows]


class PlainLoop:
    """The loop in torch: state in float32, or float64 for a float64 network; the host waits for nothing."""

    def __init__(self, problem: Problem, unet: Callable[..., Any], of: Example, dtype: torch.dtype) -> None:
        self.unet, self.dtype, self.problem = unet, dtype, problem
        self.state = torch.float64 if dtype == torch.float64 else torch.float32
        timesteps, self.rows = rows_of(of, problem.schedule.betas)
        self.timesteps = torch.tensor(timesteps, device=problem.device)
        self.shape = (of.batch, *problem.shape)

    def draw(self, row: int) -> Tensor:
        """Noise of torch's generator."""
        return torch.randn(self.shape, device=self.problem.device, dtype=self.state)

    @torch.no_grad()
    def __call__(self, noise: Noise | None = None) -> Tensor:
        draw = self.draw if noise is None else noise
        x = draw(-1).to(self.state)
        for row, (a, b, c, d, e, s) in enumerate(self.rows):
            given = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
            out = predict(self.unet, given, self.timesteps[row].expand(len(x))).to(self.state)
            new = c * (a * x + b * out).clamp(-1, 1)
            if d:
                new += d * x
            if e:
                new += e * out
            if s:
                new += s * draw(row).to(self.state)
            x = new
        return x


@functools.lru_cache(maxsize=2)
def truth(of: Example, device: torch.device) -> tuple[Tensor, Tensor]:
    """The images of seed 0 in float64, and those of eager torch in the example's dtype, for what that loses."""
    problem = make_problem(of.network, device)
    noise = philox_noise(problem, of.batch)
    networks = {dtype: plain_unet(problem, dtype, channels_last=True) for dtype in (torch.float64, of.dtype)}
    exact, eager = (PlainLoop(problem, unet, of, dtype)(noise) for dtype, unet in networks.items())
    return exact, eager


@pytest.mark.parametrize("arm", [*ARMS, *PEERS])
def test_loop(example: Example, arm: str, session: Session, compare: Callable[..., None]) -> None:
    of = example if session.timed else example._replace(steps=SMOKE_STEPS)

    def build(arm: str) -> Candidate:
        problem = make_problem(of.network, session.device)
        if arm in PEERS:
            call, check, settings = pipeline(arm, problem, of)
        else:
            call, images, settings = looping(session, arm, problem, of)

            def check() -> None:
                if arm == "reference":  # which is the truth
                    images()
                    return
                exact, eager = truth(of, session.device)
                # A loop's images are float32; they are as exact as what its network is computed in.
                assert_network_close(images(), exact, eager, of.dtype, settings.get("backend", ""))

        flops = problem.flops * of.batch
        settings |= {"steps": of.steps, "batch": of.batch}
        return Candidate([call], check, of.steps, flops=flops, precision=PRECISIONS[of.dtype], settings=settings)

    compare(build, seconds=4.0, least=2, most=7)


def looping(
    session: Session, arm: str, problem: Problem, of: Example
) -> tuple[Callable[[], object], Callable[[], Tensor], dict[str, Any]]:
    """What an arm calls, the images of seed 0, and its settings."""
    noise = philox_noise(problem, of.batch)
    if arm == "fused":
        sampler = Sampler(problem.unet, problem.schedule, of.method, of.steps, dtype=of.dtype, device=session.device)

        def call() -> Tensor:
            return sampler.sample(of.batch, seed=0)

        backend = getattr(getattr(sampler.network, "frozen", None), "backend", "")
        return call, call, {"cuda_graph": sampler.graph_report()["mode"], "backend": backend}
    if arm == "reference":
        loop = PlainLoop(problem, plain_unet(problem, torch.float64, channels_last=True), of, torch.float64)
        return lambda: loop(noise), lambda: loop(noise), {"dtype": "float64"}
    unet = plain_unet(problem, of.dtype, channels_last=True, fused=True)
    settings: dict[str, Any] = {"network": unet_name(unet), "channels_last": True}
    run: Callable[..., Any] = unet
    if arm == "compiled":
        run, options = compiled_network(session, unet)
        settings |= options
    loop = PlainLoop(problem, run, of, of.dtype)
    return loop, lambda: loop(noise), settings


class _AsLucidrains(nn.Module):
    """A network with the attributes that denoising_diffusion_pytorch asks for."""

    channels, out_dim, self_condition, random_or_learned_sinusoidal_cond = 3, 3, False, False

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return predict(self.unet, x, t)


def pipeline(name: str, problem: Problem, of: Example) -> tuple[Callable[[], Any], Callable[[], None], dict[str, Any]]:
    """A peer's loop as its users call it, its check and its settings.

    Raises:
        Missing: it is not installed.
    """
    peer(name)
    unet = plain_unet(problem, of.dtype, channels_last=True, fused=True)
    size, ddim = problem.shape[1], of.method == "ddim"
    if name == "diffusers":
        from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

        scheduler = (DDIMScheduler if ddim else DDPMScheduler)(TRAIN, beta_start=1e-4, beta_end=0.02)
        pipe: Any = (DDIMPipeline if ddim else DDPMPipeline)(unet=unet, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)

        def call() -> Any:
            return pipe(batch_size=of.batch, num_inference_steps=of.steps, output_type="np").images

        settings = {"call": f"{type(pipe).__name__}()", "channels_last": True, "projections": "fused"}
    else:
        from denoising_diffusion_pytorch import GaussianDiffusion

        network: Any = _AsLucidrains(unet)
        # Its DDPM cannot leave out steps: a smoke test's is a schedule of that length, which "linear" cannot be.
        train = TRAIN if ddim else of.steps
        diffusion: Any = GaussianDiffusion(
            network, image_size=size, timesteps=train, sampling_timesteps=of.steps,
            beta_schedule="linear" if train == TRAIN else "cosine",
            objective="pred_noise", auto_normalize=True,
        ).to(problem.device).eval()  # fmt: skip
        autocast = of.dtype.itemsize < 4

        @torch.no_grad()
        def call() -> Any:
            with torch.autocast(problem.device.type, of.dtype if autocast else None, enabled=autocast):
                return diffusion.sample(batch_size=of.batch)

        settings = {"call": "GaussianDiffusion.sample()", "network": unet_name(unet), "channels_last": True}

    def check() -> None:
        images = torch.as_tensor(call())
        assert images.numel() == of.batch * problem.shape[0] * size * size
        assert bool(((images >= 0) & (images <= 1)).all())
        x = torch.randn(of.batch, *problem.shape, device=problem.device)
        exact, eager = (plain_unet(problem, dtype, channels_last=True) for dtype in (torch.float64, of.dtype))
        with torch.no_grad():
            outs = [
                predict(network, x.to(dtype), torch.full((of.batch,), 500, device=x.device))
                for network, dtype in ((unet, of.dtype), (exact, torch.float64), (eager, of.dtype))
            ]
        assert_network_close(outs[0], outs[1], outs[2], of.dtype, "")

    return call, check, settings
