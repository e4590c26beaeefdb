"""Define and check the settings of a training run."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PRECISIONS = ("no", "bf16", "fp16")
LR_SCHEDULERS = ("constant", "linear", "cosine")


def _integer(least: int) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least  # type: ignore[operator]
    )


def _number(least: float = -math.inf, below: float = math.inf, *, closed: bool = True) -> Callable[[Any], bool]:
    """Accept finite numbers from `least` (above it, if not `closed`) to below `below`."""
    return lambda value: (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (least <= float(value) if closed else least < float(value))
        and float(value) < below
    )


def _optional(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or valid(value)


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)


_COUNT = (_integer(1), "a positive integer")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_FLAG_OR_NONE = (lambda value: isinstance(value, bool | None), "true, false or None")
_ABOVE_0 = _number(0, closed=False)
_SHARE = _number(0, 1)
# The allowed values of each setting, in order: a test and its description.
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("results_folder", lambda value: isinstance(value, str | os.PathLike), "the path of a folder"),
    *((name, *_COUNT) for name in ("train_batch_size", "gradient_accumulate_every", "train_num_steps", "log_every")),
    *((name, *_COUNT) for name in ("save_every", "sample_every", "num_inference_steps", "keep_last")),
    ("num_samples", lambda value: _integer(1)(value) and value <= 1 << 16, "an integer from 1 to 65536"),
    ("max_bad_steps", *_COUNT),
    *((name, *_FLAG) for name in ("ema_warmup", "augment_horizontal_flip", "compile", "stop_on_save_error")),
    *((name, *_FLAG_OR_NONE) for name in ("channels_last", "tensorboard")),
    ("cache_bytes", _integer(0), "an integer of at least 0"),
    ("lr_warmup_steps", _optional(_integer(0)), "an integer of at least 0, or None"),
    ("metric_every", _optional(_integer(1)), "a positive integer or None"),
    ("seed", lambda value: _integer(0)(value) and value < 1 << 63, "an integer from 0 to below 2^63"),
    ("num_workers", lambda value: value == "auto" or (_integer(0)(value) and value <= 1024), "'auto', or 0 to 1024"),
    ("lr_scheduler", lambda value: value in LR_SCHEDULERS, f"one of {', '.join(LR_SCHEDULERS)}"),
    ("mixed_precision", lambda value: value in (None, *PRECISIONS), f"None or one of {', '.join(PRECISIONS)}"),
    ("metric_mode", lambda value: value in ("min", "max"), "'min' or 'max'"),
    ("device", lambda value: isinstance(value, str | None), "the name of a device or None"),
    ("train_lr", _ABOVE_0, "a positive number"),
    ("adam_epsilon", _ABOVE_0, "a positive number"),
    ("adam_weight_decay", _number(0), "a number of at least 0"),
    ("lr_final", _number(0, math.nextafter(1, 2)), "a number from 0 to 1"),
    ("max_grad_norm", _optional(_ABOVE_0), "a positive number or None"),
    ("guidance_scale", _optional(_number()), "a number or None"),
    ("adam_betas", lambda value: len(_several(value)) == 2 and all(map(_SHARE, value)),
     "two numbers from 0 to below 1"),
    ("ema_decay", lambda value: len(_several(value)) > 0 and all(map(_SHARE, _several(value))),
     "a number from 0 to below 1, or several"),
    ("ema_decay", lambda value: len(set(_several(value))) == len(_several(value)), "numbers that differ"),
)  # fmt: skip


@dataclass(frozen=True)
class TrainerSettings:
    """The settings of a `Trainer`, mostly named as in denoising_diffusion_pytorch's and diffusers' trainers.

    A step is one update of the weights, from `train_batch_size * gradient_accumulate_every` images.

    Attributes:
        results_folder: the folder for all output; see `Trainer`.
        train_batch_size: images of one forward pass, summed over all processes, so that the number of processes does
            not change the run.
        gradient_accumulate_every: forward passes per step.
        train_num_steps: the total number of steps.
        train_lr: the peak learning rate of AdamW.
        lr_scheduler: the schedule after the warm-up: "constant", "linear" or "cosine", down to `lr_final` at the last
            step.
        lr_warmup_steps: steps in which the rate rises linearly from 0 to its peak; None for 500, or a tenth of all
            steps if that is less.
        lr_final: the rate at the end, as a share of the peak.
        adam_betas, adam_weight_decay, adam_epsilon: of AdamW.
        max_grad_norm: gradients are scaled down to this norm; None for no clipping.
        mixed_precision: "no", "bf16" or "fp16" (CUDA only); None for the setting of `accelerate launch`, else "no".
        ema_decay: of the averaged weights, one or several; a half-life of h steps is 0.5 ** (1 / h). The first is the
            model that is sampled and saved.
        ema_warmup: the decay of step n is at most (1 + n) / (10 + n), so that the average forgets the start.
        augment_horizontal_flip: mirror every other image, at random.
        seed: of the order of the data, of flips and of dropout. The diffusion has its own seed for its noise.
        num_workers: processes that read data; "auto" for none if the data are in memory, else one per core up to 8.
        cache_bytes: keep the decoded pictures of a folder in memory if they need no more than this.
        log_every, save_every, sample_every: steps between records, checkpoints and grids of samples.
        metric_every: steps between metrics; None for `sample_every`.
        metric_mode: "min" or "max", the better direction of the metric.
        num_samples: the samples of a grid.
        num_inference_steps: the steps of DPM-Solver++ for the grids.
        guidance_scale: of the grids, for a model with a null class; None for no guidance.
        keep_last: the number of checkpoints to keep, besides the best by metric.
        max_bad_steps: consecutive steps without a finite gradient after which training stops. Such steps change
            nothing. With "fp16", steps in which the scaler still searches for its scale do not count.
        stop_on_save_error: whether a failure to write a checkpoint ends the training; else it only warns.
        compile: compile the training step with torch.compile.
        channels_last: the memory format of a U-Net's weights and images; None to choose.
        device: "cpu", "cuda" or "mps"; None for what accelerate finds.
        tensorboard: also write TensorBoard's files; None does so if it is installed.

    Raises:
        ValueError, TypeError: a value is wrong; the message names the setting, its value and the allowed values.
    """

    results_folder: str = "results"
    train_batch_size: int = 16
    gradient_accumulate_every: int = 1
    train_num_steps: int = 100_000
    train_lr: float = 1e-4
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int | None = None
    lr_final: float = 0.01
    adam_betas: tuple[float, float] = (0.9, 0.99)
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    mixed_precision: str | None = None
    ema_decay: float | tuple[float, ...] = 0.9999
    ema_warmup: bool = True
    augment_horizontal_flip: bool = False
    seed: int = 0
    num_workers: int | str = "auto"
    cache_bytes: int = 2 << 30
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 1000
    metric_every: int | None = None
    metric_mode: str = "min"
    num_samples: int = 16
    num_inference_steps: int = 25
    guidance_scale: float | None = None
    keep_last: int = 3
    max_bad_steps: int = 10
    stop_on_save_error: bool = False
    compile: bool = False
    channels_last: bool | None = None
    device: str | None = None
    tensorboard: bool | None = None

    def __post_init__(self) -> None:
        for name in ("adam_betas", "ema_decay"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):  # TOML has no tuples
                object.__setattr__(self, name, tuple(value))
        for name, valid, what in _RULES:
            if not valid(value := getattr(self, name)):
                raise ValueError(f"{name} is {value!r}, must be {what}")
        object.__setattr__(self, "results_folder", os.fspath(self.results_folder))

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """Return `ema_decay` as a tuple."""
        return tuple(_several(self.ema_decay))

    @property
    def images_per_step(self) -> int:
        """Return the number of images of one update of the weights."""
        return self.train_batch_size * self.gradient_accumulate_every

    def replace(self, **fields: Any) -> TrainerSettings:
        """Return a copy with other values of the named settings.

        Raises:
            TypeError: there is no such setting.
            ValueError: a value is wrong.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in fields:
            if name not in known:
                raise TypeError(f"{name} is no setting of a Trainer, which are: {', '.join(known)}")
        return dataclasses.replace(self, **fields)

    def learning_rate(self, step: int) -> float:
        """Return the share of `train_lr` at step number `step`, from 0."""
        warmup = self.lr_warmup_steps
        if warmup is None:
            warmup = min(500, self.train_num_steps // 10)
        if step < warmup:
            return (step + 1) / warmup
        if self.lr_scheduler == "constant":
            return 1.0
        progress = (step - warmup) / max(1, self.train_num_steps - warmup)
        falling = 1 - progress if self.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr_final + (1 - self.lr_final) * falling
