"""Run the loop of a diffusion policy: the original's random numbers, fastddpm's network and steps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from fastddpm.interop.diffusers.scheduler import Recognised, recognise, state_of
from fastddpm.interop.robots.network import PolicyNetwork
from fastddpm.networks.frozen import blueprint_of, why_not
from fastddpm.networks.frozen.blueprint import Blueprint
from fastddpm.networks.network import DTYPES
from fastddpm.networks.weights import Watch
from fastddpm.process.tables import StepTable, ddim_table
from fastddpm.sampling.sampler import Sampler

_log = logging.getLogger(__name__)

_STEP_OPTIONS = ("eta", "use_clipped_model_output")


@dataclass(frozen=True)
class Options:
    """The options of `accelerate`."""

    allow_general: bool = True
    dtype: torch.dtype | str | None = None
    backend: str = "auto"
    cuda_graph: str | bool = "auto"
    check_weights: bool = False


class Draw(NamedTuple):
    """What a call asks for.

    Attributes:
        shape: (N, L, C) of the samples.
        steps: num_inference_steps of the scheduler.
        dtype, device: of the samples and of what is drawn.
        generator: of all random numbers; None for torch's own.
        start: [N, L, C], in place of the first draw.
        known, mask: [N, L, C], values that the samples have before every step where the mask is True, and at the end.
        options: of the scheduler's `step`: those of `_STEP_OPTIONS`.
    """

    shape: tuple[int, int, int]
    steps: int
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator | None = None
    start: Tensor | None = None
    known: Tensor | None = None
    mask: Tensor | None = None
    options: Mapping[str, Any] = MappingProxyType({})


class _Prepared(NamedTuple):
    """A sampler, and what it was made for."""

    key: tuple[Any, ...]
    blueprint: Blueprint
    sampler: Sampler


class Engine:
    """Keeps what was made for a network and a scheduler as long as they stay the same.

    A copy of an engine starts anew, with the same options. Threads take turns.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._scheduler: tuple[Any, Recognised] | None = None
        self._table: tuple[Any, StepTable] | None = None
        self._prepared: _Prepared | None = None
        self._lock = threading.RLock()

    def check(self, unet: Any, scheduler: Any) -> None:
        """Prepare the network and the scheduler.

        Raises:
            ValueError: one of them is not supported.
        """
        with self._lock:
            self._prepare(unet, self._recognise(scheduler))

    @torch.inference_mode(False)
    @torch.no_grad()
    def sample(self, unet: Any, scheduler: Any, draw: Draw, conditions: Mapping[str, Tensor | None]) -> Tensor:
        """Return samples [N, L, C], as the original's loop draws them.

        Args:
            unet, scheduler: of the policy.
            draw: what the call asks for.
            conditions: of the network, by name; None for one that is not given.

        Raises:
            ValueError, TypeError: a shape or an option does not fit the network or the scheduler.
        """
        given = {name: value for name, value in conditions.items() if value is not None}
        with self._lock:
            recognised = self._recognise(scheduler)
            _, blueprint, sampler = self._prepare(unet, recognised)
            _check_shapes(blueprint, draw, given)
            start, known = draw.start, dict[str, Any]()
            if start is None:
                start = torch.randn(draw.shape, dtype=draw.dtype, device=draw.device, generator=draw.generator)
            scheduler.set_timesteps(draw.steps)
            table = self._table_of(recognised, scheduler, draw.options)
            noise = _noise(recognised, table, draw)
            if draw.known is not None and draw.mask is not None and bool(draw.mask.any()):
                start = torch.where(draw.mask, draw.known.to(start), start)
                clean = torch.tensor([[1.0, 0.0]], dtype=table.levels.dtype)
                table = replace(table, levels=clean.expand(len(table), 2))  # known values keep out of the noise
                known = {"known": draw.known.transpose(1, 2), "known_mask": draw.mask.transpose(1, 2)}
            count, length, channels = draw.shape
            samples: Tensor = sampler.sample(
                count, shape=(channels, length), x_T=start.transpose(1, 2), noise=noise, table=table, conditions=given,
                **known,
            )  # fmt: skip
            return samples.transpose(1, 2).to(draw.dtype).contiguous()

    def _recognise(self, scheduler: Any) -> Recognised:
        """Return what a scheduler does.

        Raises:
            ValueError: it is not supported.
        """
        state = state_of(scheduler)
        if self._scheduler is None or self._scheduler[0] != state:
            recognised = recognise(scheduler)
            if recognised.scales:
                raise ValueError(f"{recognised.name} scales the network's input, which the policy's loop does not do")
            self._scheduler = (state, recognised)
        return self._scheduler[1]

    def _table_of(self, recognised: Recognised, scheduler: Any, options: Mapping[str, Any]) -> StepTable:
        """Return the table of the timesteps that a scheduler has set."""
        if unknown := options.keys() - set(_STEP_OPTIONS):
            raise TypeError(f"{min(unknown)} is no option of a step here, must be one of {', '.join(_STEP_OPTIONS)}")
        if options and recognised.method != "ddim":
            raise TypeError(f"{min(options)} is given but the scheduler is a {recognised.name}, must be DDIMScheduler")
        key = (recognised, tuple(scheduler.timesteps.tolist()), tuple(sorted(options.items())))
        if self._table is None or self._table[0] != key:
            self._table = (key, recognised.table(scheduler, **options))
        return self._table[1]

    def _prepare(self, wrapped: Any, recognised: Recognised) -> _Prepared:
        """Return the sampler of a network; it is made anew where the network or the scheduler is another one.

        Raises:
            ValueError: the network is not known; or, if not `allow_general`, cannot be prepared for sampling.
        """
        unet: nn.Module = getattr(wrapped, "_orig_mod", wrapped)  # as torch.compile wraps it
        options, first = self.options, next(unet.parameters())
        key = (unet, recognised, first.device, first.dtype)
        if self._prepared is not None and self._prepared.key == key:
            return self._prepared
        self._prepared = None  # its memory is free before the next one takes its own
        kind = blueprint_of(unet)
        if kind is None or kind.dims != 1:
            raise ValueError(f"the policy's network is a {type(unet).__name__}, must be one that can be frozen")
        if first.dtype not in DTYPES:
            raise ValueError(f"the policy's network is {first.dtype}, must be one of {', '.join(map(str, DTYPES))}")
        reason = why_not(unet)
        network = PolicyNetwork(unet)
        if reason is None:
            sampler = Sampler(
                network, ddim_table(recognised.schedule, [0]), dtype=options.dtype, device=first.device,
                backend=options.backend, cuda_graph=options.cuda_graph, **recognised.of_sampler,
            )  # fmt: skip
            frozen = sampler.network.frozen
            if frozen is not None:
                frozen.watch = None if options.check_weights else Watch(unet)
            else:
                reason = "it does not compute what its class says"
        if reason is not None:
            if not options.allow_general or options.dtype not in (None, first.dtype):
                raise ValueError(f"the policy's network cannot be prepared for sampling: {reason}")
            _log.warning("the policy's network is called as it is, in fastddpm's loop: %s", reason)
            sampler = Sampler(
                network, ddim_table(recognised.schedule, [0]), device=first.device, backend=options.backend,
                cuda_graph=options.cuda_graph, **recognised.of_sampler,
            )  # fmt: skip
        self._prepared = _Prepared(key, kind(unet), sampler)
        return self._prepared

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _noise(recognised: Recognised, table: StepTable, draw: Draw) -> Tensor | None:
    """Draw the noise of all steps in the original's order: [S, N, C, L], or None where it draws none."""
    draws = recognised.draws(table.timesteps, float(draw.options.get("eta", 0.0)))
    if not any(draws):
        return None
    count, length, channels = draw.shape
    noise = torch.zeros(len(table), count, channels, length, dtype=torch.float32, device=draw.device)
    for row, drawn in zip(noise, draws, strict=True):
        if drawn:
            own = randn_tensor(draw.shape, generator=draw.generator, device=draw.device, dtype=draw.dtype)
            row.copy_(own.transpose(1, 2))
    return noise


def _check_shapes(blueprint: Blueprint, draw: Draw, conditions: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the network takes samples and conditions of these shapes."""
    count, length, channels = draw.shape
    if channels != blueprint.in_channels:
        raise ValueError(
            f"a sample has {channels} values at a position, must have {blueprint.in_channels}, the network's input_dim"
        )
    if length < 1 or length % blueprint.factor:
        halvings = blueprint.factor.bit_length() - 1
        raise ValueError(
            f"the horizon is {length}, must be a positive multiple of {blueprint.factor}: the network halves it "
            f"{halvings} times"
        )
    blueprint.check_conditions(conditions, count)
    for name in ("start", "known", "mask"):
        value = getattr(draw, name)
        if value is not None and tuple(value.shape) != draw.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be {draw.shape}")
    local = conditions.get("local_cond")
    if local is not None and local.shape[1] != length:
        raise ValueError(f"local_cond has {local.shape[1]} positions, must have {length}, the horizon")
