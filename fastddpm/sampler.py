"""Sampling: settings and a model become a coefficient table, a loop, and images."""

from __future__ import annotations

import copy
import inspect
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fastddpm_kernels import philox
from fastddpm_kernels._backend import resolve
from torch import Tensor, nn

from fastddpm.coefficients import METHODS, StepTable, ddim_table, ddpm_table
from fastddpm.loop import Loop
from fastddpm.progress import progress_bar
from fastddpm.schedule import NoiseSchedule
from fastddpm.unet import UNet

NoiseSource = Tensor | Callable[[int, tuple[int, ...]], Tensor]
StepCallback = Callable[[int, int, Tensor], bool | None]
NETWORK_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Sampler:
    """Draws samples from a diffusion model by running its reverse process.

    Args:
        model: an `nn.Module` or any callable `model(x, t)`, or `model(x, t, class_labels=labels)` if it is
            conditional. x is [N, ...] in the network's dtype, t is int64 [N]. It returns a tensor of x's shape (twice
            the channels for `learned_range`), an object with such a `.sample`, or a tuple that begins with one.
        schedule: the forward process the model was trained on.
        method: "ddpm" (ancestral sampling) or "ddim".
        num_inference_steps: from 1 to T; None for all T.
        timestep_spacing: "leading", "trailing" or "linspace".
        prediction_type: what the model predicts: "epsilon", "sample" or "v_prediction".
        variance_type: of method "ddpm": "fixed_small", "fixed_small_log", "fixed_large" or "learned_range".
        clip_sample: clip the predicted x0 to [-clip_sample_range, clip_sample_range] at every step.
        eta: of method "ddim": 0 is deterministic, 1 has DDPM's variance.
        guidance_scale: classifier-free guidance, out = uncond + scale * (cond - uncond); needs class labels and a
            null class. None: no guidance, one evaluation per step.
        dtype: of the network: float32, float16 or bfloat16; None for the model's own. The state is always float32.
        device: where to sample; None for where the model is.
        backend: "auto", "triton", "eager" or "reference", for the sampling step (and for the norms of a
            `fastddpm.UNet`).
        cuda_graph: "auto" captures the loop where that is supported; False never does. This version supports it on
            no device yet: every loop is a plain one.
        steps_offset: added to the timesteps of "leading" spacing.
        clip_sample_range: see `clip_sample`.
        null_class: the label that means "no class"; None for the one the model's config names.

    A model that has to be moved or converted is copied; the one passed in stays as it is. It is evaluated in eval
    mode and without gradients.

    Raises:
        ValueError: a setting is not known, out of range, or two of them contradict each other.
        BackendError: a backend was named that cannot run on the device.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        method: str = "ddpm",
        num_inference_steps: int | None = None,
        timestep_spacing: str = "leading",
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        eta: float = 0.0,
        guidance_scale: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
        cuda_graph: str | bool = "auto",
        *,
        steps_offset: int = 0,
        clip_sample_range: float = 1.0,
        null_class: int | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model is a {type(model).__name__}, must be an nn.Module or a callable model(x, t)")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule is a {type(schedule).__name__}, must be a NoiseSchedule")
        if cuda_graph not in ("auto", False):
            raise ValueError(f"cuda_graph is {cuda_graph!r}, must be 'auto' or False")
        if clip_sample and not 0 < clip_sample_range < float("inf"):
            raise ValueError(f"clip_sample_range is {clip_sample_range}, must be a positive number")
        self.schedule = schedule
        self.method = method
        self.timesteps = schedule.timesteps(num_inference_steps, timestep_spacing, steps_offset)
        self.table = _build_table(schedule, self.timesteps, method, prediction_type, variance_type, eta)
        self.clip_range = float(clip_sample_range) if clip_sample else None
        self.device, self.dtype = _place(model, device, dtype)
        self.backend = resolve("reverse_step", backend, self.device.type)
        self.model = _prepare(model, self.device, self.dtype, backend)
        self.config = getattr(model, "config", None)
        self.null_class = null_class if null_class is not None else getattr(self.config, "null_class", None)
        self.guidance_scale = guidance_scale
        if guidance_scale is not None:
            if not abs(guidance_scale) < float("inf"):
                raise ValueError(f"guidance_scale is {guidance_scale}, must be a finite number")
            if self.null_class is None:
                raise ValueError("guidance_scale needs a null_class, and the model's config names none")
        self._labels_name = _labels_parameter(model)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        *,
        shape: Sequence[int] | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        x_T: Tensor | None = None,
        noise: NoiseSource | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        callback: StepCallback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draws `num_samples` samples.

        Sample k of a seed is the same image (to the network's rounding) whatever the number of samples, the batch
        size, the backend or the device: its noise depends on the seed, k, the step and the position only.

        Args:
            num_samples: N, at least 1.
            shape: of one sample, such as (C, H, W); None for the one the model's config states.
            seed: 0 <= seed < 2**64; sample k draws stream k of it.
            seeds: one seed per sample in place of `seed`; each sample is then sample 0 of its seed.
            x_T: float [N, ...] to start from, in place of drawn noise.
            noise: [S, N, ...], or a function of (step index, (n, ...)) that returns such a tensor for one step of n
                samples, in place of drawn noise z. It is not called for steps that add none (the last one of DDPM).
            class_labels: one label for all or one per sample.
            batch_size: samples per pass through the network; None for all at once.
            callback: called after every step as callback(step index, timestep, x); x [n, ...] is the float32 state
                and must not be changed. If it returns True the loop stops there.
            progress: show a progress bar.

        Returns:
            float32 [N, *shape], within [-1, 1] where x0 is clipped to it.

        Raises:
            ValueError, TypeError: an argument is out of range or of the wrong shape or type.
        """
        count = _positive(num_samples, "num_samples")
        chunk = count if batch_size is None else _positive(batch_size, "batch_size")
        shape = self._sample_shape(shape, x_T)
        keys = self._keys(count, seed, seeds)
        labels = self._labels(class_labels, count)
        _check_given(x_T, (count, *shape), "x_T")
        if isinstance(noise, Tensor):
            _check_given(noise, (len(self.timesteps), count, *shape), "noise")

        images = torch.empty((count, *shape), dtype=torch.float32, device=self.device)
        total = len(self.timesteps) * -(-count // chunk)
        with _eval_mode(self.model), progress_bar(total, "sampling", enabled=progress) as advance:
            for start in range(0, count, chunk):
                rows = slice(start, min(start + chunk, count))
                start_from = self._initial(keys[rows], shape) if x_T is None else x_T[rows].to(self.device)
                loop = Loop(
                    self._predict,
                    self.table,
                    start_from,
                    keys=keys[rows] if noise is None else None,
                    class_labels=None if labels is None else self._batch_labels(labels[rows]),
                    guidance_scale=self.guidance_scale,
                    clip_range=self.clip_range,
                    network_dtype=self.dtype,
                    backend=self.backend,
                )
                self._run(loop, noise, rows, callback, advance)
                images[rows] = loop.x
        return images

    def _initial(self, keys: Tensor, shape: tuple[int, ...]) -> Tensor:
        return philox.normal(keys, shape, step=0, stream=philox.STREAM_INITIAL, backend=self.backend)

    def _batch_labels(self, labels: Tensor) -> Tensor:
        """Labels of one pass through the network: under guidance the unconditional half comes first."""
        if self.guidance_scale is None:
            return labels
        assert self.null_class is not None  # checked on construction
        return torch.cat([torch.full_like(labels, self.null_class), labels])

    def _run(
        self,
        loop: Loop,
        noise: NoiseSource | None,
        rows: slice,
        callback: StepCallback | None,
        advance: Callable[[], None],
    ) -> None:
        adds_noise = (self.table.rows[:, 6] != 0).tolist()
        for index, timestep in enumerate(self.timesteps.tolist()):
            given = noise is not None and adds_noise[index]
            z = self._given_noise(noise, index, rows, loop.x) if given else None
            loop.body(z)
            advance()
            if callback is not None and callback(index, timestep, loop.x):
                return

    def _given_noise(self, noise: NoiseSource | None, index: int, rows: slice, x: Tensor) -> Tensor:
        assert noise is not None
        z = noise[index, rows] if isinstance(noise, Tensor) else noise(index, tuple(x.shape))
        _check_given(z, tuple(x.shape), f"noise of step {index}")
        return z.to(x.device, torch.float32).contiguous()

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            out = self.model(x, t)
        elif self._labels_name is None:
            out = self.model(x, t, labels)
        else:
            out = self.model(x, t, **{self._labels_name: labels})
        if isinstance(out, Tensor):
            return out
        if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
            return out[0]
        if isinstance(sample := getattr(out, "sample", None), Tensor):
            return sample
        raise TypeError(f"model returned a {type(out).__name__}, must return a tensor, a tuple or have a .sample")

    def _sample_shape(self, shape: Sequence[int] | None, x_T: Tensor | None) -> tuple[int, ...]:
        if shape is not None:
            return tuple(_positive(size, "every size of shape") for size in shape)
        if isinstance(x_T, Tensor) and x_T.ndim > 1:
            return tuple(x_T.shape[1:])
        size, channels = getattr(self.config, "sample_size", None), getattr(self.config, "in_channels", None)
        if size is None or channels is None:
            raise ValueError("shape is None, must be given: the model has no config with sample_size and in_channels")
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return (channels, height, width)

    def _keys(self, count: int, seed: int, seeds: Sequence[int] | None) -> Tensor:
        if seeds is None:
            return philox.sample_keys([seed] * count, range(count), device=self.device)
        if len(seeds) != count:
            raise ValueError(f"seeds has {len(seeds)} entries, must have one per sample, {count}")
        return philox.sample_keys(list(seeds), [0] * count, device=self.device)

    def _labels(self, class_labels: int | Sequence[int] | Tensor | None, count: int) -> Tensor | None:
        classes = getattr(self.config, "num_class_embeds", None)
        if class_labels is None:
            if self.guidance_scale is not None:
                raise ValueError("guidance_scale needs class_labels, and none were given")
            if classes is None:
                return None
            if self.null_class is None:
                raise ValueError(f"class_labels is None, must be given: the model has {classes} classes")
            class_labels = self.null_class
        labels = torch.as_tensor(class_labels)
        if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
            raise TypeError(f"class_labels has dtype {labels.dtype}, must be integers")
        if labels.ndim == 0:
            labels = labels.expand(count)
        if labels.shape != (count,):
            raise ValueError(
                f"class_labels has shape {list(labels.shape)}, must be one label or one per sample ({count})"
            )
        if classes is not None and (int(labels.min()) < 0 or int(labels.max()) >= classes):
            wrong = int(labels[(labels < 0) | (labels >= classes)][0])
            raise ValueError(f"class_labels has {wrong}, every label must be from 0 to {classes - 1}")
        return labels.to(self.device, torch.int64)


def _build_table(
    schedule: NoiseSchedule, timesteps: Tensor, method: str, prediction_type: str, variance_type: str, eta: float
) -> StepTable:
    if method == "ddpm":
        if eta != 0:
            raise ValueError(f"eta is {eta} but method is 'ddpm'; eta is a setting of method 'ddim'")
        return ddpm_table(schedule, timesteps, prediction_type=prediction_type, variance_type=variance_type)
    if method == "ddim":
        if variance_type == "learned_range":
            raise ValueError("variance_type is 'learned_range' but method is 'ddim', whose variance is set by eta")
        return ddim_table(schedule, timesteps, prediction_type=prediction_type, eta=eta)
    raise ValueError(f"method is {method!r}, must be one of {', '.join(METHODS)}")


def _place(
    model: Callable[..., Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Where and in which dtype the network runs."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if dtype is None:
        own = first.dtype if first is not None else torch.float32
        dtype = own if own in NETWORK_DTYPES else torch.float32
    if dtype not in NETWORK_DTYPES:
        raise ValueError(f"dtype is {dtype}, must be one of {', '.join(map(str, NETWORK_DTYPES))}")
    if device is None:
        return (first.device if first is not None else torch.device("cpu")), dtype
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device is {str(device)!r}, which cannot be used: {str(error).splitlines()[0]}") from None
    return device, dtype


def _prepare(model: Callable[..., Any], device: torch.device, dtype: torch.dtype, backend: str) -> Callable[..., Any]:
    """The model in the place and dtype it runs in: itself if it is there already, else a copy."""
    if not isinstance(model, nn.Module):
        return model
    ours = isinstance(model, UNet) and model.backend != backend
    moved = any(p.device != device or p.dtype != dtype for p in model.parameters())
    if not (ours or moved):
        return model
    model = copy.deepcopy(model).to(device=device, dtype=dtype)
    if isinstance(model, UNet):
        model.backend = backend
    return model


def _labels_parameter(model: Callable[..., Any]) -> str | None:
    """The name under which the model takes labels; None to pass them as third argument."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    return next((name for name in ("class_labels", "classes", "y") if name in names), None)


@contextmanager
def _eval_mode(model: Callable[..., Any]) -> Iterator[None]:
    if not isinstance(model, nn.Module):
        yield
        return
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _positive(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}, must be a positive integer")
    return int(value)


def _check_given(value: Tensor | None, shape: tuple[int, ...], name: str) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} is of {kind}, must be a floating-point tensor")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}, must have {list(shape)}")
