"""The diffusions of denoising_diffusion_pytorch with `Sampler` in place of their loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fastddpm_kernels import philox
from torch import Tensor

from fastddpm.common import checks
from fastddpm.interop.lucidrains.models import LIBRARY
from fastddpm.interop.lucidrains.run import Drawing, Options, Samplers, Variant
from fastddpm.interop.lucidrains.tables import ddim_sample_table, p_sample_table

METHODS = ("sample", "p_sample_loop", "ddim_sample", "interpolate")
# What the library's versions of these call: a diffusion with one of its own samples in another way than ours.
_PARTS = (
    *METHODS,
    *("p_sample", "p_mean_variance", "model_predictions", "q_posterior", "q_sample"),
    *("predict_start_from_noise", "predict_noise_from_start", "predict_start_from_v"),
)
_PLAIN = Variant()


def check_parts(diffusion: Any) -> None:
    """Raise ValueError where a method that sampling calls is not the library's: overridden, or replaced on either."""
    given = {name: value for name, value in vars(diffusion).items() if name in _PARTS}
    own = [n for n, value in given.items() if not isinstance(getattr(value, "__self__", None), AcceleratedDiffusion)]
    # The library's other diffusions derive from these in modules of their own, and override some of them.
    bases = [base for base in type(diffusion).__mro__ if base.__module__.partition(".")[0] == LIBRARY]
    home = next(base.__module__ for base in bases if base.__name__.startswith("GaussianDiffusion"))
    own += [name for name in _PARTS if not _is_of(getattr(type(diffusion), name, None), home)]
    if own:
        raise ValueError(
            f"{type(diffusion).__name__} has its own {', '.join(dict.fromkeys(own))}, which would not be called; must "
            f"have those of {LIBRARY}. Sampler(model, schedule) samples its network"
        )


def _is_of(function: Any, module: str) -> bool:
    """Return whether a function was written in a module, and what wraps it there or in torch. None counts."""
    while function is not None:
        where = getattr(function, "__globals__", {}).get("__name__", "")
        if where != module and where.partition(".")[0] != "torch":
            return False
        function = getattr(function, "__wrapped__", None)
    return True


class AcceleratedDiffusion:
    """A `GaussianDiffusion` that samples with `Sampler`; made by `accelerate`, which says what the options are.

    `sample`, `p_sample_loop`, `ddim_sample` and `interpolate` take the arguments of the original, and by name:

        noise: "philox" or "torch", in place of the option.
        seed: of Philox noise, 0 <= seed < 2**64; None for one that is drawn from torch's global generator, so that
            two calls differ and `torch.manual_seed` repeats both.
        progress: whether a bar is shown, in place of the option.

    Everything else is the diffusion's, read when it is needed: `sampling_timesteps`, `ddim_sampling_eta` and the
    weights may change between calls. The network is evaluated in eval mode, in which the original may not have been.
    `clip_denoised` is always true where the original has no such argument.

    Attributes:
        diffusion: the original object.
    """

    _rederives = True  # whether DDIM derives the predicted noise again from the clipped x0
    _by_name = False  # whether the network is given x_self_cond by name
    _usual = _PLAIN  # what is sampled with by default

    def __init__(self, diffusion: Any, options: Options) -> None:
        options.check_for(diffusion)
        samplers = Samplers(diffusion, options, self._by_name)
        self.__dict__.update(diffusion=diffusion, options=options, _samplers=samplers)

    # -- the library's methods ------------------------------------------------------------------------------------

    def sample(self, batch_size: int = 16, return_all_timesteps: bool = False, **drawing: Any) -> Tensor:
        """Images [N, C, H, W], in [0, 1] with `auto_normalize`; or with all states, [N, S + 1, C, H, W], x_T first."""
        loop = self.ddim_sample if self.diffusion.is_ddim_sampling else self.p_sample_loop
        shape = (checks.positive(batch_size, "batch_size"), self.diffusion.channels, *self.diffusion.image_size)
        return loop(shape, return_all_timesteps=return_all_timesteps, **drawing)

    def p_sample_loop(self, shape: tuple[int, ...], return_all_timesteps: bool = False, **drawing: Any) -> Tensor:
        """As `sample`, of `shape` [N, C, H, W], by DDPM with all timesteps."""
        return self._images(self._walk("ddpm", shape, drawing, all_states=return_all_timesteps)[0])

    def ddim_sample(self, shape: tuple[int, ...], return_all_timesteps: bool = False, **drawing: Any) -> Tensor:
        """As `sample`, of `shape` [N, C, H, W], by DDIM with `sampling_timesteps` steps."""
        return self._images(self._walk("ddim", shape, drawing, all_states=return_all_timesteps)[0])

    def interpolate(
        self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5, **drawing: Any
    ) -> Tensor:
        """x1 and x2 [N, C, H, W], in [-1, 1], noised to timestep t, mixed and denoised by DDPM: like them."""
        return self._interpolate(x1, x2, t, lam, drawing)

    # -- the object's own -----------------------------------------------------------------------------------------

    def to(self, *arguments: Any, **named: Any) -> AcceleratedDiffusion:
        """Moves the original, and with it where it is sampled, unless a device was given."""
        self.diffusion.to(*arguments, **named)
        return self

    def cuda(self, device: int | torch.device | None = None) -> AcceleratedDiffusion:
        """As `to`."""
        self.diffusion.cuda(device)
        return self

    def cpu(self) -> AcceleratedDiffusion:
        """As `to`."""
        return self.to("cpu")

    def train(self, mode: bool = True) -> AcceleratedDiffusion:
        """Sets the mode of the original."""
        self.diffusion.train(mode)
        return self

    def eval(self) -> AcceleratedDiffusion:
        """Sets the mode of the original."""
        return self.train(False)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The training loss, of the original."""
        return self.diffusion(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name == "diffusion":  # not there yet, while being copied
            raise AttributeError(name)
        return getattr(self.diffusion, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.diffusion, name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.diffusion!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"diffusion": self.diffusion, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def check(self) -> None:
        """Makes what sampling by default needs, and raises what is wrong with it; see `accelerate`."""
        p_sample_table(self.diffusion)
        self._samplers.check(self._usual)

    # -- sampling -------------------------------------------------------------------------------------------------

    def _walk(
        self,
        method: str,
        shape: tuple[int, ...],
        drawing: Mapping[str, Any],
        *,
        variant: Variant = _PLAIN,
        labels: Tensor | None = None,
        all_states: bool = False,
        keep_start: bool = False,
        scales: tuple[float, float] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return samples of `shape`, or all states [N, S + 1, ...]; and x_T, if it was drawn beforehand."""
        check_parts(self.diffusion)
        table = (
            p_sample_table(self.diffusion)
            if method == "ddpm"
            else ddim_sample_table(self.diffusion, rederive=self._rederives)
        )
        with self._samplers.lent(variant, scales) as sampler:
            draw = Drawing(drawing, self.options, self.diffusion, sampler, tuple(shape))
            x = draw.initial() if draw.by_torch or all_states or keep_start else None
            return draw.walk(table, method, x, labels=labels, all_states=all_states), x

    def _interpolate(
        self,
        x1: Tensor,
        x2: Tensor,
        t: int | None,
        lam: float,
        drawing: Mapping[str, Any],
        *,
        variant: Variant = _PLAIN,
        labels: Tensor | None = None,
        scales: tuple[float, float] | None = None,
    ) -> Tensor:
        diffusion = self.diffusion
        check_parts(diffusion)
        total = int(diffusion.num_timesteps)
        checks.floating(x1, tuple(getattr(x1, "shape", ())), "x1")
        checks.floating(x2, tuple(x1.shape), "x2")
        t = total - 1 if t is None else t
        if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < total:
            raise ValueError(f"t is {t!r}, must be an integer from 0 to {total - 1}")
        checks.finite(lam, "lam")
        with self._samplers.lent(variant, scales) as sampler:
            draw = Drawing(drawing, self.options, diffusion, sampler, tuple(x1.shape))
            times = torch.full((len(x1),), t, device=diffusion.device)
            images = (x.to(diffusion.device) for x in (x1, x2))
            first, second = (self._noised(x, times, draw, index) for index, x in enumerate(images))
            mixed = ((1 - lam) * first + lam * second).to(sampler.device)
            if t == 0:
                return mixed
            return draw.walk(p_sample_table(diffusion), "ddpm", mixed, labels=labels, start=total - t)

    def _noised(self, x: Tensor, times: Tensor, draw: Drawing, index: int) -> Tensor:
        """q_sample of the image that is the `index`-th to be noised."""
        noise = None if draw.by_torch else draw.initial(index).to(x)
        return self.diffusion.q_sample(x, t=times, noise=noise)

    def _images(self, x: Tensor) -> Tensor:
        return self.diffusion.unnormalize(x)


class AcceleratedDiffusion1D(AcceleratedDiffusion):
    """A `GaussianDiffusion1D` that samples with `Sampler`: see `AcceleratedDiffusion`.

    `model_forward_kwargs` are for the original's own loop, which runs them if `allow_general` was given.
    """

    _rederives, _by_name = False, True

    def sample(  # type: ignore[override]
        self,
        batch_size: int = 16,
        return_noise: bool = False,
        model_forward_kwargs: Mapping[str, Any] | None = None,
        **drawing: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Sequences [N, C, L], or [N, L, C] without `channel_first`; with `return_noise` and the x_T they come from.

        (The original's DDIM returns the noise of its last but one step instead.)
        """
        own = self.diffusion
        loop = self.ddim_sample if own.is_ddim_sampling else self.p_sample_loop
        sizes = (own.channels, own.seq_length) if own.channel_first else (own.seq_length, own.channels)
        return loop(
            (checks.positive(batch_size, "batch_size"), *sizes),
            return_noise=return_noise,
            model_forward_kwargs=model_forward_kwargs,
            **drawing,
        )

    def p_sample_loop(  # type: ignore[override]
        self,
        shape: tuple[int, ...],
        return_noise: bool = False,
        model_forward_kwargs: Mapping[str, Any] | None = None,
        **drawing: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `sample`, by DDPM with all timesteps."""
        if model_forward_kwargs:
            named = {"return_noise": return_noise, "model_forward_kwargs": dict(model_forward_kwargs)}
            return self._samplers.general("p_sample_loop", "model_forward_kwargs", drawing, shape, **named)
        x, start = self._walk("ddpm", shape, drawing, keep_start=return_noise)
        return (self._images(x), start) if return_noise and start is not None else self._images(x)

    def ddim_sample(  # type: ignore[override]
        self,
        shape: tuple[int, ...],
        clip_denoised: bool = True,
        model_forward_kwargs: Mapping[str, Any] | None = None,
        return_noise: bool = False,
        **drawing: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `sample`, by DDIM with `sampling_timesteps` steps; x0 is clipped to [-1, 1] or not."""
        if model_forward_kwargs:
            named = {"return_noise": return_noise, "model_forward_kwargs": dict(model_forward_kwargs)}
            return self._samplers.general(
                "ddim_sample", "model_forward_kwargs", drawing, shape, clip_denoised=clip_denoised, **named
            )
        variant = Variant(clip=bool(clip_denoised))
        x, start = self._walk("ddim", shape, drawing, variant=variant, keep_start=return_noise)
        return (self._images(x), start) if return_noise and start is not None else self._images(x)


class AcceleratedGuidedDiffusion(AcceleratedDiffusion):
    """The class-conditional `GaussianDiffusion` that samples with `Sampler`: see `AcceleratedDiffusion`.

    Both halves of the guidance are one batch. `cond_scale` 1 computes the conditional half alone (the original fails).
    DDIM with `use_cfg_plus_plus` is for the original's own loop, which runs it if `allow_general` was given.
    """

    _rederives = False
    _usual = Variant(labelled=True, guided=True, rescaled=True)

    def sample(  # type: ignore[override]
        self, classes: Tensor, cond_scale: float = 6.0, rescaled_phi: float = 0.7, **drawing: Any
    ) -> Tensor:
        """Images [N, C, H, W] in [0, 1] of the classes int64 [N]."""
        loop = self.ddim_sample if self.diffusion.is_ddim_sampling else self.p_sample_loop
        size = self.diffusion.image_size
        shape = (len(self._classes(classes)), self.diffusion.channels, size, size)
        return loop(classes, shape, cond_scale, rescaled_phi, **drawing)

    def p_sample_loop(  # type: ignore[override]
        self,
        classes: Tensor,
        shape: tuple[int, ...],
        cond_scale: float = 6.0,
        rescaled_phi: float = 0.7,
        **drawing: Any,
    ) -> Tensor:
        """As `sample`, by DDPM with all timesteps."""
        guided = self._guided(cond_scale, rescaled_phi)
        return self._images(self._walk("ddpm", shape, drawing, labels=self._classes(classes), **guided)[0])

    def ddim_sample(  # type: ignore[override]
        self,
        classes: Tensor,
        shape: tuple[int, ...],
        cond_scale: float = 6.0,
        rescaled_phi: float = 0.7,
        clip_denoised: bool = True,
        **drawing: Any,
    ) -> Tensor:
        """As `sample`, by DDIM with `sampling_timesteps` steps; x0 is clipped to [-1, 1] or not."""
        if getattr(self.diffusion, "use_cfg_plus_plus", False) and cond_scale != 1:
            arguments = (classes, shape, cond_scale, rescaled_phi, clip_denoised)
            return self._samplers.general("ddim_sample", "use_cfg_plus_plus", drawing, *arguments)
        guided = self._guided(cond_scale, rescaled_phi, clip=bool(clip_denoised))
        return self._images(self._walk("ddim", shape, drawing, labels=self._classes(classes), **guided)[0])

    def interpolate(  # type: ignore[override]
        self, x1: Tensor, x2: Tensor, classes: Tensor, t: int | None = None, lam: float = 0.5, **drawing: Any
    ) -> Tensor:
        """x1 and x2 [N, C, H, W], in [-1, 1], noised to timestep t, mixed and denoised by DDPM with the classes."""
        guided = self._guided(6.0, 0.7)
        return self._interpolate(x1, x2, t, lam, drawing, labels=self._classes(classes), **guided)

    def _guided(self, cond_scale: float, rescaled_phi: float, *, clip: bool = True) -> dict[str, Any]:
        cond_scale = checks.finite(cond_scale, "cond_scale")
        rescaled_phi = checks.finite(rescaled_phi, "rescaled_phi")
        guided = cond_scale != 1
        variant = Variant(clip=clip, labelled=True, guided=guided, rescaled=guided and rescaled_phi != 0)
        return {"variant": variant, "scales": (cond_scale, rescaled_phi)}

    def _classes(self, classes: Tensor) -> Tensor:
        if not isinstance(classes, Tensor) or classes.ndim != 1:
            raise TypeError("classes must be an integer tensor [N], one class per image")
        embedding = getattr(self.diffusion.model, "classes_emb", None)
        return checks.labels(classes, len(classes), getattr(embedding, "num_embeddings", None))

    def _noised(self, x: Tensor, times: Tensor, draw: Drawing, index: int) -> Tensor:
        own = self.diffusion
        if draw.by_torch:
            return own.q_sample(x, t=times)
        noise = draw.initial(index)
        if own.offset_noise_strength > 0:  # the original draws this inside, from torch's generator
            offset = draw.initial(index, stream=philox.STREAM_Q_SAMPLE)[:, :, :1, :1]
            noise = noise + own.offset_noise_strength * offset
        t = int(times[0])
        return own.sqrt_alphas_cumprod[t] * x + own.sqrt_one_minus_alphas_cumprod[t] * noise.to(x)

    def _images(self, x: Tensor) -> Tensor:
        return (x + 1) * 0.5
