"""Measure how far apart two sets of images are as distributions: the Frechet distance of their features.

For the bundled model of digits, features are those that it was judged by when it was trained: 32 principal components
of the real digits; and a classifier says whether samples are the digits asked for. Both need scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


class Judge(Protocol):
    """Tell sets of images apart.

    Attributes:
        name: what the features are, in a few words.
        real: float64 [M, D], features of real images.
    """

    name: str
    real: np.ndarray

    def features(self, images: Tensor) -> np.ndarray:
        """Return the features float64 [N, D] of images float [N, C, H, W] in [-1, 1]."""

    def recognised(self, images: Tensor, labels: Tensor) -> float | None:
        """Return the share of images [N, C, H, W] taken for their labels int64 [N]; None where nothing can tell."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of a set of features.

    Attributes:
        mean: float64 [D].
        root: float64 [K, D]; the covariance is root' root.
    """

    mean: np.ndarray
    root: np.ndarray


def moments(features: np.ndarray, name: str = "features") -> Moments:
    """Return mean and covariance (N - 1 degrees of freedom) of features [N, D], called `name` in errors.

    Raises:
        ValueError: there are fewer than two, or a value is not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name} has shape {list(features.shape)}, must be features [N, D] of at least two images")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} has values that are not finite, must have none")
    features = features.astype(np.float64, copy=False)
    mean = features.mean(0)
    return Moments(mean, np.linalg.qr(features - mean, mode="r") / np.sqrt(len(features) - 1))


def moments_of_statistics(mu: np.ndarray, sigma: np.ndarray, name: str = "statistics") -> Moments:
    """Return the moments of a mean [D] and a covariance [D, D], as `.npz` files of statistics hold them.

    Raises:
        ValueError: a shape is another, a value is not finite, or `sigma` is no covariance.
    """
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"{name} has mu of shape {list(mu.shape)} and sigma of {list(sigma.shape)}, must have [D] and [D, D]"
        )
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{name} has values that are not finite, must have none")
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    size = max(np.abs(values).max(initial=0), np.finfo(np.float64).tiny)
    # Files in float32 round a singular covariance to slightly negative eigenvalues.
    if values.min(initial=0) < -1e-4 * size or np.abs(sigma - sigma.T).max(initial=0) > 1e-4 * size:
        raise ValueError(f"{name} has a sigma that is not a covariance, must be symmetric without negative eigenvalues")
    return Moments(mu, np.sqrt(values.clip(0))[:, None] * vectors.T)


def frechet_distance(a: np.ndarray | Moments, b: np.ndarray | Moments) -> float:
    """Return |mean_a - mean_b|^2 + tr(A + B - 2 sqrt(A B)) of features [N, D] and [M, D] (Heusel et al. 2017).

    A and B are the covariances. It is biased upwards, the more the fewer the samples: compare only what has as many.

    Raises:
        ValueError: there are fewer than two of either, D differs, or a value is not finite.
    """
    a, b = (x if isinstance(x, Moments) else moments(x, name) for x, name in ((a, "a"), (b, "b")))
    if len(a.mean) != len(b.mean):
        raise ValueError(f"a has {len(a.mean)} features and b {len(b.mean)}, must have as many")
    # With A = R'R, and B likewise, tr sqrt(A B) is the sum of the singular values of R_a R_b'.
    mixed = np.linalg.svd(a.root @ b.root.T, compute_uv=False).sum()
    mean = np.square(a.mean - b.mean).sum()
    return float(max(0.0, mean + np.square(a.root).sum() + np.square(b.root).sum() - 2 * mixed))


def distance_of_real(real: np.ndarray, count: int, draws: int = 10) -> float:
    """Return the Frechet distance to expect: of `count` real images to the others, mean of `draws` draws.

    Args:
        real: features [M, D].
        count: from 2 to M - 2; more are taken as M // 2.
        draws: how many times `count` images are drawn, by a fixed seed.
    """
    count = count if count <= len(real) - 2 else len(real) // 2
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(real)) for _ in range(draws)]
    return float(np.mean([frechet_distance(real[order[:count]], real[order[count:]]) for order in orders]))


def real_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's `load_digits`, drawn at 16x16 as the bundled model saw them.

    Returns:
        float32 [1797, 1, 16, 16] in [-1, 1], and labels int64 [1797].

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "scikit-learn is missing, which has the real digits; pip install fastddpm[examples]", name="sklearn"
        ) from None
    digits = load_digits()
    return _draw(torch.from_numpy(digits.images).float()[:, None]), torch.from_numpy(digits.target).long()


class DigitJudge:
    """Judge samples of the bundled model: 1,797 real digits, 32 principal components, a support-vector machine.

    The digits are those of `real_digits`. The classifier is trained on all of them.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
    """

    name = "32 principal components of real digits"

    def __init__(self) -> None:
        images, labels = real_digits()
        from sklearn.svm import SVC

        rows = self._rows(images)
        self._mean = rows.mean(0)
        self._components = np.linalg.svd(rows - self._mean, full_matrices=False)[2][:32]
        self.real = self.features(images)
        self._classifier = SVC(C=10.0).fit(rows, labels.numpy())

    def features(self, images: Tensor) -> np.ndarray:
        """Return the features float64 [N, 32] of digits float [N, 1, 16, 16] in [-1, 1]."""
        return (self._rows(images) - self._mean) @ self._components.T

    def recognised(self, images: Tensor, labels: Tensor) -> float | None:
        """Return the share of digits [N, 1, 16, 16] that the classifier takes for their labels, 0 to 9."""
        return float((self._classifier.predict(self._rows(images)) == labels.cpu().numpy()).mean())

    @staticmethod
    def _rows(images: Tensor) -> np.ndarray:
        if tuple(images.shape[1:]) != (1, 16, 16):
            raise ValueError(f"images has shape {list(images.shape)}, must have [N, 1, 16, 16]")
        return images.detach().cpu().flatten(1).double().numpy()


def _draw(counts: Tensor) -> Tensor:
    """Return ink counts 0..16 [N, 1, 8, 8] as images [N, 1, 16, 16] in [-1, 1], by bicubic interpolation."""
    n = len(counts)
    grid = affine_grid(torch.eye(2, 3).expand(n, 2, 3), [n, 1, 16, 16], align_corners=False)
    drawn = grid_sample(counts, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return drawn.clamp(0, 16) / 8 - 1
