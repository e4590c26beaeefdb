"""How good the bundled digits are after few steps: DDPM, DDIM and DPM-Solver++ from 2 to 1000 steps.

    python examples/few_steps.py --output few_steps.json --plot few_steps.png     measure, then draw
    python examples/few_steps.py --output few_steps.json --plot few_steps.png --steps       draw only

Points that --output holds already are not measured again, so that a run that was stopped can be resumed.
Every point draws the same number of samples, from the same noise, with equally many of each digit and no guidance.
Two things are measured: the share that a classifier trained on real digits takes for the digit asked for, and the
Frechet distance to the real digits in 32 principal components (as in `digits.py`). Both have a reference: the
classifier's accuracy on real digits it has not seen, and the distance between equally many real digits and the others.
Needs scikit-learn and matplotlib: `pip install fastddpm[examples]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import digits
import numpy as np
import rich
import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from sklearn.decomposition import PCA

import fastddpm
from fastddpm.common.files import read_json, write_json
from fastddpm.interop.pretrained import BUNDLED, Pretrained, load_pretrained

METHODS = {"ddpm": "DDPM", "ddim": "DDIM", "dpmsolver++": "DPM-Solver++ (2M)"}
STEPS = (2, 3, 5, 10, 20, 50, 100, 250, 1000)
SPLITS = 20  # of the real digits, over which distances are averaged


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a pipeline folder of a model of the digits")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--plot", type=Path, required=True, help="PNG file for the plot")
    parser.add_argument("--samples", type=int, default=500, help="per point; a multiple of 10")
    parser.add_argument("--batch-size", type=int, default=125)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, nargs="*", default=STEPS)
    parser.add_argument("--spacing", default="trailing", help="which timesteps are visited")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.samples < 10 or args.samples % digits.CLASSES:
        raise SystemExit(f"--samples is {args.samples}, must be a multiple of {digits.CLASSES}")
    result = begin(args)
    measure(load_pretrained(args.model), result, args)
    for point in result["points"]:
        rich.print(
            f"{METHODS[point['method']]:>18} {point['steps']:>5} steps: recognised {point['recognised']:.1%}, "
            f"distance {point['distance']:.3f}"
        )
    draw(result, args.plot)


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings and references, with the points that --output holds."""
    result: dict[str, Any] = {"samples": args.samples, "spacing": args.spacing, "seed": args.seed}
    points = []
    if args.output.exists():
        found = read_json(args.output)
        if {name: found[name] for name in result} != result:
            raise SystemExit(f"{args.output} was made with other settings; name another file")
        points = found["points"]
    references = {"recognised": digits.classifier()[1], "distance": Distances(args.samples).between_real()}
    versions = {"fastddpm": fastddpm.__version__, "torch": torch.__version__}
    return {**result, "references": references, "versions": versions, "points": points}


def measure(model: Pretrained, result: dict[str, Any], args: argparse.Namespace) -> None:
    """Add what is missing to the points of `result`, and write --output after each."""
    labels = torch.arange(args.samples) % digits.CLASSES
    distances = Distances(args.samples)
    known = {(point["method"], point["steps"]) for point in result["points"]}
    todo = [(method, steps) for steps in sorted(args.steps) for method in args.methods if (method, steps) not in known]
    with Progress() as progress:
        task = progress.add_task("sampling", total=sum(steps for _, steps in todo))
        for method, steps in todo:
            sampler = model.sampler(method=method, num_inference_steps=steps, timestep_spacing=args.spacing)
            images = sampler.sample(args.samples, seed=args.seed, class_labels=labels, batch_size=args.batch_size)
            point = {
                "method": method,
                "steps": steps,
                "recognised": float(digits.recognised(images, labels).mean()),
                "distance": distances.to_real(digits.flat(images)),
            }
            result["points"].append(point)
            result["points"].sort(key=lambda point: (list(METHODS).index(point["method"]), point["steps"]))
            write_json(args.output, result)
            progress.advance(task, steps)


class Distances:
    """Frechet distances in 32 principal components of the real digits.

    The distance is biased upwards for few samples, so `count` is the same on one side of every comparison, and the
    other side always has the same number of real digits.
    """

    def __init__(self, count: int) -> None:
        real = digits.flat(digits.render(digits.source()[0]))
        self.components = PCA(32, random_state=0).fit(real)
        self.real = self.components.transform(real)
        rng = np.random.default_rng(0)
        self.splits = [np.split(rng.permutation(len(real)), [count]) for _ in range(SPLITS)]

    def to_real(self, images: np.ndarray) -> float:
        """Return the distance of images [count, 256]."""
        features = self.components.transform(images)
        return float(np.mean([digits.frechet(features, self.real[rest]) for _, rest in self.splits]))

    def between_real(self) -> float:
        """Return the distance of as many real digits to the other ones."""
        return float(np.mean([digits.frechet(self.real[some], self.real[rest]) for some, rest in self.splits]))


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw quality against steps, one panel for each of the two figures."""
    figure = Figure(figsize=(9.6, 3.8), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (method, name), colour, marker in zip(METHODS.items(), ("C7", "C0", "C3"), ("s", "o", "D"), strict=True):
        points = [point for point in result["points"] if point["method"] == method]
        steps = [point["steps"] for point in points]
        share = np.array([point["recognised"] for point in points])
        error = np.sqrt(share * (1 - share) / result["samples"])
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "label": name}
        left.errorbar(steps, 100 * share, 100 * error, capsize=2, **style)
        right.plot(steps, [point["distance"] for point in points], **style)
    references = result["references"]
    unseen = left.axhline(100 * references["recognised"], color="black", linestyle=":", label="unseen real digits")
    right.axhline(references["distance"], color="black", linestyle=":", label="real digits to each other")
    left.set_ylabel("recognised as the digit asked for, %")
    right.set_ylabel("Fréchet distance to real digits")
    right.set_yscale("log")
    right.set_yticks([0.5, 1, 2, 5], ["0.5", "1", "2", "5"])
    left.set_ylim(min(95, 100 * min(point["recognised"] for point in result["points"]) - 1), 100.4)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("steps")
        ticks = sorted({point["steps"] for point in result["points"]})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=9)
    left.legend(handles=[unseen], loc="lower right", frameon=False, fontsize=9)
    figure.savefig(path)


if __name__ == "__main__":
    main()
