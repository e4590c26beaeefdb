"""scikit-learn's 1,797 handwritten digits as 16x16 images, and a report that says how good a model of them is.

Shared by `train_digits.py` and the test of the bundled model. Needs scikit-learn (`pip install fastddpm[examples]`).
Images are float32 [N, 1, 16, 16] in [-1, 1], paper -1 and ink 1.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import get_console
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fastddpm.common.images import save_grid
from fastddpm.interop.pretrained import load_pretrained

SIZE, CLASSES = 16, 10


@functools.cache
def source() -> tuple[Tensor, Tensor]:
    """Return the data set as it is: ink counts 0..16, float32 [1797, 1, 8, 8], and labels int64 [1797]."""
    digits = load_digits()
    return torch.from_numpy(digits.images).float()[:, None], torch.from_numpy(digits.target).long()


def render(counts: Tensor, affine: Tensor | None = None) -> Tensor:
    """Draw 8x8 ink counts [N, 1, 8, 8] at 16x16 by one bicubic interpolation; in [-1, 1].

    Args:
        counts: ink counts 0..16.
        affine: [N, 2, 3], where each output pixel looks in the source, coordinates in [-1, 1]. Being part of the one
            interpolation, a shift or rotation costs no sharpness.
    """
    n = len(counts)
    if affine is None:
        affine = torch.eye(2, 3).expand(n, 2, 3)
    grid = affine_grid(affine, [n, 1, SIZE, SIZE], align_corners=False)
    drawn = grid_sample(counts, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return drawn.clamp(0, 16) / 8 - 1


def random_affine(n: int, *, degrees: float, scale: float, shift: float, generator: torch.Generator) -> Tensor:
    """Return [n, 2, 3] small affine maps: rotation, relative size, shift (in pixels of 16), uniform in +- the given."""
    angle, size, dx, dy = (torch.rand(4, n, generator=generator) * 2 - 1).unbind()
    angle, size = angle * np.deg2rad(degrees), 1 + size * scale
    dx, dy = dx * shift * 2 / SIZE, dy * shift * 2 / SIZE
    cos, sin = angle.cos() / size, angle.sin() / size
    return torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)


def flat(images: Tensor) -> np.ndarray:
    """Return images [N, 1, 16, 16] as rows [N, 256], float64."""
    return images.flatten(1).double().numpy()


@functools.cache
def classifier() -> tuple[SVC, float]:
    """Return a support-vector machine trained on 70 % of the real digits, and its accuracy on the other 30 %."""
    counts, labels = source()
    seen, unseen, seen_labels, unseen_labels = train_test_split(
        flat(render(counts)), labels.numpy(), test_size=0.3, random_state=0, stratify=labels.numpy()
    )
    model = SVC(C=10.0).fit(seen, seen_labels)
    return model, float(model.score(unseen, unseen_labels))


def recognised(images: Tensor, labels: Tensor) -> np.ndarray:
    """Return whether the classifier takes each image for the digit that was asked for: bool [N]."""
    return classifier()[0].predict(flat(images)) == labels.numpy()


def nearest(queries: np.ndarray, points: np.ndarray, *, same: bool = False) -> np.ndarray:
    """Return the distance [N] from each query [N, D] to the nearest point; with `same`, to the nearest other one."""
    squared = (queries**2).sum(1)[:, None] - 2 * queries @ points.T + (points**2).sum(1)
    if same:
        np.fill_diagonal(squared, np.inf)
    return np.sqrt(squared.min(1).clip(0))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Fréchet distance between Gaussians fitted to features [N, D] and [M, D] (Heusel et al. 2017)."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    # The trace of sqrtm(cov_a @ cov_b): that product is similar to a positive one, so its eigenvalues are real.
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def spread(features: np.ndarray) -> float:
    """Return the total variance of features [N, D]."""
    return float(features.var(0, ddof=1).sum())


def evaluate(samples: Tensor, labels: Tensor) -> dict[str, Any]:
    """Compare samples [N, 1, 16, 16], asked for as `labels` [N], with the real digits; return numbers, for JSON.

    Features are 32 principal components of the real images. The copies that nearest neighbours are judged against are
    real images turned by up to 3 degrees and shifted by up to half a pixel: what a model that repeats its training
    set would give.
    """
    counts, real_labels = source()
    real_images = render(counts)
    real, fake = flat(real_images), flat(samples.cpu())
    y, asked = real_labels.numpy(), labels.cpu().numpy()
    pca = PCA(32, random_state=0).fit(real)
    real_features, fake_features = pca.transform(real), pca.transform(fake)

    right = recognised(samples.cpu(), labels.cpu())
    per_class = []
    for digit in range(CLASSES):
        mine, theirs = fake_features[asked == digit], real_features[y == digit]
        per_class.append(
            {
                "digit": digit,
                "recognised": float(right[asked == digit].mean()),
                "variance": spread(mine),
                "real_variance": spread(theirs),
                "variance_ratio": spread(mine) / spread(theirs),
            }
        )

    near, real_near = nearest(fake, real), nearest(real, real, same=True)
    generator = torch.Generator().manual_seed(0)
    nudge = random_affine(len(counts), degrees=3, scale=0, shift=0.5, generator=generator)
    copy_near = nearest(flat(render(counts, nudge)), real)

    rng, half = np.random.default_rng(0), len(real) // 2
    real_split, fake_split = [], []
    for _ in range(10):  # equal sizes on both sides, as the distance is biased upwards for few samples
        order = rng.permutation(len(real))
        one, other = real_features[order[:half]], real_features[order[half:]]
        real_split.append(frechet(one, other))
        fake_split.append(frechet(fake_features[rng.permutation(len(fake))[:half]], other))

    def quantiles(distances: np.ndarray) -> dict[str, float]:
        return {"median": float(np.median(distances)), "quantile_05": float(np.quantile(distances, 0.05))}

    return {
        "samples": len(fake),
        "classifier_accuracy_on_unseen_real": classifier()[1],
        "recognised": float(right.mean()),
        "per_class": per_class,
        "nearest_training_image": {
            "samples": quantiles(near),
            "real_to_other_real": quantiles(real_near),
            "nudged_copies_of_real": quantiles(copy_near),
            "samples_below_real_quantile_01": float((near < np.quantile(real_near, 0.01)).mean()),
        },
        "frechet": {"samples_to_real": float(np.mean(fake_split)), "real_to_real": float(np.mean(real_split))},
    }


def report_on(folder: Path, samples: int, *, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Sample a saved model, all its DDPM steps, no guidance, as many of each digit; print how good they are.

    Returns what `evaluate` does. A hundred samples are drawn to `samples.png` in the folder.
    """
    labels = torch.arange(samples) % CLASSES
    sampler = load_pretrained(folder).sampler(device=device)
    images = sampler.sample(samples, seed=seed, class_labels=labels, batch_size=100, progress=True).cpu()
    figures = evaluate(images, labels)
    print_report(figures, get_console())
    order = labels[:100].argsort(stable=True)
    save_grid(folder / "samples.png", images[:100][order], labels[:100][order].tolist())
    return figures


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print what `evaluate` returned."""
    table = Table(title=f"{report['samples']} samples against the real digits")
    for column in ("digit", "recognised", "variance", "real variance", "ratio"):
        table.add_column(column, justify="right")
    for row in report["per_class"]:
        table.add_row(
            str(row["digit"]),
            f"{row['recognised']:.1%}",
            f"{row['variance']:.2f}",
            f"{row['real_variance']:.2f}",
            f"{row['variance_ratio']:.2f}",
        )
    console.print(table)
    console.print(
        f"recognised as the class asked for: {report['recognised']:.1%} "
        f"(the classifier on unseen real digits: {report['classifier_accuracy_on_unseen_real']:.1%})"
    )
    distances = report["nearest_training_image"]
    for name in ("samples", "real_to_other_real", "nudged_copies_of_real"):
        row = distances[name]
        label = name.replace("_", " ")
        console.print(f"nearest training image, {label}: median {row['median']:.2f}, 5 % {row['quantile_05']:.2f}")
    console.print(
        f"samples nearer than 1 % of the real ones are to each other: {distances['samples_below_real_quantile_01']:.1%}"
    )
    console.print(
        f"Frechet distance: samples to real {report['frechet']['samples_to_real']:.3f}, "
        f"real to real {report['frechet']['real_to_real']:.3f}"
    )
