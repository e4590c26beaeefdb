"""One batch on the device and the step that advances it.

One step is "predict, then `reverse_step`". Everything it needs (state, table, step counter, keys, labels) is in
device memory before the first one, so that the host only has to ask for the next.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from fastddpm_kernels import philox
from fastddpm_kernels.reverse_step import reverse_step_
from torch import Tensor

from fastddpm.batch import Batch
from fastddpm.coefficients import StepTable
from fastddpm.guidance import (
    Classifier,
    add_to_prediction,
    combine,
    learned_std,
    log_of_variance,
    rescale_guidance,
    score_shift,
)
from fastddpm.network import Network
from fastddpm.settings import LoopSettings


class Body(NamedTuple):
    """Which of the loop's few bodies a step runs: all that the host chooses.

    Attributes:
        network: False for a step that needs no prediction, such as one back up in RePaint.
        guided: whether the unconditional half is computed.
    """

    network: bool
    guided: bool


class Loop:
    """The device state of one batch and the step that advances it.

    Attributes:
        x: float32 [N, ...], the state x_t.
        x0: float32 [N, ...], the x0 predicted last, or None where it is not kept.
        inputs: [N, ...], or [2N, ...] under guidance, what the network reads; `net_in`, the channels of it that hold
            the state, which the kernel writes.
        step: int64 [1], index of the next row of the table.
        bodies: for every row the body that its step runs.
    """

    def __init__(
        self,
        network: Network,
        table: StepTable,
        x: Tensor,
        batch: Batch,
        settings: LoopSettings,
        *,
        start: int = 0,
        keep_x0: bool = False,
    ) -> None:
        """The loop before the step of row `start`, at whose level `x` [N, ...] is. `x` itself is not changed."""
        device = x.device
        self.network, self.settings = network, settings
        self.x = x.to(torch.float32).clone(memory_format=torch.contiguous_format)
        self.step = torch.full((1,), start, dtype=torch.int64, device=device)
        self.timesteps = table.timesteps.to(device)
        self.rows = _first_order_at(start, table.rows).to(device, torch.float32)
        self.log_variance = None if table.log_variance is None else table.log_variance.to(device, torch.float32)
        self.learned, self.multistep = table.learned, table.multistep
        self.score_shift: Tensor | None = None
        if settings.classifier is not None and settings.classifier.shifts == "epsilon":
            self.score_shift = score_shift(table).to(device, torch.float32)

        self.keys, self.class_labels, self.guidance_scale = batch.keys, batch.class_labels, batch.guidance_scale
        self.labels = batch.class_labels  # of the network: the unconditional half comes first
        if self.guidance_scale is not None and batch.class_labels is not None:
            null = torch.full_like(batch.class_labels, settings.null_class or 0)
            self.labels = torch.cat([null, batch.class_labels])
        self.known, self.known_mask = batch.known, batch.known_mask
        self.known_table = None if batch.known is None else table.levels.to(device, torch.float32)

        self.x0: Tensor | None = None
        if self.multistep or settings.self_condition or keep_x0:
            self.x0 = torch.zeros_like(self.x)
        # What the network reads beside the state has its place in the input once and for all.
        channels = self.x.shape[1]
        concatenates = settings.self_condition and not network.takes_self_condition
        parts = [torch.zeros_like(self.x)] if concatenates else []
        parts += [self.x] if batch.condition is None else [self.x, batch.condition]
        copies = 1 if self.guidance_scale is None else 2
        self.inputs = torch.cat([torch.cat([part.to(network.dtype) for part in parts], dim=1)] * copies)
        first = channels if concatenates else 0
        self.net_in = self.inputs[:, first : first + channels]
        self.self_condition: Tensor | None = None
        if settings.self_condition:
            self.self_condition = self.inputs[:, :channels] if concatenates else torch.zeros_like(self.net_in)

        low, high = settings.guidance_interval or (-math.inf, math.inf)
        guidable = self.guidance_scale is not None
        self.bodies = [
            Body(network=needed, guided=needed and guidable and low <= t <= high)
            for needed, t in zip(table.needs_network.tolist(), table.timesteps.tolist(), strict=True)
        ]

    def body(self, kind: Body, noise: Tensor | None = None, known_noise: Tensor | None = None) -> None:
        """One step: x_t to x_{t-1}, in place. `kind` is the one in `bodies` of the row that `step` is at.

        `noise` [N, ...] takes the place of the Philox noise, `known_noise` of that of the known region.
        """
        if kind.network:
            self._denoise(kind.guided, noise, known_noise)
        else:
            self._renoise(noise)
        self.step += 1

    def _denoise(self, guided: bool, noise: Tensor | None, known_noise: Tensor | None) -> None:
        settings, channels = self.settings, self.x.shape[1]
        scale = self.guidance_scale if guided else None
        t = self.timesteps.index_select(0, self.step)
        out = self._predict(t, guided)
        if scale is not None and settings.guidance_rescale:
            out = rescale_guidance(out, channels, scale, settings.guidance_rescale)
        if settings.classifier is not None:
            out, noise = self._classify(settings.classifier, out, t, noise)
        threshold = None
        if settings.threshold is not None:
            a, b = self.rows.index_select(0, self.step)[0, :2]
            threshold = settings.threshold(a * self.x + b * combine(out, channels, scale))
        reverse_step_(
            self.x,
            out,
            self.rows,
            self.step,
            x0=self.x0,
            net_in=self._part(self.net_in, guided),
            multistep=self.multistep,
            keys=self.keys if noise is None or self.known is not None else None,
            noise=noise,
            clip_range=settings.clip_range,
            threshold=threshold,
            log_variance=self.log_variance,
            guidance_scale=scale,
            known=self.known,
            known_mask=self.known_mask,
            known_table=self.known_table,
            known_noise=known_noise,
            backend=settings.backend,
        )
        self._mirror(guided)
        if self.self_condition is not None and self.x0 is not None:
            for half in self.self_condition.split(len(self.x)):
                half.copy_(self.x0)

    def _renoise(self, noise: Tensor | None) -> None:
        """A step that asks the network nothing, D x + S z: the state stands for a prediction, which is not read."""
        reverse_step_(
            self.x,
            self.x,
            self.rows,
            self.step,
            net_in=self._part(self.net_in, guided=False),
            keys=self.keys if noise is None else None,
            noise=noise,
            backend=self.settings.backend,
        )
        self._mirror(guided=False)

    def _predict(self, t: Tensor, guided: bool) -> Tensor:
        """The network's output for the state, of both halves or of the conditional one alone."""
        inputs = self._part(self.inputs, guided)
        labels = None if self.labels is None else self._part(self.labels, guided)
        self_condition = None
        if self.self_condition is not None and self.network.takes_self_condition:
            self_condition = self._part(self.self_condition, guided)
        out = self.network(inputs, t.expand(len(inputs)), labels, self_condition)
        _check_output(out, (len(inputs), *self.x.shape[1:]), self.settings)
        if self.learned is None:
            return out[:, : self.x.shape[1]] if self.settings.learned_variance else out
        return log_of_variance(out, self.x.shape[1]) if self.learned == "variance" else out

    def _classify(
        self, classifier: Classifier, out: Tensor, t: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`out` and the step's noise, one of which carries the classifier's gradient."""
        n, channels = self.x.shape[:2]
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
        return out, noise + std * gradient

    def _part(self, halves: Tensor, guided: bool) -> Tensor:
        """What a body reads or writes of a tensor for the whole batch: under guidance both halves or the last alone."""
        return halves if guided or self.guidance_scale is None else halves[len(self.x) :]

    def _mirror(self, guided: bool) -> None:
        """Brings the unconditional half up to date where the kernel did not write it."""
        if self.guidance_scale is not None and not guided:
            first, last = self.net_in.split(len(self.x))
            first.copy_(last)


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
