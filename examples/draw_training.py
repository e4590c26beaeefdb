"""Draw a run of `fastddpm.Trainer`: its loss and metric, and what it drew on the way from one and the same noise.

    python examples/draw_training.py digits-run -o digits-run.png

Needs matplotlib: `pip install fastddpm[examples]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from fastddpm.training import read_log

LEFT, RIGHT = 36, 244  # pixels of a grid that are shown: four columns of 48, after their labels
MOST = 5  # grids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the results folder of the run")
    parser.add_argument("-o", "--output", type=Path, default=Path("run.png"), help="(default: %(default)s)")
    parser.add_argument("--metric", default="frechet", help="which metric of the log (default: %(default)s)")
    options = parser.parse_args()
    draw(options.run, options.output, options.metric)


def draw(run: Path, path: Path, metric: str) -> None:
    """Draw the loss (left scale) and a metric (right) against the steps; then the left of some sample grids, in order.

    The first, the last, and others that are about evenly spaced between.
    """
    grids = sorted((run / "samples").glob("step-*.png"))
    if len(grids) > MOST:
        grids = [grids[round(i * (len(grids) - 1) / (MOST - 1))] for i in range(MOST)]
    log = read_log(run / "log.jsonl")
    figure = Figure(figsize=(5 + 1.9 * len(grids), 4.4), dpi=100, layout="constrained")
    left, *panels = figure.subplots(1, 1 + len(grids), width_ratios=[4.6] + [1.8] * len(grids))
    losses = [(record["step"], record["loss"]) for record in log if "loss" in record]
    left.plot(*zip(*losses, strict=True), color="C0")
    left.set_ylabel("loss", color="C0")
    left.set_yscale("log")
    left.set_yticks([0.1, 0.2, 0.5], ["0.1", "0.2", "0.5"])
    left.minorticks_off()
    left.set_xlabel("step")
    left.grid(alpha=0.3)
    right = left.twinx()
    figures = [(record["step"], record[metric]) for record in log if metric in record]
    right.plot(*zip(*figures, strict=True), color="C3", marker="o", linestyle="--")
    right.set_ylabel("Fréchet distance to real images" if metric == "frechet" else metric, color="C3")
    right.set_ylim(0, 1.1 * max(value for _, value in figures))
    for axes, grid in zip(panels, grids, strict=True):
        with Image.open(grid) as image:
            axes.imshow(image.crop((LEFT, 0, RIGHT, image.height)), cmap="gray")
        axes.set_title(f"step {int(grid.stem.removeprefix('step-'))}", fontsize=10)
        axes.set_axis_off()
    figure.savefig(path)


if __name__ == "__main__":
    main()
