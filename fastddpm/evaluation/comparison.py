"""Measure what a lower precision costs against float32: in each prediction, in images, in distribution."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastddpm.common import checks
from fastddpm.common.images import to_uint8
from fastddpm.evaluation.frechet import Judge, distance_of_real, frechet_distance
from fastddpm.networks.network import Network
from fastddpm.networks.overflow import ActivationWatch, OverflowReport
from fastddpm.networks.precision import parse_precision, tf32
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling.sampler import Sampler

LABELS = ("class_labels", "classes", "y")  # what models call them; see `Network`
# Settings of `Sampler` that cannot be set here.
_TAKEN = {
    "dtype": "precisions are compared",
    "cuda_graph": "each precision is sampled as by default",
    "num_inference_steps": "it is called steps here",
}


class SamplerFactory(Protocol):
    """Make samplers that differ only in their network."""

    def __call__(self, network: Callable[..., Any], *, dtype: str, cuda_graph: str | bool) -> Sampler:
        """Return a sampler on the device of the comparison."""


@dataclass(frozen=True)
class PrecisionResult:
    """The cost of one precision. Where a prediction or an image is not finite, the figures of images are None.

    Attributes:
        precision: its name.
        prediction_error: by timestep, the rms of the error of predictions, relative to the rms of float32's; both are
            for the states that float32 passes through.
        worst_prediction_error: the largest of them.
        finite: whether all predictions and images are.
        image_rms, image_max: difference of the images from float32's at equal noise, where pixels go from -1 to 1.
        pixels_differ, pixels_differ_by_more: share of 8-bit values that are not the same; that differ by more than 1.
        frechet_to_float32, frechet_to_real: distances of the images' features, where there is a judge.
        recognised: share of the images that are taken for their class, where there is a judge that can tell.
    """

    precision: str
    prediction_error: dict[int, float | None]
    worst_prediction_error: float | None
    finite: bool
    image_rms: float | None = None
    image_max: float | None = None
    pixels_differ: float | None = None
    pixels_differ_by_more: float | None = None
    frechet_to_float32: float | None = None
    frechet_to_real: float | None = None
    recognised: float | None = None


@dataclass(frozen=True)
class PrecisionReport:
    """The cost of precisions, compared with float32.

    Attributes:
        num_samples, steps, seed, method, device: of the sampling.
        every: predictions were compared at every so many steps.
        results: float32's own first.
        largest_activation, module, timestep: of float32 at those steps, as in `OverflowReport`.
        float16_headroom: how many times larger activations could be before float16 ends.
        judge: what the features are; None without a judge.
        frechet_of_real: what `frechet_to_real` is for as many real images.
    """

    num_samples: int
    steps: int
    seed: int
    method: str
    device: str
    every: int
    results: list[PrecisionResult] = field(default_factory=list)
    largest_activation: float = 0.0
    module: str = ""
    timestep: int = 0
    float16_headroom: float | None = None
    judge: str | None = None
    frechet_of_real: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and names, for JSON."""
        result = asdict(self)
        for row in result["results"]:  # JSON has no integers as keys
            row["prediction_error"] = {str(t): error for t, error in row["prediction_error"].items()}
        return result


def compare_precisions(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    precisions: Sequence[str] = ("float16", "bfloat16"),
    *,
    num_samples: int,
    steps: int | None = None,
    seed: int = 0,
    every: int | None = None,
    shape: Sequence[int] | None = None,
    class_labels: int | Sequence[int] | Tensor | None = None,
    batch_size: int | str | None = None,
    judge: Judge | None = None,
    progress: bool = False,
    device: torch.device | str | None = None,
    **settings: Any,
) -> PrecisionReport:
    """Sample a model in float32 and in each of `precisions`, at equal noise, and compare the results.

    Args:
        model, schedule, device, settings: as for `Sampler`, but no `dtype` nor `cuda_graph`.
        precisions: names of `fastddpm.networks.precision.PRECISIONS`; float32 is always run.
        num_samples, shape, class_labels, seed, batch_size, progress: as for `Sampler.sample`.
        steps: sampling steps; None for all trained ones.
        every: predictions are compared at every so many steps; None for about ten times in all.
        judge: tells distributions apart, such as `DigitJudge` for the bundled model; None leaves that out.

    Raises:
        ValueError, TypeError: as `Sampler`, or a precision is not known or the device cannot run it.
    """
    for name, reason in _TAKEN.items():
        if name in settings:
            raise ValueError(f"{name} is {settings[name]!r}, must be left out: {reason}")
    place = Network(model, device).device

    def make(network: Callable[..., Any], *, dtype: str, cuda_graph: str | bool) -> Sampler:
        options = {"num_inference_steps": steps, "device": place, "dtype": dtype, "cuda_graph": cuda_graph}
        return Sampler(network, schedule, **{**options, **settings})

    return compare_samplers(
        model,
        make,
        precisions,
        device=place,
        backend=settings.get("backend", "auto"),
        num_samples=num_samples,
        seed=seed,
        every=every,
        shape=shape,
        class_labels=class_labels,
        batch_size=batch_size,
        judge=judge,
        progress=progress,
    )


@torch.no_grad()
def compare_samplers(
    model: Callable[..., Any],
    make: SamplerFactory,
    precisions: Sequence[str],
    *,
    device: torch.device,
    num_samples: int,
    seed: int = 0,
    every: int | None = None,
    shape: Sequence[int] | None = None,
    class_labels: int | Sequence[int] | Tensor | None = None,
    batch_size: int | str | None = None,
    judge: Judge | None = None,
    progress: bool = False,
    backend: str = "auto",
) -> PrecisionReport:
    """Compare the samplers that `make` makes on `device`, as `compare_precisions`."""
    names = check_precisions(precisions, device)
    lower = {name: parse_precision(name, device) for name in names if name != "float32"}
    samplers: dict[str, Sampler] = {}
    for name in lower:
        samplers[name] = make(model, dtype=name, cuda_graph="auto")
    exact = Network(model, device, torch.float32, backend)
    arguments: dict[str, Any] = {
        "seed": seed,
        "shape": shape,
        "class_labels": class_labels,
        "batch_size": batch_size,
        "progress": progress,
    }

    others = {name: (sampler.network, lower[name][1]) for name, sampler in samplers.items()}
    watched = _Watched(exact, others)
    # What is watched leaves the device at every step, which a graph cannot do.
    sampler = make(watched, dtype="float32", cuda_graph=False)
    steps = len(sampler.timesteps)
    every = max(1, steps // 10) if every is None else checks.positive(every, "every")
    watched.timesteps = set(sampler.timesteps[::every].tolist())
    with tf32(False), exact.evaluating():
        expected = sampler.sample(num_samples, **arguments)
    if not bool(expected.isfinite().all()):
        raise ValueError("model draws images that are not finite in float32, which the others are compared with")

    images = {"float32": expected}
    for name, (_, allow) in lower.items():
        with tf32(allow), _naming(name, device):
            images[name] = samplers[name].sample(num_samples, **arguments)
    labels = None if class_labels is None else checks.labels(class_labels, num_samples, None)
    peak = watched.peak
    return PrecisionReport(
        num_samples=num_samples,
        steps=steps,
        seed=seed,
        method=sampler.method,
        device=str(device),
        every=every,
        results=[_result(name, x, expected, watched.errors(name), judge, labels) for name, x in images.items()],
        largest_activation=peak.maximum,
        module=peak.module,
        timestep=peak.timestep,
        float16_headroom=peak.headroom if peak.maximum > 0 else None,
        judge=None if judge is None else judge.name,
        frechet_of_real=None if judge is None else distance_of_real(judge.real, num_samples),
    )


def check_precisions(precisions: Sequence[str], device: torch.device | str, name: str = "precisions") -> list[str]:
    """Return `precisions` without repetition.

    Raises:
        TypeError, ValueError: there are none, or one is not known or cannot be run on `device`.
    """
    if isinstance(precisions, str) or not precisions:
        raise ValueError(f"{name} is {precisions!r}, must be a list of at least one precision")
    for precision in precisions:
        parse_precision(precision, device, name)
    return list(dict.fromkeys(str(precision).removeprefix("torch.") for precision in precisions))


class _Watched:
    """Run the network in float32; at some timesteps also run the other precisions and watch activations."""

    def __init__(self, exact: Network, others: dict[str, tuple[Network, bool]]) -> None:
        """`others`: the networks of samplers, by precision, and whether each may use TensorFloat-32."""
        self.__signature__ = inspect.signature(
            exact.model.forward if isinstance(exact.model, nn.Module) else exact.model
        )
        self.config = exact.config
        self.timesteps: set[int] = set()
        self.peak = OverflowReport(0.0, "output", 0)
        self._exact, self._others = exact, others
        self._squares: dict[str, dict[int, list[float]]] = {name: {} for name in ["float32", *others]}

    def __call__(self, x: Tensor, t: Tensor, *args: Any, **named: Any) -> Tensor:
        labels = args[0] if args else next((named[key] for key in LABELS if key in named), None)
        self_condition = named.get("x_self_cond")
        timestep = int(t[0])
        if timestep not in self.timesteps:
            return self._exact(x, t, labels, self_condition)
        with ActivationWatch(self._exact.model) as watch:
            expected = self._exact(x, t, labels, self_condition)
        watch.keep("output", expected)
        name, maximum = max(watch.maxima().items(), key=lambda item: item[1])
        if maximum > self.peak.maximum:
            self.peak = OverflowReport(maximum, name, timestep)
        self._add("float32", timestep, expected, expected)
        for name, (network, allow) in self._others.items():
            with tf32(allow), _naming(name, network.device), network.evaluating():
                out = _predict(network, x, t, labels, self_condition)
            self._add(name, timestep, out, expected)
        return expected

    def errors(self, name: str) -> dict[int, float]:
        """Return the relative rms error of predictions by timestep."""
        return {
            timestep: math.sqrt(error / scale) if scale > 0 else 0.0
            for timestep, (error, scale) in self._squares[name].items()
        }

    def _add(self, name: str, timestep: int, out: Tensor, expected: Tensor) -> None:
        sums = self._squares[name].setdefault(timestep, [0.0, 0.0])  # over the chunks of a batch
        sums[0] += float((out.double() - expected.double()).square().sum())
        sums[1] += float(expected.double().square().sum())


def _predict(network: Network, x: Tensor, t: Tensor, labels: Tensor | None, self_condition: Tensor | None) -> Tensor:
    """Return the prediction for x [N, ...] at one timestep t [N], called as a sampler's loop calls it."""
    inputs = network.new_input(x.shape)
    inputs.copy_(x)
    if self_condition is not None:
        self_condition = self_condition.to(network.dtype)
    bound = network.bind(inputs, t[:1], labels, self_condition)
    bound.load()
    return bound(torch.zeros(1, dtype=torch.int64, device=x.device))


@contextmanager
def _naming(precision: str, device: torch.device) -> Iterator[None]:
    """Turn torch's error that it has no kernel for a dtype into a ValueError that names the precision."""
    try:
        yield
    except RuntimeError as error:
        if "not implemented for" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(f"precision is {precision!r}, which {device} cannot run: {reason}") from error


def _result(
    name: str, images: Tensor, expected: Tensor, errors: dict[int, float], judge: Judge | None, labels: Tensor | None
) -> PrecisionResult:
    known = {timestep: error if math.isfinite(error) else None for timestep, error in errors.items()}
    finite = None not in known.values() and bool(images.isfinite().all())
    if not finite:
        return PrecisionResult(name, known, None, finite)
    difference = (images - expected).double()
    levels = abs(_levels(images) - _levels(expected))
    result: dict[str, float | None] = {}
    if judge is not None:
        features = judge.features(images)
        result["frechet_to_float32"] = frechet_distance(features, judge.features(expected))
        result["frechet_to_real"] = frechet_distance(features, judge.real)
        result["recognised"] = None if labels is None else judge.recognised(images, labels)
    return PrecisionResult(
        name,
        known,
        max(errors.values(), default=0.0),
        finite,
        image_rms=float(difference.square().mean().sqrt()),
        image_max=float(difference.abs().max()),
        pixels_differ=float((levels > 0).mean()),
        pixels_differ_by_more=float((levels > 1).mean()),
        **result,
    )


def _levels(images: Tensor) -> Any:
    """Return 8-bit values, as integers that can be subtracted, of samples [N, C, ...] of any shape."""
    return to_uint8(images.reshape(*images.shape[:2], -1, 1)).astype(int)
