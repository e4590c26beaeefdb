"""Measure FID, KID, precision and recall, and the Inception score, in any features.

The Frechet distance is `frechet.py`'s; the others are torch-fidelity's functions of features.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastddpm.common import checks
from fastddpm.evaluation.features import DigitFeatures, Features, InceptionFeatures, NetworkFeatures
from fastddpm.evaluation.frechet import Moments, distance_of_real, frechet_distance, moments
from fastddpm.evaluation.image_sets import ImageSet, images_bar, in_one_colour_space
from fastddpm.evaluation.reading import DIGITS, Reference, open_images, open_reference

METRICS = ("fid", "kid", "prc", "isc")
RELIABLE = 10_000  # the least number of images for a reliable FID
KID_SUBSET, KID_SUBSETS = 1000, 100  # as published (Binkowski et al. 2018)
NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)
ISC_SPLITS = 10  # Salimans et al. 2016
FEWEST = {"fid": 2, "kid": 2, "prc": NEIGHBOURS + 1, "isc": ISC_SPLITS}  # images
CHEAP = 256  # features, up to which a Frechet distance takes milliseconds


@dataclass(frozen=True)
class Evaluation:
    """The comparison of samples with real images; figures that were not measured are None.

    Attributes:
        samples, real, features: what was compared, in which features.
        num_samples, num_real: of the images; `num_real` is None where there were only statistics.
        fid: Frechet distance of the features (Heusel et al. 2017), with Inception v3 the FID.
        fid_of_real: what it is for as many real images against the other real ones, mean of ten draws: where the
            features are few, and there are more real images than samples.
        kid, kid_std: squared maximum mean discrepancy with a cubic kernel, unbiased, mean and standard deviation over
            100 subsets of `kid_subset_size` (Binkowski et al. 2018).
        precision, recall: shares of samples in the manifold of real images, and of real images in that of samples, by
            3 nearest neighbours (Kynkäänniemi et al. 2019).
        inception_score, inception_score_std: over 10 splits (Salimans et al. 2016).
        recognised: of digits with labels, the share that a classifier takes for them.
        not_measured: the reason for each missing figure, by metric.
        notes: remarks for readers of the figures.
    """

    samples: str
    real: str
    features: str
    num_samples: int
    num_real: int | None
    fid: float | None = None
    fid_of_real: float | None = None
    kid: float | None = None
    kid_std: float | None = None
    kid_subset_size: int | None = None
    precision: float | None = None
    recall: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None
    recognised: float | None = None
    not_measured: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and names, for JSON."""
        return asdict(self)


def evaluate(
    samples: Any,
    real: Any,
    *,
    metrics: Sequence[str] | None = None,
    features: Features | str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Evaluation:
    """Compare images with real ones once; `Evaluator` keeps the features of the real ones.

    Raises:
        ValueError, TypeError, FileNotFoundError, ModuleNotFoundError: as `Evaluator`.
    """
    evaluator = Evaluator(real, metrics=metrics, features=features, batch_size=batch_size, device=device)
    return evaluator(samples, progress=progress)


class Evaluator:
    """Compare images with the same real ones, whose features are computed once.

        evaluator = Evaluator("digits")
        fid = evaluator(sampler.sample(500)).fid

    Args:
        real: float [N, C, H, W] in [-1, 1]; uint8 [N, H, W, C]; the path of a folder of pictures, or of a `.npz` with
            images (`arr_0`), statistics (`mu`, `sigma`) or both (the FID then takes the statistics); "digits".
        metrics: of "fid", "kid", "prc" (precision and recall), "isc" (Inception score); None for all that there can
            be. All but "fid" need torch-fidelity.
        features: "inception", "digits", the path of a network (see `NetworkFeatures`), or a `Features`; None for
            "digits" where `real` is that, else "inception".
        batch_size: images at once through the feature network.
        device: where it runs.

    Raises:
        ValueError: a metric or the features are not known.
        ModuleNotFoundError, FileNotFoundError: as the features.
    """

    def __init__(
        self,
        real: Any,
        *,
        metrics: Sequence[str] | None = None,
        features: Features | str | os.PathLike[str] | None = None,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        self._real, self._device = real, torch.device(device)
        self._batch_size = checks.positive(batch_size, "batch_size")
        self._metrics = None if metrics is None else check_metrics(metrics)
        if features is None:
            features = DIGITS if isinstance(real, str) and real == DIGITS else "inception"
        self.features = _make_features(features, self._device)
        # By the shape of samples, to which pictures of a folder are fitted.
        self._references: dict[tuple[int, int, int], Reference] = {}
        self._seen: dict[tuple[int, int, int], _Seen] = {}

    def __call__(self, samples: Any, *, progress: bool = False) -> Evaluation:
        """Compare `samples`: images as `real`, or an `ImageSet` such as `image_sets.of_sampler` returns.

        Errors that can be found early are raised before the first sample is drawn.

        Raises:
            ValueError, TypeError, FileNotFoundError: either images cannot be read or are of other shapes, a metric that
                was named cannot be had, or features are not finite.
        """
        given = open_images(samples)
        if given.shape not in self._references:
            self._references[given.shape] = open_reference(self._real, given.shape)
        reference = self._references[given.shape]
        drawn, real = given, reference.images
        if real is not None:
            drawn, real = in_one_colour_space(drawn, real)
        probe, logits = self.features(torch.zeros(2, *drawn.shape, dtype=torch.uint8))
        if reference.statistics is not None and probe.shape[1] != len(reference.statistics.mean):
            raise ValueError(
                f"{reference.name} has statistics of {len(reference.statistics.mean)} features, but "
                f"{self.features.name} makes {probe.shape[1]}"
            )
        has_logits = logits is not None
        metrics, _ = self._possible(drawn.count, None if real is None else real.count, reference, has_logits)
        ours = None
        if real is not None and (reference.statistics is None or {"kid", "prc"} & set(metrics)):
            if given.shape not in self._seen:
                self._seen[given.shape] = self._look(real, progress)
            ours = self._seen[given.shape]
        theirs = self._look(drawn, progress)

        count, num_real = len(theirs.features), None if ours is None else len(ours.features)
        # Files that cannot be read are known by now.
        metrics, missing = self._possible(count, num_real, reference, has_logits)
        notes = [*drawn.notes, *([] if real is None or ours is None else real.notes)]
        return Evaluation(
            drawn.name,
            reference.name,
            self.features.name,
            count,
            num_real,
            recognised=theirs.recognised,
            not_measured=missing,
            notes=notes + self._remarks(metrics, count, num_real, reference),
            **self._figures(metrics, theirs, ours, reference),
        )

    def _possible(
        self, count: int, num_real: int | None, reference: Reference, has_logits: bool
    ) -> tuple[list[str], dict[str, str]]:
        """Return the metrics that so many images allow, and why not the others; raise if one of those was named."""
        fewest = min(count, count if num_real is None else num_real)
        reasons: dict[str, str] = {}
        for name in METRICS:
            if name != "fid" and importlib.util.find_spec("torch_fidelity") is None:
                reasons[name] = "torch-fidelity is missing; pip install fastddpm[evaluate]"
            elif name in ("kid", "prc") and num_real is None:
                reasons[name] = f"{reference.name} has statistics alone, and no images"
            elif name == "isc" and not has_logits:
                reasons[name] = f"{self.features.name} has no logits of classes"
            elif (count if name == "isc" else fewest) < FEWEST[name]:
                reasons[name] = f"there are {count if name == 'isc' else fewest} images, it needs {FEWEST[name]}"
        for name in self._metrics or ("fid",):
            if name in reasons:
                raise ValueError(f"metrics has {name}, which cannot be measured: {reasons[name]}")
        wanted = METRICS if self._metrics is None else self._metrics
        return [name for name in wanted if name not in reasons], {n: r for n, r in reasons.items() if n in wanted}

    def _look(self, images: ImageSet, progress: bool) -> _Seen:
        """Return the features of all images, read or drawn a few at a time."""
        features: list[Tensor] = []
        logits: list[Tensor] = []
        right, done = 0.0, 0
        judge = self.features if images.labels is not None and isinstance(self.features, DigitFeatures) else None
        with images_bar(images.count, "features", enabled=progress and not images.drawn) as advance:
            for batch in images.batches(self._batch_size):
                made, classes = self.features(batch)
                features.append(made.detach().cpu())
                if classes is not None:
                    logits.append(classes.detach().cpu())
                if judge is not None and images.labels is not None:
                    right += judge.recognised(batch, images.labels[done : done + len(batch)]) * len(batch)
                done += len(batch)
                advance(done)
        if done == 0:
            raise ValueError(f"{images.name} has no images that can be read, must have some")
        whole = torch.cat(features)
        if not bool(whole.isfinite().all()):
            raise ValueError(f"{self.features.name} of {images.name} has values that are not finite, must have none")
        return _Seen(whole, torch.cat(logits) if logits else None, round(right) / done if judge is not None else None)

    def _figures(
        self, metrics: Sequence[str], theirs: _Seen, ours: _Seen | None, reference: Reference
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if "fid" in metrics:
            real = reference.statistics or (None if ours is None else ours.moments)
            assert real is not None  # a reference has images or statistics
            result["fid"] = frechet_distance(theirs.moments, real)
            if ours is not None and ours.features.shape[1] <= CHEAP and len(theirs.features) <= len(ours.features) - 2:
                result["fid_of_real"] = distance_of_real(ours.features.double().numpy(), len(theirs.features))
        if "kid" in metrics and ours is not None:
            from torch_fidelity.metric_kid import kid_features_to_metric

            size = min(KID_SUBSET, len(theirs.features), len(ours.features))
            made = kid_features_to_metric(
                theirs.features, ours.features, kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False
            )
            result["kid"], result["kid_std"] = made.values()
            result["kid_subset_size"] = size
        if "prc" in metrics and ours is not None:
            from torch_fidelity.metric_prc import prc_features_to_metric

            place = self._device if self._device.type == "cuda" else "cpu"  # features may be float64
            made = prc_features_to_metric(
                theirs.features.to(place),
                ours.features.to(place),
                prc_neighborhood=NEIGHBOURS,
                save_cpu_ram=True,
                verbose=False,
            )
            result["precision"], result["recall"] = made["precision"], made["recall"]
        if "isc" in metrics and theirs.logits is not None:
            from torch_fidelity.metric_isc import isc_features_to_metric

            made = isc_features_to_metric(theirs.logits, splits=ISC_SPLITS)
            result["inception_score"], result["inception_score_std"] = made.values()
        return result

    def _remarks(self, metrics: Sequence[str], count: int, num_real: int | None, reference: Reference) -> list[str]:
        notes = []
        fewest = min(count, count if num_real is None or reference.statistics is not None else num_real)
        if "fid" in metrics and fewest < RELIABLE:
            notes.append(
                f"an FID of {fewest:,} images is biased upwards, the more the fewer they are: below {RELIABLE:,} "
                "compare it with figures of as many images alone, and see the KID, which is not biased"
            )
        if "fid" in metrics and not isinstance(self.features, InceptionFeatures):
            notes.append(f"fid is the Frechet distance of {self.features.name}, not to be compared with published FIDs")
        if "fid" in metrics and reference.statistics is not None:
            notes.append(
                f"fid is against the statistics in {reference.name}, which do not say of how many images they are"
            )
        return notes


def check_metrics(metrics: Sequence[str], name: str = "metrics") -> list[str]:
    """Return `metrics` without repetition.

    Raises:
        ValueError: there are none, or one is not known.
    """
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"{name} is {metrics!r}, must be a list of at least one of {', '.join(METRICS)}")
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"{name} has {metric!r}, must be of {', '.join(METRICS)}")
    return list(dict.fromkeys(metrics))


@dataclass(frozen=True, eq=False)
class _Seen:
    """The features [N, D] and logits [N, K] of a set of images, on the CPU."""

    features: Tensor
    logits: Tensor | None
    recognised: float | None

    @functools.cached_property
    def moments(self) -> Moments:
        return moments(self.features.double().numpy())


def _make_features(features: Features | str | os.PathLike[str], device: torch.device) -> Features:
    if features == DIGITS:
        return DigitFeatures()
    if features == "inception":
        return InceptionFeatures(device=device)
    if isinstance(features, str | os.PathLike):
        return NetworkFeatures(features, device=device)
    if not callable(features) or not hasattr(features, "name"):
        raise TypeError(
            f"features is a {type(features).__name__}, must be 'inception', 'digits', a path or callable with a name"
        )
    return features
