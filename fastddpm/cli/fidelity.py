"""The part of `fastddpm evaluate` that compares samples with real images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastddpm.cli.options import best_device, classes_of, device_name, make_sampler, report_device

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from fastddpm.evaluation import Evaluation
    from fastddpm.evaluation.features import Features
    from fastddpm.interop.pretrained import Pretrained

DIGIT_SAMPLES, SAMPLES = 500, 10_000


def check_fidelity(options: argparse.Namespace, *, is_bundled: bool) -> None:
    """Completes the options from each other, before anything is loaded.

    Raises:
        ValueError: REAL is missing, a metric is not known, or two options contradict each other.
    """
    from fastddpm.evaluation.fidelity import check_metrics
    from fastddpm.evaluation.reading import DIGITS

    if options.real is None:
        if not is_bundled:
            raise ValueError(
                "REAL is missing, what to compare with: a folder of pictures, a .npz or 'digits' (or --precision, "
                "which needs none)"
            )
        options.real = DIGITS
    if options.metrics is not None:
        options.metrics = check_metrics([name.strip() for name in options.metrics.split(",")], "--metrics")
    if options.inception_weights is not None and options.feature_network is not None:
        raise ValueError("--inception-weights is given and so is --feature-network; distances are measured in one")


def labels_in_turn(model: Pretrained, count: int) -> list[int] | None:
    """All classes in equal numbers."""
    classes = classes_of(model.unet.config)
    return [classes[i % len(classes)] for i in range(count)] if classes else None


def measure_fidelity(
    options: argparse.Namespace, model: Pretrained | None, console: Console, *, is_bundled: bool
) -> dict[str, Any]:
    """Compares what `model` draws, or without one the images that MODEL names, with REAL; prints and returns it."""
    import torch

    from fastddpm.common.images import save_npz
    from fastddpm.evaluation import Evaluator
    from fastddpm.evaluation.image_sets import of_sampler
    from fastddpm.evaluation.reading import open_images
    from fastddpm.networks.network import usable_device

    device = usable_device(options.device or best_device())
    drawn: list[Tensor] = []
    labels = sampler = None
    if model is None:
        samples = open_images(options.model)
    else:
        sampler = make_sampler(options, model)
        count = options.num_samples or (DIGIT_SAMPLES if is_bundled else SAMPLES)
        labels = labels_in_turn(model, count)
        samples = of_sampler(
            sampler,
            count,
            seed=options.seed,
            class_labels=labels,
            decode=None if model.decoder is None else model.decode,
            keep=None if options.save_samples is None else drawn,
            name=options.model or "the bundled model",
            progress=True,
            batch_size=options.batch_size,
        )
    evaluator = Evaluator(options.real, metrics=options.metrics, features=_features(options, device), device=device)
    try:
        result = evaluator(samples, progress=True)
    finally:  # what took hours to draw is written also where its figures cannot be had
        if options.save_samples is not None and sum(map(len, drawn)) == samples.count:
            save_npz(options.save_samples, torch.cat(drawn), labels, in_colour=True)
            print(f"wrote {options.save_samples}")
    _print(result, console)
    about: dict[str, Any] = {"device_name": device_name(device)}
    if sampler is not None:
        report_device(sampler)
        about |= {"seed": options.seed, "method": sampler.method, "steps": len(sampler.timesteps)}
    return {**result.to_dict(), **about}


def _features(options: argparse.Namespace, device: Any) -> Features | str | None:
    from fastddpm.evaluation.features import InceptionFeatures, NetworkFeatures
    from fastddpm.evaluation.reading import DIGITS

    if options.inception_weights is not None:
        return InceptionFeatures(options.inception_weights, device=device)
    if options.feature_network is None or options.feature_network == DIGITS:
        return options.feature_network
    return NetworkFeatures(
        options.feature_network,
        feature_input=options.feature_input,
        feature_channels=options.feature_channels,
        device=device,
    )


def _print(result: Evaluation, console: Console) -> None:
    from rich.table import Table

    real = "statistics" if result.num_real is None else f"{result.num_real:,} real images"
    table = Table(title=f"{result.num_samples:,} samples against {real}", title_justify="left")
    for column in ("measure", "value", ""):
        table.add_column(column, justify="right" if column == "value" else "left")
    subsets = f"± {result.kid_std or 0:.2g}, subsets of {result.kid_subset_size}"
    rows = [
        ("fid", result.fid, "{:.4g}", "lower is better"),
        ("fid of real images", result.fid_of_real, "{:.4g}", "as many of them against the others"),
        ("kid", result.kid, "{:.4g}", f"{subsets}; lower is better"),
        ("precision", result.precision, "{:.3f}", "of samples, those among real images"),
        ("recall", result.recall, "{:.3f}", "of real images, those among samples"),
        ("inception score", result.inception_score, "{:.4g}", f"± {result.inception_score_std or 0:.2g}"),
        ("recognised", result.recognised, "{:.1%}", "as the class asked for"),
    ]
    for name, value, form, remark in rows:
        if value is not None:
            table.add_row(name, form.format(value), remark)
    console.print(table)
    console.print(f"samples: {result.samples}; real: {result.real}", highlight=False, markup=False)
    console.print(f"features: {result.features}", highlight=False, markup=False)
    for name, reason in result.not_measured.items():
        console.print(f"{name}: not measured, {reason}", highlight=False, markup=False)
    for note in result.notes:
        console.print(f"warning: {note}", highlight=False, markup=False)
