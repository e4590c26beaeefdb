"""Turn a sampler's settings into its table and into the way its loop processes predictions.

A setting that has no effect because of another one raises an error that names both.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastddpm.process.methods import method_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import VARIANCE_TYPES, Shifts, StepTable
from fastddpm.sampling.guidance import Classifier, ClassifierFn, DynamicThreshold


@dataclass(frozen=True)
class LoopSettings:
    """The way a sampler's loops process predictions, the same for every batch.

    Attributes:
        backend: of the kernels.
        clip_range: the bound of x0, or None.
        threshold: dynamic thresholding, in place of `clip_range`.
        variance_type: says whether the network's output has twice the channels. The second half is read if the
            table has a learned variance.
        guidance_rescale: from 0 to 1; see `guidance.rescale_guidance`.
        guidance_interval: (lowest, highest) timestep at which guidance is computed; None for all.
        null_class: the label of the unconditional half.
        classifier: guidance by a gradient, or None.
        self_condition: whether the network reads the x0 predicted before.
    """

    backend: str = "auto"
    clip_range: float | None = None
    threshold: DynamicThreshold | None = None
    variance_type: str = "fixed_small"
    guidance_rescale: float = 0.0
    guidance_interval: tuple[int, int] | None = None
    null_class: int | None = None
    classifier: Classifier | None = None
    self_condition: bool = False

    @property
    def learned_variance(self) -> bool:
        """Whether the network's output has a second half of channels for the variance."""
        return self.variance_type in ("learned", "learned_range")


def choose_table(
    schedule: NoiseSchedule | StepTable,
    method: str,
    *,
    num_inference_steps: int | str | None,
    timestep_spacing: str | None,
    steps_offset: int,
    timesteps: Sequence[int] | Tensor | None,
    variance_type: str,
    prediction_type: str,
    settings: Mapping[str, Any],
) -> StepTable:
    """Return the table of a method at the timesteps listed, or at those of a spacing; or the table given.

    Args:
        schedule: the forward process, or the table itself.
        settings: of the method; None stands for its own default.
        others: as for `Sampler`.

    Raises:
        TypeError, ValueError: a setting is not known, is another method's, or is fixed by a given table; or as
            `NoiseSchedule.timesteps` and `check_timesteps`.
    """
    if variance_type not in VARIANCE_TYPES:
        raise ValueError(f"variance_type is {variance_type!r}, must be one of {', '.join(VARIANCE_TYPES)}")
    given = {name: value for name, value in settings.items() if value is not None}
    if isinstance(schedule, StepTable):
        defaults = {
            "method": (method, "ddpm"),
            "num_inference_steps": (num_inference_steps, None),
            "timestep_spacing": (timestep_spacing, None),
            "steps_offset": (steps_offset, 0),
            "prediction_type": (prediction_type, "epsilon"),
            **{name: (value, None) for name, value in [*given.items(), ("timesteps", timesteps)]},
        }
        for name, (value, default) in defaults.items():
            if value is not default and value != default:
                raise ValueError(f"{name} is {value!r} but schedule is a StepTable, which already fixes it")
        return schedule
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule is a {type(schedule).__name__}, must be a NoiseSchedule or a StepTable")
    return method_table(
        method,
        schedule,
        timesteps,
        num_inference_steps=num_inference_steps,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        prediction_type=prediction_type,
        variance_type=variance_type,
        **given,
    )


def checked_table(table: StepTable, start: int, given: bool, settings: LoopSettings) -> StepTable:
    """Return `table` if a run of these settings can start from its row `start`.

    Args:
        given: whether the states to start from are given.

    Raises:
        TypeError, ValueError: it cannot; the message says why.
    """
    if not isinstance(table, StepTable):
        raise TypeError(f"table is a {type(table).__name__}, must be a StepTable")
    if table.learned is not None and not settings.learned_variance:
        raise ValueError(f"table has a learned variance but variance_type is {settings.variance_type!r}")
    if isinstance(start, bool) or not isinstance(start, numbers.Integral) or not 0 <= start < len(table):
        raise ValueError(f"start is {start!r}, must be from 0 to {len(table) - 1}, a row of the table")
    if table.begins and start not in table.begins:
        begins = ", ".join(map(str, table.begins))
        raise ValueError(f"start is {start}, inside a step of several evaluations, must be one of {begins}")
    if not given and start > 0:
        raise ValueError(f"start is {start} but x_T is None, must be given: samples at the level of that row")
    if start > 0 and len(table.skip(start)) != len(table) - start:
        raise ValueError(f"start is {start}, where this table begins with other rows: must be 0 of table.skip({start})")
    if not given and table.start[1] == 0:
        raise ValueError("table starts from clean samples but x_T is None, must be given")
    return table


def clipping(
    clip_sample: bool, clip_sample_range: float, thresholding: bool, ratio: float, maximum: float
) -> tuple[float | None, DynamicThreshold | None]:
    """Return the loop's clip_range and threshold; at least one is None.

    Raises:
        ValueError: a number is out of range, or is given without thresholding.
    """
    if clip_sample and not 0 < clip_sample_range < math.inf:
        raise ValueError(f"clip_sample_range is {clip_sample_range}, must be a positive number")
    if not thresholding:
        for name, value, default in (("dynamic_thresholding_ratio", ratio, 0.995), ("sample_max_value", maximum, 1.0)):
            if value != default:
                raise ValueError(f"{name} is {value} but thresholding is False; {name} is a setting of thresholding")
        return (float(clip_sample_range) if clip_sample else None), None
    if not 0 < ratio <= 1:
        raise ValueError(f"dynamic_thresholding_ratio is {ratio}, must be in (0, 1]")
    if not 0 < maximum < math.inf:
        raise ValueError(f"sample_max_value is {maximum}, must be a positive finite number")
    return None, DynamicThreshold(float(ratio), float(maximum))


def check_guidance(interval: Sequence[int] | None, rescale: float) -> tuple[int, int] | None:
    """Return `guidance_interval` as a pair.

    Raises:
        ValueError: it is not (lowest, highest), or `rescale` is not in [0, 1].
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale is {rescale}, must be from 0 to 1")
    if interval is None:
        return None
    pair = tuple(interval)
    if len(pair) != 2 or not all(isinstance(t, numbers.Real) for t in pair) or not pair[0] <= pair[1]:
        raise ValueError(f"guidance_interval is {interval}, must be (lowest, highest) timestep")
    return pair


def check_null_class(null_class: object, num_classes: int | None, guidance_scale: float | None = None) -> None:
    """Raise ValueError unless `null_class` is a label of the model (any, if its number is not known) or not needed."""
    if null_class is None:
        if guidance_scale not in (None, 1.0):
            raise ValueError("guidance_scale needs a null_class, and the model's config names none")
        return
    known = isinstance(null_class, numbers.Integral) and not isinstance(null_class, bool)
    if not known or (num_classes is not None and not 0 <= null_class < num_classes):  # type: ignore[operator]
        what = "an integer" if num_classes is None else f"a label from 0 to {num_classes - 1}"
        raise ValueError(f"null_class is {null_class!r}, must be {what}")


def check_out_channels(settings: LoopSettings, channels: int | None) -> None:
    """Raise ValueError if so many output channels cannot hold a learned variance; None: their number is not known."""
    if settings.learned_variance and channels is not None and channels % 2:
        raise ValueError(
            f"variance_type is {settings.variance_type!r} but the model has out_channels {channels}, must have twice "
            "those of a sample"
        )


def choose_classifier(classifier_fn: ClassifierFn | None, classifier_scale: float, shifts: Shifts) -> Classifier | None:
    """Return the guidance by a classifier, which shifts the quantity that the table names (`shifts`).

    Raises:
        ValueError: there is a scale but no function, or it is not finite.
        TypeError: the function cannot be called.
    """
    if classifier_fn is None:
        if classifier_scale != 1:
            raise ValueError(f"classifier_scale is {classifier_scale} but classifier_fn is None, must be given with it")
        return None
    if not callable(classifier_fn):
        raise TypeError(
            f"classifier_fn is a {type(classifier_fn).__name__}, must be a function of (x, t, class_labels)"
        )
    if not math.isfinite(classifier_scale):
        raise ValueError(f"classifier_scale is {classifier_scale}, must be a finite number")
    return Classifier(classifier_fn, float(classifier_scale), shifts)
