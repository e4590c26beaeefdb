"""Sample images with a model and a coefficient table.

`run` holds the loop and describes the objects involved.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import torch
from fastddpm_kernels.backend import resolve, unproved
from torch import Tensor

from fastddpm.common import checks
from fastddpm.common.progress import Report
from fastddpm.networks import weights
from fastddpm.networks.network import Network
from fastddpm.networks.overflow import choose_dtype
from fastddpm.networks.precision import tf32
from fastddpm.process.methods import find_method
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import StepTable
from fastddpm.sampling.batch import NoiseSource, check_noise, make_batch
from fastddpm.sampling.batch_size import BatchSizes
from fastddpm.sampling.guidance import ClassifierFn
from fastddpm.sampling.pool import LoopPool
from fastddpm.sampling.run import Run, StepCallback
from fastddpm.sampling.runner import GraphRecord
from fastddpm.sampling.settings import (
    LoopSettings,
    check_guidance,
    check_null_class,
    check_out_channels,
    checked_table,
    choose_classifier,
    choose_table,
    clipping,
)
from fastddpm.sampling.trajectory import Recorder, Trajectory


class Sampler:
    """Draws samples from a diffusion model by running its reverse process.

    Names and defaults are diffusers'.

    Args:
        model: an `nn.Module` or any callable `model(x, t)`, or `model(x, t, class_labels=labels)` if it is
            conditional. x is [N, ...] in the network's dtype, t is int64 [N], or float32 where a method
            visits levels between timesteps. It returns a tensor of x's shape (twice
            the channels for a learned variance), an object with such a `.sample`, or a tuple that begins with one.
            Or a `Network` that is there already, which says its dtype and device itself.
        schedule: the forward process the model was trained on; or a `StepTable`, such as
            `ddim_table(schedule, timesteps, eta=0.5)`, in place of a schedule, a method and its settings.
        method: the name of a function that makes the table: "ddpm" (ancestral sampling), "ddim", "dpmsolver++"
            (multistep, for few steps), "unipc", "deis", "plms", "euler", "euler_a", "heun", "dpm2", "lms", "edm", "lcm"
            and others; `fastddpm.process.methods.METHODS` has them all.
        num_inference_steps: from 1 to T; None for all T. For spacing "guided_diffusion" also a string of its.
        timestep_spacing: "leading", "trailing", "linspace", "denoising_diffusion_pytorch" or "guided_diffusion"; None
            for the method's own, "linspace" for samplers in sigma and "leading" for the others.
        prediction_type: what the model predicts: "epsilon", "sample" or "v_prediction".
        variance_type: "fixed_small", "fixed_small_log", "fixed_large", "learned" or "learned_range", of method "ddpm".
            Other methods ignore the second half of the model's channels if the variance is learned.
        clip_sample: clip the predicted x0 to [-clip_sample_range, clip_sample_range] at every step; None for the
            method's default, as diffusers has it: True for "ddpm" and "ddim", False for the others.
        eta: of method "ddim": 0 is deterministic, 1 has DDPM's variance.
        guidance_scale: classifier-free guidance, out = uncond + scale * (cond - uncond); needs class labels and a
            null class. None or 1: no guidance, one evaluation per step. `sample` may override it.
        dtype: of the network, as a torch.dtype or by name: "float32", "float16", "bfloat16"; "tf32" for float32 whose
            products CUDA rounds to TensorFloat-32; None for the model's own. "auto" is float16 on CUDA and the model's
            own elsewhere; a `fastddpm.UNet` that would overflow in float16 gets bfloat16 (it is tried, and logged).
            "float32" and "tf32" set torch's switches for TensorFloat-32 during sampling. The state is always float32.
            A `fastddpm.UNet` is prepared for sampling: see `fastddpm.networks.frozen`.
        device: where to sample; None for where the model is.
        backend: "auto", "triton", "native", "eager" or "reference", for the sampling step (and for the layers of a
            `fastddpm.UNet`).
        cuda_graph: on a CUDA device, "auto" captures the steps as CUDA graphs and runs them in the way that it measures
            to be fastest (up to 192 steps one by one, where measuring does not pay); a model that cannot be captured
            runs without, with a warning. "while" (one launch for all steps), "unrolled" (several steps per launch) or
            "step" (one): only that way. False: no graphs, for models whose Python code does not do the same in every
            call. All modes run the same operations. `graph_report` says which one is used. On the CPU "auto" hands the
            steps of a network that runs natively to the native library, which runs them without Python.
        steps_offset: added to the timesteps of "leading" spacing.
        clip_sample_range: see `clip_sample`.
        null_class: the label that means "no class"; None for the one the model's config names.
        timesteps: an explicit list of falling timesteps, in place of `num_inference_steps` and the spacing.
        convention: of method "ddpm", see `ddpm_table`.
        use_clipped_model_output, set_alpha_to_one: of method "ddim", see `ddim_table`.
        solver_order, lower_order_final, final_sigmas_type: of method "dpmsolver++", see `dpmsolver_table`.
        thresholding: dynamic thresholding (Saharia et al. 2022) in place of `clip_sample`: each sample's x0 is clipped
            to its `dynamic_thresholding_ratio`-quantile of magnitude, at least 1 and at most `sample_max_value` (which
            comes first, if it is less than 1), and divided by it.
        guidance_interval: (lowest, highest) timestep between which guidance applies (Kynkäänniemi et al. 2024);
            outside it only the conditional half is computed.
        guidance_rescale: from 0 to 1, how far the guided prediction is brought back to the standard deviation of the
            conditional one (Lin et al. 2024, section 3.4).
        classifier_fn: classifier_fn(x, t, class_labels), the gradient of log p(class_labels | x_t) in x: x float32
            [N, ...], t int64 [N]; it runs with gradients enabled. "ddpm" moves the mean of a step by the step's
            variance times the gradient, the other methods move epsilon by -sqrt(1 - abar) times it (Dhariwal & Nichol
            2021, algorithms 1 and 2); `guidance.Classifier` says what guided-diffusion does otherwise.
        classifier_scale: factor of that gradient.
        weight_dtype: "float16" stores the weights of convolutions in float16, for half the bytes to read, where a
            network runs natively on the CPU in float32: each is rounded by up to 2^-11 of itself, which is part of the
            result. None for the network's dtype.
        fusion: how a prepared U-Net is divided into kernels on CUDA: "full", "parts" or "auto", see
            `fastddpm.networks.frozen.freeze`.
        self_condition: give the model the x0 it predicted in the step before, zeros at first (Chen et al. 2022): as
            `x_self_cond` if it has a parameter of that name, else as channels before those of x.
        **settings: further settings of the method. Where one is None, the method's own default holds.

    Attributes:
        table: the coefficient table; `timesteps` are its.
        schedule, method: as given; None and "table" where a table was.
        settings: how the loops process predictions.
        network: the model in its place and dtype.

    A model that has to be moved or converted is copied; the one passed in stays as it is. It is evaluated in eval
    mode and without gradients. The device memory of a batch is kept for the next one of the same shape and options,
    and freed with the sampler. Several threads may use one sampler.

    Raises:
        ValueError, TypeError: a setting is not known, out of range, another method's, or contradicts another one.
        BackendError: the named backend cannot run on the device.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule | StepTable,
        method: str = "ddpm",
        num_inference_steps: int | str | None = None,
        timestep_spacing: str | None = None,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        clip_sample: bool | None = None,
        eta: float | None = None,
        guidance_scale: float | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
        cuda_graph: str | bool = "auto",
        *,
        steps_offset: int = 0,
        clip_sample_range: float = 1.0,
        null_class: int | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        convention: str | None = None,
        use_clipped_model_output: bool | None = None,
        set_alpha_to_one: bool | None = None,
        solver_order: int | None = None,
        lower_order_final: bool | None = None,
        final_sigmas_type: str | None = None,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        guidance_interval: tuple[int, int] | None = None,
        guidance_rescale: float = 0.0,
        classifier_fn: ClassifierFn | None = None,
        classifier_scale: float = 1.0,
        weight_dtype: torch.dtype | str | None = None,
        fusion: str = "auto",
        self_condition: bool = False,
        **settings: Any,
    ) -> None:
        self.table = choose_table(
            schedule,
            method,
            num_inference_steps=num_inference_steps,
            timestep_spacing=timestep_spacing,
            steps_offset=steps_offset,
            timesteps=timesteps,
            variance_type=variance_type,
            prediction_type=prediction_type,
            settings={
                "eta": eta,
                "convention": convention,
                "use_clipped_model_output": use_clipped_model_output,
                "set_alpha_to_one": set_alpha_to_one,
                "solver_order": solver_order,
                "lower_order_final": lower_order_final,
                "final_sigmas_type": final_sigmas_type,
                **settings,
            },
        )
        self.timesteps, self.prediction_type = self.table.timesteps, prediction_type
        if clip_sample is None:
            clip_sample = self.table.stores == "x0" and (isinstance(schedule, StepTable) or find_method(method).clips)
        if self.table.stores != "x0" and (clip_sample or thresholding):
            name = "clip_sample" if clip_sample else "thresholding"
            raise ValueError(f"{name} is True but method is {method!r}, which stores no x0 to clip: must be False")
        if self.table.stores != "x0" and self_condition:
            raise ValueError(f"self_condition is True but method is {method!r}, which stores no x0: must be False")
        self.schedule: NoiseSchedule | None = None if isinstance(schedule, StepTable) else schedule
        self.method = "table" if self.schedule is None else method
        if self.schedule is None and self.table.learned is not None:
            variance_type = "learned_range" if self.table.learned == "range" else "learned"
        self.variance_type = variance_type
        if self.schedule is None and dtype == "auto":
            raise ValueError("dtype is 'auto' but schedule is a StepTable, which cannot test float16; name a dtype")
        if weight_dtype not in (None, "float16", torch.float16):
            raise ValueError(f"weight_dtype is {weight_dtype!r}, must be 'float16' or None")
        if isinstance(model, Network):
            self.network, self._tf32 = model, None
        else:
            chosen, self._tf32 = choose_dtype(
                model,
                self.schedule,
                dtype,
                device,
                prediction_type=prediction_type,
                clip_range=clip_sample_range if clip_sample else None,
                learned_variance=variance_type in ("learned", "learned_range"),
            )
            stored = None if weight_dtype is None else torch.float16
            self.network = Network(
                model, device, chosen, backend, allow_tf32=self._tf32 is True, weight_dtype=stored, freeze=True,
                fusion=fusion,
            )  # fmt: skip
        if self._tf32 is None and self.network.frozen is not None and self.network.dtype == torch.float32:
            self._tf32 = False  # its convolutions ignore torch's switches, so its products must too
        self.model, self.config = self.network.model, self.network.config
        self.device, self.dtype = self.network.device, self.network.dtype
        # Do not build the native library for the step alone: a network must run on it too.
        native = self.network.frozen is not None and self.network.frozen.backend == "native"
        native = native and (backend == "native" or unproved(("reverse_step",), "cpu") is None)
        step = backend if backend not in ("auto", "native") else "native" if native else "auto"
        self.backend = resolve("reverse_step_", step, self.device.type)
        self.clip_range, threshold = clipping(
            clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value
        )
        self.null_class = null_class if null_class is not None else getattr(self.config, "null_class", None)
        self.guidance_scale = None if guidance_scale is None else checks.finite(guidance_scale, "guidance_scale")
        of_labels = None if self.network.convention.takes_text else self.guidance_scale  # else texts may be guided
        check_null_class(self.null_class, getattr(self.config, "num_class_embeds", None), of_labels)
        self.settings = LoopSettings(
            backend=self.backend,
            clip_range=self.clip_range,
            threshold=threshold,
            variance_type=variance_type,
            guidance_rescale=guidance_rescale,
            guidance_interval=check_guidance(guidance_interval, guidance_rescale),
            null_class=self.null_class,
            classifier=choose_classifier(classifier_fn, classifier_scale, self.table.shifts),
            self_condition=self_condition,
        )
        check_out_channels(self.settings, getattr(self.config, "out_channels", None))
        self._graphs = GraphRecord.parse(cuda_graph, self.device)
        # Neither refers to the sampler: a reference to it would keep its memory alive.
        self._pool = LoopPool(self.network, self.settings, self._graphs)
        self._sizes = BatchSizes(self._pool)

    def graph_report(self) -> dict[str, Any]:
        """Return how the steps run with this `cuda_graph`, and why.

        Returns:
            "mode": how steps run, "while", "unrolled" or "step", "native" on the CPU, "plain" without graphs, None
            before the first capture;
            "measured_us": microseconds per step of every mode that was tried; "captures": how many were made so far;
            "why_not": why there are no graphs, or None.
        """
        return self._graphs.report()

    @overload
    def sample(
        self,
        num_samples: int,
        *,
        shape: Sequence[int] | None = ...,
        seed: int = ...,
        seeds: Sequence[int] | None = ...,
        first_sample: int = ...,
        x_T: Tensor | None = ...,
        start: int = ...,
        table: StepTable | None = ...,
        noise: NoiseSource | None = ...,
        class_labels: int | Sequence[int] | Tensor | None = ...,
        guidance_scale: float | Sequence[float] | Tensor | None = ...,
        condition: Tensor | None = ...,
        conditions: Mapping[str, Tensor] | None = ...,
        unconditional: Mapping[str, Tensor] | None = ...,
        known: Tensor | None = ...,
        known_mask: Tensor | None = ...,
        known_noise: NoiseSource | None = ...,
        batch_size: int | str | None = ...,
        callback: StepCallback | None = ...,
        progress: bool | Report = ...,
        return_trajectory: None = ...,
    ) -> Tensor: ...

    @overload
    def sample(self, num_samples: int, *, return_trajectory: int, **arguments: Any) -> Trajectory: ...

    # Tensors kept for the next call must not be inference tensors.
    @torch.inference_mode(False)  # type: ignore[misc]  # mypy holds **Any to be more than all the keywords
    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        *,
        shape: Sequence[int] | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        first_sample: int = 0,
        x_T: Tensor | None = None,
        start: int = 0,
        table: StepTable | None = None,
        noise: NoiseSource | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float | Sequence[float] | Tensor | None = None,
        condition: Tensor | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        unconditional: Mapping[str, Tensor] | None = None,
        known: Tensor | None = None,
        known_mask: Tensor | None = None,
        known_noise: NoiseSource | None = None,
        batch_size: int | str | None = None,
        callback: StepCallback | None = None,
        progress: bool | Report = False,
        return_trajectory: int | None = None,
    ) -> Tensor | Trajectory:
        """Draw `num_samples` samples.

        Sample k of a seed is the same image (to the network's rounding) whatever the number of samples, the batch
        size, the backend or the device: its noise depends on the seed, k, the step and the position only.

        Args:
            num_samples: N, at least 1.
            shape: of one sample, such as (C, H, W), (C, L) or (P, 3); None for the one the model's config states.
            seed: 0 <= seed < 2**64; sample k draws stream k of it.
            seeds: one seed per sample in place of `seed`; each sample is then sample 0 of its seed.
            first_sample: k: the samples are k to k + N - 1 of the seed, so that several calls can share one seed.
            x_T: float [N, ...] to start from, in place of drawn noise.
            start: the row of the table to start from; above 0 `x_T` must be given, at the level before that row
                (`table.skip(start).start`). The steps from there on draw the noise that they draw in the whole loop;
                a multistep method begins there at first order.
            table: another `StepTable` than the sampler's own, such as a RePaint walk or an inversion.
            noise: [S, N, ...], or a function of (row of the table, (n, ...)) that returns such a tensor for one step
                of n samples, in place of drawn noise z. The function is not called for steps that add none (the last
                one of DDPM), and does not work with a `batch_size` below N.
            class_labels: one label for all or one per sample; with class_embed_type "identity" float [N, E].
            guidance_scale: one for all or one per sample, in place of the sampler's.
            condition: float [N, C', ...] that the model reads as further channels after those of x, such as the
                low-resolution image of super-resolution.
            conditions: what else the model takes, [N, ...] or [1, ...] by the names of its arguments, such as
                {"encoder_hidden_states": text} of a UNet2DConditionModel.
            unconditional: the same for the unconditional half of guidance, which then needs no labels: the embedding of
                a negative prompt. What it lacks is that of `conditions`; it may have "class_labels".
            known: float, broadcastable to [N, ...]: after every step it replaces the samples where `known_mask` is 1,
                noised to the level of that step (Lugmayr et al. 2022, eq. 8). The mask goes from 0 to 1, or is boolean.
            known_noise: as `noise`, in place of the noise drawn for `known`.
            batch_size: samples per pass through the network; None for all at once; "auto" for as many as are fastest
                and fit, which a long run measures first, and half as many wherever memory runs out. With noise
                functions "auto" is all at once.
            callback: called after every step as callback(row of the table, timestep, x). x [n, ...] is the float32
                state, whose memory is reused: do not change it, and copy it to keep it. If the callback returns
                True, the loop stops there. With "auto" it may see the steps of a chunk that did not fit.
            progress: True shows a progress bar; a function is called as progress(steps done, steps of all chunks), on
                CUDA after several steps, so that one launch may run them.
            return_trajectory: k: return a `Trajectory` of the states and predicted x0 every k steps (no x0 for methods
                that store none).

        Returns:
            float32 [N, *shape], within [-1, 1] where x0 is clipped to it; or the trajectory asked for.

        Raises:
            ValueError, TypeError: an argument is out of range or of the wrong shape or type, or contradicts another.
            torch.OutOfMemoryError: this many samples do not fit at once.
            CaptureError: the steps cannot be captured in the way that `cuda_graph` names.

        Warns:
            RuntimeWarning: some samples are not finite; it names them, and the first step of one of them. To see it,
                the host waits for the device when all steps are done.
        """
        count = checks.positive(num_samples, "num_samples")
        batch_size = checks.batch_size(batch_size)
        table = checked_table(self.table if table is None else table, start, x_T is not None, self.settings)
        shape = (count, *self._sample_shape(shape, x_T))
        batch = make_batch(
            self.network,
            self.settings,
            shape,
            seed=seed,
            seeds=seeds,
            first_sample=first_sample,
            class_labels=class_labels,
            guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
            condition=condition,
            conditions=conditions,
            unconditional=unconditional,
            known=known,
            known_mask=known_mask,
        )
        if known_noise is not None and known is None:
            raise ValueError("known_noise is given but known is None, must be given along with it")
        if x_T is not None:
            checks.floating(x_T, shape, "x_T")
        recorder = None
        if return_trajectory is not None:
            every = checks.positive(return_trajectory, "return_trajectory")
            recorder = Recorder(every, table.timesteps[start:], shape, self.device)
        run = Run(
            self._pool,
            table,
            start,
            batch,
            shape,
            x_T,
            noise=check_noise(noise, (len(table), *shape), batch_size, "noise"),
            known_noise=check_noise(known_noise, (len(table), *shape), batch_size, "known_noise"),
            callback=callback,
            recorder=recorder,
        )
        with self.network.evaluating(), self._rounding(), weights.summed_once():
            images = run.draw(self._sizes, batch_size, progress)
            self._check_finite(images, run)
        return images if recorder is None else recorder.trajectory(stores_x0=table.stores == "x0")

    def _rounding(self) -> AbstractContextManager[None]:
        """Set how CUDA rounds the factors of float32 products, if the user asked for it."""
        return nullcontext() if self._tf32 is None or self.device.type != "cuda" else tf32(self._tf32)

    def _check_finite(self, images: Tensor, run: Run) -> None:
        """Warn of samples that are not finite, and name the step at which the first of them became so.

        The loop itself checks nothing: the step is found by walking one sample again.
        """
        bad = (~images.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()  # waits for the device, once
        if not bad:
            return
        row = run.first_not_finite(bad[0])
        step = ""
        if row is not None:
            at = f"step {row - run.start + 1} of {run.steps} (timestep {int(run.table.timesteps[row])})"
            step = f", sample {bad[0]} since {at}"
        few = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        reason = "the model's weights or inputs may have values that are not finite"
        if self.dtype == torch.float16:
            reason = "activations above 65504 overflow in float16; dtype='auto' tests for that and takes bfloat16"
        warnings.warn(
            f"{len(bad)} of {len(images)} samples are not finite ({few}){step}: {reason}",
            RuntimeWarning,
            stacklevel=5,  # past the decorators of `sample`
        )

    def _sample_shape(self, shape: Sequence[int] | None, x_T: Tensor | None) -> tuple[int, ...]:
        if shape is not None:
            return checks.sample_shape(shape)
        if isinstance(x_T, Tensor) and x_T.ndim > 1:
            return tuple(x_T.shape[1:])
        return self.network.sample_shape(self.settings.learned_variance)
