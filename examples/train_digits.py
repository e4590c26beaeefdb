"""Train the bundled model: a small class-conditional U-Net on 1,797 real handwritten digits.

    python examples/train_digits.py --output digits-run [--resume]    train (about half an hour on a CPU), then report
    python examples/train_digits.py --evaluate-only digits-run/digits

The run is in --output (see `fastddpm.Trainer`), the model in float16, with the report (see `digits.py`), in its folder
`digits`. Needs scikit-learn and accelerate: `pip install fastddpm[examples,train]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import digits
import torch
from torch import Tensor
from torch.utils.data import Dataset
from training import versions, write_record

from fastddpm import GaussianDiffusion, NoiseSchedule, Trainer, UNet, load_pretrained, save_pretrained
from fastddpm.training import read_log

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, default=Path("digits-run"), help="folder of the run (default: %(default)s)")
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
parser.add_argument("--evaluate-only", type=Path, metavar="DIR", help="report on the model in DIR instead")
parser.add_argument("--steps", type=int, default=5000, help="training steps (default: %(default)s)")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="of weights, order and samples (default: %(default)s)")
parser.add_argument("--samples", type=int, default=1000, help="for the report (default: %(default)s)")


class Digits(Dataset[Any]):
    """The digits as images [1, 16, 16], each time turned by up to 4 degrees, scaled by 4 %, shifted by 0.3 pixels."""

    def __len__(self) -> int:
        return len(digits.source()[0])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        counts, labels = digits.source()
        affine = digits.random_affine(1, degrees=4, scale=0.04, shift=0.3, generator=torch.default_generator)
        return digits.render(counts[index : index + 1], affine)[0], labels[index]


def metric(run: Trainer) -> dict[str, float]:
    """Return, of 200 samples, the Fréchet distance to the real digits and the share that is recognised."""
    labels = torch.arange(200) % digits.CLASSES
    figures = digits.evaluate(run.sampler().sample(200, seed=1, class_labels=labels).cpu(), labels)
    return {"frechet": figures["frechet"]["samples_to_real"], "recognised": figures["recognised"]}


def train(args: argparse.Namespace) -> Path:
    """Train; return the folder of the model in float16, with a record of how it came about."""
    torch.manual_seed(args.seed)
    # Few channels at 16x16, where an 8x8 drawing has little to say; most of the weights work at 4x4.
    unet = UNet(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(16, 32, 96), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"), attention_head_dim=None, norm_num_groups=8,
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), num_class_embeds=11, null_class=10,
    )  # fmt: skip
    told = {"prediction_type": "v_prediction", "timestep_sampling": "stratified", "label_dropout": 0.1}
    diffusion = GaussianDiffusion(unet, NoiseSchedule.cosine(1000), seed=args.seed, **told)
    Trainer(
        diffusion, Digits(), metric=metric, resume=args.resume, results_folder=args.output, device=args.device,
        train_num_steps=args.steps, train_batch_size=128, train_lr=1e-3, lr_warmup_steps=200, adam_weight_decay=0.01,
        ema_decay=0.999, mixed_precision="bf16", num_workers=1, num_samples=100, sample_every=500, save_every=500,
        seed=args.seed,
    ).train()  # fmt: skip
    folder, model = args.output / "digits", load_pretrained(args.output / "model")
    save_pretrained(folder, model.unet.half(), model.schedule, prediction_type="v_prediction")
    write_record(folder, log=read_log(args.output / "log.jsonl"), **versions())
    return folder


if __name__ == "__main__":
    options = parser.parse_args()
    folder = options.evaluate_only or train(options)
    write_record(folder, report=digits.report_on(folder, options.samples, seed=options.seed, device=options.device))
