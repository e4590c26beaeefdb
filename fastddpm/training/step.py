"""Run one step of training: forward passes, backward passes, an update of the weights."""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fastddpm.common.images import from_uint8
from fastddpm.training.objective import GaussianDiffusion
from fastddpm.training.order import Batches
from fastddpm.training.settings import TrainerSettings

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(settings: TrainerSettings) -> Accelerator:
    """Return accelerate's view of devices, precision and processes.

    Raises:
        ModuleNotFoundError: accelerate is not installed.
        ValueError: the device cannot be used, or not in this precision.
    """
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
        from accelerate.state import AcceleratorState, PartialState
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "accelerate is missing, which runs the training: pip install fastddpm[train]", name="accelerate"
        ) from None
    from fastddpm.networks.network import usable_device

    device = None if settings.device is None else usable_device(settings.device)
    # On a machine without a GPU, accelerate recognises several processes only if it is told to use the CPU.
    cpu = device.type == "cpu" if device is not None else not torch.accelerator.is_available()
    state = AcceleratorState._shared_state
    if state and PartialState._shared_state.get("num_processes") == 1:
        # Reset the state of an earlier run in this process: accelerate would keep its precision and device, or refuse
        # to change them.
        kept = (state.get("_mixed_precision"), bool(PartialState._shared_state.get("_cpu")))
        if kept != (settings.mixed_precision or "no", cpu):
            AcceleratorState._reset_state(reset_partial_state=True)
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    if settings.mixed_precision == "fp16" and (device.type != "cuda" if device else not torch.cuda.is_available()):
        raise ValueError(
            f"mixed_precision is 'fp16', which needs CUDA; on {device or 'the CPU'} it must be 'bf16' or 'no'"
        )
    # A long timeout: while one process draws samples, the others wait for it.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=6))
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        cpu=cpu,
        kwargs_handlers=[patience],
    )
    if device is not None and accelerator.device.type != device.type:
        raise ValueError(f"device is {settings.device!r}, but accelerate takes {str(accelerator.device)!r}")
    return accelerator


def in_any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether `flag` is set in any process; every process must call this."""
    if accelerator.num_processes == 1:
        return flag
    flags = torch.tensor([float(flag)], device=accelerator.device)
    return bool(accelerator.reduce(flags, "sum") > 0)


class _Objective(nn.Module):
    """Compute the loss of a raw batch: scale pixels, mirror some images, call the diffusion."""

    def __init__(self, diffusion: GaussianDiffusion, *, compiled: bool, channels_last: bool) -> None:
        super().__init__()
        self.diffusion, self._channels_last = diffusion, channels_last
        self._loss = torch.compile(diffusion.forward) if compiled else diffusion

    def forward(
        self,
        images: Tensor,
        flips: Tensor | None,
        labels: Tensor | None,
        step: int | Tensor,
        first_sample: int,
        global_batch: int,
    ) -> Tensor:
        x0 = from_uint8(images)
        if flips is not None:
            x0 = torch.where(flips.view(-1, *[1] * (x0.ndim - 1)), x0.flip(-1), x0)
        if self._channels_last and x0.ndim == 4:
            x0 = x0.contiguous(memory_format=torch.channels_last)
        return self._loss(x0, labels, step=step, first_sample=first_sample, global_batch=global_batch)


class TrainingStep:
    """Train a diffusion in place.

    A step whose gradient is not finite changes nothing: a flag on the device tells the optimizer, like a GradScaler's,
    so the host does not wait. `bad` counts such steps.

    Args:
        diffusion: moved to the accelerator's device.
        settings: of the run.
        accelerator: from `make_accelerator`.
        batches: maps steps to images.

    Attributes:
        waited: seconds spent waiting for data, so far.
    """

    def __init__(
        self, diffusion: GaussianDiffusion, settings: TrainerSettings, accelerator: Accelerator, batches: Batches
    ) -> None:
        self.diffusion, self.settings, self.accelerator, self.batches = diffusion, settings, accelerator, batches
        device = accelerator.device
        if (channels_last := settings.channels_last) is None:
            # The fastest format for oneDNN on the CPU and for tensor cores in half precision. Three-dimensional
            # convolutions do not support it.
            fast = device.type == "cpu" or (device.type == "cuda" and accelerator.mixed_precision != "no")
            channels_last = fast and all(parameter.ndim <= 4 for parameter in diffusion.unet.parameters())
        if channels_last:
            diffusion.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        objective = _Objective(diffusion, compiled=settings.compile, channels_last=channels_last)
        parameters = [p for p in diffusion.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("diffusion has no parameter that requires a gradient, must have one to train")
        diffusion.to(device)
        self._raw = torch.optim.AdamW(parameters, lr=settings.train_lr, fused=True)
        self._set_options()
        self.scheduler = LambdaLR(self._raw, lambda step: settings.learning_rate(step))
        self._model, self._optimizer = accelerator.prepare(objective, self._raw)
        self._parameters = parameters
        self.bad = torch.zeros(2, dtype=torch.int64, device=device)  # consecutive so far; in total
        self.waited = 0.0

    def __call__(self, step: int, data: Iterator[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
        """Run step number `step`, from 0; return mean loss (of this process) and norm of the gradient, scalars."""
        settings, accelerator = self.settings, self.accelerator
        self._model.train()
        total: Tensor | None = None
        for turn in range(settings.gradient_accumulate_every):
            start = time.perf_counter()
            images, labels = next(data)
            self.waited += time.perf_counter() - start
            last = turn + 1 == settings.gradient_accumulate_every
            with contextlib.nullcontext() if last else accelerator.no_sync(self._model):
                loss = self._forward(step, turn, images, labels) / settings.gradient_accumulate_every
                accelerator.backward(loss)
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        norm = accelerator.clip_grad_norm_(self._parameters, settings.max_grad_norm or math.inf)
        bad = ~torch.isfinite(norm)
        if accelerator.scaler is None:
            self._raw.found_inf = bad.float()  # type: ignore[attr-defined]
        else:
            # Scaled gradients overflow now and then, which is how the scaler finds its scale. A smaller scale does not
            # help if the loss, or the gradient at a scale of 1, is not finite.
            scale = accelerator.scaler.scale(torch.ones((), device=accelerator.device))
            finite = torch.isfinite(accelerator.reduce(total, "mean"))
            bad &= ~finite | (scale <= 1)
        self._optimizer.step()
        self.scheduler.step()
        self._optimizer.zero_grad()
        self.bad[0].add_(1).mul_(bad)
        self.bad[1].add_(bad)
        return total, norm

    def _forward(self, step: int, turn: int, images: Tensor, labels: Tensor | None) -> Tensor:
        settings, device = self.settings, self.accelerator.device
        flips = self.batches.flips(step, turn).to(device) if settings.augment_horizontal_flip else None
        images = images.to(device, non_blocking=True)
        labels = None if labels is None else labels.to(device, non_blocking=True)
        counter: int | Tensor = step
        if settings.compile:  # a number would be compiled in
            counter = torch.full((1,), step, dtype=torch.int64, device=device)
        return self._model(images, flips, labels, counter, self.batches.first_sample(turn), settings.images_per_step)

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        return float(self._raw.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Return the states of optimizer, learning rate and gradient scaler: tensors and plain values."""
        scaler = self.accelerator.scaler
        return {
            "optimizer": self._raw.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "bad": self.bad.cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned; the optimizer's rates and constants come from the current settings."""
        self._raw.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.bad.copy_(state["bad"])
        self._set_options()
        rate = self.settings.train_lr
        self.scheduler.base_lrs = [rate]
        for group in self._raw.param_groups:
            group["initial_lr"], group["lr"] = rate, rate * self.settings.learning_rate(self.scheduler.last_epoch)

    def _set_options(self) -> None:
        for group in self._raw.param_groups:
            group.update(
                betas=self.settings.adam_betas,
                eps=self.settings.adam_epsilon,
                weight_decay=self.settings.adam_weight_decay,
            )
