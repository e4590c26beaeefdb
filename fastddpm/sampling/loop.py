"""One batch on the device and the step that advances it.

One step is "predict, then `reverse_step`". Everything it needs (state, table, step counter, keys, labels, given noise)
is in device memory that stays where it is: a batch is loaded by copying its values in, and the host then only has to
ask for the next step. That is what a CUDA graph can hold, and why one graph serves every batch of the same layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from fastddpm_kernels import philox
from fastddpm_kernels.reverse_step import reverse_step_
from torch import Tensor

from fastddpm.networks.frozen import Program
from fastddpm.networks.network import Bound, Network
from fastddpm.process.tables import StepTable
from fastddpm.sampling.batch import Batch
from fastddpm.sampling.guidance import (
    Classifier,
    add_to_prediction,
    clipped_prediction,
    combine,
    learned_std,
    log_of_variance,
    rescale_guidance,
    score_shift,
)
from fastddpm.sampling.settings import LoopSettings

ROWS = 64  # tables have room for a multiple of this: their lengths need not agree, and graphs can be tried out in it


class Body(NamedTuple):
    """Which of the loop's few bodies a step runs: all that the host chooses.

    Attributes:
        network: False for a step that needs no prediction, such as one back up in RePaint.
        guided: whether the unconditional half is computed.
    """

    network: bool
    guided: bool


@dataclass(frozen=True)
class Layout:
    """What of a batch and its table is baked into a loop: which tensors there are, and their shapes.

    Attributes:
        shape: (N, C, ...) of the state.
        rows: rows that the loop has room for.
        learned: as in `StepTable`.
        multistep: whether some row reads the x0 of the step before.
        keep_x0: whether the predicted x0 is wanted.
        guidance: rows of the guidance scale, 1 or N; None without an unconditional half.
        labelled: whether the network is given labels.
        real_labels: the shape of one where they are real numbers; None where they are integers.
        condition: channels of the condition.
        known, known_mask: their shapes, or None.
        noise, known_noise: whether the user gives them.
        score_shift: whether a classifier moves epsilon.
        mean_shift: whether a classifier moves the mean, and not by the table's S.
    """

    shape: tuple[int, ...]
    rows: int
    learned: str | None = None
    multistep: bool = False
    keep_x0: bool = False
    guidance: int | None = None
    labelled: bool = False
    real_labels: tuple[int, ...] | None = None
    condition: int = 0
    known: tuple[int, ...] | None = None
    known_mask: tuple[int, ...] | None = None
    noise: bool = False
    known_noise: bool = False
    score_shift: bool = False
    mean_shift: bool = False


def layout_of(
    table: StepTable,
    shape: tuple[int, ...],
    batch: Batch,
    settings: LoopSettings,
    *,
    keep_x0: bool = False,
    noise: bool = False,
    known_noise: bool = False,
) -> Layout:
    """The layout of the loop that takes `batch`, of samples of `shape` [N, ...], through `table`."""
    classifier, labels = settings.classifier, batch.class_labels
    return Layout(
        shape=tuple(shape),
        rows=-(-len(table) // ROWS) * ROWS,
        learned=table.learned,
        multistep=table.multistep,
        keep_x0=keep_x0,
        guidance=None if batch.guidance_scale is None else len(batch.guidance_scale),
        labelled=labels is not None,
        real_labels=None if labels is None or not labels.is_floating_point() else tuple(labels.shape[1:]),
        condition=0 if batch.condition is None else batch.condition.shape[1],
        known=None if batch.known is None else tuple(batch.known.shape),
        known_mask=None if batch.known_mask is None else tuple(batch.known_mask.shape),
        noise=noise,
        known_noise=known_noise,
        score_shift=classifier is not None and classifier.shifts != "mean",
        mean_shift=classifier is not None and classifier.shifts == "mean" and table.mean_std is not None,
    )


class Loop:
    """The device state of one batch and the step that advances it.

    No attribute that is a tensor is ever replaced.

    Attributes:
        x: float32 [N, ...], the state x_t.
        x0: float32 [N, ...], the x0 predicted last, or None where it is not kept.
        inputs: [N, ...], or [2N, ...] under guidance, what the network reads; `net_in`, the channels of it that hold
            the state, which the kernel writes.
        step: int64 [1], index of the next row of the table.
        noise, known_noise: float32 [N, ...], where the user's noise for the next step goes; None where it is drawn.
        bodies: for every row of the table loaded last the body that its step runs.
    """

    def __init__(self, network: Network, layout: Layout, settings: LoopSettings) -> None:
        """A loop with room for batches of `layout`; it runs once one is loaded."""
        self.network, self.layout, self.settings = network, layout, settings
        self.bodies: list[Body] = []
        device, (n, channels, *spatial) = network.device, layout.shape

        def zeros(*shape: int, dtype: torch.dtype = torch.float32, given: bool = True) -> Tensor | None:
            return torch.zeros(shape, dtype=dtype, device=device) if given else None

        self.x = torch.zeros(layout.shape, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.timesteps = torch.zeros(layout.rows, dtype=torch.int64, device=device)
        self.rows = torch.zeros(layout.rows, 7, device=device)
        self.log_variance = zeros(layout.rows, 2, given=layout.learned is not None)
        self.score_shift = zeros(layout.rows, given=layout.score_shift)
        self.adds_noise = zeros(layout.rows, given=layout.mean_shift)
        self.keys = torch.zeros(n, 2, dtype=torch.int64, device=device)
        self.guidance_scale = zeros(layout.guidance or 0, given=layout.guidance is not None)
        self.copies = 1 if layout.guidance is None else 2
        # The network's labels: the unconditional half comes first.
        one, of = (layout.real_labels, torch.float32) if layout.real_labels is not None else ((), torch.int64)
        self.labels = zeros(self.copies * n, *one, dtype=of, given=layout.labelled)
        self.class_labels = None if self.labels is None else self.labels[-n:]
        self.known = zeros(*layout.known or (), given=layout.known is not None)
        self.known_mask = zeros(*layout.known_mask or (), given=layout.known_mask is not None)
        self.known_table = zeros(layout.rows, 2, given=layout.known is not None)
        self.noise = zeros(*layout.shape, given=layout.noise)
        self.known_noise = zeros(*layout.shape, given=layout.known_noise)
        self.x0 = zeros(*layout.shape, given=layout.multistep or settings.self_condition or layout.keep_x0)

        # What the network reads beside the state has its place in the input once and for all.
        concatenates = settings.self_condition and not network.takes_self_condition
        first = channels if concatenates else 0
        rows, last = self.copies * n, first + channels
        self.inputs = network.new_input((rows, last + layout.condition, *spatial))
        self.net_in, self.condition = self.inputs[:, first:last], self.inputs[:, last:]
        self.self_condition: Tensor | None = None
        if settings.self_condition:
            self.self_condition = (
                self.inputs[:, :first] if concatenates else network.new_input((rows, channels, *spatial))
            )

        # A classifier may guide a U-Net that knows no classes: then the labels are the classifier's alone.
        classless = settings.classifier is not None and not getattr(network.config, "has_classes", True)
        told = None if classless else self.labels
        self._bound: dict[bool, Bound | Program] = {}  # by whether a step is guided
        guidable, always = layout.guidance is not None, settings.guidance_interval is None
        for guided in ((True,) if always else (True, False)) if guidable else (False,):
            self._bound[guided] = network.bind(
                self._part(self.inputs, guided),
                self.timesteps,
                None if told is None else self._part(told, guided),
                None if self.self_condition is None or concatenates else self._part(self.self_condition, guided),
            )

    def load(self, table: StepTable, x: Tensor, batch: Batch, start: int = 0) -> None:
        """Makes this the loop of `batch`, before the step of row `start`, at whose level `x` [N, ...] is.

        The layout must be that of `layout_of`. Given noise is zero until the host puts it where it belongs.
        """
        n, rows = self.layout.shape[0], len(table)
        self.timesteps[:rows].copy_(table.timesteps)
        self.rows[:rows].copy_(_first_order_at(start, table.rows))
        if self.adds_noise is not None and table.mean_std is not None:  # S is of the shift, and z is 0 where it was 0
            self.rows[:rows, 6].copy_(table.mean_std)
            self.adds_noise[:rows].copy_(table.rows[:, 6] != 0)
        _fill(self.log_variance, table.log_variance, rows)
        _fill(self.known_table, table.levels, rows)
        _fill(self.score_shift, score_shift(table) if self.score_shift is not None else None, rows)
        self.keys.copy_(batch.keys)
        _fill(self.guidance_scale, batch.guidance_scale)
        if self.labels is not None and batch.class_labels is not None:
            self.labels[:-n].fill_(self.settings.null_class or 0)
            self.labels[-n:].copy_(batch.class_labels)
        _fill(self.known, batch.known)
        _fill(self.known_mask, batch.known_mask)
        self.x.copy_(x)
        for half in self.net_in.split(n):
            half.copy_(self.x)
        if batch.condition is not None:
            for half in self.condition.split(n):
                half.copy_(batch.condition)
        for buffer in (self.x0, self.self_condition, self.noise, self.known_noise):
            if buffer is not None:
                buffer.zero_()
        self.step.fill_(start)

        low, high = self.settings.guidance_interval or (-math.inf, math.inf)
        guidable = self.guidance_scale is not None
        self.bodies = [
            Body(network=needed, guided=needed and guidable and low <= t <= high)
            for needed, t in zip(table.needs_network.tolist(), table.timesteps.tolist(), strict=True)
        ]
        for bound in self._bound.values():
            bound.load()

    def body(self, kind: Body) -> None:
        """One step: x_t to x_{t-1}, in place. `kind` is the one in `bodies` of the row that `step` is at."""
        if kind.network:
            self._denoise(kind.guided)
        else:
            self._renoise()
        self.step += 1

    def _denoise(self, guided: bool) -> None:
        settings, channels = self.settings, self.x.shape[1]
        scale = self.guidance_scale if guided else None
        out, noise = self._predict(guided), self.noise
        if scale is not None and settings.guidance_rescale:
            out = rescale_guidance(out, channels, scale, settings.guidance_rescale)
        clip_range, dynamic, threshold = settings.clip_range, settings.threshold, None
        if settings.classifier is not None:
            if settings.classifier.shifts == "clipped epsilon":
                row = self.rows.index_select(0, self.step)[0]
                out = clipped_prediction(combine(out, channels, scale), self.x, row, clip_range, dynamic)
                guided, scale, clip_range, dynamic = False, None, None, None
            out, noise = self._classify(settings.classifier, out, noise)
        if dynamic is not None:
            a, b = self.rows.index_select(0, self.step)[0, :2]
            threshold = dynamic(a * self.x + b * combine(out, channels, scale))
        reverse_step_(
            self.x,
            out,
            self.rows,
            self.step,
            x0=self.x0,
            net_in=self._part(self.net_in, guided),
            multistep=self.layout.multistep,
            keys=self.keys if noise is None or self.known is not None else None,
            noise=noise,
            clip_range=clip_range,
            threshold=threshold,
            log_variance=self.log_variance,
            guidance_scale=scale,
            known=self.known,
            known_mask=self.known_mask,
            known_table=self.known_table,
            known_noise=self.known_noise,
            backend=settings.backend,
        )
        self._mirror(guided)
        if self.self_condition is not None and self.x0 is not None:
            for half in self.self_condition.split(len(self.x)):
                half.copy_(self.x0)

    def _renoise(self) -> None:
        """A step that asks the network nothing, D x + S z: the state stands for a prediction, which is not read."""
        reverse_step_(
            self.x,
            self.x,
            self.rows,
            self.step,
            net_in=self._part(self.net_in, guided=False),
            keys=self.keys if self.noise is None else None,
            noise=self.noise,
            backend=self.settings.backend,
        )
        self._mirror(guided=False)

    def _predict(self, guided: bool) -> Tensor:
        """The network's output for the state, of both halves or of the conditional one alone."""
        out = self._bound[guided](self.step)
        rows = len(self.x) * (2 if guided else 1)
        _check_output(out, (rows, *self.x.shape[1:]), self.settings)
        if self.layout.learned is None:
            return out[:, : self.x.shape[1]] if self.settings.learned_variance else out
        return log_of_variance(out, self.x.shape[1]) if self.layout.learned == "variance" else out

    def _classify(self, classifier: Classifier, out: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`out` and the step's noise, one of which carries the classifier's gradient."""
        n, channels = self.x.shape[:2]
        t = self.timesteps.index_select(0, self.step)
        gradient = classifier(self.x, t.expand(n), self.class_labels)
        if self.score_shift is not None:
            return add_to_prediction(out, channels, self.score_shift.index_select(0, self.step) * gradient), noise
        # The mean moves by std^2 * gradient: that is noise z + std * gradient.
        if self.log_variance is None:
            std = self.rows.index_select(0, self.step)[0, 6]
        else:
            std = learned_std(out[-n:], channels, self.log_variance.index_select(0, self.step))
        if noise is None:
            noise = philox.normal(
                self.keys,
                self.x.shape[1:],
                step=self.step,
                stream=philox.STREAM_STEP,
                backend=self.settings.backend,
            )
        if self.adds_noise is not None:
            noise = noise * self.adds_noise.index_select(0, self.step)
        return out, noise + std * gradient

    def _part(self, halves: Tensor, guided: bool) -> Tensor:
        """What a body reads or writes of a tensor for the whole batch: under guidance both halves or the last alone."""
        return halves if guided or self.guidance_scale is None else halves[len(self.x) :]

    def _mirror(self, guided: bool) -> None:
        """Brings the unconditional half up to date where the kernel did not write it."""
        if self.guidance_scale is not None and not guided:
            first, last = self.net_in.split(len(self.x))
            first.copy_(last)


def _fill(buffer: Tensor | None, values: Tensor | None, rows: int | None = None) -> None:
    """Copies values into the first `rows` of a buffer, all of it if None; nothing where there is none."""
    if buffer is not None and values is not None:
        buffer[:rows].copy_(values)


def _first_order_at(start: int, rows: Tensor) -> Tensor:
    """`rows`, where the one that the loop starts from does without the x0 before: as if that were the new one."""
    if float(rows[start, 5]) == 0:
        return rows
    rows = rows.clone()
    rows[start, 2] += rows[start, 5]
    rows[start, 5] = 0
    return rows


def _check_output(out: Tensor, shape: tuple[int, ...], settings: LoopSettings) -> None:
    """Raises ValueError unless the network's output is like samples of `shape`, with twice the channels if learned."""
    channels = shape[1] * (2 if settings.learned_variance else 1)
    if tuple(out.shape) == (shape[0], channels, *shape[2:]):
        return
    if tuple(out.shape) not in (shape, (shape[0], 2 * shape[1], *shape[2:])):
        raise ValueError(f"model returned shape {list(out.shape)}, must return {[shape[0], channels, *shape[2:]]}")
    raise ValueError(
        f"variance_type is {settings.variance_type!r} but the model returned {out.shape[1]} channels for samples of "
        f"{shape[1]}: a learned variance takes twice the channels, a fixed one as many"
    )
