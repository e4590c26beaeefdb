"""Measure any images without a download, by the Frechet distance of principal components."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastddpm.interop.text_encoder import told
from fastddpm.training.data import Source
from fastddpm.training.fitting import takes_text
from fastddpm.training.order import Batches
from fastddpm.training.preview import sample_labels, sample_texts

if TYPE_CHECKING:
    from fastddpm.training.trainer import Trainer


class ComponentDistance:
    """Measure the Frechet distance of samples to training images, in their first principal components.

    It shows whether samples have the colours, layout and variety of the data. It says little about sharpness and
    nothing about copies. Compare values only for the same data and number of samples.

    Args:
        source: the training data.
        num_samples: the number drawn each time, by the trainer's sampler.
        num_images: the largest number of images to compare with.
        num_components: the number of components.
        seed: of the samples, and of the choice of images.
    """

    def __init__(
        self, source: Source, *, num_samples: int = 256, num_images: int = 2048, num_components: int = 32, seed: int = 0
    ) -> None:
        self.num_samples, self.seed = num_samples, seed
        count = min(num_images, len(source))
        picks = next(Batches(len(source), seed, count).picks(0, 1))
        rows = self._rows(source.read(picks)[0])
        self._mean = rows.mean(0)
        components = min(num_components, count - 1, rows.shape[1], num_samples - 1)
        # Decompose the small matrix of products between images instead of the matrix of all pixels.
        centred = rows - self._mean
        vectors = np.linalg.eigh(centred @ centred.T)[1][:, -components:]
        self._components = np.linalg.qr(centred.T @ vectors)[0].T
        self._real = self._features(rows)

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """Return {"frechet": the distance} of samples of the averaged weights."""
        from fastddpm.evaluation.frechet import frechet_distance

        labels = sample_labels(trainer.diffusion, trainer.labels, self.num_samples)
        texts = {}
        if takes_text(trainer.diffusion.unet):
            texts = told(sample_texts(trainer.source, self.num_samples)[0])
        images = trainer.sampler().sample(
            self.num_samples,
            shape=trainer.shape,
            seed=self.seed,
            class_labels=labels,
            **texts,
            batch_size=max(64, trainer.settings.train_batch_size),
        )
        return {"frechet": frechet_distance(self._features(self._rows(images.clamp(-1, 1))), self._real)}

    def _features(self, rows: np.ndarray) -> np.ndarray:
        return (rows - self._mean) @ self._components.T

    @staticmethod
    def _rows(images: Tensor) -> np.ndarray:
        values = images.cpu().double()
        return (values / 127.5 - 1 if images.dtype == torch.uint8 else values).flatten(1).numpy()
