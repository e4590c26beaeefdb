"""Diffusions of denoising_diffusion_pytorch that several files of tests compare ours with, and how they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, GaussianDiffusion1D, Unet, Unet1D
from denoising_diffusion_pytorch import classifier_free_guidance as cfg
from torch import Tensor, nn

from fastddpm.interop.lucidrains import accelerate

STEPS = 24  # of the linear schedule, with 20 nothing of x_0 is left at the end
CLOSE = 1e-5  # images are within [0, 1]; float32 rounds each of the steps to about 1e-7
SCHEDULES = ("linear", "cosine", "sigmoid")


def unet(**options: Any) -> Unet:
    return Unet(**{"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2, **options})


def diffusion(model: nn.Module | None = None, **options: Any) -> GaussianDiffusion:
    return GaussianDiffusion(model or unet(), **{"image_size": 8, "timesteps": STEPS, **options}).eval()


def guided_diffusion(**options: Any) -> Any:
    model = cfg.Unet(dim=8, num_classes=5, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2)
    return cfg.GaussianDiffusion(model, **{"image_size": 8, "timesteps": STEPS, **options}).eval()


def diffusion_1d(**options: Any) -> GaussianDiffusion1D:
    model = Unet1D(dim=8, dim_mults=(1, 2), channels=3, attn_dim_head=8, attn_heads=2, self_condition=True)
    return GaussianDiffusion1D(model, **{"seq_length": 16, "timesteps": STEPS, **options}).eval()


def fast(theirs: Any, **options: Any) -> Any:
    return accelerate(theirs, **{"noise": "torch", "progress": False, **options})


def both(theirs: Any, ours: Any, method: str, *arguments: Any, after: bool = True, **named: Any) -> tuple[Any, Any]:
    """What a method of both gives from the same seed; torch's generator must then be where it is after theirs."""
    results, following = [], []
    for obj in (theirs, ours):
        torch.manual_seed(7)
        results.append(getattr(obj, method)(*arguments, **named))
        following.append(torch.randn(4))
    assert not after or torch.equal(*following)
    return results[0], results[1]


def same(pair: tuple[Tensor, Tensor], close: float = CLOSE) -> None:
    theirs, ours = pair
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=close)


class Fixed(nn.Module):
    """A network without weights, in any dtype."""

    channels = out_dim = 3
    self_condition = False

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return (0.9 * x + (t.view(-1, 1, 1, 1) / STEPS).to(x)).cos()


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "Unet": lambda: (unet(self_condition=True, full_attn=(False, True)), (torch.randn(2, 3, 8, 8),)),
    "Unet1D": lambda: (diffusion_1d().model, (torch.randn(2, 3, 16),)),
    "guided": lambda: (guided_diffusion().model, (torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))),
}
