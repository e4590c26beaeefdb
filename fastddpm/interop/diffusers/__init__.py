"""diffusers' unconditional pipelines, called as before, with fastddpm's U-Net and loop inside.

    pipe = accelerate(DDPMPipeline.from_pretrained("google/ddpm-cifar10-32"))
    images = pipe(batch_size=16, generator=torch.manual_seed(0)).images

The classes here are subclasses of diffusers' own and have their names, so that what is saved is loaded by diffusers.
This module imports diffusers; `fastddpm.interop.accelerate` imports it when it is given an object of that library.
"""

from __future__ import annotations

import copy
import functools
import logging
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from fastddpm_kernels import philox
from torch import Tensor

from fastddpm.interop.diffusers.engine import Engine, Options, Plan
from fastddpm.interop.shared import StepNoise, not_supported
from fastddpm.process.tables import StepTable

_log = logging.getLogger(__name__)

Generators = torch.Generator | list[torch.Generator] | None


def accelerate(
    obj: Any,
    *,
    inplace: bool = False,
    allow_general: bool = True,
    noise: str = "philox",
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    cuda_graph: str | bool = "auto",
) -> Any:
    """A pipeline of diffusers with its U-Net and loop replaced; its arguments and results stay the same.

    With `generator=` the images are those of the original pipeline, to rounding: the same random numbers in the same
    order. (LDMPipeline uses it for the first latents only; the noise of its steps is torch's own, as in the original.)
    Without, noise is Philox's: the seed is one number from torch's default CPU generator, so that two calls differ,
    `torch.manual_seed` repeats them, and an image does not depend on how many are drawn with it.

    The components are shared, as with diffusers' `from_pipe`, but for the scheduler, which is copied unless `inplace`.
    The U-Net may be trained, moved, converted or exchanged afterwards, and so may the scheduler: every call looks at
    what is there. The U-Net runs without dropout, and where `torch.compile` has wrapped it, without that.

    The progress bar is the pipeline's own. On CUDA it moves by several steps at a time, which are one launch.

    Args:
        obj: a `DDPMPipeline`, `DDIMPipeline` or `LDMPipeline`, or `(UNet2DModel, scheduler)`, which becomes a
            `DDIMPipeline` if the scheduler is a `DDIMScheduler` and else a `DDPMPipeline` whose loop scales noise and
            inputs as the scheduler wants (diffusers' own does not). Schedulers: those of `scheduler.SCHEDULERS`.
        inplace: change the pipeline itself.
        allow_general: where the U-Net is not supported, call it as it is in fastddpm's loop; where the scheduler or
            what it is set to is not, run the pipeline's own loop, with its own noise, around fastddpm's U-Net. Either
            is logged once, as a warning. False: raise ValueError instead.
        noise: "philox", or "torch": without `generator=` draw from torch's global generator, in the original's order.
        dtype, backend, cuda_graph: as for `Sampler`; the dtype of None is the U-Net's.

    Raises:
        TypeError: `obj` is none of these.
        ValueError: neither the U-Net nor the scheduler is supported (either, if not `allow_general`), they do not fit
            each other, or an option is not known.
    """
    options, parts = Options(allow_general, noise, dtype, backend, cuda_graph), isinstance(obj, (tuple, list))
    if parts:
        obj = _pipeline_of(obj, inplace)
        inplace = True  # it is new
    kind = type(obj)
    cls = _accelerated(kind)  # type: ignore[arg-type]
    if cls is None:
        raise not_supported(obj)
    result = obj if inplace else copy.copy(obj)
    if not inplace:
        result.__dict__["scheduler"] = copy.deepcopy(obj.scheduler)
    engine = Engine(options, scales=parts)
    engine.plan(result.unet, result.scheduler, scales=cls.scales, first=True)  # raises before anything is changed
    result.__class__ = cls
    result.__dict__["_engine"] = engine
    return result


@functools.cache
def _accelerated(kind: type) -> Any:
    """Return the class of a pipeline's class, accelerated, or None. Subclasses that call as their base count."""
    if issubclass(kind, _Accelerated):
        return kind
    for ours in _CLASSES:
        if kind is ours.base:
            return ours
        if issubclass(kind, ours.base) and kind.__call__ is ours.base.__call__:
            return type(kind.__name__, (ours, kind), {"__module__": kind.__module__, "base": kind})
    return None


def _pipeline_of(parts: Any, inplace: bool) -> Any:
    if len(parts) != 2 or not (hasattr(parts[0], "config") and hasattr(parts[1], "set_timesteps")):
        raise not_supported(parts)
    if inplace:
        raise ValueError("inplace is True but obj is a tuple, must be a pipeline to be changed")
    unet, scheduler = parts[0], copy.deepcopy(parts[1])
    name = "DDIMPipeline" if type(scheduler).__name__ == "DDIMScheduler" else "DDPMPipeline"
    return getattr(diffusers, name)(unet=unet, scheduler=scheduler)


class _Accelerated:
    """What the accelerated pipelines have in common; the rest is diffusers' class."""

    base: Any
    _engine: Engine
    scales = False  # whether the original's loop scales noise and inputs for schedulers in sigma

    def _plan(self: Any) -> Plan:
        # A pipeline that the class itself made, such as by `from_pipe`, has no engine yet.
        engine = self.__dict__.setdefault("_engine", Engine(Options()))
        return engine.plan(self.unet, self.scheduler, scales=self.scales)

    def _table(self: Any, plan: Plan, num_inference_steps: int, **options: Any) -> StepTable | None:
        """Set the timesteps and return the table; None where the pipeline has to keep its own loop.

        Raises:
            ValueError: the scheduler cannot be set to so many steps; or `allow_general` is False.
        """
        recognised, scheduler, before = plan.recognised, self.scheduler, dict(vars(self.scheduler))
        if recognised is None:
            return None
        first = scheduler.init_noise_sigma  # LDMPipeline asks before it sets the timesteps
        scheduler.set_timesteps(num_inference_steps)
        try:
            table = recognised.table(scheduler, **options)
        except ValueError as error:
            self._engine.keep_loop(f"{recognised.name}: {error}")
            vars(scheduler).clear()
            vars(scheduler).update(before)
            return None
        first = first if self.scales else scheduler.init_noise_sigma
        return replace(table, init_noise_sigma=float(first) * recognised.initial_scale(scheduler))

    def _denoise(
        self: Any,
        plan: Plan,
        table: StepTable,
        shape: tuple[int, ...],
        generator: Generators,
        *,
        latents: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """Run the whole loop: float32 [N, C, H, W] where the U-Net is.

        `latents`: as LDMPipeline draws: x_T in float32 on the CPU, the steps' noise from torch's global generator.
        """
        recognised = plan.recognised
        assert recognised is not None
        device, dtype = self._execution_device, self.unet.dtype
        sampler = self._engine.sampler(plan, device, table)
        arguments: dict[str, Any] = {}
        noise = None
        if generator is None and self._engine.options.noise == "philox":
            arguments["seed"] = seed = int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64))
            if table.start[1] == 0:  # inversion, which begins with images, is given noise all the same
                keys = philox.sample_keys([seed] * shape[0], range(shape[0]), device=device)
                arguments["x_T"] = philox.normal(keys, shape[1:], step=0, stream=philox.STREAM_INITIAL)
        else:
            _check_generators(generator, shape[0])
            place: dict[str, Any] = {} if latents else {"device": device, "dtype": dtype}
            arguments["x_T"] = randn_tensor(shape, generator=generator, **place) * table.init_noise_sigma
            of_steps = None if latents else generator
            draws = recognised.draws(table.timesteps, eta)
            # What the CPU draws the sampler copies, which need not wait for it.
            first = of_steps[0] if isinstance(of_steps, list) else of_steps
            drawn_on = device if first is None else first.device
            noise = StepNoise(draws, lambda: randn_tensor(shape, generator=of_steps, device=drawn_on, dtype=dtype))
            if any(draws):
                arguments["noise"] = noise
        with self.progress_bar(total=len(table)) as bar:
            if not getattr(bar, "disable", False):
                arguments["progress"] = lambda done, _: bar.update(done - bar.n)
            images = sampler.sample(shape[0], shape=shape[1:], table=table, **arguments)
        if noise is not None:
            noise.finish()
        return images

    def _result(self: Any, images: Tensor, output_type: str | None, return_dict: bool) -> Any:
        """Images from [-1, 1], as diffusers returns them, in the U-Net's dtype (float32 where numpy has none)."""
        images = (images / 2 + 0.5).clamp(0, 1)
        result: Any = images.to(self.unet.dtype)
        if output_type != "pt":
            result = images if self.unet.dtype == torch.bfloat16 else result
            result = result.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                result = self.numpy_to_pil(result)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def _shape(self: Any, batch_size: int) -> tuple[int, int, int, int]:
        config = self.unet.config
        size = config.sample_size
        if size is None:
            raise ValueError("unet.config.sample_size is None, must be the pixels of an image, or (height, width)")
        height, width = (size, size) if isinstance(size, int) else size
        return (batch_size, config.in_channels, height, width)


class DDPMPipeline(_Accelerated, diffusers.DDPMPipeline):
    """diffusers' DDPMPipeline, accelerated."""

    base = diffusers.DDPMPipeline

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """As `diffusers.DDPMPipeline`; see `accelerate` for the noise without a generator."""
        plan = self._plan()
        table = self._table(plan, num_inference_steps)
        if table is not None:
            images = self._denoise(plan, table, self._shape(batch_size), generator)
        elif self._engine.scales:
            images = plan.scaled_loop(self, self._shape(batch_size), generator, num_inference_steps)
        else:
            arguments = (batch_size, generator, num_inference_steps, output_type, return_dict)
            return plan.their_loop(self, self.base, *arguments)
        return self._result(images, output_type, return_dict)


class DDIMPipeline(_Accelerated, diffusers.DDIMPipeline):
    """diffusers' DDIMPipeline, accelerated."""

    base = diffusers.DDIMPipeline

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """As `diffusers.DDIMPipeline`; see `accelerate` for the noise without a generator."""
        plan = self._plan()
        if plan.recognised is not None and plan.recognised.method != "ddim":
            raise TypeError(f"scheduler is a {plan.recognised.name}, must be a DDIMScheduler: it is given eta")
        clipped = bool(use_clipped_model_output)
        table = self._table(plan, num_inference_steps, eta=eta, use_clipped_model_output=clipped)
        if table is None:
            arguments = (eta, num_inference_steps, use_clipped_model_output, output_type, return_dict)
            return plan.their_loop(self, self.base, batch_size, generator, *arguments)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator has {len(generator)} entries, must have one per image, {batch_size}")
        if not 0 <= eta <= 1:
            _log.warning("eta is %s, should be from 0 (DDIM) to 1 (DDPM's variance)", eta)
        images = self._denoise(plan, table, self._shape(batch_size), generator, eta=eta)
        return self._result(images, output_type, return_dict)


class LDMPipeline(_Accelerated, diffusers.LDMPipeline):
    """diffusers' LDMPipeline, accelerated: the latents are sampled here, decoded by its VQModel."""

    base = diffusers.LDMPipeline
    scales = True
    vqvae: Any

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        **kwargs: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """As `diffusers.LDMPipeline`; see `accelerate` for the noise without a generator."""
        plan = self._plan()
        # As in the original: eta is passed only to schedulers that take it.
        own = eta if plan.recognised is not None and plan.recognised.method == "ddim" else 0.0
        table = self._table(plan, num_inference_steps, eta=own)
        if table is None:
            arguments = (eta, num_inference_steps, output_type, return_dict)
            return plan.their_loop(self, self.base, batch_size, generator, *arguments)
        latents = self._denoise(plan, table, self._shape(batch_size), generator, latents=True, eta=own)
        decoder = self.vqvae
        images = decoder.decode((latents / decoder.config.scaling_factor).to(decoder.dtype)).sample.float()
        # The original has no "pt": whatever is not "pil" is an array.
        return self._result(images, "pil" if output_type == "pil" else "np", return_dict)


_CLASSES: tuple[Any, ...] = (DDPMPipeline, DDIMPipeline, LDMPipeline)


def _check_generators(generator: Generators, batch_size: int) -> None:
    """Raises ValueError if a list of generators does not reach; of one it is used for all, as in diffusers."""
    if isinstance(generator, list) and len(generator) != 1 and len(generator) < batch_size:
        raise ValueError(f"generator has {len(generator)} entries, must have one per image, {batch_size}")
