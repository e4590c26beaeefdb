"""Writes the README's table of speed from what `gpu_check.py` measured: `benchmarks/results/<gpu>.json`.

    python benchmarks/report.py            # between the two marker comments of README.md
    python benchmarks/report.py --check    # exit status 1 if the README says anything else

Every figure is read from a results file of a whole run on a GPU. What was not measured is a dash.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gpu.marks import MAIN, Mark, judge, median, records
from gpu.results import ROOT, SCHEMA

from fastddpm._files import atomic_write, read_json

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
NOTHING = "Speed has not been measured on a GPU yet."
NETWORKS = {"cifar10": "google/ddpm-cifar10-32", "celeba256": "google/ddpm-celebahq-256"}


def main(arguments: list[str] | None = None) -> int:
    """Writes, or checks, the table; returns the exit status: 0, 1 if a check fails, 2 for files that do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file that holds the markers")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="the folder of results")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if something would be written")
    options = parser.parse_args(arguments)
    try:
        old = options.readme.read_text(encoding="utf-8")
        new = replaced(old, table(load(options.results)))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    if new == old:
        return 0
    if options.check:
        print(f"report: {options.readme} differs from the results; run python benchmarks/report.py", file=sys.stderr)
        return 1
    def write(path: Path) -> None:
        path.write_text(new, encoding="utf-8")

    atomic_write(options.readme, write)
    return 0


def load(folder: Path) -> list[dict[str, Any]]:
    """The results of `gpu_check.py` in a folder that were measured at full size on a GPU, by name of the GPU."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if content.get("schema") == SCHEMA and content["device"]["kind"] == "cuda" and not content["small"]:
            found.append(content)
    return found


def replaced(text: str, between: str) -> str:
    """`text` with what stands between the two markers replaced.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end or BEGIN in inside + after or END in before + after:
        raise ValueError(f"the markers {BEGIN} and {END} must be there once each, in this order")
    return f"{before}{BEGIN}\n{between}\n{END}{after}"


def table(all_results: list[dict[str, Any]]) -> str:
    """Markdown for all GPUs, or a sentence that says that nothing has been measured."""
    parts = [part for content in all_results if (part := _one(content))]
    return "\n\n".join(parts) if parts else NOTHING


def _one(content: dict[str, Any]) -> str:
    """One GPU; "" if its file holds no time of a loop."""
    machine = content["sections"].get("machine", {})
    tflops = (machine.get("matmul_tflops") or {}).get("fp16")
    rows = []
    for section, network in NETWORKS.items():
        flops = (content["sections"].get(section, {}).get("problem") or {}).get("flops_per_image_and_step")
        for record in records(content, section, what="loop", arm=MAIN, status="ok"):
            batch, us = int(record["batch"]), float(record["us_per_step"]["median"])
            pipeline = median(content, section, record["group"], "DDPMPipeline")
            group = f"compiled batch {batch}"
            ours, compiled = (median(content, section, group, arm) for arm in (MAIN, "torch.compile fp16"))
            share = f"{100 * flops * batch / tflops / 1e6 / us:.0f} %" if flops and tflops else "-"
            speed = f"{batch / us * 1e3:.3g}"
            rows.append(
                f"| {network} | {batch} | {_figure(us)} | {speed} | {_times(pipeline, us)} | {_times(compiled, ours)} "
                f"| {share} |"
            )
    if not rows:
        return ""
    versions = machine.get("versions", {})
    names = [f"{name} {versions[name]}" for name in ("torch", "triton", "diffusers") if versions.get(name)]
    commit = content["commit"] + (" with changes" if content.get("dirty") else "")
    head = f"**{content['device']['name']}**, {', '.join([*names, f'commit {commit}', str(content['written'])[:10]])}:"
    lines = [
        head,
        "",
        "| network | batch | us per step | images/s, 1000 steps | times as fast as `DDPMPipeline` "
        "| ... as `torch.compile` | of the compute floor |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    shares = [mark for mark in judge(content) if mark.what.endswith("% of copy") and mark.found is not None]
    if shares:
        lines += ["", f"Of the bandwidth of a copy, least among large shapes: {', '.join(map(_share, shares))}."]
    return "\n".join(lines)


def _share(mark: Mark) -> str:
    return f"`{mark.what.split(',')[0]}` {mark.found:.0f} %"


def _times(other: float | None, ours: float | None) -> str:
    return "-" if other is None or ours is None else f"{other / ours:.1f}"


def _figure(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


if __name__ == "__main__":
    sys.exit(main())
