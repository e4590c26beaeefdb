"""What an accelerated pipeline of diffusers runs: the U-Net and the scheduler it has at the moment, and a sampler."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastddpm.interop.diffusers.scheduler import Recognised, recognise, state_of
from fastddpm.interop.diffusers.unet import AsUNet2D, check_same, check_unet, share_unet, unwrapped
from fastddpm.interop.shared import check_noise
from fastddpm.networks.comparing import Settings, changed, settings_of
from fastddpm.networks.unet.model import UNet
from fastddpm.process.tables import StepTable
from fastddpm.sampling.sampler import Sampler


@dataclass(frozen=True)
class Options:
    """The options of `accelerate`.

    Raises:
        ValueError: `noise` is not known.
    """

    allow_general: bool = False
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
        """The pipeline's own loop and scheduler around fastddpm's U-Net: `base.__call__` with its arguments."""
        original = copy.copy(pipeline)
        original.__class__ = base
        assert isinstance(self.model, UNet)
        original.__dict__["unet"] = AsUNet2D(self.model, self.theirs)
        return original(*arguments)


@dataclass(eq=False)
class Engine:
    """Keeps what was made for a pipeline's parts as long as they stay the same.

    A copy of an engine starts anew, with the same options.
    """

    options: Options
    _unet: tuple[list[nn.Parameter], Settings, nn.Module, str] | None = field(default=None, init=False)
    _scheduler: tuple[Any, Recognised | str] | None = field(default=None, init=False)
    _sampler: tuple[Any, Sampler] | None = field(default=None, init=False)

    def plan(self, unet: Any, scheduler: Any) -> Plan:
        """How to run these two.

        Raises:
            ValueError: one of them is not supported and `allow_general` is False, or neither is, or they do not fit.
        """
        theirs = unwrapped(unet)
        config = theirs.config
        for name in ("class_embed_type", "num_class_embeds"):
            if config.get(name) is not None:
                raise ValueError(
                    f"unet.config.{name} is {config[name]!r}, must be None: the pipeline passes no class labels, "
                    "Sampler.sample does"
                )
        if hasattr(theirs, "_hf_hook"):
            raise ValueError("unet is offloaded, must be on its device: pipe.remove_all_hooks(), then pipe.to(device)")
        model, why_not_unet = self._find_unet(theirs)
        recognised = self._recognise(scheduler)
        general = [why_not_unet] if why_not_unet else []
        if isinstance(recognised, Recognised):
            recognised.check_channels(config.in_channels, config.out_channels)
        else:
            general.append(recognised)
        if general and not self.options.allow_general:
            how = "is called as it is, in fastddpm's loop" if why_not_unet else "keeps its own loop"
            what = "U-Net" if why_not_unet else "pipeline"
            raise ValueError(f"{general[0]}; with allow_general=True the {what} {how}")
        if len(general) == 2:
            raise ValueError(f"{general[0]}, and {general[1]}: there is nothing left to accelerate")
        if not isinstance(recognised, Recognised):
            for name, default in (("dtype", None), ("cuda_graph", "auto")):
                if (value := getattr(self.options, name)) not in (default, False):
                    raise ValueError(f"{name} is {value!r} but {recognised}: in its own loop it must be {default!r}")
        return Plan(model, recognised if isinstance(recognised, Recognised) else None, general, theirs)

    def sampler(self, plan: Plan, device: torch.device, table: StepTable) -> Sampler:
        """A sampler for the plan on `device`; the table is only its own default.

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
        options = self.options
        sampler = Sampler(
            plan.model,
            recognised.schedule,
            timesteps=table.timesteps,
            dtype=options.dtype,
            device=place,
            backend=options.backend,
            cuda_graph=options.cuda_graph,
            **recognised.settings,
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
        return {"options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["options"])  # type: ignore[misc]
