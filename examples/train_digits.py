"""Trains the bundled model: a small class-conditional U-Net on 1,797 real handwritten digits.

    python examples/train_digits.py --output digits-model       train (about half an hour on a CPU), then report
    python examples/train_digits.py --evaluate-only digits-model

The defaults are the settings that made `fastddpm/assets/digits`. The report (see `digits.py`) is printed and written
to `training.json` beside the model. Needs scikit-learn: `pip install fastddpm[examples]`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import digits
import rich
import sklearn
import torch
from fastddpm_kernels.philox import sample_keys
from fastddpm_kernels.q_sample import q_sample
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import mse_loss

import fastddpm
from fastddpm.images import save_grid
from fastddpm.pretrained import load_pretrained, save_pretrained
from fastddpm.schedule import NoiseSchedule
from fastddpm.unet import UNet
from fastddpm.unet_config import UNetConfig

NULL_CLASS = digits.CLASSES  # the label that means "no class", for classifier-free guidance

# Few channels at 16x16, where an 8x8 drawing has little to say; most of the weights work at 4x4.
CONFIG = UNetConfig(
    sample_size=digits.SIZE,
    in_channels=1,
    out_channels=1,
    block_out_channels=(16, 32, 96),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    norm_num_groups=8,
    num_class_embeds=digits.CLASSES + 1,
    null_class=NULL_CLASS,
)
PREDICTION_TYPE = "v_prediction"
NOT_SETTINGS = ("output", "evaluate_only", "samples", "save_every")  # of what makes the model


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("digits-model"), help="folder for the model (default: %(default)s)")
    add("--evaluate-only", type=Path, metavar="DIR", help="report on the model in DIR instead of training one")
    add("--steps", type=int, default=5000, help="training steps (default: %(default)s)")
    add("--batch-size", type=int, default=128, help="(default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="of AdamW, at its peak (default: %(default)s)")
    add("--warmup-steps", type=int, default=200, help="of the learning rate (default: %(default)s)")
    add("--ema-decay", type=float, default=0.999, help="of the averaged weights (default: %(default)s)")
    add("--label-dropout", type=float, default=0.1, help="share of labels made 'no class' (default: %(default)s)")
    add("--rotation", type=float, default=4.0, help="augmentation: up to so many degrees (default: %(default)s)")
    add("--scale", type=float, default=0.04, help="augmentation: up to this share (default: %(default)s)")
    add("--shift", type=float, default=0.3, help="augmentation: up to so many pixels (default: %(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of autocast (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, batches and noise (default: %(default)s)")
    add("--save-every", type=int, default=500, help="steps between checkpoints in --output (default: %(default)s)")
    add("--samples", type=int, default=1000, help="for the report (default: %(default)s)")
    return parser.parse_args()


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then half a cosine down to 1 % of the peak."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    return args.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def draw_batch(args: argparse.Namespace, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Augmented images, labels (some of them dropped) and timesteps."""
    counts, labels = digits.source()
    n = args.batch_size
    chosen = torch.randint(len(counts), (n,), generator=generator)
    affine = digits.random_affine(n, degrees=args.rotation, scale=args.scale, shift=args.shift, generator=generator)
    dropped = torch.rand(n, generator=generator) < args.label_dropout
    # One timestep from each of n equal slices: the loss of a batch is less noisy than with independent ones.
    t = ((torch.arange(n) + torch.rand(n, generator=generator)) * (1000 / n)).long().clamp(max=999)
    return digits.render(counts[chosen], affine), labels[chosen].masked_fill(dropped, NULL_CLASS), t


@torch.no_grad()
def update_average(average: UNet, model: UNet, step: int, decay: float) -> None:
    """Exponential moving average of the weights, over few steps at first so that it forgets the start."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def save(folder: Path, model: UNet, schedule: NoiseSchedule) -> None:
    save_pretrained(
        folder,
        copy.deepcopy(model).half(),
        schedule,
        prediction_type=PREDICTION_TYPE,
        variance_type="fixed_small",
        clip_sample=True,
    )


def train(args: argparse.Namespace) -> None:
    """Trains; saves the averaged model, and a record of how it came about, in `args.output`."""
    (args.output / "training.json").unlink(missing_ok=True)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    device = torch.device(args.device)
    model = UNet(CONFIG).to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    schedule = NoiseSchedule.cosine(1000)
    table = schedule.q_sample_table().to(device)
    keys = sample_keys([args.seed] * args.batch_size, range(args.batch_size), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)

    start, recent, curve = time.perf_counter(), [], []
    with Progress() as progress:
        bar = progress.add_task("training", total=args.steps)
        for step in range(args.steps):
            x0, labels, t = (tensor.to(device) for tensor in draw_batch(args, generator))
            noised, target = q_sample(
                x0,
                table,
                t,
                keys=keys,
                step=torch.tensor([step], device=device),
                prediction_type=PREDICTION_TYPE,
            )
            with torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
                predicted = model(noised, t, labels)
            loss = mse_loss(predicted.float(), target)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            update_average(average, model, step, args.ema_decay)

            recent.append(loss.detach())
            progress.advance(bar)
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                mean = float(torch.stack(recent).mean())
                curve.append([step + 1, round(mean, 5)])
                recent.clear()
                minutes = (time.perf_counter() - start) / 60
                progress.console.print(f"step {step + 1:5d}  mean loss {mean:.4f}  {minutes:.1f} min")
                save(args.output, average, schedule)
                write_record(
                    args.output,
                    settings={name: value for name, value in vars(args).items() if name not in NOT_SETTINGS},
                    parameters=sum(p.numel() for p in model.parameters()),
                    training_minutes=round(minutes, 1),
                    mean_loss=curve,
                    date=date.today().isoformat(),
                    versions={
                        "python": platform.python_version(),
                        "torch": torch.__version__,
                        "scikit-learn": sklearn.__version__,
                        "fastddpm": fastddpm.__version__,
                    },
                )


def write_record(folder: Path, **entries: Any) -> None:
    """Adds entries to `training.json` in the model's folder, or replaces them."""
    path = folder / "training.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(record | entries, indent=2) + "\n")


def report(folder: Path, args: argparse.Namespace) -> None:
    """Samples the saved model, all 1000 DDPM steps, no guidance, as many of each digit; prints and records figures."""
    sampler = load_pretrained(folder).sampler(device=args.device)
    labels = torch.arange(args.samples) % digits.CLASSES
    start = time.perf_counter()
    images = sampler.sample(args.samples, seed=args.seed, class_labels=labels, batch_size=100, progress=True).cpu()
    seconds = time.perf_counter() - start
    figures = digits.evaluate(images, labels)
    digits.print_report(figures, rich.get_console())
    rich.print(f"{args.samples} samples of 1000 steps in {seconds:.0f} s")
    write_record(folder, report=figures)
    order = labels[:100].argsort(stable=True)
    save_grid(folder / "samples.png", images[:100][order], labels[:100][order].tolist())


def main() -> None:
    args = parse_args()
    if args.evaluate_only is None:
        train(args)
    report(args.evaluate_only or args.output, args)


if __name__ == "__main__":
    main()
