"""The short table that a run ends with: times and ratios, shares of the ceilings, and the marks."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from gpu.marks import MAIN, judge, median, records

TUNED_ROWS = 12  # that are printed of what tuning found


def show(content: dict[str, Any], console: Console | None = None) -> None:
    """Prints what `content` holds, most important last."""
    console = console or Console(width=140, highlight=False)
    _machine(content, console)
    _failures(content, console)
    _ops(content, console)
    for section in ("cifar10", "celeba256"):
        _loops(content, section, console)
    _profile(content, console)
    _tune(content, console)
    _marks(content, console)


def _machine(content: dict[str, Any], console: Console) -> None:
    machine = content["sections"].get("machine", {})
    console.print(f"{content['device']['name']}, commit {content['commit']}{' (changed)' if content['dirty'] else ''}")
    if copy := machine.get("copy_gb_s"):
        rates = ", ".join(f"{name} {value:.4g}" for name, value in machine.get("matmul_tflops", {}).items())
        console.print(f"ceilings: copy {copy:.0f} GB/s, matmul TFLOP/s {rates}")
    latency = machine.get("latency", {})
    if "graph_node_us" in latency:
        console.print("latency: " + ", ".join(f"{name} {value:.2f}" for name, value in latency.items()))


def _failures(content: dict[str, Any], console: Console) -> None:
    for name, section in content["sections"].items():
        line = f"{name}: {section.get('status')}, {section.get('seconds', 0):.0f} s"
        if name == "tests":
            line += "".join(
                f"; {r['arm']}: {r.get('passed', 0)} passed, {r.get('failed', 0)} failed, {r.get('skipped', 0)} skipped"
                for r in section.get("records", [])
            )
        console.print(line + (f" ({text})" if (text := section.get("error") or section.get("reason")) else ""))
        same: dict[tuple[str, str, str], list[str]] = {}
        for record in section.get("records", []):
            if record["status"] != "ok":
                why = (record.get("error") or record.get("reason") or "").partition("\n")[0]
                same.setdefault((record["status"], record["arm"], why), []).append(record["group"])
            for failure in record.get("failures", [])[:10]:
                console.print(f"    {failure['test']}: {failure['error'].partition(chr(10))[0]}", markup=False)
        for (status, arm, why), groups in same.items():
            more = f" and {len(groups) - 1} more" if len(groups) > 1 else ""
            console.print(f"  {status}: {arm}, {groups[0]}{more}: {why}", markup=False)


def _ops(content: dict[str, Any], console: Console) -> None:
    rows = [r for r in records(content, "ops") if r["status"] == "ok" and "percent_of_copy" in r]
    if not rows:
        return
    table = Table(title="ops: share of the copy's bandwidth, % (each input and output once)", title_justify="left")
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    table.add_column("op")
    for arm in arms:
        table.add_column(arm, justify="right")
    table.add_column("us, first arm", justify="right")
    for group in dict.fromkeys(r["group"] for r in rows):
        of_arm = {r["arm"]: r for r in rows if r["group"] == group}
        first = next(iter(of_arm.values()))
        cells = [f"{of_arm[arm]['percent_of_copy']:.0f}" if arm in of_arm else "-" for arm in arms]
        table.add_row(group, *cells, f"{first['us_per_step']['median']:.2f}")
    console.print(table)


def _loops(content: dict[str, Any], section: str, console: Console) -> None:
    rows = [r for r in records(content, section) if r["status"] == "ok" and "us_per_step" in r]
    if not rows:
        return
    problem = content["sections"][section].get("problem", {}).get("architecture", section)
    table = Table(title=f"{section} ({problem}): us per step, and in brackets times ours", title_justify="left")
    groups = list(dict.fromkeys(r["group"] for r in rows))
    table.add_column("arm")
    for group in groups:
        table.add_column(group.replace(" batch ", "\n"), justify="right")
    for arm in dict.fromkeys(r["arm"] for r in rows):
        cells = []
        for group in groups:
            value, ours = median(content, section, group, arm), median(content, section, group, MAIN)
            cell = "-" if value is None else _short(value)
            cells.append(f"{cell} ({value / ours:.2f})" if value and ours and arm != MAIN else cell)
        table.add_row(arm, *cells)
    console.print(table)
    for record in rows:
        ours = median(content, section, record["group"], MAIN)
        if ours and (share := record.get("report", {}).get("share_of_ours")):
            ratio = record["us_per_step"]["median"] / ours / share
            text = f"another network, {share:.2f} of our operations; {ratio:.2f} times ours per operation"
            console.print(f"{record['arm']}, {record['group']}: {text}")


def _profile(content: dict[str, Any], console: Console) -> None:
    for record in records(content, "profile", status="ok"):
        floor = record["floor"]
        console.print(
            f"profile, batch {record['batch']}: {record['us_per_step']['median']:.1f} us per step, "
            f"{record['kernels_per_step']:.1f} kernels, idle {100 * record['idle_share']:.1f} %, "
            f"{100 * floor['share_of_compute']:.1f} % of the compute floor"
        )
        for entry in record["top"][:6]:
            text = f"  {100 * entry['share']:5.1f} % {entry['us_per_step']:8.1f} us {entry['calls_per_step']:5.1f} x "
            console.print(text + entry["kernel"][:90], markup=False)


def _tune(content: dict[str, Any], console: Console) -> None:
    """What tuning found, in all and where a step gains most; and steps that were timed with it and without."""
    rows = records(content, "tune", what="tune", status="ok")
    if not rows:
        return
    section = content["sections"]["tune"]
    for plan in dict.fromkeys(r["plan"] for r in rows):
        of_plan = [r for r in rows if r["plan"] == plan]
        before, after = (sum(r["calls"] * r[name] for r in of_plan) for name in ("heuristic_us", "tuned_us"))
        faster = sum(r["choice"] is not None for r in of_plan)
        line = f"tune, {plan}: {len(of_plan)} shapes, of which {faster} have a faster choice than the heuristics'; "
        line += f"of their {_short(before)} us a step {_short(after)} are left"
        steps = [median(content, "tune", f"{plan}: step", arm) for arm in ("heuristics", "tuned")]
        if None not in steps:
            line += f"; the network timed as a whole: {_short(steps[0])} us, tuned {_short(steps[1])}"
        console.print(line)
    better = sorted((r for r in rows if r["choice"] is not None), key=_saved, reverse=True)
    if better:
        table = Table(title="tuned: where a step gains most", title_justify="left")
        for name in ("shape", "calls", "heuristic us", "tuned us", "gain", "choice"):
            table.add_column(name)
        for r in better[:TUNED_ROWS]:
            words = " ".join(f"{name}={value}" for name, value in r["choice"].items())
            own, best = r["heuristic_us"], r["tuned_us"]
            table.add_row(r["group"], str(r["calls"]), f"{own:.1f}", f"{best:.1f}", f"{own / best:.2f}x", words)
        console.print(table)
    console.print(f"the table of all is {section['table']}; for everyone it is tuned_tables/{section['package']}")


def _saved(record: dict[str, Any]) -> float:
    """Microseconds that a step saves by a shape's choice."""
    return record["calls"] * (record["heuristic_us"] - record["tuned_us"])


def _marks(content: dict[str, Any], console: Console) -> None:
    if content["device"]["kind"] != "cuda":
        console.print("no marks: they are of a GPU")
        return
    table = Table(title="marks", title_justify="left")
    for name in ("mark", "wanted", "found", "", "from"):
        table.add_column(name)
    for mark in judge(content):
        verdict = "not measured" if mark.passed is None else "PASS" if mark.passed else mark.short
        found = "-" if mark.found is None else f"{mark.found:.4g}"
        table.add_row(mark.what, mark.wanted, found, verdict, mark.where)
    console.print(table)


def _short(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"

