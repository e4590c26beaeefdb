"""The forward of diffusers' UNet2DConditionModel, computed by the prepared U-Net.

The module stays as it is, with its parameters, processors and config: only its attribute `forward` is another one. A
call that is not supported is computed by the original, and the log says once why.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastddpm.interop.diffusers.unet import managed
from fastddpm.networks.comparing import Replacement, Settings, changed, settings_of
from fastddpm.networks.frozen import FrozenUNet, Program, blueprint_of, why_not
from fastddpm.networks.precision import parse_precision
from fastddpm.networks.weights import Watch

ROWS = 64  # a time table grows by a multiple of this
MOST_ROWS = 4096  # and starts anew beyond
KEPT = 3  # programs that are kept for other shapes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """The options of `accelerate`, as described there."""

    allow_general: bool = True
    loop: bool = True
    dtype: torch.dtype | str | None = None
    backend: str = "auto"
    cuda_graph: str | bool = "auto"
    release: bool = False


class Watcher(Protocol):
    """Takes the calls of a U-Net while a pipeline's loop is taken over."""

    unet: nn.Module

    def predict(self, call: Call) -> Tensor | None:
        """Return what the pipeline's loop is to see of a call; None to compute it."""
        ...


watching: ContextVar[Watcher | None] = ContextVar("watching", default=None)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a forward that the prepared U-Net computes.

    Attributes:
        sample: [N, C, H, W].
        timestep: a number, or a tensor of one or N.
        labels: [N, ...], or None.
        conditions: [N, ...] by the names of `Blueprint.conditions`.
    """

    sample: Tensor
    timestep: Tensor | float
    labels: Tensor | None
    conditions: dict[str, Tensor]


class Forward(Replacement):
    """The forward of a UNet2DConditionModel, in its attribute `forward`. Threads may share it.

    Layers and weights are compared where a run of calls begins: after `begin`, where the timestep rises, or where the
    conditions are others. In between only what torch itself notes is looked at (`Watch`).

    Args:
        unet: the module.
        options: how it is computed.

    Attributes:
        frozen: the prepared U-Net, once there is one.
        runs: how many calls it has computed.
    """

    def __init__(self, unet: nn.Module, options: Options) -> None:
        self.unet, self.options = unet, options
        self.frozen: FrozenUNet | None = None
        self.runs = 0
        self._lock, self._own_call = threading.RLock(), threading.local()
        self._bound: OrderedDict[object, _Bound] = OrderedDict()
        self._failed: tuple[Settings, str] | None = None
        self._logged: set[str] = set()
        self._watch: Watch | None = None
        self._epoch = 0
        self._ladder = _Ladder()

    @property
    def released(self) -> bool:
        """Whether the module's own weights are gone."""
        return self.frozen is not None and self.frozen.releasing

    @property
    def __wrapped__(self) -> Any:
        return self.original

    @property
    def original(self) -> Any:
        """The forward of the module's class."""
        return type(self.unet).forward.__get__(self.unet)

    def begin(self) -> None:
        """Note that a new run of calls begins: compare layers and weights at the next one."""
        self._epoch += 1

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: Any = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Any = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As `UNet2DConditionModel.forward`."""
        out = None
        if not (torch.compiler.is_compiling() or getattr(self._own_call, "inside", False)):
            named = {
                "encoder_hidden_states": encoder_hidden_states,
                "timestep_cond": timestep_cond,
                "attention_mask": attention_mask,
                "encoder_attention_mask": encoder_attention_mask,
                "mid_block_additional_residual": mid_block_additional_residual,
                **_listed("down_block_additional_residuals", down_block_additional_residuals),
                **_listed("down_intrablock_additional_residuals", down_intrablock_additional_residuals),
                **(added_cond_kwargs or {}),
            }
            out = self._try(sample, timestep, class_labels, named, cross_attention_kwargs)
        if out is None:
            return self.original(
                sample, timestep, encoder_hidden_states, class_labels=class_labels, timestep_cond=timestep_cond,
                attention_mask=attention_mask, cross_attention_kwargs=cross_attention_kwargs,
                added_cond_kwargs=added_cond_kwargs,
                down_block_additional_residuals=down_block_additional_residuals,
                mid_block_additional_residual=mid_block_additional_residual,
                down_intrablock_additional_residuals=down_intrablock_additional_residuals,
                encoder_attention_mask=encoder_attention_mask, return_dict=return_dict,
            )  # fmt: skip
        if not return_dict:
            return (out,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=out)

    def _try(
        self, sample: Tensor, timestep: Any, labels: Any, named: Mapping[str, Any], attention: Any
    ) -> Tensor | None:
        """Return the result of a call; None, and say why, where it is the original's to compute."""
        try:
            call = self._call(sample, timestep, labels, named, attention)
            watcher = watching.get()
            if watcher is not None and watcher.unet is self.unet:
                out = watcher.predict(call)
                if out is not None:
                    return out
            return self.compute(call)
        except Unsupported as error:
            self.general(str(error))
            return None

    def general(self, reason: str) -> None:
        """Note that the original computes a call for a reason, and log it once.

        Raises:
            ValueError: `allow_general` is False, or the original has no weights any more.
        """
        if self.released:
            raise ValueError(f"{reason}, but diffusers cannot compute it: the weights were released") from None
        if not self.options.allow_general:
            raise ValueError(f"{reason}; with allow_general=True diffusers computes it") from None
        if reason not in self._logged:
            self._logged.add(reason)
            _log.warning("%s: diffusers computes it", reason)

    def keeps_loop(self, reason: str) -> None:
        """Note that a pipeline keeps its own loop around the prepared U-Net for a reason, and log it once."""
        if (text := f"{reason}: the pipeline keeps its own loop") not in self._logged:
            self._logged.add(text)
            _log.info("%s", text)

    def _call(self, sample: Any, timestep: Any, labels: Any, named: Mapping[str, Any], attention: Any) -> Call:
        """Return the arguments of a call.

        Raises:
            Unsupported: it is not one for the prepared U-Net.
        """
        unet, first = self.unet, next(self.unet.parameters())
        if torch.is_grad_enabled():
            raise Unsupported("gradients are on (torch.no_grad() turns them off)")
        if not isinstance(sample, Tensor) or sample.dtype != first.dtype or sample.device != first.device:
            raise Unsupported(f"sample is not of the U-Net's {first.dtype} on {first.device}")
        if torch.is_autocast_enabled(first.device.type):
            raise Unsupported("autocast is on")
        if unet.training and any(isinstance(m, nn.Dropout) and m.p for m in unet.modules()):
            raise Unsupported("unet is in training mode and has dropout")
        if attention:
            raise Unsupported(f"cross_attention_kwargs has {', '.join(map(repr, attention))}")
        conditions = {name: value for name, value in named.items() if value is not None}
        kind = blueprint_of(unet)
        for name, value in {"class_labels": labels, **conditions}.items():
            if value is not None and not isinstance(value, Tensor):
                raise Unsupported(f"{name} is a {type(value).__name__}")
        given = conditions.get("encoder_hidden_states")
        if kind is None:
            raise Unsupported(f"unet is a {type(unet).__name__}")
        if given is not None and given.dtype != first.dtype:
            raise Unsupported(f"encoder_hidden_states are {given.dtype} but unet is {first.dtype}")
        return Call(sample, timestep, labels, conditions)

    @torch.inference_mode(False)
    @torch.no_grad()
    def compute(self, call: Call) -> Tensor:
        """Return the prediction [N, C, H, W] for a call.

        Raises:
            Unsupported: the U-Net cannot be prepared, or the call's shapes are none that it takes.
        """
        with self._lock:
            frozen = self.frozen if self._watch is not None and not self._watch.changed() else None
            if frozen is None:
                frozen = self.prepared()
                self._epoch += 1
            value, others = self._ladder.read(call.timestep)
            bound = self._bind(frozen, call, value, others)
            if bound.begins(call, value, self._epoch):
                try:
                    bound.load(call)
                except ValueError:  # its layers are others now
                    frozen = self.prepared()
                    bound = self._bind(frozen, call, value, others)
                    bound.load(call)
                bound.epoch = self._epoch
                self._watch = Watch(self.unet)
            bound.take(call)
            out = bound.program(bound.steps[bound.rows[value]])
            self.runs += 1
            # A copy, since the next call overwrites it; contiguous, as noise drawn like it fills memory in that order.
            return out.to(call.sample).clone(memory_format=torch.contiguous_format)

    def prepared(self) -> FrozenUNet:
        """Return the prepared U-Net for the layers that there are now.

        Raises:
            Unsupported: it cannot be prepared; the message says why.
        """
        with self._lock:
            if self.released and self.frozen is not None:
                return self.frozen
            unet, first = self.unet, next(self.unet.parameters())
            device = first.device
            dtype, tf32 = first.dtype, False
            if self.options.dtype is not None:
                dtype, tf32 = parse_precision(self.options.dtype, device)
            if (reason := managed(unet) or why_not(unet)) is not None:
                self._drop()
                raise Unsupported(reason)
            settings = settings_of(unet)
            if self._failed is not None:
                if changed(self._failed[0], settings) is None and changed(settings, self._failed[0]) is None:
                    raise Unsupported(self._failed[1])
                self._failed = None
            frozen = self.frozen
            if frozen is not None and (frozen.device, frozen.dtype) == (device, dtype):
                try:
                    frozen.refresh()
                except ValueError:
                    pass  # its layers are others now
                else:
                    return frozen
            self._drop()
            with self._inside():
                frozen = FrozenUNet(unet, dtype, backend=self.options.backend, allow_tf32=tf32)
                if self.options.release:
                    frozen.release()
                elif reason := frozen.differs():
                    self._failed = settings, reason
                    raise Unsupported(reason)
            self.frozen = frozen
            return frozen

    def _bind(self, frozen: FrozenUNet, call: Call, value: float, others: list[float]) -> _Bound:
        shapes = {name: (tuple(given.shape), given.dtype) for name, given in call.conditions.items()}
        labels = None if call.labels is None else (tuple(call.labels.shape), call.labels.dtype)
        key = (tuple(call.sample.shape), labels, frozenset(shapes.items()))
        bound = self._bound.get(key)
        if bound is None or (value not in bound.rows and not bound.add([value, *others])):
            known = [] if bound is None else [*bound.rows]
            try:
                bound = _Bound(frozen, call, [*known, value, *others])
            except ValueError as error:
                raise Unsupported(str(error)) from None
            self._bound[key] = bound
        self._bound.move_to_end(key)
        while len(self._bound) > KEPT:
            self._bound.popitem(last=False)
        return bound

    def _drop(self) -> None:
        if self.released:
            raise ValueError("unet has changed, but its weights were released when it was prepared")
        self.frozen = self._watch = None
        self._bound.clear()

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Let the original compute this thread's calls inside."""
        self._own_call.inside = True
        try:
            yield
        finally:
            self._own_call.inside = False

    def __getstate__(self) -> dict[str, Any]:
        return {"unet": self.unet, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["unet"], state["options"])  # type: ignore[misc]


class Unsupported(Exception):
    """Says why the original computes a call."""


class _Bound:
    """A program for calls of the same shapes, with a row of its time table for every timestep seen so far.

    Attributes:
        inputs, program: as of `FrozenUNet.bind`.
        rows: by timestep.
        steps: int64 [1], of every row.
        epoch: of the run of calls that it was loaded for.
    """

    def __init__(self, frozen: FrozenUNet, call: Call, timesteps: list[float]) -> None:
        timesteps = list(dict.fromkeys(timesteps))
        if len(timesteps) > MOST_ROWS:
            timesteps = timesteps[-MOST_ROWS:]
        count = -(-len(timesteps) // ROWS) * ROWS
        self.inputs = frozen.new_input(call.sample.shape)
        self.rows: dict[float, int] = {}
        self.steps = torch.arange(count, device=frozen.device).split(1)
        self.epoch = -1
        self._timesteps = torch.zeros(count, device=frozen.device)
        self._labels = None if call.labels is None else call.labels.to(frozen.device, copy=True)
        self._conditions = {name: given.to(frozen.device, copy=True) for name, given in call.conditions.items()}
        self._seen: list[tuple[Tensor, int]] = []
        self._last = float("-inf")
        self.program: Program = frozen.bind(self.inputs, self._timesteps, self._labels, self._conditions)
        self.add(timesteps)

    def add(self, timesteps: list[float]) -> bool:
        """Take further timesteps; return False if there is no room for them."""
        new = [value for value in dict.fromkeys(timesteps) if value not in self.rows]
        if len(self.rows) + len(new) > len(self._timesteps):
            return False
        start = len(self.rows)
        self.rows.update((value, start + index) for index, value in enumerate(new))
        self._timesteps[start : start + len(new)] = torch.tensor(
            new, dtype=torch.float32, device=self._timesteps.device
        )
        self.epoch = -1
        return True

    def begins(self, call: Call, value: float, epoch: int) -> bool:
        """Return whether a run of calls begins with this one."""
        rises, self._last = value > self._last, value
        return self.epoch != epoch or rises or not self._same(call)

    def _same(self, call: Call) -> bool:
        """Return whether labels and conditions are those of the call before; only other tensors are compared."""
        pairs = self._pairs(call)
        if len(self._seen) == len(pairs) and all(
            given is seen and _version(given) == version
            for (given, _), (seen, version) in zip(pairs, self._seen, strict=True)
        ):
            return True
        if not all(torch.equal(given.to(own), own) for given, own in pairs):
            return False
        self._seen = [(given, _version(given)) for given, _ in pairs]
        return True

    def take(self, call: Call) -> None:
        """Take over what differs from step to step."""
        self.inputs.copy_(call.sample)
        for name, given in call.conditions.items():
            if _changes(name):
                self._conditions[name].copy_(given)

    def load(self, call: Call) -> None:
        """Take over the labels and conditions of a call, and the U-Net's weights.

        Raises:
            ValueError: the U-Net's layers have changed.
        """
        pairs = self._pairs(call)
        for given, own in pairs:
            own.copy_(given)
        self.program.load()
        self._seen = [(given, _version(given)) for given, _ in pairs]

    def _pairs(self, call: Call) -> list[tuple[Tensor, Tensor]]:
        pairs = [(given, self._conditions[name]) for name, given in call.conditions.items() if not _changes(name)]
        if call.labels is not None and self._labels is not None:
            pairs.append((call.labels, self._labels))
        return pairs


class _Ladder:
    """Reads timesteps. Of a schedule on a GPU it reads all at once, so that a step does not wait for the device."""

    def __init__(self) -> None:
        self._held: Tensor | None = None  # keeps its memory from being used again
        self._key: tuple[Any, ...] = ()
        self._values: list[float] = []

    def read(self, timestep: Tensor | float) -> tuple[float, list[float]]:
        """Return the timestep of a call, and those of the schedule that it is of.

        Raises:
            Unsupported: samples are at different timesteps.
        """
        if not isinstance(timestep, Tensor):
            return float(timestep), []
        storage = timestep.untyped_storage()
        numel = storage.nbytes() // timestep.itemsize
        if any(size > 1 and stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True)):
            values = set(timestep.flatten().tolist())
            if len(values) != 1:
                raise Unsupported("timestep has several values")
            return float(values.pop()), []
        if numel > MOST_ROWS or not timestep.numel():
            return float(timestep.flatten()[0]), []
        key = (storage.data_ptr(), numel, timestep.dtype, timestep.device, _version(timestep))
        if timestep.is_inference() or key != self._key or self._held is None:
            whole = timestep.new_empty(0).set_(storage)  # type: ignore[call-overload]
            self._values = [float(value) for value in whole.tolist()]
            self._held, self._key = timestep, key
        return self._values[timestep.storage_offset()], [value for value in self._values if math.isfinite(value)]


def _listed(name: str, values: Any) -> dict[str, Any]:
    """Return a sequence of tensors by numbered names, as blueprints know them."""
    if values is None:
        return {}
    return {f"{name}.{index}": value for index, value in enumerate(values)}


def _changes(name: str) -> bool:
    """Return whether a condition differs from step to step: a ControlNet's residuals do."""
    return "residual" in name


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
