"""The short table that a run ends with: times and ratios, shares of the ceilings, and the marks."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from gpu.marks import MAIN, judge
from gpu.results import median, records

TUNED_ROWS = 12  # that are printed of what tuning found


def show(content: dict[str, Any], console: Console | None = None) -> None:
    """Print what `content` holds, most important last."""
    console = console or Console(width=160, highlight=False)
    machine = content["sections"].get("machine", {})
    console.print(f"{content['device']['name']}, commit {content['commit']}{' (changed)' if content['dirty'] else ''}")
    if copy := machine.get("copy_gb_s"):
        rates = ", ".join(f"{name} {value:.4g}" for name, value in machine.get("matmul_tflops", {}).items())
        console.print(f"ceilings: copy {copy:.0f} GB/s, matmul TFLOP/s {rates}")
    for name, section in content["sections"].items():
        _status(name, section, console)
    for name in ("ops", "cifar10", "celeba256"):
        _arms(content, name, console)
    for record in records(content, "profile", status="ok"):
        idle = record.get("idle_share")
        console.print(
            f"profile, {record['group']}: {record['us_per_step']['median']:.1f} us per step"
            + (f", idle {100 * idle:.1f} %" if idle is not None else "")
            + "".join(f"\n  {cause}" for cause in record["causes"]),
            markup=False,
        )
    _tune(content, console)
    if content["device"]["kind"] == "cuda":
        table = Table("mark", "wanted", "found", "", "from", title="marks", title_justify="left")
        for mark in judge(content):
            found = "-" if mark.found is None else f"{mark.found:.4g}"
            table.add_row(mark.what, f"{'<=' if mark.most else '>='} {mark.wanted:g}", found, mark.verdict, mark.where)
        console.print(table)


def _status(name: str, section: dict[str, Any], console: Console) -> None:
    own = section.get("records", [])
    counts = {status: sum(r["status"] == status for r in own) for status in dict.fromkeys(r["status"] for r in own)}
    line = f"{name}: {section['status']}; " + ", ".join(f"{count} {status}" for status, count in counts.items())
    console.print(line + (f" ({reason})" if (reason := section.get("reason")) else ""), markup=False)
    for record in own:
        if record["status"] in ("failed", "not run"):
            reason = (record.get("reason") or "").partition("\n")[0]
            console.print(f"  {record['status']}: {record['group']}, {record['arm']}: {reason}", markup=False)


def _arms(content: dict[str, Any], section: str, console: Console) -> None:
    rows = records(content, section, status="ok")
    if not rows:
        return
    title = f"{section}: us per step, and in brackets times ours"
    arms = [arm for arm in dict.fromkeys(r["arm"] for r in rows) if arm != MAIN]
    table = Table("group", MAIN, "% of roof", *arms, title=title, title_justify="left")
    for group in dict.fromkeys(r["group"] for r in rows):
        ours = next((r for r in rows if r["group"] == group and r["arm"] == MAIN), None)
        share = (
            "-" if ours is None or "percent_of_roof" not in ours else f"{ours['percent_of_roof']:.0f} {ours['roof']}"
        )
        cells = ["-" if ours is None else f"{ours['us_per_step']['median']:.4g}", share]
        for arm in arms:
            value = median(content, section, group, arm)
            ratio = f" ({value / ours['us_per_step']['median']:.2f})" if value and ours else ""
            cells.append("-" if value is None else f"{value:.4g}{ratio}")
        table.add_row(group, *cells)
    console.print(table)


def _tune(content: dict[str, Any], console: Console) -> None:
    """Print what tuning found, in all and where a step gains most."""
    rows = records(content, "tune", status="ok")
    if not rows:
        return
    before, after = (sum(r["calls"] * r[name] for r in rows) for name in ("heuristic_us", "tuned_us"))
    console.print(f"tune: {len(rows)} shapes; of their {before:.0f} us a step {after:.0f} are left")
    better = [r for r in rows if r["choice"] is not None]
    better.sort(key=lambda r: r["calls"] * (r["tuned_us"] - r["heuristic_us"]))
    table = Table("shape", "calls", "us", "tuned us", "choice", title="where a step gains most", title_justify="left")
    for r in better[:TUNED_ROWS]:
        words = " ".join(f"{name}={value}" for name, value in r["choice"].items())
        table.add_row(r["group"], str(r["calls"]), f"{r['heuristic_us']:.1f}", f"{r['tuned_us']:.1f}", words)
    console.print(table)
    section = content["sections"]["tune"]
    console.print(f"the table of all is {section['table']}; for everyone it is tuned_tables/{section['package']}")
