"""A training step of the CIFAR-10 U-Net: ours, diffusers' training loop, and denoising_diffusion_pytorch's Trainer's.

Each arm is noising, forward, backward, clipped gradients and the optimizer, as its library does them, on equal weights;
its loss at one noise is compared first. "fused" is fastddpm as it comes, "eager" the same in plain torch, "compiled"
that under torch.compile, "reference" with its ops in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from denoising_diffusion_pytorch import GaussianDiffusion as LucidrainsDiffusion
from diffusers import DDPMScheduler, UNet2DModel
from measuring import ARMS, PEERS, Candidate, Session, Unavailable, compiled
from networks import CONFIGS, AsLucidrains, flops_of
from torch import Tensor, nn

from fastddpm import GaussianDiffusion, NoiseSchedule, UNet

# Of smoke tests, and for torch.compile on a CPU.
CIFAR = CONFIGS["cifar10"]
SMALL = {**CIFAR, "sample_size": 8, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


class Example(NamedTuple):
    network: dict[str, Any]
    precision: str
    batch: int
    compile: bool = False


EXAMPLES = {
    "small": {
        "cifar10 fp32 batch 4": Example(CIFAR, "fp32", 4),
        "cifar10 bf16 batch 4": Example(CIFAR, "bf16", 4),
        "small fp32 batch 4": Example(SMALL, "fp32", 4, compile=True),
    },
    "full": {
        "cifar10 fp32 batch 16": Example(CIFAR, "fp32", 16),
        "cifar10 bf16 batch 16": Example(CIFAR, "bf16", 16),
        "cifar10 bf16 batch 128": Example(CIFAR, "bf16", 128, compile=True),
    },
}

Losses = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x0, t, noise) -> the mean loss


def _ours(model: Any, backend: str) -> tuple[GaussianDiffusion, Callable[[Tensor], Tensor], Losses]:
    unet = UNet.from_diffusers(model).train().to(memory_format=torch.channels_last)
    diffusion = GaussianDiffusion(unet, NoiseSchedule.linear(), backend=backend)
    step = iter(range(1 << 30))
    return (
        diffusion,
        lambda x0: diffusion(x0, step=next(step)),
        lambda x0, t, z: diffusion.losses(x0, t, noise=z).mean(),
    )


def _diffusers(model: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor], Losses]:
    scheduler = DDPMScheduler()

    def loss(x0: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
        noise = torch.randn_like(x0) if noise is None else noise
        return F.mse_loss(model(scheduler.add_noise(x0, noise, t), t).sample.float(), noise)

    return model, lambda x0: loss(x0, torch.randint(0, 1000, (len(x0),), device=x0.device), None), loss


def _lucidrains(model: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor], Losses]:
    diffusion = LucidrainsDiffusion(
        AsLucidrains(model),
        image_size=model.config.sample_size,
        objective="pred_noise",
        beta_schedule="linear",
        auto_normalize=False,
    )
    return diffusion, diffusion, lambda x0, t, z: diffusion.p_losses(x0, t, noise=z)


def _arm(session: Session, name: str, model: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor], Losses, dict]:
    """Return a module, its loss at noise of its own and at given noise, and the settings of an arm.

    Raises:
        Missing, Unavailable: there is no such arm here.
    """
    if name in PEERS:
        return *(_diffusers if name == "diffusers" else _lucidrains)(model), {}
    backend = {"fused": "auto", "reference": "reference"}.get(name, "eager")
    diffusion, loss, loss_at = _ours(model, backend)
    settings: dict[str, Any] = {"backend": backend, "channels_last": True}
    if name == "compiled":
        if not session.timed:
            raise Unavailable("compiled with --benchmark-only alone; tests/sampling/test_counts.py traces it")
        run, options = compiled(session, lambda x0, step: diffusion(x0, step=step))
        settings |= options
        steps = torch.zeros(1, dtype=torch.int64, device=session.device)
        loss = lambda x0: run(x0, steps.add_(1))  # noqa: E731
    return diffusion, loss, loss_at, settings


def _optimizer(name: str, module: nn.Module) -> torch.optim.Optimizer:
    if name == "denoising_diffusion_pytorch":
        return torch.optim.Adam(module.parameters(), lr=1e-4, betas=(0.9, 0.99))
    return torch.optim.AdamW(module.parameters(), lr=1e-4, fused=None if name == "diffusers" else True)


@pytest.mark.parametrize("arm", [*ARMS, *PEERS])
def test_training_step(example: Example, arm: str, session: Session, compare: Callable[..., None]) -> None:
    device, dtype = session.device, PRECISIONS[example.precision]
    network, batch = (example.network, example.batch) if session.timed else (SMALL, 2)
    torch.manual_seed(0)
    model = UNet2DModel(**network).to(device)
    side = model.config.sample_size
    x0 = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    t, noise = torch.randint(0, 1000, (batch,), device=device), torch.randn_like(x0)
    # As it is written, forward once and backward, of inputs and weights, twice.
    flops = 3 * batch * flops_of(model, x0[:1], t[:1])

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def build(arm: str) -> Candidate:
        if arm == "compiled" and not example.compile:
            raise Unavailable("torch.compile takes minutes for this network; it is measured for another")
        module, loss, loss_at, settings = _arm(session, arm, copy.deepcopy(model))
        module = module.to(device)

        def check() -> None:
            expected = float(_diffusers(copy.deepcopy(model))[2](x0, t, noise))  # in float32
            with torch.no_grad(), autocast():
                got = float(loss_at(x0, t, noise.clone()))
            assert got == pytest.approx(expected, rel=1e-4 if dtype is None else 1e-2), arm

        step = _step(module, loss, _optimizer(arm, module), x0, autocast)
        precision = {"fp32": "fp32", "bf16": "bf16"}[example.precision]
        settings |= {"batch": batch, "optimizer": "Adam" if arm == PEERS[1] else "AdamW"}
        return Candidate([step], check, flops=flops, precision=precision, settings=settings)

    compare(build, seconds=3.0, least=3, most=9)


def _step(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    x0: Tensor,
    autocast: Callable[[], torch.autocast],
) -> Callable[[], None]:
    parameters = list(module.parameters())

    def step() -> None:
        with autocast():
            value = loss(x0)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
