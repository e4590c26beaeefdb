"""Whole calls of other libraries' samplers before and after `accelerate`, in turn, and how far their images differ.

    cifar10      diffusers' DDPMPipeline with the configuration of google/ddpm-cifar10-32
    lucidrains   GaussianDiffusion of denoising_diffusion_pytorch with its default Unet (dim 64), 32x32

Weights are random but seeded, and so is the noise, which both arms draw alike; then their images are compared, as
floats and as 8-bit pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from measuring import peer
from networks import CONFIGS
from torch import nn

from fastddpm.perf.profiling.timing import interleave, quantiles, timed

Arm = Callable[[], np.ndarray]  # a whole call: images [N, H, W, 3] in [0, 1]


def _random(model: nn.Module) -> nn.Module:
    """Give a model seeded weights: those of norms differ from 1 and 0, and no output is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim > 1 and not name.startswith("g"):
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)
                else:
                    parameter.copy_((name in ("weight", "g")) + 0.1 * noise)
    return model.eval()


def cifar10(base: str, batch: int, steps: int, dtypes: list[str]) -> dict[str, Arm]:
    """Return the pipeline, and accelerated ones; `base` names the U-Net's configuration."""
    peer("diffusers")
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    from fastddpm.interop import accelerate

    unet = _random(UNet2DModel(**CONFIGS[base]))
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, variance_type="fixed_large")
    original: Any = DDPMPipeline(unet=unet, scheduler=scheduler)
    pipelines = {"original": original}
    for dtype in dtypes:
        pipelines[dtype] = accelerate(copy.deepcopy(original), **({} if dtype == "float32" else {"dtype": dtype}))

    def arm(pipeline: Any) -> Arm:
        pipeline.set_progress_bar_config(disable=True)
        return lambda: np.asarray(
            pipeline(batch, torch.manual_seed(0), num_inference_steps=steps, output_type="np").images
        )

    return {name: arm(pipeline) for name, pipeline in pipelines.items()}


def lucidrains(base: str, batch: int, steps: int, dtypes: list[str]) -> dict[str, Arm]:
    """Return the diffusion, and accelerated ones."""
    peer("denoising_diffusion_pytorch")
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    from fastddpm.interop.lucidrains import accelerate

    original: Any = GaussianDiffusion(
        _random(Unet(dim=64 if base == "cifar10" else 8)), image_size=32, timesteps=steps
    ).eval()
    samplers = {"original": original}
    for dtype in dtypes:
        own = {} if dtype == "float32" else {"dtype": dtype}
        samplers[dtype] = accelerate(copy.deepcopy(original), noise="torch", **own)

    def arm(sampler: Any) -> Arm:
        @torch.no_grad()
        def run() -> np.ndarray:
            torch.manual_seed(0)
            return sampler.sample(batch).permute(0, 2, 3, 1).float().numpy()

        return run

    return {name: arm(sampler) for name, sampler in samplers.items()}


def differences(images: np.ndarray, original: np.ndarray) -> dict[str, float | int]:
    """Return how far images in [0, 1] are from each other, as floats and as the 8-bit pixels that are saved."""
    a, b = ((x * 255).round().astype(np.int32) for x in (images, original))
    return {
        "largest": float(np.abs(images.astype(np.float64) - original).max()),
        "rms": float(np.sqrt(np.square(images.astype(np.float64) - original).mean())),
        "pixels": int(a.size),
        "pixels_differ": int((a != b).sum()),
        "pixels_differ_by_more_than_1": int((np.abs(a - b) > 1).sum()),
    }


def compare(arms: dict[str, Arm], rounds: int) -> list[dict[str, Any]]:
    """Time the arms in turn; the first is what the others are compared with."""
    images = {name: run() for name, run in arms.items()}  # builds what is built once
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    runs = {name: partial(timed, run, torch.device("cpu")) for name, run in arms.items()}
    for name, value in interleave(runs, seconds=float("inf"), least=rounds, most=rounds):
        seconds[name].append(value)
    first = next(iter(arms))
    records = []
    for name, own in seconds.items():
        median, ratios = quantiles(own)["median"], [a / b for a, b in zip(seconds[first], own, strict=True)]
        spread = quantiles(ratios)
        records.append(
            {
                "arm": name,
                "median_s": median,
                "times_as_fast": spread["median"],
                "times_as_fast_p20": spread["p20"],
                "times_as_fast_p80": spread["p80"],
                "images": differences(images[name], images[first]),
            }
        )
    return records


NETWORKS = {"cifar10": cifar10, "lucidrains": lucidrains}
