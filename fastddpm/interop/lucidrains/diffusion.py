"""Sample the diffusions of denoising_diffusion_pytorch that have betas with `Sampler` instead of their loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from fastddpm_kernels import philox
from torch import Tensor

from fastddpm.common import checks
from fastddpm.interop.lucidrains.accelerated import PLAIN, Accelerated
from fastddpm.interop.lucidrains.run import Drawing, Traits, Variant
from fastddpm.interop.lucidrains.tables import ddim_sample_table, p_sample_table
from fastddpm.interop.shared import kind_of
from fastddpm.process.tables import StepTable


class AcceleratedDiffusion(Accelerated):
    """A `GaussianDiffusion` that samples with `Sampler`. `accelerate` makes it and documents the options.

    `sample`, `p_sample_loop`, `ddim_sample` and `interpolate` take the arguments of the original, and these by name:

        noise: "philox" or "torch"; overrides the option.
        seed: of Philox noise, 0 <= seed < 2**64. None draws a seed from torch's global generator: two calls differ,
            and `torch.manual_seed` repeats both.
        progress: whether to show a bar; overrides the option.

    Every call reads the other settings from the diffusion: `sampling_timesteps`, `ddim_sampling_eta` and the weights
    may change between calls. The network runs in eval mode, even if the original is in training mode.
    `clip_denoised` is always true where the original has no such argument.

    Attributes:
        diffusion: the original object.
    """

    of = (("denoising_diffusion_pytorch", "GaussianDiffusion"),)
    methods = ("sample", "p_sample_loop", "ddim_sample", "interpolate")
    _rederives = True  # whether DDIM computes the predicted noise again from the clipped x0

    def sample(self, batch_size: int = 16, return_all_timesteps: bool = False, **drawing: Any) -> Tensor:
        """Draw images [N, C, H, W], in [0, 1] with `auto_normalize`; or all states [N, S + 1, C, H, W], x_T first."""
        loop = self.ddim_sample if self.diffusion.is_ddim_sampling else self.p_sample_loop
        shape = (checks.positive(batch_size, "batch_size"), self.diffusion.channels, *self.diffusion.image_size)
        return loop(shape, return_all_timesteps=return_all_timesteps, **drawing)

    def p_sample_loop(self, shape: tuple[int, ...], return_all_timesteps: bool = False, **drawing: Any) -> Tensor:
        """Draw images of `shape` [N, C, H, W] by DDPM with all timesteps; otherwise like `sample`."""
        return self._images(self._ancestral(shape, drawing, all_states=return_all_timesteps)[0])

    def ddim_sample(self, shape: tuple[int, ...], return_all_timesteps: bool = False, **drawing: Any) -> Tensor:
        """Draw images of `shape` [N, C, H, W] by DDIM with `sampling_timesteps` steps; otherwise like `sample`."""
        return self._images(self._implicit(shape, drawing, all_states=return_all_timesteps)[0])

    def interpolate(self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5, **drawing: Any) -> Tensor:
        """Noise x1 and x2, [N, C, H, W] in [-1, 1], to timestep t, mix and denoise by DDPM; same shape and range."""
        return self._interpolate(x1, x2, t, lam, drawing)

    def check(self) -> None:
        self.check_parts()
        self._p_table()
        super().check()

    def _p_table(self) -> StepTable:
        return p_sample_table(self.diffusion)

    def _ddim_table(self) -> StepTable:
        return ddim_sample_table(self.diffusion, rederive=self._rederives)

    def _ancestral(
        self, shape: tuple[int, ...], drawing: Mapping[str, Any], **named: Any
    ) -> tuple[Tensor, Tensor | None]:
        table = self._p_table()
        return self._walk(table, (table.timesteps > 0).tolist(), shape, drawing, **named)

    def _implicit(
        self, shape: tuple[int, ...], drawing: Mapping[str, Any], **named: Any
    ) -> tuple[Tensor, Tensor | None]:
        table = self._ddim_table()
        return self._walk(table, [True] * (len(table) - 1) + [False], shape, drawing, **named)

    def _interpolate(
        self,
        x1: Tensor,
        x2: Tensor,
        t: int | None,
        lam: float,
        drawing: Mapping[str, Any],
        *,
        variant: Variant = PLAIN,
        labels: Tensor | None = None,
        scales: tuple[float, float] | None = None,
    ) -> Tensor:
        diffusion = self.diffusion
        self.check_parts()
        total = int(diffusion.num_timesteps)
        checks.floating(x1, tuple(getattr(x1, "shape", ())), "x1")
        checks.floating(x2, tuple(x1.shape), "x2")
        t = total - 1 if t is None else t
        if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < total:
            raise ValueError(f"t is {t!r}, must be an integer from 0 to {total - 1}")
        checks.finite(lam, "lam")
        with self._samplers.lent(variant, scales) as sampler:
            device = self.traits.device(diffusion)
            draw = Drawing(drawing, self.options, device, sampler, tuple(x1.shape))
            times = torch.full((len(x1),), t, device=device)
            images = (x.to(device) for x in (x1, x2))
            first, second = (self._noised(x, times, draw, index) for index, x in enumerate(images))
            mixed = ((1 - lam) * first + lam * second).to(sampler.device)
            if t == 0:
                return mixed
            table = self._p_table()
            return draw.walk(table, (table.timesteps > 0).tolist(), mixed, labels=labels, start=total - t)

    def _noised(self, x: Tensor, times: Tensor, draw: Drawing, index: int) -> Tensor:
        """Return `q_sample` of x; `index` counts the images noised in this call and selects the noise."""
        noise = None if draw.by_torch else draw.initial(index).to(x)
        return self.diffusion.q_sample(x, t=times, noise=noise)

    def _images(self, x: Tensor) -> Tensor:
        return self.diffusion.unnormalize(x)


class AcceleratedDiffusion1D(AcceleratedDiffusion):
    """A `GaussianDiffusion1D` that samples with `Sampler`: see `AcceleratedDiffusion`.

    With `model_forward_kwargs` the unmodified network is called, without CUDA graphs, with all samples at once.
    """

    of = (("denoising_diffusion_pytorch_1d", "GaussianDiffusion1D"),)
    _rederives = False
    traits = Traits(by_name=True)

    def sample(  # type: ignore[override]
        self,
        batch_size: int = 16,
        return_noise: bool = False,
        model_forward_kwargs: Mapping[str, Any] | None = None,
        **drawing: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw sequences [N, C, L], or [N, L, C] without `channel_first`; `return_noise` also returns their x_T.

        The original's DDIM returns the noise of its second-to-last step instead.
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
        """Sample by DDPM with all timesteps; otherwise like `sample`."""
        x, start = self._ancestral(shape, drawing, keep_start=return_noise, named=model_forward_kwargs)
        return (self._images(x), start) if return_noise and start is not None else self._images(x)

    def ddim_sample(  # type: ignore[override]
        self,
        shape: tuple[int, ...],
        clip_denoised: bool = True,
        model_forward_kwargs: Mapping[str, Any] | None = None,
        return_noise: bool = False,
        **drawing: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Sample by DDIM with `sampling_timesteps` steps; `clip_denoised` clips x0. Otherwise like `sample`."""
        variant = Variant(clip=bool(clip_denoised))
        x, start = self._implicit(shape, drawing, variant=variant, keep_start=return_noise, named=model_forward_kwargs)
        return (self._images(x), start) if return_noise and start is not None else self._images(x)


class AcceleratedGuidedDiffusion(AcceleratedDiffusion):
    """The class-conditional `GaussianDiffusion` that samples with `Sampler`: see `AcceleratedDiffusion`.

    Both halves of the guidance run as one batch. `cond_scale` 1 computes only the conditional half (the original
    fails). DDIM with `use_cfg_plus_plus` runs the original's own loop around the prepared network.
    """

    of = (("classifier_free_guidance", "GaussianDiffusion"),)
    _rederives = False
    _usual = Variant(labelled=True, guided=True, rescaled=True)

    def sample(  # type: ignore[override]
        self, classes: Tensor, cond_scale: float = 6.0, rescaled_phi: float = 0.7, **drawing: Any
    ) -> Tensor:
        """Draw images [N, C, H, W] in [0, 1] of the classes int64 [N]."""
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
        """Sample by DDPM with all timesteps; otherwise like `sample`."""
        guided = self._guided(cond_scale, rescaled_phi)
        return self._images(self._ancestral(shape, drawing, labels=self._classes(classes), **guided)[0])

    def ddim_sample(  # type: ignore[override]
        self,
        classes: Tensor,
        shape: tuple[int, ...],
        cond_scale: float = 6.0,
        rescaled_phi: float = 0.7,
        clip_denoised: bool = True,
        **drawing: Any,
    ) -> Tensor:
        """Sample by DDIM with `sampling_timesteps` steps; `clip_denoised` clips x0. Otherwise like `sample`."""
        guided = self._guided(cond_scale, rescaled_phi, clip=bool(clip_denoised))
        if getattr(self.diffusion, "use_cfg_plus_plus", False) and cond_scale != 1:
            arguments = (self._classes(classes), shape, cond_scale, rescaled_phi, clip_denoised)
            return self._own_loop("ddim_sample", "use_cfg_plus_plus is True", drawing, *arguments, **guided)
        return self._images(self._implicit(shape, drawing, labels=self._classes(classes), **guided)[0])

    def interpolate(  # type: ignore[override]
        self, x1: Tensor, x2: Tensor, classes: Tensor, t: int | None = None, lam: float = 0.5, **drawing: Any
    ) -> Tensor:
        """Noise x1 and x2, [N, C, H, W] in [-1, 1], to timestep t, mix them and denoise by DDPM with the classes."""
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


class AcceleratedLearnedDiffusion(AcceleratedDiffusion):
    """A `LearnedGaussianDiffusion` that samples with `Sampler`: see `AcceleratedDiffusion`.

    As in the original, the network predicts noise, whatever `objective` says, and the variance of every step.
    """

    of = (("learned_gaussian_diffusion", "LearnedGaussianDiffusion"),)
    _rederives = False
    traits = Traits(by_name=True, predicts=lambda _: "epsilon", variance_type="learned_range")

    def _p_table(self) -> StepTable:
        return p_sample_table(self.diffusion, predicts="epsilon", learned=True)

    def _ddim_table(self) -> StepTable:
        """Return the table that the original's DDIM describes, for predicted noise only.

        The original cannot run (it lacks an import), and its code is unambiguous only for noise.
        """
        objective = self.diffusion.objective
        if objective != "pred_noise":
            raise ValueError(
                f"objective is {objective!r}, must be 'pred_noise' for ddim_sample of a {kind_of(self.diffusion)}, "
                f"whose networks predict noise; or sampling_timesteps num_timesteps, {self.diffusion.num_timesteps}"
            )
        return super()._ddim_table()


class AcceleratedWeightedDiffusion(AcceleratedDiffusion):
    """A `WeightedObjectiveGaussianDiffusion` that samples with `Sampler`: see `AcceleratedDiffusion`.

    The original's `p_sample` fails because it expects a fourth value from `p_mean_variance`; this class does what it
    describes.
    """

    of = (("weighted_objective_gaussian_diffusion", "WeightedObjectiveGaussianDiffusion"),)
    traits = Traits(by_name=True, predicts=lambda _: "sample", weighted=True)

    def _p_table(self) -> StepTable:
        return p_sample_table(self.diffusion, predicts="sample")

    def _ddim_table(self) -> StepTable:
        own = self.diffusion
        raise ValueError(
            f"sampling_timesteps is {own.sampling_timesteps}, must be num_timesteps, {own.num_timesteps}, for a "
            f"{kind_of(own)}, which has no DDIM"
        )


class AcceleratedRepaintDiffusion(AcceleratedDiffusion):
    """A `repaint.GaussianDiffusion` that samples with `Sampler`: see `AcceleratedDiffusion`.

    As in the original, `sample` always uses DDPM. With a mask the original's own loop runs around the prepared network.
    """

    of = (("repaint", "GaussianDiffusion"),)

    def sample(  # type: ignore[override]
        self, batch_size: int = 16, return_all_timesteps: bool = False, gt: Tensor | None = None,
        mask: Tensor | None = None, resample: bool = True, resample_iter: int = 10, resample_jump: int = 10,
        resample_every: int = 50, **drawing: Any,
    ) -> Tensor:  # fmt: skip
        """Draw images [N, C, H, W], in [0, 1] with `auto_normalize`; keep `gt`, in [0, 1], where `mask` is 1."""
        count = checks.positive(batch_size, "batch_size") if mask is None else len(mask)
        return self.p_sample_loop(
            (count, self.diffusion.channels, *self.diffusion.image_size), return_all_timesteps, gt, mask, resample,
            resample_iter, resample_jump, resample_every, **drawing,
        )  # fmt: skip

    def p_sample_loop(  # type: ignore[override]
        self, shape: tuple[int, ...], return_all_timesteps: bool = False, gt: Tensor | None = None,
        mask: Tensor | None = None, resample: bool = True, resample_iter: int = 10, resample_jump: int = 3,
        resample_every: int = 50, **drawing: Any,
    ) -> Tensor:  # fmt: skip
        """Draw images of `shape` [N, C, H, W]; otherwise like `sample`."""
        if mask is None:
            return super().p_sample_loop(shape, return_all_timesteps, **drawing)
        if gt is None:
            raise ValueError("gt is None but mask is given, must be the images that are kept where it is 1")
        checks.floating(mask, tuple(getattr(mask, "shape", ())), "mask")
        checks.floating(gt, tuple(getattr(gt, "shape", ())), "gt")
        if resample is True and not 0 <= resample_jump < self.diffusion.num_timesteps:
            total = self.diffusion.num_timesteps
            raise ValueError(f"resample_jump is {resample_jump!r}, must be from 0 to {total - 1}, a timestep")
        return self._own_loop(
            "p_sample_loop", "mask is given", drawing, shape, return_all_timesteps, gt, mask, resample, resample_iter,
            resample_jump, resample_every,
        )  # fmt: skip


class AcceleratedClassifierDiffusion(AcceleratedDiffusion):
    """A `guided_diffusion.GaussianDiffusion` of this library that samples with `Sampler`: see `AcceleratedDiffusion`.

    With `cond_fn` the original's own loop runs around the prepared network.
    """

    of = (("guided_diffusion", "GaussianDiffusion"),)
    _rederives = False

    def sample(  # type: ignore[override]
        self, batch_size: int = 16, return_all_timesteps: bool = False, cond_fn: Callable[..., Tensor] | None = None,
        guidance_kwargs: Mapping[str, Any] | None = None, **drawing: Any,
    ) -> Tensor:  # fmt: skip
        """Draw images [N, C, H, W], in [0, 1] with `auto_normalize`."""
        loop = self.ddim_sample if self.diffusion.is_ddim_sampling else self.p_sample_loop
        size = self.diffusion.image_size
        shape = (checks.positive(batch_size, "batch_size"), self.diffusion.channels, size, size)
        return loop(shape, return_all_timesteps, cond_fn, guidance_kwargs, **drawing)

    def p_sample_loop(  # type: ignore[override]
        self, shape: tuple[int, ...], return_all_timesteps: bool = False, cond_fn: Callable[..., Tensor] | None = None,
        guidance_kwargs: Mapping[str, Any] | None = None, **drawing: Any,
    ) -> Tensor:  # fmt: skip
        """Draw images of `shape` [N, C, H, W] by DDPM with all timesteps; otherwise like `sample`."""
        if cond_fn is None or guidance_kwargs is None:
            return super().p_sample_loop(shape, return_all_timesteps, **drawing)
        return self._own_loop(
            "p_sample_loop", "cond_fn is given", drawing, shape, return_all_timesteps, cond_fn, guidance_kwargs
        )

    def ddim_sample(  # type: ignore[override]
        self, shape: tuple[int, ...], return_all_timesteps: bool = False, cond_fn: Callable[..., Tensor] | None = None,
        guidance_kwargs: Mapping[str, Any] | None = None, **drawing: Any,
    ) -> Tensor:  # fmt: skip
        """Sample by DDIM, which ignores `cond_fn`; otherwise like `sample`.

        As in the original, the returned states are x_T, x_T, ..., without x_0.
        """
        if not return_all_timesteps:
            return super().ddim_sample(shape, **drawing)
        states = self._implicit(shape, drawing, all_states=True)[0]
        return self._images(torch.cat([states[:, :1], states[:, :-1]], dim=1))


class AcceleratedOwnLoop(Accelerated):
    """A diffusion of a user's own class, whose own loops run around the prepared network.

    The network runs in eval mode. Noise comes from torch.
    """

    methods = AcceleratedDiffusion.methods

    @classmethod
    def like(cls, kind: type[Accelerated]) -> type[AcceleratedOwnLoop]:
        """Return this class for diffusions that use their network as those of `kind` do."""
        return _OwnLoopGuided if kind is AcceleratedGuidedDiffusion else cls

    def check_parts(self) -> None:
        """Accept any methods: the object's own loop runs."""

    def sample(self, *arguments: Any, **named: Any) -> Any:
        """Run the original method with the prepared network."""
        return self._loop("sample", *arguments, **named)

    def p_sample_loop(self, *arguments: Any, **named: Any) -> Any:
        """Run the original method with the prepared network."""
        return self._loop("p_sample_loop", *arguments, **named)

    def ddim_sample(self, *arguments: Any, **named: Any) -> Any:
        """Run the original method with the prepared network."""
        return self._loop("ddim_sample", *arguments, **named)

    def interpolate(self, *arguments: Any, **named: Any) -> Any:
        """Run the original method with the prepared network."""
        return self._loop("interpolate", *arguments, **named)

    def _loop(self, method: str, *arguments: Any, **named: Any) -> Any:
        drawing: dict[str, Any] = {name: named.pop(name) for name in ("noise", "seed", "progress") if name in named}
        reason = f"{kind_of(self.diffusion)} has methods of its own"
        return self._own_loop(method, reason, drawing, *arguments, **named)


class _OwnLoopGuided(AcceleratedOwnLoop):
    _usual = AcceleratedGuidedDiffusion._usual
