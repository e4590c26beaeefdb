"""Shared by tests of the Trainer: data, a network and settings that cost nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from unets import TINY

from fastddpm import GaussianDiffusion, NoiseSchedule, Trainer, UNet


class Patterns(Dataset[Any]):
    """Thirteen gradients of three classes."""

    def __init__(self, channels: int = 1, size: int = 8, count: int = 13, broken_from: int | None = None) -> None:
        self.shape, self.count, self.broken_from, self.read = (channels, size, size), count, broken_from, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read += 1
        ramp = torch.linspace(-1, 1, self.shape[-1]).expand(self.shape) * (index + 1) / self.count
        bad = self.broken_from is not None and self.read > self.broken_from
        return ramp * float("nan") if bad else ramp.contiguous(), index % 3


def small(*, classes: bool = True, dropout: float = 0.0, **settings: Any) -> GaussianDiffusion:
    torch.manual_seed(3)
    fields: dict[str, Any] = {"num_class_embeds": 4, "null_class": 3} if classes else {}
    changed = {"block_out_channels": (8, 8), "add_attention": False, "dropout": dropout}
    unet = UNet(**TINY | changed | fields)
    return GaussianDiffusion(unet, NoiseSchedule.cosine(50), **settings)


def trainer(folder: Path, diffusion: GaussianDiffusion | None = None, data: Any = None, **settings: Any) -> Trainer:
    options: dict[str, Any] = {
        "results_folder": folder,
        "train_num_steps": 6,
        "train_batch_size": 4,
        "train_lr": 1e-2,
        "log_every": 2,
        "save_every": 100,
        "sample_every": 100,
        "num_samples": 3,
        "num_inference_steps": 2,
        "num_workers": 0,
        "device": "cpu",
        "tensorboard": False,
        "progress": False,
    }
    chosen = {**options, **settings}
    return Trainer(diffusion or small(), Patterns() if data is None else data, **chosen)


def weights(diffusion: GaussianDiffusion) -> Tensor:
    return torch.cat([p.detach().flatten() for p in diffusion.unet.parameters()])
