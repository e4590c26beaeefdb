"""Result files as Markdown: the README's table, docs/speed.md with plots, and two files held against each other.

    python benchmarks/report.py                        # between the two marker comments of both files; plots beside
    python benchmarks/report.py --check                # exit status 1 if they say anything else
    python benchmarks/report.py --compare OLD NEW      # a table of ratios and their noise, to standard output

The figures are read from `benchmarks/results/`: <gpu>.json of a whole run of `gpu_check.py` on a GPU, and cpu.json of
`cpu_check.py`. What was not measured is a dash. `--compare` takes those and what `fastddpm profile` writes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from cpu import tables
from gpu.marks import MAIN, Mark, judge
from gpu.results import median, records
from measuring import ROOT

from fastddpm.common.files import atomic_write, read_json
from fastddpm.perf.profiling import compare, plots

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
CPU_SCHEMA, GPU_SCHEMA = compare.CPU_SCHEMA, compare.GPU_SCHEMA
NOTHING = "Speed has not been measured on a GPU yet."
NETWORKS = {"cifar10": "google/ddpm-cifar10-32", "celeba256": "google/ddpm-celebahq-256"}
STEPS = 1000  # of an image, in images per second
# Arms of the plots, and their names there.
PLOTTED = {
    MAIN: "fastddpm, float16",
    "eager": "eager torch, float16",
    "DDPMPipeline": "diffusers' DDPMPipeline as it is",
}


def main(arguments: list[str] | None = None) -> int:
    """Write, check or compare; return the exit status: 0, 1 if a check fails, 2 for files that do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="takes the short table")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "speed.md", help="takes all tables")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="the folder of results")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="write nothing, and fail if something would be written")
    mode.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two files of the same kind")
    options = parser.parse_args(arguments)
    try:
        if options.compare:
            old, new = (read_json(path) for path in options.compare)
            print(compare.markdown(old, new, (options.compare[0].stem, options.compare[1].stem)))
            return 0
        return _render(options.readme, options.page, options.results, options.check)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2


def _render(readme: Path, page: Path, folder: Path, check: bool) -> int:
    results = load(folder)
    tables = {readme: table(results, short=True), page: table(results, folder.resolve(), page.resolve().parent)}
    old = {path: path.read_text(encoding="utf-8") for path in tables}
    new = {path: replaced(old[path], text) for path, text in tables.items()}
    gpus = [content for content in results if content.get("schema") == GPU_SCHEMA]
    drawings = {folder / f"{content['device']['slug']}.svg": content for content in gpus if _series(content)}
    if check:
        stale = [str(path) for path in drawings if not path.exists()] + [str(p) for p in tables if new[p] != old[p]]
        if stale:
            print(f"report: {stale[0]} differs from the results; run python benchmarks/report.py", file=sys.stderr)
        return int(bool(stale))
    for path, content in drawings.items():
        plots.check_plot(path, "the plot")
        draw(path, content)
    for path, text in new.items():
        if text != old[path]:
            atomic_write(path, lambda temporary, text=text: _write(temporary, text))
    return 0


def load(folder: Path) -> list[dict[str, Any]]:
    """Return the results in a folder that were measured at full size: of GPUs, then of CPUs."""
    found = [read_json(path) for path in sorted(folder.glob("*.json"))]
    gpus = [c for c in found if c.get("schema") == GPU_SCHEMA and c["device"]["kind"] == "cuda" and not c["small"]]
    cpus = [c for c in found if c.get("schema") == CPU_SCHEMA and c["rounds"] >= compare.LEAST_SAMPLES]
    return gpus + cpus


def replaced(text: str, between: str) -> str:
    """Return `text` with what stands between the two markers replaced.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end or BEGIN in inside + after or END in before + after:
        raise ValueError(f"the markers {BEGIN} and {END} must be there once each, in this order")
    return f"{before}{BEGIN}\n{between}\n{END}{after}"


def table(results: list[dict[str, Any]], folder: Path = Path(), base: Path = Path(), *, short: bool = False) -> str:
    """Return Markdown for all GPUs, or a sentence that says that none was measured, and for CPUs.

    `short`: only what our users call beside what they called before. `folder` is where the plots are, which is linked
    to from `base`.
    """
    parts = []
    if not any(content.get("schema") == GPU_SCHEMA and _gpu(content, short) for content in results):
        parts.append(NOTHING)
    for content in results:
        if content.get("schema") == CPU_SCHEMA:
            parts.append(tables.calls(content, short=True) if short else tables.of(content))
        elif part := _gpu(content, short):
            parts.append(part)
            if _series(content) and not short:
                name = content["device"]["name"]
                path = Path(os.path.relpath(folder / f"{content['device']['slug']}.svg", base))
                parts.append(f"![images per second on {name}]({path.as_posix()})")
    return "\n\n".join(filter(None, parts))


def draw(path: Path, content: dict[str, Any]) -> None:
    """Draw images per second against the batch size, for each network that was measured on one GPU."""
    series = _series(content)
    figure = plots.new_figure(len(series), 5.5)
    for axes, (network, arms) in zip(figure.subplots(1, len(series), squeeze=False)[0], series.items(), strict=True):
        plots.draw_throughput(axes, arms, STEPS)
        axes.set_title(f"{network}, {STEPS} steps", loc="left", fontsize=10)
    figure.suptitle(content["device"]["name"], x=0.01, ha="left", fontsize=12)
    plots.save(path, figure)


def _loops(content: dict[str, Any], network: str, arm: str) -> list[dict[str, Any]]:
    """Return the records of an arm of the loops of a network, by batch size."""
    found = [
        r for r in records(content, network, arm=arm, status="ok") if r["group"].startswith(f"loop {network} fp16")
    ]
    return sorted(found, key=lambda record: record["settings"]["batch"])


def _series(content: dict[str, Any]) -> dict[str, dict[str, list[tuple[int, dict[str, Any]]]]]:
    """Return {network: {arm: [(batch, microseconds per step)]}} of what was measured at two batch sizes or more."""
    found: dict[str, dict[str, list[tuple[int, dict[str, Any]]]]] = {}
    for section, network in NETWORKS.items():
        for arm, name in PLOTTED.items():
            points = [(r["settings"]["batch"], r["us_per_step"]) for r in _loops(content, section, arm)]
            if len(points) > 1:
                found.setdefault(network, {})[name] = points
    return {network: arms for network, arms in found.items() if PLOTTED[MAIN] in arms}


def _gpu(content: dict[str, Any], short: bool) -> str:
    """Return the table of one GPU; "" if its file holds no time of a loop."""
    rows = []
    for section, network in NETWORKS.items():
        for record in _loops(content, section, MAIN):
            batch, us = record["settings"]["batch"], float(record["us_per_step"]["median"])
            pipeline, compiled = (median(content, section, record["group"], a) for a in ("DDPMPipeline", "compiled"))
            share = f"{record['percent_of_roof']:.0f} %" if "percent_of_roof" in record else "-"
            speed = f"{batch / us * 1e6 / STEPS:.3g}"
            rows.append(
                f"| {network} | {batch} | {tables.figure(us)} | {speed} | {_times(pipeline, us)} "
                f"| {_times(compiled, us)} | {share} |"
            )
    if not rows:
        return ""
    versions = content["sections"].get("machine", {}).get("versions", {})
    names = [f"{name} {versions[name]}" for name in ("torch", "triton", "diffusers") if versions.get(name)]
    commit = content["commit"] + (" with changes" if content.get("dirty") else "")
    head = f"**{content['device']['name']}**, {', '.join([*names, f'commit {commit}', str(content['written'])[:10]])}:"
    lines = [
        head,
        "",
        f"| network, float16 | batch | us per step | images/s, {STEPS} steps | times as fast as `DDPMPipeline` "
        "| ... as `torch.compile` | of the compute floor |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    shares = [mark for mark in judge(content) if mark.what.endswith("% of copy") and mark.found is not None]
    if shares and not short:
        lines += ["", f"Of the bandwidth of a copy, least among large shapes: {', '.join(map(_share, shares))}."]
    return "\n".join(lines)


def _share(mark: Mark) -> str:
    return f"`{mark.what.split(',')[0]}` {mark.found:.0f} %"


def _times(other: float | None, ours: float | None) -> str:
    return "-" if other is None or ours is None else f"{other / ours:.1f}"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
