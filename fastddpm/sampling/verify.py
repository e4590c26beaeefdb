"""Prove a frozen network and each kind of CUDA graph on a device: a child process of `fastddpm_kernels.proving`.

network         a small U-Net frozen with the kernels that "auto" takes, against itself in float64
whole network   the same in whole layers, which a tuned table may choose
graph MODE      8 steps of DDPM captured, against the same steps one by one: equal bits
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from fastddpm_kernels.proof import Proof, main, of_op
from torch import Tensor, nn

from fastddpm.networks.frozen import FrozenUNet, why_not
from fastddpm.networks.unet.config import UNetConfig
from fastddpm.networks.unet.model import UNet
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling.cuda_graph import MODES
from fastddpm.sampling.cuda_graph import why_not as why_no_graph
from fastddpm.sampling.sampler import Sampler

STEPS = 8
_SIZE = 32


def proofs(device: torch.device, options: argparse.Namespace | None = None) -> Iterator[Proof]:
    """Yield the proofs for a device, of a small U-Net."""
    return proofs_of(_small(), device)


def proofs_of(unet: nn.Module, device: torch.device) -> Iterator[Proof]:
    """Yield the proofs for a device, of a U-Net."""
    kernels = "native" if device.type == "cpu" else "triton"
    for dtype in (torch.float32,) if device.type == "cpu" else (torch.float32, torch.float16):
        yield _network(unet, dtype, device, kernels)
        if device.type == "cuda" and torch.version.hip is None:
            yield _network(unet, dtype, device, kernels, "full")
    for mode in reversed(MODES):  # the simplest first
        if why_no_graph(mode, device) is None:
            yield Proof(f"graph {mode}", f"{STEPS} steps", lambda mode=mode: _graph(unet, mode, device))  # type: ignore[misc]


def _small() -> UNet:
    """Return a U-Net of the layers of CIFAR-10's, with few channels."""
    torch.manual_seed(0)
    return UNet(
        UNetConfig(
            sample_size=_SIZE,
            block_out_channels=(64, 128),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
        )
    ).eval()


def _network(
    unet: nn.Module, dtype: torch.dtype, device: torch.device, kernels: str, fusion: str = "parts"
) -> Proof:  # fmt: skip
    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        place = torch.device("cpu") if backend == "reference" else device
        own = unet.double() if backend == "reference" else unet.float()
        if reason := why_not(own, place):
            raise ValueError(f"the model is not prepared for sampling: {reason}")
        how = fusion if backend == "triton" else "auto"
        frozen = FrozenUNet(own, dtype, place, backend="eager" if backend == "reference" else backend, fusion=how)
        blueprint = frozen.blueprint
        generator = torch.Generator().manual_seed(1)
        shape = (2, blueprint.in_channels, *blueprint.sample_size[: blueprint.dims])
        x = torch.randn(shape, generator=generator).to(dtype).to(place)
        inputs = frozen.new_input(shape)
        inputs.copy_(x)
        timesteps = torch.tensor([500], device=place)
        program = frozen.bind(inputs, timesteps, blueprint.some_labels(2, place))
        return {"prediction": program(torch.zeros_like(timesteps)).clone()}

    subject = "whole network" if fusion == "full" else "network"
    return of_op(subject, type(unet).__name__, kernels, dtype, run, factor=4.0)


def _graph(unet: nn.Module, mode: str, device: torch.device) -> tuple[float, float]:
    images = []
    for how in (False, mode):
        sampler = Sampler(unet.float(), NoiseSchedule.linear(), "ddpm", STEPS, dtype="float16", device=device,
                          cuda_graph=how)  # fmt: skip
        images.append(sampler.sample(2, seed=1, progress=False))
    return float((images[0] - images[1]).abs().max()), 0.0


if __name__ == "__main__":
    main(proofs)
