"""What an accelerated pipeline of diffusers runs: the U-Net and the scheduler it has at the moment, and a sampler."""

from __future__ import annotations

import copy
import inspect
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.interop.diffusers.scheduler import Recognised, recognise, state_of
from fastddpm.interop.diffusers.unet import AsUNet2D, check_same, check_unet, managed, share_unet, unwrapped
from fastddpm.interop.shared import check_noise
from fastddpm.networks.comparing import Settings, changed, settings_of
from fastddpm.networks.unet.model import UNet
from fastddpm.process.tables import StepTable
from fastddpm.sampling.sampler import Sampler

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """The options of `accelerate`.

    Raises:
        ValueError: `noise` is not known.
    """

    allow_general: bool = True
    noise: str = "philox"
    dtype: torch.dtype | str | None = None
    backend: str = "auto"
    cuda_graph: str | bool = "auto"

    def __post_init__(self) -> None:
        check_noise(self.noise)


@dataclass(frozen=True, eq=False)
class Plan:
    """How a pipeline with this U-Net and scheduler is run.

    Attributes:
        model: fastddpm's U-Net of the same parameters; where the U-Net is not supported, itself.
        recognised: what the scheduler does; None if it is not supported.
        general: why the one or the other is not supported.
        theirs: the pipeline's U-Net.
    """

    model: nn.Module
    recognised: Recognised | None
    general: list[str]
    theirs: Any

    def their_loop(self, pipeline: Any, base: Any, *arguments: Any) -> Any:
        """Run the pipeline's own loop and scheduler around fastddpm's U-Net: `base.__call__` with its arguments."""
        original = copy.copy(pipeline)
        original.__class__ = base
        original.__dict__["unet"] = self._as_theirs()
        return original(*arguments)

    def _as_theirs(self) -> Any:
        return AsUNet2D(self.model, self.theirs) if isinstance(self.model, UNet) else self.theirs

    def scaled_loop(self, pipeline: Any, shape: tuple[int, ...], generator: Any, steps: int) -> Tensor:
        """Run the loop that diffusers documents around fastddpm's U-Net, with noise and inputs scaled."""
        from diffusers.utils.torch_utils import randn_tensor

        unet, scheduler = self._as_theirs(), pipeline.scheduler
        given = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        images = randn_tensor(shape, generator=generator, device=pipeline._execution_device, dtype=self.theirs.dtype)
        scheduler.set_timesteps(steps)
        images = images * scheduler.init_noise_sigma
        for t in pipeline.progress_bar(scheduler.timesteps):
            out = unet(scheduler.scale_model_input(images, t), t).sample
            images = scheduler.step(out, t, images, **given).prev_sample
        return images


@dataclass(eq=False)
class Engine:
    """Keeps what was made for a pipeline's parts as long as they stay the same.

    A copy of an engine starts anew, with the same options.

    Attributes:
        options: of `accelerate`.
        scales: whether the loop scales noise and inputs where a scheduler wants it, whatever the pipeline's does.
    """

    options: Options
    scales: bool = False
    _unet: tuple[list[nn.Parameter], Settings, nn.Module, str] | None = field(default=None, init=False)
    _scheduler: tuple[Any, Recognised | str] | None = field(default=None, init=False)
    _sampler: tuple[Any, Sampler] | None = field(default=None, init=False)
    _logged: set[str] = field(default_factory=set, init=False)

    def plan(self, unet: Any, scheduler: Any, *, scales: bool = False, first: bool = False) -> Plan:
        """Return how to run these two.

        Args:
            unet, scheduler: the pipeline's.
            scales: whether the pipeline's loop scales noise and inputs where a scheduler wants it.
            first: whether the pipeline is about to be accelerated; later on one whose parts were exchanged runs as it
                is if neither is supported.

        Raises:
            ValueError: one of them is not supported and `allow_general` is False, or neither is at first, or they do
                not fit.
        """
        theirs = unwrapped(unet)
        config = theirs.config
        for name in ("class_embed_type", "num_class_embeds"):
            if config.get(name) is not None:
                raise ValueError(
                    f"unet.config.{name} is {config[name]!r}, must be None: the pipeline passes no class labels, "
                    "Sampler.sample does"
                )
        if reason := managed(theirs):
            self.keep_loop(reason)
            return Plan(theirs, None, [reason], theirs)
        model, why_not_unet = self._find_unet(theirs)
        recognised = self._recognise(scheduler)
        if isinstance(recognised, Recognised) and recognised.scales and not (scales or self.scales):
            recognised = f"{recognised.name} scales the network's input, which the loop of this pipeline does not"
        general = [why_not_unet] if why_not_unet else []
        if isinstance(recognised, Recognised):
            recognised.check_channels(config.in_channels, config.out_channels)
        else:
            general.append(recognised)
        if len(general) == 2 and first:
            raise ValueError(f"{general[0]}, and {general[1]}: there is nothing left to accelerate")
        if why_not_unet:
            loop = "" if isinstance(recognised, str) else ", in fastddpm's loop"
            self._allow(why_not_unet, f"the U-Net is called as it is{loop}")
        if isinstance(recognised, str):
            self.keep_loop(recognised)
        return Plan(model, recognised if isinstance(recognised, Recognised) else None, general, theirs)

    def keep_loop(self, reason: str) -> None:
        """Note that the pipeline keeps its own loop for a reason, and log it once.

        Raises:
            ValueError: `allow_general` is False, or an option says how fastddpm's loop is to run.
        """
        for name, default in (("dtype", None), ("cuda_graph", "auto")):
            if (value := getattr(self.options, name)) not in (default, False):
                raise ValueError(f"{name} is {value!r} but {reason}: in its own loop it must be {default!r}")
        self._allow(reason, "the pipeline keeps its own loop")

    def _allow(self, reason: str, how: str) -> None:
        if not self.options.allow_general:
            raise ValueError(f"{reason}; with allow_general=True {how}")
        if reason not in self._logged:
            self._logged.add(reason)
            _log.warning("%s: %s", reason, how)

    def sampler(self, plan: Plan, device: torch.device, table: StepTable) -> Sampler:
        """Return a sampler for the plan on `device`; the table is only its own default.

        Raises:
            ValueError: the U-Net is elsewhere, or as `Sampler`.
        """
        recognised = plan.recognised
        assert recognised is not None
        place = plan.theirs.device
        if place != device:
            raise ValueError(f"unet is on {place} but the pipeline runs on {device}, must be on the same: pipe.to()")
        key = (plan.model, recognised, place, plan.theirs.dtype)
        if self._sampler is not None and self._sampler[0] == key:
            return self._sampler[1]
        self._sampler = None  # its memory is free before the next one takes its own
        options, settings = self.options, recognised.of_sampler
        if options.dtype == "auto":  # tries the network at the levels of a schedule
            predicts = recognised.settings.get("prediction_type", "epsilon")
            settings["prediction_type"] = "v_prediction" if predicts == "flow_prediction" else predicts
            settings["timesteps"] = [0]
        sampler = Sampler(
            plan.model,
            recognised.schedule if options.dtype == "auto" else table,
            dtype=options.dtype,
            device=place,
            backend=options.backend,
            cuda_graph=options.cuda_graph,
            **settings,
        )
        self._sampler = (key, sampler)
        return sampler

    def _find_unet(self, theirs: Any) -> tuple[nn.Module, str]:
        """Return fastddpm's U-Net and "", or theirs and why that has to do.

        Both are compared where the U-Net is another one or its layers have other settings; weights may change.
        """
        parameters, settings = list(theirs.parameters()), settings_of(theirs)
        try:
            check_unet(theirs)
            if self._unet is not None:
                known, seen, model, reason = self._unet
                same = len(known) == len(parameters) and all(a is b for a, b in zip(known, parameters, strict=True))
                if not reason and same and changed(seen, settings) is None:
                    return model, ""
            shared = share_unet(theirs)
            if self.options.backend != "auto":
                shared.backend = self.options.backend
            check_same(theirs, shared)
            self._unet = (parameters, settings, shared, "")
        except ValueError as error:
            self._unet = (parameters, settings, theirs, str(error))
        return self._unet[2:]

    def _recognise(self, scheduler: Any) -> Recognised | str:
        """Return what the scheduler does, or why it is not supported."""
        key = state_of(scheduler)
        if self._scheduler is None or self._scheduler[0] != key:
            try:
                self._scheduler = (key, recognise(scheduler))
            except ValueError as error:
                self._scheduler = (key, str(error))
        return self._scheduler[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "scales": self.scales}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["options"], state["scales"])  # type: ignore[misc]
