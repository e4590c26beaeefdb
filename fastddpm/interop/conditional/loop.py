"""The whole denoising loop of a pipeline in one go, inside the pipeline's own call.

A pipeline prepares prompts and latents, walks its timesteps, and decodes. Its walk calls the U-Net and then the
scheduler's `step`. Here the first call of the U-Net only notes the conditions and returns numbers that stand in for a
prediction. They come back in the first `step`, guided as the pipeline guides: that shows its formula to be ours. That
`step` then runs the sampler's loop from these latents to the end, and the pipeline's further steps change nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from fastddpm_kernels import philox
from torch import Tensor

from fastddpm.interop.conditional.forward import Call, Forward, Unsupported, watching
from fastddpm.interop.diffusers.scheduler import Recognised, recognise, state_of
from fastddpm.interop.shared import StepNoise
from fastddpm.networks.network import Network
from fastddpm.process.tables import StepTable
from fastddpm.sampling.guidance import combine, rescale_guidance
from fastddpm.sampling.sampler import Sampler

# Where a pipeline sets regions after every step, the next step must read nothing else than the state and x0.
_KNOWN = ("ddpm", "ddim", "euler", "euler_a", "dpmsolver++", "sde-dpmsolver++", "lcm")
_SAME = 1e-3  # of the pipeline's guidance and ours, in float32


class Pipeline(NamedTuple):
    """How the loop of a pipeline's class uses its U-Net.

    Attributes:
        masks: whether it sets known regions after every step, where the U-Net reads no mask.
    """

    masks: bool = False


PIPELINES: dict[str, Pipeline] = {
    "StableDiffusionPipeline": Pipeline(),
    "StableDiffusionImg2ImgPipeline": Pipeline(),
    "StableDiffusionInpaintPipeline": Pipeline(masks=True),
    "StableDiffusionUpscalePipeline": Pipeline(),
    "StableDiffusionDepth2ImgPipeline": Pipeline(),
    "StableDiffusionImageVariationPipeline": Pipeline(),
    "StableUnCLIPPipeline": Pipeline(),
    "StableUnCLIPImg2ImgPipeline": Pipeline(),
    "StableDiffusionXLPipeline": Pipeline(),
    "StableDiffusionXLImg2ImgPipeline": Pipeline(),
    "StableDiffusionXLInpaintPipeline": Pipeline(masks=True),
    "LatentConsistencyModelPipeline": Pipeline(),
    "LatentConsistencyModelImg2ImgPipeline": Pipeline(),
    "LDMTextToImagePipeline": Pipeline(),
    "IFPipeline": Pipeline(),
    "IFImg2ImgPipeline": Pipeline(),
    "IFSuperResolutionPipeline": Pipeline(),
    "IFImg2ImgSuperResolutionPipeline": Pipeline(),
}


def pipeline_of(kind: type) -> Pipeline | None:
    """Return how the loop of a class is; of a subclass, where it calls as its base does. None if it is not known."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "diffusers" and base.__name__ in PIPELINES:
            return PIPELINES[base.__name__] if kind.__call__ is base.__call__ else None  # type: ignore[operator]
    return None


class KeepLoop(Exception):
    """Says why a pipeline keeps its own loop, after that has begun."""


@dataclass(eq=False)
class Samplers:
    """The sampler of a pipeline, and what its scheduler was recognised as, kept for the next call."""

    _scheduler: tuple[Any, Recognised | str] | None = None
    _sampler: tuple[Any, Sampler] | None = None

    def recognised(self, scheduler: Any) -> Recognised:
        """Return what a scheduler does.

        Raises:
            Unsupported: it is not supported.
        """
        key = state_of(scheduler)
        if self._scheduler is None or self._scheduler[0] != key:
            try:
                self._scheduler = key, recognise(scheduler)
            except ValueError as error:
                self._scheduler = key, str(error)
        found = self._scheduler[1]
        if isinstance(found, str):
            raise Unsupported(found)
        return found

    def sampler(self, forward: Forward, recognised: Recognised, table: StepTable, **settings: Any) -> Sampler:
        """Return the sampler of a prepared U-Net; the table is only its own default."""
        frozen, options = forward.prepared(), forward.options
        key = (id(frozen), id(recognised), tuple(sorted(settings.items())))
        if self._sampler is None or self._sampler[0] != key:
            self._sampler = None  # its memory is free before the next one takes its own
            network = Network(frozen.unet, frozen=frozen)
            own = {**recognised.of_sampler, **settings}
            self._sampler = key, Sampler(network, table, backend=options.backend, cuda_graph=options.cuda_graph, **own)
        return self._sampler[1]


class Loop:
    """One call of a pipeline, whose loop is taken over.

    Args:
        pipe: the pipeline.
        how: of its class.
        forward: of its U-Net.
        samplers: of the pipeline.
        arguments: of the call, by name, with defaults.

    Raises:
        Unsupported: its scheduler is not supported, or the call needs the host at every step.
    """

    def __init__(
        self, pipe: Any, how: Pipeline, forward: Forward, samplers: Samplers, arguments: dict[str, Any]
    ) -> None:
        for name in ("callback", "callback_on_step_end"):
            given = arguments.get(name) or arguments.get("kwargs", {}).get(name)
            if given is not None:
                raise Unsupported(f"{name} is given")
        if forward.frozen is None:
            forward.prepared()
        assert forward.frozen is not None
        if forward.frozen.dtype == torch.float64:
            raise Unsupported("unet is in float64")
        self.unet = forward.unet
        self._pipe, self._how, self._forward, self._samplers = pipe, how, forward, samplers
        self._arguments = arguments
        self._recognised = samplers.recognised(pipe.scheduler)
        self._call: Call | None = None
        self._stand_in = torch.empty(0)
        self._given_up = self._done = False
        self._bar: Any = None
        self._latents: tuple[Any, ...] = ()
        self._mask: Tensor | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take the calls of the U-Net and of the scheduler's `step` inside."""
        scheduler = self._pipe.scheduler
        own, self._pipe.__dict__["_num_timesteps"] = scheduler.step, None

        @functools.wraps(own)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._call is None or self._given_up:
                return own(model_output, timestep, sample, *args, **kwargs)
            given = inspect.signature(own).bind(model_output, timestep, sample, *args, **kwargs).arguments
            out = sample if self._done else self._run(model_output, timestep, sample, given)
            self._done = True
            if getattr(scheduler, "_step_index", None) is not None:
                scheduler._step_index += 1
            if not given.get("return_dict", True):
                return (out, out) if self._recognised.method == "lcm" else (out,)
            from diffusers.schedulers.scheduling_utils import SchedulerOutput

            return SchedulerOutput(prev_sample=out)

        states = self._random_states()
        token = watching.set(self)
        scheduler.__dict__["step"] = step
        try:
            yield
        except KeepLoop:
            for restore in states:
                restore()
            raise
        finally:
            watching.reset(token)
            scheduler.__dict__.pop("step", None)

    def noted_bar(self, bar: Any) -> None:
        """Note the progress bar of the loop."""
        self._bar = bar

    def noted_latents(self, latents: Any) -> None:
        """Note what the pipeline's `prepare_latents` has returned."""
        self._latents = latents if isinstance(latents, tuple) else (latents,)

    def noted_mask(self, mask: Tensor) -> None:
        """Note the mask [N or 2N, 1, H, W], 1 where the image is to be made."""
        self._mask = mask

    def predict(self, call: Call) -> Tensor | None:
        """Return numbers in place of the prediction for a call; None where it is to be computed."""
        if self._given_up:
            return None
        if self._call is None:
            try:
                self._check(call)
            except Unsupported as error:
                self.give_up(str(error))
                return None
            n, _, *size = call.sample.shape
            keys = philox.sample_keys([0] * n, range(n), device=call.sample.device)
            shape = (self._out_channels, *size)
            noise = philox.normal(keys, shape, step=0, stream=philox.STREAM_INITIAL, backend="eager")
            self._call, self._stand_in = call, noise.to(call.sample.dtype)
        return self._stand_in

    def give_up(self, reason: str) -> None:
        """Leave the loop to the pipeline, and log once why."""
        self._given_up = True
        self._forward.keeps_loop(reason)

    @property
    def _out_channels(self) -> int:
        config: Any = self.unet.config
        return int(config.out_channels)

    def _check(self, call: Call) -> None:
        frozen = self._forward.prepared()
        blueprint = frozen.blueprint
        try:
            blueprint.check_conditions(call.conditions, len(call.sample))
        except ValueError as error:
            raise Unsupported(str(error)) from None
        if any(name not in blueprint.conditions for name in call.conditions):
            raise Unsupported("the U-Net's further inputs differ from step to step")
        if changing := [name for name in call.conditions if "residual" in name]:
            raise Unsupported(f"{changing[0]} differs from step to step")

    def _random_states(self) -> tuple[Callable[[], None], ...]:
        """Return functions that restore the random generators that the call may draw from."""
        given = self._arguments.get("generator")
        generators = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
        restore: list[Callable[[], None]] = [functools.partial(torch.set_rng_state, torch.get_rng_state())]
        if next(self.unet.parameters()).is_cuda:
            device = next(self.unet.parameters()).device
            restore.append(functools.partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device))
        restore += [functools.partial(g.set_state, g.get_state()) for g in generators]
        return tuple(restore)

    def _guidance(self) -> tuple[float, float]:
        """Return the scale of guidance and how far its standard deviation is restored."""
        pipe, given = self._pipe, self._arguments
        own = isinstance(getattr(type(pipe), "guidance_scale", None), property)
        scale = pipe.guidance_scale if own else given.get("guidance_scale", 1.0)
        rescale = getattr(pipe, "guidance_rescale", given.get("guidance_rescale", 0.0))
        return float(scale), float(rescale or 0.0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _run(self, guided: Tensor, timestep: Any, latents: Tensor, given: dict[str, Any]) -> Tensor:
        """Return the latents at the end of the loop, from those before its first step.

        Args:
            guided: the stand-in for the prediction, as the pipeline guides it.
            timestep: of the first step.
            latents: [N, C, H, W].
            given: the arguments of the scheduler's `step`, by name.

        Raises:
            KeepLoop: the pipeline does something else than the sampler would.
        """
        call, recognised, scheduler = self._call, self._recognised, self._pipe.scheduler
        assert call is not None
        latents = latents.clone()
        n, channels = latents.shape[:2]
        halves = 2 if len(call.sample) == 2 * n else 1
        scale, rescale = self._guidance()
        self._check_guidance(guided, latents, halves, scale, rescale)
        eta = float(given.get("eta", 0.0) or 0.0)
        clipped = bool(given.get("use_clipped_model_output", False))
        try:
            table = recognised.table(scheduler, eta=eta, use_clipped_model_output=clipped)
            draws = recognised.draws(table.timesteps, eta)
            start, stop = self._rows(scheduler, float(timestep), table)
            own_scale = recognised.initial_scale(scheduler) if start == 0 else _from(table, start).start[0]
            own_scale = own_scale if recognised.scales else 1.0
            last_scale = 1.0
            if stop < len(table) and recognised.scales:  # else the last row does it
                last_scale = 1 / float(table.levels[stop - 1, 0])
            table, draws = _until(_from(table, start), stop - start), draws[start:stop]
        except ValueError as error:
            raise KeepLoop(str(error)) from None
        self._check_input(call.sample, latents * own_scale, halves)
        settings: dict[str, Any] = {}
        if halves == 2 and rescale:
            settings["guidance_rescale"] = rescale
        if self._out_channels == 2 * channels and not recognised.learned_variance:
            settings["variance_type"] = "learned_range"  # channels that nothing reads
        arguments = self._of_sample(call, n, channels, halves, scale)
        if self._how.masks and self._mask is not None and call.sample.shape[1] == channels:
            table = self._known(table, latents, halves, arguments)
        noise = StepNoise(draws, self._draw(guided, given))
        if any(draws):
            arguments["noise"] = noise
        try:
            sampler = self._samplers.sampler(self._forward, recognised, table, **settings)
            out = sampler.sample(
                n, shape=latents.shape[1:], table=table, x_T=(latents * own_scale).float(),
                progress=self._progress(), **arguments,
            )  # fmt: skip
        except Unsupported as error:
            raise KeepLoop(str(error)) from None
        noise.finish()
        return (out * last_scale).to(latents.dtype)

    def _draw(self, guided: Tensor, given: dict[str, Any]) -> Callable[[], Tensor]:
        """Return what draws the noise of a step as the scheduler does."""
        from diffusers.utils.torch_utils import randn_tensor

        shape = given["sample"].shape
        return functools.partial(
            randn_tensor, shape, generator=given.get("generator"), device=guided.device, dtype=guided.dtype
        )

    def _check_guidance(self, guided: Tensor, latents: Tensor, halves: int, scale: float, rescale: float) -> None:
        """Raise KeepLoop unless the pipeline has guided the stand-in as the sampler guides predictions."""
        n, channels = latents.shape[:2]
        out = self._stand_in
        if len(out) != halves * n:
            raise KeepLoop(f"the U-Net is called with {len(out)} samples for {n} images")
        scales = torch.full((1,), scale, device=out.device)
        expected = out[-n:, :channels].float()
        if halves == 2:
            rescaled = rescale_guidance(out, channels, scales, rescale) if rescale else out
            expected = combine(rescaled, channels, scales)
        if guided.shape[1] != channels:
            expected = torch.cat([expected, out[-n:, channels:].float()], dim=1)
        tolerance = max(_SAME, 8 * torch.finfo(guided.dtype).eps) * (1 + abs(scale))
        if guided.shape != expected.shape or not bool((guided.float() - expected).abs().max() <= tolerance):
            raise KeepLoop("the pipeline guides the prediction in a way of its own")

    def _check_input(self, sample: Tensor, expected: Tensor, halves: int) -> None:
        """Raise KeepLoop unless the U-Net reads the latents as the sampler would give them, in both halves."""
        n, channels = expected.shape[:2]
        parts = sample.split(n)
        tolerance = max(_SAME, 8 * torch.finfo(sample.dtype).eps) * float(expected.abs().max().clamp_min(1))
        same = all(bool((part[:, :channels] - expected).abs().max() <= tolerance) for part in parts)
        if not same or (halves == 2 and not torch.equal(parts[0], parts[1])):
            raise KeepLoop("the pipeline gives the U-Net something else than the scaled latents")

    def _rows(self, scheduler: Any, timestep: float, table: StepTable) -> tuple[int, int]:
        """Return the first row of the table that the pipeline's loop walks, and the one after the last."""
        told = [float(t) for t in scheduler.timesteps]
        begin = getattr(scheduler, "begin_index", None)
        start = int(begin) if begin is not None else told.index(timestep) if timestep in told else -1
        if not 0 <= start < len(table) or told[start] != timestep:
            raise ValueError(f"timestep {timestep:g} is not of the scheduler's")
        if start and self._recognised.method in ("plms", "lms"):  # as if there had been steps before
            raise ValueError(f"{self._recognised.name} begins in the middle in a way of its own")
        count = getattr(self._pipe, "_num_timesteps", None)
        stop = len(table) if count is None else start + int(count)
        if not start < stop <= len(table):
            raise ValueError(f"the loop has {count} steps from {start} of {len(table)} on")
        return start, stop

    def _of_sample(self, call: Call, n: int, channels: int, halves: int, scale: float) -> dict[str, Any]:
        """Return the arguments of `Sampler.sample` for the conditions of a call."""
        arguments: dict[str, Any] = {"conditions": {name: value[-n:] for name, value in call.conditions.items()}}
        if call.labels is not None:
            arguments["class_labels"] = call.labels[-n:]
        if halves == 2:
            arguments["guidance_scale"] = scale
            arguments["unconditional"] = {name: value[:n] for name, value in call.conditions.items()}
            if call.labels is not None:
                arguments["unconditional"]["class_labels"] = call.labels[:n]
        if call.sample.shape[1] > channels:
            arguments["condition"] = call.sample[-n:, channels:].float()
        return arguments

    def _known(self, table: StepTable, latents: Tensor, halves: int, arguments: dict[str, Any]) -> StepTable:
        """Add the known region to the arguments of `Sampler.sample`, and return the table whose levels it takes."""
        assert self._mask is not None
        if self._recognised.method not in _KNOWN:
            raise KeepLoop(f"{self._recognised.name} reads more than the state, which the mask changes")
        if len(self._latents) != 3:
            raise KeepLoop("prepare_latents returns no noise")
        noise, image = (part.to(latents.device, torch.float32) for part in self._latents[1:])
        mask = self._mask.chunk(halves)[0].float()
        arguments |= {"known": image.expand_as(latents), "known_mask": (1 - mask).expand(len(latents), -1, -1, -1)}
        arguments["known_noise"] = noise.expand(len(table), *latents.shape)
        levels = table.levels.clone()
        levels[-1] = torch.tensor([1.0, 0.0])  # the image itself
        return replace(table, levels=levels)

    def _progress(self) -> Any:
        """Return the function that moves the pipeline's bar; the pipeline moves it no more."""
        bar = self._bar
        if bar is None or getattr(bar, "disable", False) or not bar.total or bar.iterable is not None:
            return False
        update, bar.update = bar.update, lambda n=1: None

        def report(done: int, total: int) -> None:
            update(done * bar.total // total - bar.n)

        return report


def _from(table: StepTable, start: int) -> StepTable:
    """Return the table from a row on, as a scheduler begins there.

    Raises:
        ValueError: the scheduler begins there with other steps.
    """
    if start and table.begins and start not in table.begins:
        raise ValueError("the loop begins inside a step of several evaluations")
    rest = table.skip(start)
    if len(rest) != len(table) - start:
        raise ValueError("the loop begins in the middle, where the sampler takes further evaluations")
    return replace(rest, timesteps=table.timesteps[start:], restart=None, begins=())


def _until(table: StepTable, stop: int) -> StepTable:
    """Return the first rows of a table."""
    cut = slice(0, stop)
    return replace(
        table,
        timesteps=table.timesteps[cut],
        rows=table.rows[cut],
        log_variance=None if table.log_variance is None else table.log_variance[cut],
        levels=table.levels[cut],
        needs_network=table.needs_network[cut],
        mean_std=None if table.mean_std is None else table.mean_std[cut],
    )
