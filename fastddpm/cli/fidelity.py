"""Compare samples with real images, for `fastddpm evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastddpm.cli.options import chosen_device, device_name, labels_in_turn, make_sampler, plain, report_device
from fastddpm.cli.outputs import NotFinite, finite_rows

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from fastddpm.evaluation import Evaluation
    from fastddpm.evaluation.features import Features
    from fastddpm.interop.pretrained import Pretrained

DIGIT_SAMPLES, SAMPLES = 500, 10_000
FEATURES = 2048  # features of Inception v3 that are kept for every sample


def check_fidelity(options: argparse.Namespace, *, is_bundled: bool) -> None:
    """Check the options and fill in those that follow from others, before anything is loaded.

    Raises:
        ValueError: REAL is missing, a metric is not known, or two options contradict each other.
    """
    from fastddpm.evaluation.fidelity import check_metrics
    from fastddpm.evaluation.reading import DIGITS

    if options.real is None:
        if not is_bundled:
            raise ValueError(
                "REAL is missing, the real images: a folder of pictures, a .npz or 'digits' (or --precision, which "
                "needs none)"
            )
        options.real = DIGITS
    if options.metrics is not None:
        options.metrics = check_metrics([name.strip() for name in options.metrics.split(",")], "--metrics")
    if options.inception_weights is not None and options.feature_network is not None:
        raise ValueError("--inception-weights is given and so is --feature-network; distances are measured in one")


def measure_fidelity(
    options: argparse.Namespace, model: Pretrained | None, *, is_bundled: bool
) -> tuple[dict[str, Any], Callable[[Console], None]]:
    """Compare samples of `model` with REAL; without a model, the images that MODEL names.

    Returns:
        The figures, and a function that prints them.
    """
    import torch

    from fastddpm.common.images import check_memory, save_npz
    from fastddpm.evaluation import Evaluator
    from fastddpm.evaluation.image_sets import of_sampler
    from fastddpm.evaluation.reading import open_images

    device = chosen_device(options)
    drawn: list[Tensor] = []
    labels = sampler = None
    if model is None:
        samples = open_images(options.model)
    else:
        sampler = make_sampler(options, model)
        count = options.num_samples or (DIGIT_SAMPLES if is_bundled else SAMPLES)
        check_memory(4 * FEATURES * count, f"--num-samples {count}: features")
        labels = labels_in_turn(model, count)
        samples = of_sampler(
            sampler, count, seed=options.seed, class_labels=labels,
            decode=lambda x: _finite(model.decode(x)),
            keep=None if options.save_samples is None else drawn,
            name=options.model or "the bundled model", progress=True, batch_size=options.batch_size,
        )  # fmt: skip
    evaluator = Evaluator(options.real, metrics=options.metrics, features=_features(options, device), device=device)
    try:
        result = evaluator(samples, progress=True)
    finally:  # samples may take hours, so keep them even if measuring fails
        if options.save_samples is not None and sum(map(len, drawn)) == samples.count:
            save_npz(options.save_samples, torch.cat(drawn), labels, in_colour=True)
            print(f"wrote {options.save_samples}")
    about: dict[str, Any] = {"device_name": device_name(device)}
    if sampler is not None:
        about |= {"seed": options.seed, "method": sampler.method, "steps": len(sampler.timesteps)}

    def show(console: Console) -> None:
        _print(result, console)
        if sampler is not None:
            report_device(sampler)

    return {**result.to_dict(), **about}, show


def _finite(images: Tensor) -> Tensor:
    """Return `images` if they are finite; else raise, because figures of black pictures would be wrong."""
    if bad := int((~finite_rows(images)).sum()):
        raise NotFinite(f"{bad} of {len(images)} samples are not finite, so nothing is measured")
    return images


def _features(options: argparse.Namespace, device: Any) -> Features | str | None:
    from fastddpm.evaluation.features import InceptionFeatures, NetworkFeatures
    from fastddpm.evaluation.reading import DIGITS

    if options.inception_weights is not None:
        return InceptionFeatures(options.inception_weights, device=device)
    if options.feature_network in (None, DIGITS):
        return options.feature_network
    taken = {"feature_input": options.feature_input, "feature_channels": options.feature_channels}
    return NetworkFeatures(options.feature_network, **taken, device=device)


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
    plain(console, f"samples: {result.samples}; real: {result.real}\nfeatures: {result.features}")
    for name, reason in result.not_measured.items():
        plain(console, f"{name}: not measured, {reason}")
    for note in result.notes:
        plain(console, f"warning: {note}")
