"""The noising step of training, noise included: x_t and what the network is to predict, from x_0.

"eager" is what one writes in torch, with torch's generator; the peers are their libraries' functions for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from fastddpm_kernels.philox import STREAM_Q_SAMPLE, normal, sample_keys
from fastddpm_kernels.q_sample import q_sample
from fastddpm_kernels.testing import assert_close
from measuring import ARMS, PEERS, Candidate, Session, assert_same_as_peer, compiled, fused_backend, peer
from torch import Tensor, nn

from fastddpm.process.schedule import NoiseSchedule


class Example(NamedTuple):
    prediction_type: str
    dtype: torch.dtype
    batch: int
    side: int
    given: bool = False  # whether the noise is an argument


EXAMPLES = {
    "small": {
        "epsilon fp32 16x3x32x32": Example("epsilon", torch.float32, 16, 32),
        "v fp32 16x3x32x32 given": Example("v_prediction", torch.float32, 16, 32, given=True),
    },
    "full": {
        "epsilon fp16 2048x3x64x64": Example("epsilon", torch.float16, 2048, 64),
        "v fp16 2048x3x64x64": Example("v_prediction", torch.float16, 2048, 64),
        "epsilon fp32 2048x3x64x64": Example("epsilon", torch.float32, 2048, 64),
        "v fp16 2048x3x64x64 given": Example("v_prediction", torch.float16, 2048, 64, given=True),
    },
}
Noised = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]  # (x0, t, noise) -> (x_t, target)
SCHEDULE = NoiseSchedule.linear(1000)


def levels(device: torch.device) -> Tensor:
    """Return the levels of noise: float32 [1000, 2], rows (signal, sigma)."""
    abar = SCHEDULE.alphas_cumprod
    return torch.stack([abar.sqrt(), (1 - abar).sqrt()], 1).float().to(device)


def noised(session: Session, arm: str, of: Example) -> tuple[Noised, dict[str, object]]:
    """Return what an arm calls, and its settings."""
    device, v = session.device, of.prediction_type == "v_prediction"
    table = levels(device)
    if arm in ("fused", "reference"):
        backend = arm if arm == "reference" else fused_backend("q_sample", device, of.dtype)
        keys, step = sample_keys([0] * of.batch, range(of.batch), device), torch.tensor([7], device=device)

        def ours(x0: Tensor, t: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
            source = {"keys": keys, "step": step} if noise is None else {"noise": noise}
            return q_sample(x0, table, t, **source, prediction_type=of.prediction_type, backend=backend)

        return ours, {"backend": backend}
    if arm == "diffusers":
        peer(arm)
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(prediction_type=of.prediction_type)

        def theirs(x0: Tensor, t: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
            z = torch.randn_like(x0) if noise is None else noise
            return scheduler.add_noise(x0, z, t), scheduler.get_velocity(x0, z, t) if v else z

        return theirs, {"call": "DDPMScheduler.add_noise, get_velocity"}
    if arm == "denoising_diffusion_pytorch":
        peer(arm)
        diffusion = lucidrains(of).to(device)

        def lucid(x0: Tensor, t: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
            z = torch.randn_like(x0) if noise is None else noise
            return diffusion.q_sample(x0, t, z), diffusion.predict_v(x0, t, z) if v else z

        return lucid, {"call": "GaussianDiffusion.q_sample, predict_v"}

    def plain(x0: Tensor, t: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        signal, sigma = table[t].view(-1, 2, 1, 1, 1).to(x0.dtype).unbind(1)
        z = torch.randn_like(x0) if noise is None else noise
        return signal * x0 + sigma * z, (signal * z - sigma * x0 if v else z)

    return (plain, {}) if arm == "eager" else compiled(session, plain)


def lucidrains(of: Example) -> nn.Module:
    """Return denoising_diffusion_pytorch's process without a network."""
    from denoising_diffusion_pytorch import GaussianDiffusion

    class Nothing(nn.Module):
        channels, out_dim, self_condition, random_or_learned_sinusoidal_cond = 3, 3, False, False

    return GaussianDiffusion(Nothing(), image_size=of.side, beta_schedule="linear")


@pytest.mark.parametrize("arm", [*ARMS, *PEERS])
def test_q_sample(example: Example, arm: str, session: Session, compare: Callable[..., None]) -> None:
    device, elements = session.device, example.batch * 3 * example.side**2
    # x0, and the noise if given, are read; x_t and the target are written.
    size = (3 + example.given) * elements * example.dtype.itemsize

    def inputs() -> tuple[Tensor, Tensor, Tensor | None]:
        x0 = (torch.rand(example.batch, 3, example.side, example.side, device=device) * 2 - 1).to(example.dtype)
        t = torch.randint(0, 1000, (example.batch,), device=device)
        return x0, t, torch.randn_like(x0) if example.given else None

    def build(arm: str) -> Candidate:
        run, settings = noised(session, arm, example)
        calls = [partial(run, *inputs()) for _ in range(session.sets(size))]
        return Candidate(calls, lambda: check(run, arm, example, *inputs()), bytes=size, settings=settings, graph=True)

    compare(build)


def check(run: Noised, arm: str, of: Example, x0: Tensor, t: Tensor, noise: Tensor | None) -> None:
    """Check both results at the noise that was drawn, which is recovered where torch's generator made it."""
    table = levels(x0.device)
    x_t, target = run(x0, t, noise)
    signal, sigma = table.double()[t].view(-1, 2, 1, 1, 1).unbind(1)
    v, clean = of.prediction_type == "v_prediction", x0.double()
    if noise is not None:
        z = noise.double()
    elif arm in ("fused", "reference"):
        keys, step = sample_keys([0] * of.batch, range(of.batch), x0.device), torch.tensor([7], device=x0.device)
        z = normal(keys, x0.shape[1:], step=step, stream=STREAM_Q_SAMPLE, backend="reference").double()
    else:  # (x_t, v) is (x0, z), turned: turned back it is that x0 again, and noise of the right moments
        z = sigma * x_t.double() + signal * target.double() if v else target.double()
        assert abs(float(z.mean())) < 5 * z.numel() ** -0.5
        assert abs(float(z.std()) - 1) < 5 * z.numel() ** -0.5
    truth = {"x_t": signal * clean + sigma * z, "target": signal * z - sigma * clean if v else z}
    signal, sigma, z = (value.to(x0.dtype) for value in (signal, sigma, z))
    eager = {"x_t": signal * x0 + sigma * z, "target": signal * z - sigma * x0 if v else z}
    for (name, expected), actual in zip(truth.items(), (x_t, target), strict=True):
        if arm in PEERS:
            assert_same_as_peer(actual, expected, name)
        else:
            assert_close(actual, expected, eager=eager[name], name=name)
