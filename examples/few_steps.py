"""How good the bundled digits are after few evaluations of the network: every main method, 5 to 100 evaluations.

    python examples/few_steps.py --output few_steps.json --plot few_steps.png     measure, then draw
    python examples/few_steps.py --output few_steps.json --plot few_steps.png --evaluations       draw only

Points that --output holds already are not measured again, so that a run that was stopped can be resumed.
Every point draws the same number of samples, from the same noise, with equally many of each digit and no guidance.
Two things are measured: the share that a classifier trained on real digits takes for the digit asked for, and the
Frechet distance to the real digits in 32 principal components (as in `digits.py`). Both have a reference: the
classifier's accuracy on real digits it has not seen, and the distance between equally many real digits and the others.
Needs scikit-learn and matplotlib: `pip install fastddpm[examples]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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


class Arm(NamedTuple):
    """A method as it is measured.

    Attributes:
        label: in the plot.
        panel: of the plot, the index in `PANELS`.
        steps: the number of steps for so many evaluations, or for one less where a step takes two.
        settings: that differ from the method's defaults.
    """

    label: str
    panel: int
    steps: Callable[[int], int] = int
    settings: Mapping[str, Any] = {}


def two_each(evaluations: int) -> int:
    """Return the number of steps of two evaluations each, but for the last, which takes one."""
    return (evaluations + 1) // 2


PANELS = ("diffusion and DPM-Solver", "other multistep methods", "two evaluations a step")
# Levels and churn as in Karras et al. 2022 (table 5, for ImageNet): with the model's own levels, from sigma 20,000 on,
# the first step of a method of second order in sigma would be far too long.
_KARRAS = {"sigma_schedule": "karras", "sigma_max": 80.0}
_CHURN = {**_KARRAS, "s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
# On these timesteps "euler" gives the samples of "ddim", and "euler_a" those of "ddpm".
METHODS = {
    "ddim": Arm("DDIM, Euler", 0),
    "ddpm": Arm("DDPM, Euler ancestral", 0),
    "dpmsolver++": Arm("DPM-Solver++ (2M)", 0),
    "sde-dpmsolver++": Arm("SDE-DPM-Solver++ (2M)", 0),
    "unipc": Arm("UniPC", 1),
    "deis": Arm("DEIS", 1),
    "plms": Arm("PLMS", 1, lambda evaluations: evaluations - 1),  # its first step takes two
    "lms": Arm("LMS", 1),
    "dpmsolver++_singlestep": Arm("DPM-Solver++ (2S)", 2),
    "heun": Arm("Heun", 2, two_each, _KARRAS),
    "edm": Arm("EDM with churn", 2, two_each, _CHURN),
    "dpm2": Arm("DPM2", 2, two_each, _KARRAS),
    "dpm2_a": Arm("DPM2 ancestral", 2, two_each, _KARRAS),
}
EVALUATIONS = (5, 10, 20, 50, 100)
SPLITS = 20  # of the real digits, over which distances are averaged


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a pipeline folder of a model of the digits")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--plot", type=Path, required=True, help="PNG file for the plot")
    parser.add_argument("--samples", type=int, default=500, help="per point; a multiple of 10")
    parser.add_argument("--batch-size", type=int, default=125)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--evaluations", type=int, nargs="*", default=EVALUATIONS, help="of the network, per sample")
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
            f"{METHODS[point['method']].label:>22} {point['evaluations']:>5} evaluations: "
            f"recognised {point['recognised']:.1%}, distance {point['distance']:.3f}"
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
    every = [(method, METHODS[method].steps(count)) for count in sorted(args.evaluations) for method in args.methods]
    todo = [each for each in every if each not in known]
    with Progress() as progress:
        task = progress.add_task("sampling", total=sum(steps for _, steps in todo))
        for method, steps in todo:
            settings = {"timestep_spacing": args.spacing, **METHODS[method].settings}
            sampler = model.sampler(method=method, num_inference_steps=steps, **settings)
            images = sampler.sample(args.samples, seed=args.seed, class_labels=labels, batch_size=args.batch_size)
            point = {
                "method": method,
                "steps": steps,
                "evaluations": int(sampler.table.needs_network.sum()),
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
    """Draw the distance to real digits against evaluations of the network, DDIM in every panel to compare with."""
    figure = Figure(figsize=(12, 4.2), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharex=True, sharey=True)
    for panel, (axes, title) in enumerate(zip(panels, PANELS, strict=True)):
        colours = iter(("C3", "C0", "C2", "C1", "C4", "C5"))
        for method, arm in METHODS.items():
            low, high = EVALUATIONS[0], EVALUATIONS[-1]
            points = [
                point for point in result["points"] if point["method"] == method and low <= point["evaluations"] <= high
            ]
            if (arm.panel != panel and method != "ddim") or not points:
                continue
            style: dict[str, Any] = {"color": "0.6", "linewidth": 3} if method == "ddim" else {"color": next(colours)}
            counts, distances = ([point[name] for point in points] for name in ("evaluations", "distance"))
            axes.plot(counts, distances, marker="o", markersize=4, label=arm.label, **style)
        axes.axhline(result["references"]["distance"], color="black", linestyle=":", label="real digits to each other")
        axes.set_title(title, fontsize=11)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(EVALUATIONS, [str(count) for count in EVALUATIONS])
        axes.set_yticks([0.5, 1, 2, 5], ["0.5", "1", "2", "5"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_xlabel("evaluations of the network")
        axes.legend(frameon=False, fontsize=9)
    panels[0].set_ylabel("Fréchet distance to real digits")
    figure.savefig(path)


if __name__ == "__main__":
    main()
