"""Other libraries, called as their users call them."""

from __future__ import annotations

from typing import Any

import torch

from gpu.arms import Missing
from gpu.networks import CONFIGS, Problem, flops_of


class DiffusersPipeline:
    """`DDPMPipeline(batch_size=..., num_inference_steps=...)` in float32 as it is loaded, images as arrays.

    Args:
        compiled: its U-Net under `torch.compile(fullgraph=True)` with `mode`.

    Raises:
        Missing: diffusers is not installed.
    """

    def __init__(self, problem: Problem, batch: int, steps: int, *, compiled: str | None = None) -> None:
        try:
            from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
        except ImportError as error:
            raise Missing(f"diffusers is not installed ({error})") from None
        unet = UNet2DModel(**CONFIGS[problem.name])
        unet.load_state_dict(problem.unet.state_dict())
        schedule = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, variance_type="fixed_large")
        self.pipeline: Any = DDPMPipeline(unet=unet.eval(), scheduler=schedule).to(problem.device)
        self.pipeline.set_progress_bar_config(disable=True)
        if compiled is not None:
            self.pipeline.unet = torch.compile(self.pipeline.unet, mode=compiled, fullgraph=True)
        self.batch, self.steps = batch, steps

    def __call__(self) -> Any:
        return self.pipeline(batch_size=self.batch, num_inference_steps=self.steps, output_type="np").images


class Lucidrains:
    """`denoising_diffusion_pytorch.GaussianDiffusion.sample` with its default U-Net: another network.

    Its time is to be compared per operation; `report` says how many its network does.

    Raises:
        Missing: denoising_diffusion_pytorch is not installed.
    """

    def __init__(self, problem: Problem, batch: int, steps: int, *, dim: int = 64) -> None:
        try:
            from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        except ImportError as error:
            raise Missing(f"denoising_diffusion_pytorch is not installed ({error})") from None
        size = problem.shape[1]
        mults = {"dim_mults": (1, 2)} if size < 32 else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.unet: Any = Unet(dim=dim, **mults).eval()
        self.diffusion: Any = GaussianDiffusion(self.unet, image_size=size, timesteps=steps).to(problem.device).eval()
        self.batch, self.size, self.own_flops = batch, size, problem.flops

    @torch.no_grad()
    def __call__(self) -> Any:
        return self.diffusion.sample(batch_size=self.batch)

    def report(self) -> dict[str, Any]:
        """How much its network computes, beside ours."""
        device = next(self.unet.parameters()).device
        x, t = torch.randn(1, 3, self.size, self.size, device=device), torch.zeros(1, device=device).long()
        flops = flops_of(self.unet, x, t)
        return {
            "network": "its default Unet: not the same network",
            "flops_per_image_and_step": flops,
            "share_of_ours": flops / self.own_flops,
        }
