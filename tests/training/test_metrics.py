"""The metric of a run that works for any images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_objects import small

from fastddpm.evaluation.frechet import frechet_distance
from fastddpm.training import ComponentDistance


class Images:
    """A source of given pixels."""

    classes: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    in_memory = True

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, picks: Any) -> tuple[Tensor, None]:
        return self.pixels[[pick.image for pick in picks]], None


def of(samples: Tensor) -> Any:
    """A trainer whose sampler draws `samples`."""
    return SimpleNamespace(
        diffusion=small(classes=False),
        labels=(),
        shape=tuple(samples.shape[1:]),
        settings=SimpleNamespace(train_batch_size=4),
        sampler=lambda: SimpleNamespace(sample=lambda *_, **__: samples),
    )


@pytest.mark.parametrize(("count", "size"), [(60, 8), (200, 4)])  # fewer images than pixels, and more
def test_it_is_that_of_the_first_principal_components(count: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8, generator=generator)
    samples = torch.rand(40, 1, size, size, generator=generator) * 2 - 1
    rows = pixels.double().flatten(1).numpy() / 127.5 - 1
    axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:12].T
    expected = frechet_distance(samples.double().flatten(1).numpy() @ axes, rows @ axes)
    made = ComponentDistance(Images(pixels), num_samples=40, num_components=12)(of(samples))
    assert made == {"frechet": pytest.approx(expected, rel=1e-9)}


def test_images_that_are_all_the_same() -> None:
    pixels = torch.full((9, 1, 4, 4), 255, dtype=torch.uint8)
    metric = ComponentDistance(Images(pixels), num_samples=5)
    assert metric(of(torch.ones(5, 1, 4, 4))) == {"frechet": pytest.approx(0, abs=1e-12)}
    assert np.isfinite(metric(of(-torch.ones(5, 1, 4, 4)))["frechet"])
