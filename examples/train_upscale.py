"""Train the bundled upscaler: a U-Net that draws 16x16 digits which a given 4x4 image may be a reduction of.

    python examples/train_upscale.py --output digits-upscale     train (about ten minutes on one CPU core), then report
    python examples/train_upscale.py --evaluate-only digits-upscale

The low-resolution image is enlarged and concatenated to x_t along the channels, as in SR3 (Saharia et al. 2021,
"Image super-resolution via iterative refinement"). In training it carries Gaussian noise of a random strength, as in
Ho et al. 2021 ("Cascaded diffusion models"), so that the network bears low-resolution images that are not exact
reductions of a digit. Unlike theirs, this network is not told the strength: the paper's 4x4 cells show it.

The network sees the 70 % of the digits that the report's classifier is trained on; the report is about the other
30 %. The defaults are the settings that made `fastddpm/assets/digits_upscale`. Needs scikit-learn:
`pip install fastddpm[examples]`.
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
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate
from training import add_training_arguments, fit, write_record

from fastddpm.common.images import grid
from fastddpm.interop.pretrained import load_pretrained, save_pretrained
from fastddpm.networks.unet.config import UNetConfig
from fastddpm.networks.unet.model import UNet
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling.editing import super_resolution
from fastddpm.sampling.sampler import Sampler

LOW = 4  # pixels a side of the low-resolution image

CONFIG = UNetConfig(
    sample_size=digits.SIZE,
    in_channels=2,  # x_t and the enlarged low-resolution image
    out_channels=1,
    block_out_channels=(16, 32, 80),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    norm_num_groups=8,
)
PREDICTION_TYPE = "v_prediction"
NOT_SETTINGS = ("output", "evaluate_only", "results", "samples", "inference_steps")  # of what makes the model


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("digits-upscale"), help="folder for the model (default: %(default)s)")
    add("--evaluate-only", type=Path, metavar="DIR", help="report on the model in DIR instead of training one")
    add("--results", type=Path, metavar="FILE", help="write the report's figures here too, as JSON")
    add_training_arguments(parser, steps=2500, batch_size=64, dtype="bfloat16")
    add("--noise", type=float, default=0.2, help="most noise on the low-resolution image (default: %(default)s)")
    add("--samples", type=int, default=4, help="per image, for the report (default: %(default)s)")
    add("--inference-steps", type=int, default=50, help="for the report (default: %(default)s)")
    args = parser.parse_args()
    if args.samples < 2:
        parser.error(f"--samples is {args.samples}, must be at least 2: the report compares them with each other")
    return args


def shrink(images: Tensor) -> Tensor:
    """Return images [N, 1, 16, 16] as [N, 1, 4, 4]: each pixel the mean of a cell."""
    return avg_pool2d(images, digits.SIZE // LOW)


def enlarge(low: Tensor) -> Tensor:
    """Return low-resolution images [N, 1, 4, 4] as [N, 1, 16, 16], bicubic, as `editing.super_resolution` does."""
    return interpolate(low, size=(digits.SIZE, digits.SIZE), mode="bicubic", align_corners=False)


@functools.cache
def split() -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the digits to train on and of those held out: the split that `digits.classifier` makes."""
    labels = digits.source()[1].numpy()
    seen, unseen = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=0, stratify=labels)
    return seen, unseen


def draw_batch(n: int, generator: torch.Generator, *, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return augmented images, and what the network is given of them."""
    seen = torch.from_numpy(split()[0])
    chosen = seen[torch.randint(len(seen), (n,), generator=generator)]
    affine = digits.random_affine(n, degrees=args.rotation, scale=args.scale, shift=args.shift, generator=generator)
    images = digits.render(digits.source()[0][chosen], affine)
    low = shrink(images)
    strength = args.noise * torch.rand(n, 1, 1, 1, generator=generator)
    return images, enlarge(low + strength * torch.randn(low.shape, generator=generator))


def predict(model: nn.Module, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    return model(torch.cat([x, condition], dim=1), t)


def train(args: argparse.Namespace) -> None:
    """Train; save the averaged model, and a record of how it came about, in `args.output`."""
    (args.output / "training.json").unlink(missing_ok=True)
    torch.manual_seed(args.seed)
    schedule = NoiseSchedule.cosine(1000)
    model, record = fit(
        UNet(CONFIG),
        functools.partial(draw_batch, args=args),
        predict,
        args,
        schedule=schedule,
        prediction_type=PREDICTION_TYPE,
        not_settings=NOT_SETTINGS,
    )
    assert isinstance(model, UNet)
    save_pretrained(args.output, model.half(), schedule, prediction_type=PREDICTION_TYPE)
    write_record(args.output, **record)


def upscale(sampler: Sampler, low: Tensor, *, samples: int = 1, seed: int = 0, progress: bool = False) -> Tensor:
    """Draw `samples` images for each of the low-resolution images [N, 1, 4, 4]: [N, samples, 1, 16, 16]."""
    repeated = low.repeat_interleave(samples, dim=0)
    images = super_resolution(sampler, repeated, seed=seed, batch_size=100, progress=progress)
    return images.cpu().unflatten(0, (-1, samples))


def squared(difference: Tensor) -> float:
    """Return the mean square of a difference."""
    return float(difference.square().mean())


def evaluate(samples: Tensor, low: Tensor, truth: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return how samples [N, K, 1, 16, 16], drawn for `low` [N, 1, 4, 4], fit it and the digits: numbers, for JSON.

    Not their distance to the truth: the mean of all plausible images is nearer to it than any of them, and blurred.
    For a sampler of the exact posterior, truth and sample are interchangeable, so that two samples for one image are
    as far apart (in the mean of squares) as a sample and the truth: `diversity.ratio` is 1, and 0 without diversity.
    """
    each = samples.shape[1]
    drawn, asked = samples.flatten(0, 1), labels.repeat_interleave(each)
    bicubic = enlarge(low).clamp(-1, 1)
    seen, _ = split()
    counts, real_labels = digits.source()
    real = digits.render(counts[seen])
    on_low = SVC(C=10.0).fit(shrink(real).flatten(1).numpy(), real_labels[seen].numpy())
    pairs = torch.stack([samples[:, i] - samples[:, j] for i in range(each) for j in range(i)])
    between, to_truth = squared(pairs), squared(samples - truth[:, None])
    known = digits.flat(real)
    return {
        "images": len(low),
        "samples_per_image": each,
        "classifier_accuracy": {
            "truth": float(digits.recognised(truth, labels).mean()),
            "samples": float(digits.recognised(drawn, asked).mean()),
            "bicubic": float(digits.recognised(bicubic, labels).mean()),
            "classifier_trained_on_low_resolution": float(
                on_low.score(low.flatten(1).numpy(), labels.numpy()),
            ),
        },
        "consistency_rms": {
            "samples": squared(shrink(drawn) - low.repeat_interleave(each, dim=0)) ** 0.5,
            "bicubic": squared(shrink(bicubic) - low) ** 0.5,
            "another_digit": squared(low - low.roll(1, 0)) ** 0.5,
        },
        "diversity": {
            "between_samples": between,
            "sample_to_truth": to_truth,
            "ratio": between / to_truth,
            "between_digits": squared(truth - truth.roll(1, 0)),
        },
        "nearest_training_image_median": {
            "samples": float(np.median(digits.nearest(digits.flat(drawn), known))),
            "truth": float(np.median(digits.nearest(digits.flat(truth), known))),
            "bicubic": float(np.median(digits.nearest(digits.flat(bicubic), known))),
        },
    }


def report(folder: Path, args: argparse.Namespace) -> None:
    """Upscale the held-out digits with the saved model; print and record figures, and draw some."""
    sampler = load_pretrained(folder).sampler(device=args.device, num_inference_steps=args.inference_steps)
    counts, labels = digits.source()
    _, unseen = split()
    truth, labels = digits.render(counts[unseen]), labels[unseen]
    low = shrink(truth)
    samples = upscale(sampler, low, samples=args.samples, seed=args.seed, progress=True)
    figures = evaluate(samples, low, truth, labels)

    generator = torch.Generator().manual_seed(args.seed)
    noisy = (low + args.noise / 2 * torch.randn(low.shape, generator=generator)).clamp(-1, 1)
    figures["classifier_accuracy_with_noise"] = {
        "noise": args.noise / 2,
        "samples": float(digits.recognised(upscale(sampler, noisy, seed=args.seed)[:, 0], labels).mean()),
        "bicubic": float(digits.recognised(enlarge(noisy).clamp(-1, 1), labels).mean()),
    }
    figures["inference_steps"] = args.inference_steps
    rich.print(figures)
    write_record(folder, report=figures)
    if args.results is not None:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(figures, indent=2) + "\n")

    # A row for the first held-out image of each digit: the given image, bicubic, samples, truth.
    rows = [int((labels == digit).nonzero()[0]) for digit in range(digits.CLASSES)]
    given = low[rows].repeat_interleave(digits.SIZE // LOW, 2).repeat_interleave(digits.SIZE // LOW, 3)
    cells = torch.cat([given[:, None], enlarge(low[rows])[:, None], samples[rows], truth[rows][:, None]], dim=1)
    named = [digit for digit in range(digits.CLASSES) for _ in range(cells.shape[1])]
    grid(cells.flatten(0, 1), named, columns=cells.shape[1]).save(folder / "samples.png")


def main() -> None:
    args = parse_args()
    if args.evaluate_only is None:
        train(args)
    report(args.evaluate_only or args.output, args)


if __name__ == "__main__":
    main()
