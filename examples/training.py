"""The training loop that `train_upscale.py` and `train_1d.py` share, and the record that all examples keep.

`fastddpm.Trainer` gives a network images and labels. Here data are drawn anew for every batch, and the network is told
what the example likes: a small image, say.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import sklearn
import torch
from fastddpm_kernels.philox import sample_keys
from fastddpm_kernels.q_sample import q_sample
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fastddpm
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.training import ExponentialAverage, TrainerSettings

# draw(n, generator) -> clean data [n, ...] and what the network is told about each sample.
Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
# predict(model, x_t, t, told) -> the network's output [n, ...].
Predict = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def add_training_arguments(
    parser: argparse.ArgumentParser, *, steps: int, batch_size: int = 128, dtype: str = "float32"
) -> None:
    """Add the command line's settings of `fit`."""
    add = parser.add_argument
    add("--steps", type=int, default=steps, help="training steps (default: %(default)s)")
    add("--batch-size", type=int, default=batch_size, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="of AdamW, at its peak (default: %(default)s)")
    add("--warmup-steps", type=int, default=200, help="of the learning rate (default: %(default)s)")
    add("--ema-decay", type=float, default=0.999, help="of the averaged weights (default: %(default)s)")
    add("--rotation", type=float, default=4.0, help="augmentation: up to so many degrees (default: %(default)s)")
    add("--scale", type=float, default=0.04, help="augmentation: up to this share (default: %(default)s)")
    add("--shift", type=float, default=0.3, help="augmentation: up to so many pixels (default: %(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), default=dtype, help="of autocast (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, batches and noise (default: %(default)s)")


def fit(
    model: nn.Module,
    draw: Draw,
    predict: Predict,
    args: argparse.Namespace,
    *,
    schedule: NoiseSchedule,
    prediction_type: str,
    not_settings: tuple[str, ...] = (),
) -> tuple[nn.Module, dict[str, Any]]:
    """Train `model` in place, by AdamW on the mean squared error.

    Args:
        args: what `add_training_arguments` declares.
        not_settings: names in `args` that the record leaves out, since they do not change the model.

    Returns:
        The average of the weights, on the CPU, and a record of how it came about: plain values, for JSON.
    """
    generator = torch.Generator().manual_seed(args.seed)
    device = torch.device(args.device)
    model.to(device)
    average = ExponentialAverage(model, args.ema_decay)
    table = schedule.q_sample_table().to(device)
    levels, n = len(table), args.batch_size
    keys = sample_keys([args.seed] * n, range(n), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    rates = TrainerSettings(train_num_steps=args.steps, lr_warmup_steps=args.warmup_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates.learning_rate(step))

    start, recent, curve = time.perf_counter(), [], []
    with Progress() as progress:
        bar = progress.add_task("training", total=args.steps)
        for step in range(args.steps):
            x0, told = (tensor.to(device) for tensor in draw(n, generator))
            # One timestep from each of n equal slices: the loss of a batch is less noisy than with independent ones.
            t = ((torch.arange(n) + torch.rand(n, generator=generator)) * (levels / n)).long().clamp(max=levels - 1)
            t = t.to(device)
            counter = torch.tensor([step], device=device)
            noised, target = q_sample(x0, table, t, keys=keys, step=counter, prediction_type=prediction_type)
            with torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
                predicted = predict(model, noised, t, told)
            loss = mse_loss(predicted.float(), target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            average.update_parameters(model)

            recent.append(loss.detach())
            progress.advance(bar)
            if (step + 1) % 500 == 0 or step + 1 == args.steps:
                mean = float(torch.stack(recent).mean())
                curve.append([step + 1, round(mean, 5)])
                recent.clear()
                minutes = (time.perf_counter() - start) / 60
                progress.console.print(f"step {step + 1:5d}  mean loss {mean:.4f}  {minutes:.1f} min")

    record = {
        "settings": {name: value for name, value in vars(args).items() if name not in not_settings},
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_minutes": round((time.perf_counter() - start) / 60, 1),
        "mean_loss": curve,
        **versions(),
    }
    return average.module.cpu(), record


def versions() -> dict[str, Any]:
    """Return when something was made, and by which versions."""
    return {
        "date": date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
            "fastddpm": fastddpm.__version__,
        },
    }


def write_record(folder: Path, **entries: Any) -> None:
    """Add entries to `training.json` in the model's folder, or replace them."""
    path = folder / "training.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(record | entries, indent=2) + "\n")
