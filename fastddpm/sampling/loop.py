"""The device state of a batch and the step that advances it: "predict, then `reverse_step`".

Everything a step needs (state, table, step counter, keys, labels, given noise) is in device buffers with fixed
addresses. Loading a batch copies its values in; the host then only asks for the next step. A CUDA graph can hold such
a step, and one graph serves every batch whose buffers have the same names and shapes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from fastddpm_kernels import philox
from fastddpm_kernels.philox import torch_normal
from fastddpm_kernels.reverse_step import reverse_step_
from torch import Tensor

from fastddpm.networks.network import BoundNetwork, Network
from fastddpm.process.tables import StepTable
from fastddpm.sampling.batch import Batch
from fastddpm.sampling.guidance import (
    add_to_prediction,
    clipped_prediction,
    combine,
    learned_std,
    log_of_variance,
    rescale_guidance,
    score_shift,
)
from fastddpm.sampling.settings import LoopSettings

ROWS = 64  # tables get room for a multiple of this, so that similar lengths share a loop and graphs can be tried out
AHEAD_STEPS, AHEAD_NUMBERS = 32, 2**16  # the most noise made at once on the CPU
_CONDITION = "condition "  # begins the names of the buffers for a network's further arguments

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Body(NamedTuple):
    """The operations that a step runs, chosen by the host.

    Attributes:
        network: False for a step without a prediction, such as one back up in RePaint.
        guided: whether the unconditional half is computed.
        multistep: whether the x0 of the previous step is read.
        variance: whether the network predicts the variance itself instead of its logarithm.
        first: whether the network gets no previous x0, instead of zeros.
    """

    network: bool
    guided: bool
    multistep: bool = False
    variance: bool = False
    first: bool = False


def buffer_shapes(
    table: StepTable,
    shape: tuple[int, ...],
    batch: Batch,
    settings: LoopSettings,
    network: Network,
    *,
    keep_x0: bool = False,
    noise: bool = False,
    known_noise: bool = False,
) -> Shapes:
    """Return the shapes and dtypes of a loop's buffers by name. Batches with equal ones may share a loop.

    Args:
        table: the table to walk.
        shape: [N, C, ...] of the samples.
        batch: of these samples.
        settings, network: of the sampler.
        keep_x0: whether the predicted x0 is wanted.
        noise, known_noise: whether the user gives them.
    """
    (n, channels, *size), rows = shape, -(-len(table) // ROWS) * ROWS
    halves = 1 if batch.guidance_scale is None else 2
    beside = 0 if batch.condition is None else batch.condition.shape[1]
    if settings.self_condition and not network.takes_self_condition:
        beside += channels
    labels, shifts = batch.class_labels, None if settings.classifier is None else settings.classifier.shifts
    integers: Shapes = {
        "step": ((1,), torch.int64),
        "timesteps": ((rows,), torch.float32 if table.timesteps.is_floating_point() else torch.int64),
        "keys": ((n, 2), torch.int64),
    }
    if labels is not None:
        integers["labels"] = ((halves * n, *labels.shape[1:]), labels.dtype)
    for name, value in batch.conditions.items():
        integers[f"{_CONDITION}{name}"] = ((halves * n, *value.shape[1:]), value.dtype)
    history = table.rows.shape[1] - 7
    floats: dict[str, tuple[int, ...] | None] = {
        "x": shape,
        "rows": (rows, table.rows.shape[1]),
        "inputs": (halves * n, channels + beside, *size),
        "self_condition": (halves * n, *shape[1:]) if settings.self_condition else None,
        "x0": shape if table.multistep or history or settings.self_condition or keep_x0 else None,
        "history": (history, *shape) if history else None,
        "noise": shape if noise else None,
        "log_variance": None if table.learned is None else (rows, 2),
        "score_shift": (rows,) if shifts not in (None, "mean") else None,
        "adds_noise": (rows,) if shifts == "mean" and table.mean_std is not None else None,
        "guidance_scale": _shape(batch.guidance_scale),
        "known": _shape(batch.known),
        "known_mask": _shape(batch.known_mask),
        "known_table": None if batch.known is None else (rows, 2),
        "known_noise": shape if known_noise else None,
    }
    return integers | {name: (tuple(each), torch.float32) for name, each in floats.items() if each is not None}


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


class Loop:
    """The buffers of a batch, the network on them, and the step.

    Attributes:
        shapes: of the buffers, from `buffer_shapes`.
        buffers: by name; none is ever replaced. "x" is the state x_t, float32 [N, ...]; "x0" the latest predicted x0;
            "inputs" the network's input, of both halves under guidance, the unconditional one first; "step" int64
            [1], the next row of the table; "noise" and "known_noise" the user's noise for the next step.
        bodies: of every row of the loaded table.
    """

    def __init__(self, network: Network, shapes: Shapes, settings: LoopSettings) -> None:
        """Make a loop that can run once a batch is loaded."""
        self.network, self.shapes, self.settings = network, shapes, settings
        self.bodies: list[Body] = []
        self.buffers = b = {
            name: torch.zeros(shape, dtype=dtype, device=network.device)
            for name, (shape, dtype) in shapes.items()
            if name not in ("inputs", "self_condition")
        }
        self.x, self.step = b["x"], b["step"]
        channels = self.x.shape[1]
        b["inputs"] = network.new_input(shapes["inputs"][0])
        concatenates = "self_condition" in shapes and not network.takes_self_condition
        first = channels if concatenates else 0
        # The network's input is [x0 predicted before, x, condition]: the kernel writes the part that is x.
        self._net_in = b["inputs"][:, first : first + channels]
        self._condition = b["inputs"][:, first + channels :]
        if "self_condition" in shapes:
            own = None if concatenates else network.new_input(shapes["self_condition"][0])
            b["self_condition"] = b["inputs"][:, :channels] if own is None else own
        self._labels = b.get("labels")
        self._conditions = {k.removeprefix(_CONDITION): v for k, v in b.items() if k.startswith(_CONDITION)}
        self._ahead = _NoiseAhead(self) if network.device.type == "cpu" and settings.backend == "eager" else None

        # A classifier may guide a U-Net without classes: then the labels are the classifier's alone.
        classless = settings.classifier is not None and not getattr(network.config, "has_classes", True)
        labels = None if classless else self._labels
        self._bound: dict[tuple[bool, bool], BoundNetwork] = {}  # by whether a step is guided, and the first
        guidable, always = "guidance_scale" in b, settings.guidance_interval is None
        conditions = "self_condition" in b and not concatenates
        starts = (False, True) if conditions and network.starts_without else (False,)
        for guided in ((True,) if always else (True, False)) if guidable else (False,):
            for without in starts:
                self._bound[guided, without] = network.bind(
                    self._half(b["inputs"], guided),
                    b["timesteps"],
                    None if labels is None else self._half(labels, guided),
                    self._half(b["self_condition"], guided) if conditions and not without else None,
                    {name: self._half(value, guided) for name, value in self._conditions.items()},
                )

    def load(self, table: StepTable, x: Tensor, batch: Batch, start: int = 0) -> None:
        """Put a batch into the buffers, before the step of row `start`, at whose level `x` [N, ...] is.

        Given noise is zero until the host puts it into its buffer.
        """
        b, n, rest, rows = self.buffers, len(self.x), table.skip(start), slice(start, len(table))
        tables = {
            "timesteps": rest.timesteps,
            "rows": rest.rows,
            "log_variance": rest.log_variance,
            "known_table": rest.levels,
            "score_shift": score_shift(rest) if "score_shift" in b else None,
            "adds_noise": rest.rows[:, 6] != 0,
        }
        for name, value in tables.items():
            if value is not None and name in b:
                b[name][rows].copy_(value)
        if "adds_noise" in b and rest.mean_std is not None:  # the shift uses S, and z is 0 where S was 0
            b["rows"][rows, 6].copy_(rest.mean_std)
        for name, value in {"x": x, **vars(batch)}.items():
            if value is not None and name in b:
                b[name].copy_(value)
        if self._labels is not None and batch.class_labels is not None:
            if (others := batch.unconditional.get("class_labels")) is not None:
                self._labels[:-n].copy_(others)
            else:
                self._labels[:-n].fill_(self.settings.null_class or 0)
            self._labels[-n:].copy_(batch.class_labels)
        for name, buffer in self._conditions.items():
            buffer[-n:].copy_(batch.conditions[name])
            if len(buffer) > n:
                buffer[:-n].copy_(batch.unconditional.get(name, batch.conditions[name]))
        for half in self._net_in.split(n):
            half.copy_(self.x)
        if batch.condition is not None:
            for half in self._condition.split(n):
                half.copy_(batch.condition)
        for name in ("x0", "history", "self_condition", "noise", "known_noise"):
            if name in b:
                b[name].zero_()
        self.step.fill_(start)
        if self._ahead is not None:
            self._ahead.load(table)

        low, high = self.settings.guidance_interval or (-math.inf, math.inf)
        # A table that restarts may need no earlier predictions: its rows then multiply the buffers' zeros by zero.
        multistep = rest.multistep or "history" in b
        guidable, variance = "guidance_scale" in b, rest.learned == "variance"
        self.bodies = [Body(False, False)] * start + [
            Body(True, guidable and low <= t <= high, multistep, variance) if needed else Body(False, False)
            for needed, t in zip(rest.needs_network.tolist(), rest.timesteps.tolist(), strict=True)
        ]
        if any(without for _, without in self._bound):
            self.bodies[start] = self.bodies[start]._replace(first=True)
        for bound in self._bound.values():
            bound.load()

    def body(self, kind: Body) -> None:
        """Run one step in place, x_t to x_{t-1}. `kind` is that of the row which `step` is at."""
        if kind.network:
            self._reverse(kind, self._bound[kind.guided, kind.first](self.step))
        else:
            self._renoise()
        self.step += 1

    def _reverse(self, kind: Body, out: Tensor) -> None:
        """Advance the state by the network's output."""
        settings, b, guided, channels = self.settings, self.buffers, kind.guided, self.x.shape[1]
        out = self._checked(kind, out)
        scale = b["guidance_scale"] if guided else None
        if scale is not None and settings.guidance_rescale:
            out = rescale_guidance(out, channels, scale, settings.guidance_rescale)
        noise, clip_range, dynamic, threshold = self._noise(), settings.clip_range, settings.threshold, None
        if settings.classifier is not None:
            if settings.classifier.shifts == "clipped epsilon":
                out = clipped_prediction(
                    combine(out, channels, scale), self.x, self._row("rows")[0], clip_range, dynamic
                )
                guided, scale, clip_range, dynamic = False, None, None, None
            out, noise = self._classify(out, noise)
        if dynamic is not None:
            a, of_out = self._row("rows")[0, :2]
            threshold = dynamic(a * self.x + of_out * combine(out, channels, scale))
        reverse_step_(
            self.x,
            out,
            b["rows"],
            self.step,
            x0=b.get("x0"),
            net_in=self._half(self._net_in, guided),
            multistep=kind.multistep,
            history=b.get("history"),
            keys=b["keys"] if noise is None or "known" in b else None,
            noise=noise,
            clip_range=clip_range,
            threshold=threshold,
            log_variance=b.get("log_variance"),
            guidance_scale=scale,
            known=b.get("known"),
            known_mask=b.get("known_mask"),
            known_table=b.get("known_table"),
            known_noise=b.get("known_noise"),
            backend=settings.backend,
        )
        self._mirror(guided)
        if "self_condition" in b:
            for half in b["self_condition"].split(len(self.x)):
                half.copy_(b["x0"])

    def _renoise(self) -> None:
        """Run a step without a prediction, D x + S z. The state stands in for the output, which is not read."""
        b, noise = self.buffers, self._noise()
        reverse_step_(
            self.x,
            self.x,
            b["rows"],
            self.step,
            net_in=self._half(self._net_in, guided=False),
            keys=b["keys"] if noise is None else None,
            noise=noise,
            backend=self.settings.backend,
        )
        self._mirror(guided=False)

    def _noise(self) -> Tensor | None:
        """Return the step's noise where it is given or was made ahead; else the kernel makes it."""
        if "noise" in self.buffers or self._ahead is None:
            return self.buffers.get("noise")
        return self._ahead.noise(int(self.step))

    def _checked(self, kind: Body, out: Tensor) -> Tensor:
        """Return the network's output as the kernel reads it.

        Raises:
            ValueError: its shape is not that of the samples, with twice the channels where a variance is learned.
        """
        n, channels, *size = self.x.shape
        n *= 2 if kind.guided else 1
        doubled = self.settings.learned_variance
        if out.shape != (n, 2 * channels if doubled else channels, *size):
            if out.shape not in ((n, channels, *size), (n, 2 * channels, *size)):
                wanted = [n, 2 * channels if doubled else channels, *size]
                raise ValueError(f"model returned shape {list(out.shape)}, must return {wanted}")
            raise ValueError(
                f"variance_type is {self.settings.variance_type!r} but the model returned {out.shape[1]} channels for "
                f"samples of {channels}: a learned variance takes twice the channels, a fixed one as many"
            )
        if kind.variance:
            return log_of_variance(out, channels)
        return out[:, :channels] if doubled and "log_variance" not in self.buffers else out

    def _classify(self, out: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `out` and the step's noise, one of which carries the classifier's gradient."""
        b, (n, channels), classifier = self.buffers, self.x.shape[:2], self.settings.classifier
        assert classifier is not None
        labels = None if self._labels is None else self._labels[-n:]
        gradient = classifier(self.x, self._row("timesteps").expand(n), labels)
        if "score_shift" in b:
            return add_to_prediction(out, channels, self._row("score_shift") * gradient), noise
        # The mean moves by std^2 * gradient: that is noise z + std * gradient.
        std = self._row("rows")[0, 6]
        if "log_variance" in b:
            std = learned_std(out[-n:], channels, self._row("log_variance"))
        if noise is None:
            shape, stream = self.x.shape[1:], philox.STREAM_STEP
            noise = philox.normal(b["keys"], shape, step=self.step, stream=stream, backend=self.settings.backend)
        if "adds_noise" in b:
            noise = noise * self._row("adds_noise")
        return out, noise + std * gradient

    def _row(self, name: str) -> Tensor:
        """Return the row of a table that the step is at, [1, ...]."""
        return self.buffers[name].index_select(0, self.step)

    def _half(self, halves: Tensor, guided: bool) -> Tensor:
        """Return the part of a tensor for both halves that a step uses: all under guidance, else the last half."""
        return halves if guided or "guidance_scale" not in self.buffers else halves[len(self.x) :]

    def _mirror(self, guided: bool) -> None:
        """Bring the unconditional half of the input up to date where the kernel did not write it."""
        if "guidance_scale" in self.buffers and not guided:
            first, last = self._net_in.split(len(self.x))
            first.copy_(last)


class _NoiseAhead:
    """Makes the noise of several steps at once, with the same numbers.

    On the CPU a step's noise takes about eighty torch operations, and calling them costs more than computing them.
    """

    def __init__(self, loop: Loop) -> None:
        self._keys, self._shape = loop.buffers["keys"], tuple(loop.x.shape)
        self._steps = min(AHEAD_STEPS, AHEAD_NUMBERS // max(1, loop.x.numel()))
        self._noisy: list[bool] = []
        self._first, self._made = 0, torch.empty(0)

    def load(self, table: StepTable) -> None:
        """Forget the noise made for other keys, and note which rows of `table` add noise."""
        self._noisy = (table.rows[:, 6] != 0).tolist()
        self._first, self._made = 0, torch.empty(0)

    def noise(self, row: int) -> Tensor | None:
        """Return the noise of a row; None if it adds none, or if the kernel makes it as fast."""
        if self._steps < 2 or row >= len(self._noisy) or not self._noisy[row]:
            return None
        if not 0 <= row - self._first < len(self._made):
            rows = torch.arange(row, min(row + self._steps, len(self._noisy))).repeat_interleave(len(self._keys))
            keys = self._keys.repeat(len(rows) // len(self._keys), 1)
            made = torch_normal(keys, self._shape[1:], rows[:, None], philox.STREAM_STEP, torch.float32)
            self._first, self._made = row, made.view(-1, *self._shape)
        return self._made[row - self._first]
