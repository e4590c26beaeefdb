"""Train a diffusion model on real one-dimensional data, and plots its samples against that data.

    python examples/train_1d.py                     train (a few minutes on one CPU core), report and plot

The data are projection profiles, the features of early optical character recognition: of each of scikit-learn's 1,797
handwritten digits how much ink lies in each row, and how much in each column. That is a pair of curves, [2, 16], with
a law of its own: both hold the same ink in all. The network is a small stack of dilated convolutions after DiffWave
(Kong et al. 2021), told the digit; any `nn.Module` called as `model(x, t, class_labels=labels)` would do, since the
sampler takes data of any shape. Needs scikit-learn and matplotlib: `pip install fastddpm[examples]`.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import digits
import numpy as np
import rich
import torch
from fastddpm_kernels.group_norm_silu import group_norm_silu
from sklearn.model_selection import cross_val_score, train_test_split
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn.functional import silu
from training import add_training_arguments, fit

from fastddpm.networks.unet.layers import EmbeddingMLP, timestep_embedding
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling.sampler import Sampler

CHANNELS, LENGTH = 2, digits.SIZE  # ink per row from the top, ink per column from the left
PREDICTION_TYPE = "v_prediction"
NOT_SETTINGS = ("plot", "results", "samples", "inference_steps")  # of what makes the model


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--plot", type=Path, default=Path("1d_samples.png"), help="picture of samples (default: %(default)s)")
    add("--results", type=Path, default=Path("1d.json"), help="figures and settings (default: %(default)s)")
    add_training_arguments(parser, steps=3000, batch_size=64)
    add("--width", type=int, default=64, help="channels of the network (default: %(default)s)")
    add("--samples", type=int, default=1000, help="for the report (default: %(default)s)")
    add("--inference-steps", type=int, default=250, help="for the report (default: %(default)s)")
    return parser.parse_args()


def profiles(images: Tensor) -> Tensor:
    """Return images [N, 1, 16, 16] as curves [N, 2, 16]: the mean of each row and of each column, within [-1, 1]."""
    return torch.cat([images.mean(3), images.mean(2)], dim=1)


@functools.cache
def source() -> tuple[Tensor, Tensor]:
    """Return the curves of the real digits [1797, 2, 16], and their labels."""
    counts, labels = digits.source()
    return profiles(digits.render(counts)), labels


class Block(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x))) + embedding))), the first convolution dilated."""

    def __init__(self, width: int, emb_channels: int, dilation: int, groups: int = 8) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width)
        self.conv1 = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.emb = nn.Linear(emb_channels, width)
        self.norm2 = nn.GroupNorm(groups, width)
        self.conv2 = nn.Conv1d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # so that the network begins as a shallow one

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm1, norm2 = self.norm1, self.norm2
        h = self.conv1(group_norm_silu(x, norm1.weight, norm1.bias, norm1.num_groups))
        h = group_norm_silu(h, norm2.weight, norm2.bias, norm2.num_groups, time_bias=self.emb(emb))
        return x + self.conv2(h)


class CurveNet(nn.Module):
    """[N, 2, L] and the timestep to [N, 2, L]; class-conditional."""

    def __init__(self, width: int = 64, dilations: tuple[int, ...] = (1, 2, 4, 8, 4, 2, 1)) -> None:
        super().__init__()
        self.width = width
        self.time = EmbeddingMLP(width, 4 * width)
        self.classes = nn.Embedding(digits.CLASSES, 4 * width)
        self.conv_in = nn.Conv1d(CHANNELS, width, 3, padding=1)
        self.blocks = nn.ModuleList([Block(width, 4 * width, dilation) for dilation in dilations])
        self.norm = nn.GroupNorm(8, width)
        self.conv_out = nn.Conv1d(width, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        sinusoids = timestep_embedding(t, self.width, flip_sin_to_cos=True, freq_shift=0)
        emb = silu(self.time(sinusoids) + self.classes(class_labels))
        x = self.conv_in(x)
        for block in self.blocks:
            x = block(x, emb)
        return self.conv_out(group_norm_silu(x, self.norm.weight, self.norm.bias, self.norm.num_groups))


def draw_batch(n: int, generator: torch.Generator, *, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return curves of augmented digits, and their labels."""
    counts, labels = digits.source()
    chosen = torch.randint(len(counts), (n,), generator=generator)
    affine = digits.random_affine(n, degrees=args.rotation, scale=args.scale, shift=args.shift, generator=generator)
    return profiles(digits.render(counts[chosen], affine)), labels[chosen]


def predict(model: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return model(x, t, class_labels=labels)


def train(args: argparse.Namespace) -> tuple[nn.Module, NoiseSchedule, dict[str, Any]]:
    """Return the averaged model, its schedule, and a record of how it came about."""
    torch.manual_seed(args.seed)
    schedule = NoiseSchedule.cosine(1000)
    model, record = fit(
        CurveNet(args.width),
        functools.partial(draw_batch, args=args),
        predict,
        args,
        schedule=schedule,
        prediction_type=PREDICTION_TYPE,
        not_settings=NOT_SETTINGS,
    )
    return model, schedule, record


@functools.cache
def classifier() -> tuple[SVC, float]:
    """Return a support-vector machine trained on 70 % of the real curves, and its accuracy on the other 30 %."""
    curves, labels = source()
    seen, unseen, seen_labels, unseen_labels = train_test_split(
        digits.flat(curves), labels.numpy(), test_size=0.3, random_state=0, stratify=labels.numpy()
    )
    model = SVC(C=10.0).fit(seen, seen_labels)
    return model, float(model.score(unseen, unseen_labels))


def ink_mismatch(curves: Tensor) -> float:
    """Return the rms difference between the ink of the rows and that of the columns, as a share of the ink."""
    ink = ((curves + 1) / 2).sum(2)
    return float((ink[:, 0] - ink[:, 1]).square().mean().sqrt() / ink.mean())


def telling_apart(a: np.ndarray, b: np.ndarray) -> float:
    """Return the accuracy, over unseen rows, of a classifier trained to tell a from b; one half where it cannot.

    The classifier two-sample test of Lopez-Paz & Oquab 2017, with a support-vector machine and five folds.
    """
    n = min(len(a), len(b))
    rng = np.random.default_rng(0)
    rows = np.concatenate([a[rng.permutation(len(a))[:n]], b[rng.permutation(len(b))[:n]]])
    order = rng.permutation(2 * n)
    return float(cross_val_score(SVC(C=10.0), rows[order], np.repeat([0, 1], n)[order], cv=5).mean())


def evaluate(samples: Tensor, labels: Tensor) -> dict[str, Any]:
    """Compare curves [N, 2, 16], asked for as `labels` [N], with the real ones; return numbers, for JSON."""
    curves, _ = source()
    real, fake = digits.flat(curves), digits.flat(samples)
    rng, half = np.random.default_rng(0), len(real) // 2
    order = rng.permutation(len(real))
    one, other = real[order[:half]], real[order[half:]]
    fewer = fake[rng.permutation(len(fake))[:half]]  # the distance is biased upwards for few samples: equal sizes
    mispaired = torch.stack([curves[:, 0], curves[:, 1].roll(1, 0)], dim=1)
    return {
        "samples": len(samples),
        "recognised": float((classifier()[0].predict(fake) == labels.numpy()).mean()),
        "classifier_accuracy_on_unseen_real": classifier()[1],
        "largest_error_of_a_mean_over_standard_deviation": float(
            np.abs(fake.mean(0) - real.mean(0)).max() / real.std()
        ),
        "variance_ratio": digits.spread(fake) / digits.spread(real),
        "frechet": {"samples_to_real": digits.frechet(fewer, other), "real_to_real": digits.frechet(one, other)},
        "telling_apart": {"samples_and_real": telling_apart(fewer, other), "real_and_real": telling_apart(one, other)},
        "ink_mismatch": {
            "samples": ink_mismatch(samples),
            "real": ink_mismatch(curves),
            "rows_and_columns_of_different_digits": ink_mismatch(mispaired),
        },
        "nearest_real_median": {
            "samples": float(np.median(digits.nearest(fake, real))),
            "real_to_other_real": float(np.median(digits.nearest(real, real, same=True))),
        },
    }


def plot(path: Path, samples: Tensor, labels: Tensor, *, curves_each: int = 20) -> None:
    """Draw real curves (grey) and samples (blue) of each digit, and their means."""
    from matplotlib.figure import Figure

    real, real_labels = source()
    figure = Figure(figsize=(15, 5), layout="constrained")
    axes = figure.subplots(4, digits.CLASSES, sharex=True, sharey=True)
    names = ("real\nrows", "samples\nrows", "real\ncolumns", "samples\ncolumns")
    for digit in range(digits.CLASSES):
        for channel in range(CHANNELS):
            theirs, mine = real[real_labels == digit][:, channel], samples[labels == digit][:, channel]
            for row, curves, colour in ((2 * channel, theirs, "0.5"), (2 * channel + 1, mine, "tab:blue")):
                axis = axes[row, digit]
                ink = (curves + 1) / 2
                some = ink[:: max(1, len(ink) // curves_each)][:curves_each]  # the data begin with few writers
                axis.plot(some.T, color=colour, linewidth=0.6, alpha=0.6)
                axis.plot(ink.mean(0), color="black", linewidth=1.4)
                axis.set(xticks=[], yticks=[])
        axes[0, digit].set_title(str(digit))
    for row, name in enumerate(names):
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    args = parse_args()
    model, schedule, record = train(args)
    sampler = Sampler(
        model,
        schedule,
        num_inference_steps=args.inference_steps,
        prediction_type=PREDICTION_TYPE,
        device=args.device,
    )
    labels = torch.arange(args.samples) % digits.CLASSES
    samples = sampler.sample(
        args.samples, shape=(CHANNELS, LENGTH), seed=args.seed, class_labels=labels, progress=True
    ).cpu()
    figures = evaluate(samples, labels) | {"inference_steps": args.inference_steps}
    rich.print(figures)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(record | {"report": figures}, indent=2) + "\n")
    plot(args.plot, samples, labels)


if __name__ == "__main__":
    main()
