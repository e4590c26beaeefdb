"""MONAI's inferers, called as before, with fastddpm's network and loop inside.

    inferer = accelerate(DiffusionInferer(scheduler), model)
    images = inferer.sample(input_noise=noise, diffusion_model=model, scheduler=scheduler)

The classes here are subclasses of MONAI's own. This module imports MONAI; `fastddpm.interop.accelerate` imports it when
it is given an object of that library.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from monai.inferers import ControlNetDiffusionInferer, DiffusionInferer, LatentDiffusionInferer
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor

from fastddpm.interop.monai.networks import Forward, Options, Prepared, check_sizes
from fastddpm.interop.monai.tables import table_of, why_not
from fastddpm.interop.shared import StepNoise, check_noise, not_supported
from fastddpm.sampling.memory import is_out_of_memory

_log = logging.getLogger(__name__)


def accelerate(
    obj: Any,
    model: Any = None,
    scheduler: Any = None,
    *,
    inplace: bool = False,
    allow_general: bool = True,
    noise: str = "torch",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    cuda_graph: str | bool = "auto",
    fuse: bool = True,
) -> Any:
    """Return an inferer of MONAI whose `sample` runs fastddpm's network and loop; its arguments stay the same.

    Random numbers are torch's, in MONAI's order, so the images are MONAI's to rounding. Networks of two dimensions are
    prepared for sampling; in those of three, norms and attention are fused. A network or scheduler given to `sample`
    may be another one. The weights are those that a network has at the beginning of a call.

    Args:
        obj: a `DiffusionInferer`, `LatentDiffusionInferer` or `ControlNetDiffusionInferer`, or
            `(DiffusionModelUNet, scheduler)`, which becomes a `DiffusionInferer`. With a ControlNet, MONAI's loop and
            forward run, with fused layers.
        model: the default of `diffusion_model`, which is prepared now; None prepares it at the first call.
        scheduler: the default of `scheduler`; None for the inferer's.
        inplace: change the inferer itself.
        allow_general: where a step table cannot say what a scheduler does (PNDM, rectified flow, a learned variance),
            or a call needs more than it (concatenated conditioning with `cfg`), run MONAI's own loop around fastddpm's
            network, with a warning in the log. False: raise ValueError instead.
        noise: "torch", or "philox": then a sample does not depend on how many are drawn with it, and its seed is one
            number from torch's generator.
        dtype, device, backend, cuda_graph: as for `Sampler`.
        fuse: whether layers of networks that are not frozen are fused.

    Raises:
        TypeError: `obj` is none of these.
        ValueError: an option is not known, or a network with fused layers computes something else.
    """
    options = Options(allow_general, check_noise(noise), dtype, device, backend, cuda_graph, fuse)
    if isinstance(obj, (tuple, list)):
        if len(obj) != 2 or not isinstance(obj[0], DiffusionModelUNet) or model is not None or inplace:
            raise not_supported(obj)
        model, obj, inplace = obj[0], DiffusionInferer(obj[1]), True  # it is new
    kind = type(obj) if type(obj) in _KINDS.values() else _KINDS.get(type(obj))
    if kind is None:
        raise not_supported(obj)
    if model is not None and not isinstance(model, DiffusionModelUNet):
        raise TypeError(f"model is a {type(model).__name__}, must be a DiffusionModelUNet")
    result = obj if inplace else copy.copy(obj)
    result.__class__ = kind
    vars(result).update(_options=options, _model=model, _scheduler=scheduler, _made={}, _told=set())
    if model is not None:
        result._prepared(model)
    return result


class _Accelerated(DiffusionInferer):
    """What the accelerated inferers share; the rest is MONAI's class."""

    _options: Options
    _model: Any
    _scheduler: Any
    _made: dict[int, Prepared]
    _told: set[str]

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self,
        input_noise: Tensor,
        diffusion_model: Any = None,
        scheduler: Any = None,
        save_intermediates: bool | None = False,
        intermediate_steps: int | None = 100,
        conditioning: Tensor | None = None,
        mode: str = "crossattn",
        verbose: bool = True,
        seg: Tensor | None = None,
        cfg: float | None = None,
        **more: Any,
    ) -> Any:
        """Draw samples as MONAI's `sample`.

        Raises:
            ValueError: an argument is out of range or of the wrong shape, or `allow_general` is False and a step table
                cannot say what the scheduler does.
            torch.OutOfMemoryError: the samples do not fit into memory.
        """
        model = self._model if diffusion_model is None else diffusion_model
        scheduler = scheduler or self._scheduler or self.scheduler
        if model is None:
            raise ValueError("diffusion_model is None, must be given: accelerate was given none")
        arguments = {
            "save_intermediates": save_intermediates, "intermediate_steps": intermediate_steps,
            "conditioning": conditioning, "mode": mode, "verbose": verbose, "seg": seg, "cfg": cfg, **more,
        }  # fmt: skip
        if not isinstance(model, DiffusionModelUNet):  # SPADE's, or a function: MONAI's own
            return super().sample(input_noise, model, scheduler, **arguments)
        _check(mode, conditioning)
        made = self._prepared(model)
        shape, network = tuple(input_noise.shape), made.network
        check_sizes(model, shape, cfg is not None, network.dtype, network.device)
        reason = why_not(scheduler)
        if reason is None and mode == "concat" and cfg is not None:
            reason = "cfg is given with mode 'concat', where the halves differ in their channels"
        if reason is None and model.num_class_embeds is not None:
            reason = "the network takes class_labels, which sample does not give"
        try:
            if reason is not None:
                self._tell(reason)
                forward: Any = Forward(model, network, scheduler.timesteps)
                return super().sample(input_noise, forward, scheduler, **arguments)
            return self._draw(made, input_noise, scheduler, arguments)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            first = str(error).splitlines()[0]
            raise torch.OutOfMemoryError(f"input_noise of shape {shape} does not fit into memory: {first}") from None

    def _draw(self, made: Prepared, x: Tensor, scheduler: Any, given: dict[str, Any]) -> Any:
        """Run the whole loop."""
        table, options = table_of(scheduler), self._options
        clip = float(scheduler.clip_sample_values[1]) if scheduler.clip_sample else None
        sampler = made.sampler(table, clip)
        kept: list[Tensor] = []
        every = given["intermediate_steps"] if given["save_intermediates"] else None

        def keep(_: int, timestep: int, state: Tensor) -> None:
            if every and timestep % every == 0:
                kept.append(state.to(x, copy=True))

        named: dict[str, Any] = {}
        conditioning, scale = given["conditioning"], given["cfg"]
        if given["mode"] == "concat":
            named["condition"] = conditioning
        elif conditioning is not None:
            named["conditions"] = {"context": conditioning}
            if scale is not None:
                fill = torch.full_like(conditioning, given.get("cfg_fill_value", -1.0))
                named |= {"unconditional": {"context": fill}, "guidance_scale": float(scale)}
        noise = None
        if options.noise == "torch":
            draws = [type(scheduler).__name__ == "DDPMScheduler" and t > 0 for t in table.timesteps.tolist()]
            noise = StepNoise(draws, lambda: torch.randn(x.shape, dtype=x.dtype, device=x.device))
            if any(draws):
                named["noise"] = noise
        else:
            named["seed"] = int(torch.randint(2**62, ()))
        images = sampler.sample(
            len(x), shape=tuple(x.shape[1:]), x_T=x.float(), table=table, progress=bool(given["verbose"]),
            callback=keep if every else None, **named,
        )  # fmt: skip
        if noise is not None:
            noise.finish()
        images = images.to(x)
        return (images, kept) if given["save_intermediates"] else images

    def _prepared(self, model: Any) -> Prepared:
        """Return a network as it runs, made once for each."""
        made = self._made.get(id(model))
        if made is None or not made.fits(model):
            made = self._made[id(model)] = Prepared(model, self._options)
            for other in list(self._made)[:-2]:
                del self._made[other]
        return made

    def _tell(self, reason: str) -> None:
        if not self._options.allow_general:
            raise ValueError(f"{reason}; or allow_general must be True: MONAI's own loop runs then")
        if reason not in self._told:
            self._told.add(reason)
            _log.warning("%s: MONAI's own loop runs around fastddpm's network", reason)


class _Diffusion(_Accelerated):
    """MONAI's DiffusionInferer, accelerated."""


class _LatentDiffusion(LatentDiffusionInferer, _Accelerated):  # type: ignore[misc]  # as in MONAI
    """MONAI's LatentDiffusionInferer, accelerated: it calls `_Accelerated.sample`, and decodes with its autoencoder."""


class _ControlNet(ControlNetDiffusionInferer):
    """MONAI's ControlNetDiffusionInferer: its loop and its networks' own forward, with fused layers."""

    _options: Options
    _model: Any
    _scheduler: Any
    _made: dict[int, Prepared]
    _told: set[str]
    _prepared: Any = _Accelerated._prepared

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self, input_noise: Tensor, diffusion_model: Any = None, controlnet: Any = None, cn_cond: Any = None,
        scheduler: Any = None, **named: Any,
    ) -> Any:  # fmt: skip
        """Draw samples as MONAI's `sample`."""
        model = self._model if diffusion_model is None else diffusion_model
        if isinstance(model, DiffusionModelUNet):
            model = self._prepared(model).fused
        return super().sample(input_noise, model, controlnet, cn_cond, scheduler or self._scheduler, **named)


_KINDS: dict[type, type] = {
    DiffusionInferer: _Diffusion,
    LatentDiffusionInferer: _LatentDiffusion,
    ControlNetDiffusionInferer: _ControlNet,
}


def _check(mode: str, conditioning: Tensor | None) -> None:
    if mode not in ("crossattn", "concat"):
        raise NotImplementedError(f"mode is {mode!r}, must be 'crossattn' or 'concat'")
    if mode == "concat" and conditioning is None:
        raise ValueError("conditioning is None but mode is 'concat', must be given")
