"""The update of a sampling loop: x_t to x_{t-1} in place, with the network's next input written along.

"eager" is the update in plain torch, with torch's generator; the peers are their libraries' functions for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from fastddpm_kernels.philox import STREAM_STEP, normal, sample_keys
from fastddpm_kernels.reverse_step import reverse_step_
from fastddpm_kernels.testing import assert_close
from measuring import (
    ARMS,
    PEERS,
    Candidate,
    Session,
    Unavailable,
    assert_same_as_peer,
    compiled,
    fused_backend,
    peer,
)
from torch import Tensor, nn

from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import ddim_table, ddpm_table


class Example(NamedTuple):
    sampler: str  # "ancestral", "ddim" (eta 0) or "guided" (ancestral, classifier-free)
    dtype: torch.dtype  # of the network
    batch: int
    side: int
    channels_last: bool = True  # as a U-Net leaves its output


EXAMPLES = {
    "small": {
        "ancestral fp32 16x3x32x32": Example("ancestral", torch.float32, 16, 32),
        "ddim fp32 16x3x32x32": Example("ddim", torch.float32, 16, 32),
        "guided fp32 16x3x32x32": Example("guided", torch.float32, 16, 32),
    },
    "full": {
        "ancestral fp16 2048x3x64x64": Example("ancestral", torch.float16, 2048, 64),
        "ddim fp16 2048x3x64x64": Example("ddim", torch.float16, 2048, 64),
        "guided fp16 2048x3x64x64": Example("guided", torch.float16, 2048, 64),
        "ancestral fp16 contiguous 2048x3x64x64": Example("ancestral", torch.float16, 2048, 64, channels_last=False),
        "ancestral fp32 2048x3x64x64": Example("ancestral", torch.float32, 2048, 64),
    },
}
T, SCALE = 500, 3.0
Step = Callable[[Tensor, Tensor, Tensor, Tensor], object]  # (x, out, net_in, step): x and net_in in place


def rows_of(sampler: str) -> Tensor:
    """Return float32 [2, 7]: the step from T, and the same without noise."""
    schedule = NoiseSchedule.linear(1000)
    table = ddim_table(schedule, [T, T - 20]) if sampler == "ddim" else ddpm_table(schedule, [T, T - 1])
    rows = table.rows[:1].float().repeat(2, 1)
    rows[1, 6] = 0
    return rows


def stepping(session: Session, arm: str, of: Example, table: Tensor) -> tuple[Step, dict[str, Any]]:
    """Return what an arm calls, and its settings."""
    device, guided = session.device, of.sampler == "guided"
    if arm in ("fused", "reference"):
        backend = arm if arm == "reference" else fused_backend("reverse_step_", device, of.dtype)
        options = {
            "keys": None if of.sampler == "ddim" else sample_keys([0] * of.batch, range(of.batch), device),
            "guidance_scale": torch.tensor([SCALE], device=device) if guided else None,
        }

        def ours(x: Tensor, out: Tensor, net_in: Tensor, step: Tensor) -> None:
            reverse_step_(x, out, table, step, net_in=net_in, clip_range=1.0, **options, backend=backend)

        return ours, {"backend": backend}
    if arm in PEERS:
        previous = theirs(arm, of)

        def library(x: Tensor, out: Tensor, net_in: Tensor, step: Tensor) -> None:
            x.copy_(previous(x, out))
            net_in.copy_(x)

        return library, {"call": f"{type(previous.__self__).__name__}.{previous.__func__.__name__}"}

    def plain(x: Tensor, out: Tensor, net_in: Tensor, step: Tensor) -> None:
        a, b, c, d, e, _, s = table.index_select(0, step)[0].unbind()
        prediction = out.float()
        if guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + SCALE * (conditional - unconditional)
        new = c * (a * x + b * prediction).clamp(-1, 1) + d * x + e * prediction
        if of.sampler != "ddim":
            new = new + s * torch.randn_like(x)
        x.copy_(new)
        net_in.copy_(torch.cat([new, new]) if guided else new)

    return (plain, {}) if arm == "eager" else compiled(session, plain)


class LucidStep:
    """denoising_diffusion_pytorch's step for a prediction that is given."""

    def __init__(self, side: int) -> None:
        from denoising_diffusion_pytorch import GaussianDiffusion

        class Given(nn.Module):
            channels, out_dim, self_condition, random_or_learned_sinusoidal_cond = 3, 3, False, False
            out = torch.empty(0)

            def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
                return self.out

        self.model = Given()
        self.diffusion: Any = GaussianDiffusion(
            self.model, image_size=side, beta_schedule="linear", objective="pred_noise"
        )

    def p_sample(self, x: Tensor, out: Tensor) -> Tensor:
        """Return x_{t-1} of x_t and epsilon."""
        self.model.out = out.float()
        return self.diffusion.to(x.device).p_sample(x, T)[0]


class DiffusersStep:
    """diffusers' step for a prediction that is given."""

    def __init__(self, sampler: str) -> None:
        from diffusers import DDIMScheduler, DDPMScheduler

        self.scheduler: Any = DDIMScheduler() if sampler == "ddim" else DDPMScheduler()
        if sampler == "ddim":
            self.scheduler.set_timesteps(50)

    def step(self, x: Tensor, out: Tensor) -> Tensor:
        """Return x_{t-1} of x_t and epsilon."""
        return self.scheduler.step(out.float(), T, x, return_dict=False)[0]


def theirs(name: str, of: Example) -> Any:
    """Return the peer's bound method.

    Raises:
        Unavailable: it has no such step.
    """
    peer(name)
    if of.sampler == "guided":
        raise Unavailable(f"{name} has no guided step to call alone")
    if name == "diffusers":
        return DiffusersStep(of.sampler).step
    if of.sampler == "ddim":
        raise Unavailable(f"{name} has no step of DDIM to call alone")
    return LucidStep(of.side).p_sample


@pytest.mark.parametrize("arm", [*ARMS, *PEERS])
def test_reverse_step(example: Example, arm: str, session: Session, compare: Callable[..., None]) -> None:
    device, copies = session.device, 1 + (example.sampler == "guided")
    table = rows_of(example.sampler).to(device)
    memory_format = torch.channels_last if example.channels_last else torch.contiguous_format
    shape = (example.batch, 3, example.side, example.side)
    first = torch.zeros(1, dtype=torch.int64, device=device)

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        out = torch.randn(copies * example.batch, *shape[1:], device=device).to(example.dtype)
        out = out.contiguous(memory_format=memory_format)
        return torch.randn(shape, device=device), out, torch.empty_like(out)

    # x is read and written, out read, net_in written.
    size = example.batch * 3 * example.side**2 * (8 + 2 * copies * example.dtype.itemsize)

    def build(arm: str) -> Candidate:
        run, settings = stepping(session, arm, example, table)
        calls = [partial(run, *inputs(), first) for _ in range(session.sets(size))]
        return Candidate(
            calls,
            lambda: check(run, arm, example, table, *inputs()),
            bytes=size,
            settings=settings,
            graph=arm not in PEERS,  # which read coefficients on the host
        )

    compare(build)


def check(run: Step, arm: str, of: Example, table: Tensor, x: Tensor, out: Tensor, net_in: Tensor) -> None:
    """Check the step at equal noise; where that cannot be had, without noise, and the noise by its moments."""
    noise, step = torch.zeros_like(x), torch.zeros(1, dtype=torch.int64, device=x.device)
    free = of.sampler != "ddim"
    if free and arm in ("fused", "reference"):
        keys = sample_keys([0] * of.batch, range(of.batch), x.device)
        noise = normal(keys, x.shape[1:], step=0, stream=STREAM_STEP, backend="reference").to(x)
    elif free and arm == "compiled":
        got = x.clone()
        run(got, out, net_in, step)
        z = (got - mean(of, table, x, out, torch.float64)) / table[0, 6].double()
        assert abs(float(z.mean())) < 5 * z.numel() ** -0.5
        assert abs(float(z.std()) - 1) < 5 * z.numel() ** -0.5
        step += 1
    elif free:
        torch.manual_seed(1)
        noise = torch.randn_like(x)
        torch.manual_seed(1)
    got = x.clone()
    run(got, out, net_in, step)
    s = table[int(step), 6]
    expected = mean(of, table, x, out, torch.float64) + s.double() * noise.double()
    eager = mean(of, table, x, out, torch.float32) + s * noise
    if arm in PEERS:
        assert_same_as_peer(got, expected, "x")
    else:
        assert_close(got, expected, eager=eager, max_factor=4.0, name="x")
    for half in net_in.split(len(x)):
        assert torch.equal(half, got.to(of.dtype))


def mean(of: Example, table: Tensor, x: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the step of row 0 without noise, in `dtype`."""
    a, b, c, d, e, _, _ = table[0].to(dtype).unbind()
    x, prediction = x.to(dtype), out.to(dtype)
    if of.sampler == "guided":
        unconditional, conditional = prediction.chunk(2)
        prediction = unconditional + SCALE * (conditional - unconditional)
    return c * (a * x + b * prediction).clamp(-1, 1) + d * x + e * prediction
