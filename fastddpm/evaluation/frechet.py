"""How far apart two sets of images are as distributions: the Frechet distance between features of them.

For the bundled model of digits, features are those that it was judged by when it was trained: 32 principal components
of the real digits; and a classifier says whether samples are the digits asked for. Both need scikit-learn.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


class Judge(Protocol):
    """What tells sets of images apart.

    Attributes:
        name: what the features are, in a few words.
        real: float64 [M, D], features of real images.
    """

    name: str
    real: np.ndarray

    def features(self, images: Tensor) -> np.ndarray:
        """Of images float [N, C, H, W] in [-1, 1]: float64 [N, D]."""

    def recognised(self, images: Tensor, labels: Tensor) -> float | None:
        """The share of images [N, C, H, W] that are taken for their labels int64 [N]; None where nothing can tell."""


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 sqrt(A B)) of features [N, D] and [M, D] (Heusel et al. 2017).

    A and B are the covariances. It is biased upwards, the more the fewer the samples: compare only what has as many.

    Raises:
        ValueError: there are fewer than two of either, D differs, or a value is not finite.
    """
    for name, features in (("a", a), ("b", b)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name} has shape {list(features.shape)}, must be features [N, D] of at least two images")
        if not np.isfinite(features).all():
            raise ValueError(f"{name} has values that are not finite, must have none")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a has {a.shape[1]} features and b {b.shape[1]}, must have as many")
    # With A = R'R of a QR decomposition, and B likewise, tr sqrt(A B) is the sum of the singular values of R_a R_b'.
    root_a, root_b = (
        np.linalg.qr(features - features.mean(0), mode="r") / np.sqrt(len(features) - 1) for features in (a, b)
    )
    mixed = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    return float(max(0.0, mean + np.square(root_a).sum() + np.square(root_b).sum() - 2 * mixed))


def distance_of_real(real: np.ndarray, count: int, draws: int = 10) -> float:
    """The Frechet distance of `count` of the real images to the others, mean of `draws` draws: what is to be expected.

    Args:
        real: features [M, D].
        count: from 2 to M - 2; more are taken as M // 2.
        draws: how many times `count` images are drawn, by a fixed seed.
    """
    count = count if count <= len(real) - 2 else len(real) // 2
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(real)) for _ in range(draws)]
    return float(np.mean([frechet_distance(real[order[:count]], real[order[count:]]) for order in orders]))


class DigitJudge:
    """Judges samples of the bundled model: 1,797 real digits, 32 principal components, a support-vector machine.

    The digits are scikit-learn's `load_digits`, drawn at 16x16 as the model was shown them. The classifier is trained
    on all of them.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
    """

    name = "32 principal components of real digits"

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.svm import SVC
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "scikit-learn is missing, which has the real digits; pip install fastddpm[examples]", name="sklearn"
            ) from None
        digits = load_digits()
        images = _draw(torch.from_numpy(digits.images).float()[:, None])
        rows = self._rows(images)
        self._mean = rows.mean(0)
        self._components = np.linalg.svd(rows - self._mean, full_matrices=False)[2][:32]
        self.real = self.features(images)
        self._classifier = SVC(C=10.0).fit(rows, digits.target)

    def features(self, images: Tensor) -> np.ndarray:
        """Of digits float [N, 1, 16, 16] in [-1, 1]: float64 [N, 32]."""
        return (self._rows(images) - self._mean) @ self._components.T

    def recognised(self, images: Tensor, labels: Tensor) -> float | None:
        """The share of digits [N, 1, 16, 16] that the classifier takes for their labels, 0 to 9."""
        return float((self._classifier.predict(self._rows(images)) == labels.cpu().numpy()).mean())

    @staticmethod
    def _rows(images: Tensor) -> np.ndarray:
        if tuple(images.shape[1:]) != (1, 16, 16):
            raise ValueError(f"images has shape {list(images.shape)}, must have [N, 1, 16, 16]")
        return images.detach().cpu().flatten(1).double().numpy()


def _draw(counts: Tensor) -> Tensor:
    """Ink counts 0..16 [N, 1, 8, 8] as images [N, 1, 16, 16] in [-1, 1], by bicubic interpolation."""
    n = len(counts)
    grid = affine_grid(torch.eye(2, 3).expand(n, 2, 3), [n, 1, 16, 16], align_corners=False)
    drawn = grid_sample(counts, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return drawn.clamp(0, 16) / 8 - 1
