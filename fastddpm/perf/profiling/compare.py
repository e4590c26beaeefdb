"""Compare two result files: ratios, their noise, and which figures changed by more than the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fastddpm.perf.profiling.model import SCHEMA

# The schemas of `benchmarks/gpu_check.py` and `benchmarks/cpu_check.py`.
GPU_SCHEMA, CPU_SCHEMA = "fastddpm.gpu_check/1", "fastddpm.cpu_check/1"
LEAST_SAMPLES = 3  # fewer do not show the noise
_IDENTITY = (
    *("device.name", "device.threads", "precision", "backend", "model", "steps", "quick", "small", "network.frozen"),
    *("versions.torch", "versions.triton", "torch", "triton", "cpu", "threads", "native"),
)


class Figure(NamedTuple):
    """One measured figure.

    Attributes:
        what: its name, unique in a file.
        unit: such as "us" or "GB/s".
        median, p20, p80: of the samples; the quantiles are None where the noise is not known.
        more_is_better: True for a rate.
    """

    what: str
    unit: str
    median: float
    p20: float | None
    p80: float | None
    more_is_better: bool = False


class Change(NamedTuple):
    """A figure in two files.

    Attributes:
        what, unit: see `Figure`.
        old, new: medians; None where a file has none.
        ratio: how many times as good the new one is; above 1 is faster, or less memory.
        low, high: the band of that ratio from the 20 % and 80 % quantiles of both; None where the noise is not known.
        verdict: "better" or "worse" where the bands of old and new do not overlap, else "within noise"; "noise not
            known", "only old" or "only new".
    """

    what: str
    unit: str
    old: float | None
    new: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str


def figures(content: dict[str, Any]) -> dict[str, Figure]:
    """Return the figures in a file of `fastddpm profile`, `benchmarks/gpu_check.py` or `cpu_check.py`, by name.

    Raises:
        ValueError: the file is from none of these.
    """
    schema = content.get("schema")
    if schema not in _READERS:
        raise ValueError(f"the file's schema is {schema!r}, must be one of {', '.join(map(repr, _READERS))}")
    return {figure.what: figure for figure in _READERS[schema](content)}


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Compare all figures of two files: in the order of the new one, then those that only the old one has.

    Raises:
        ValueError: a file holds no results, or the two are not of the same kind.
    """
    if old.get("schema") != new.get("schema"):
        raise ValueError(f"the old file's schema is {old.get('schema')!r}, must be {new.get('schema')!r} as the new's")
    before, after = figures(old), figures(new)
    return [_change(before.get(what), after.get(what)) for what in dict.fromkeys([*after, *before])]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return other differences between two runs that may explain a change: "precision: float32, now float16"."""
    values = [(name, _at(old, name), _at(new, name)) for name in _IDENTITY]
    return [f"{name}: {before}, now {after}" for name, before, after in values if before != after]


def markdown(old: dict[str, Any], new: dict[str, Any], names: tuple[str, str] = ("old", "new")) -> str:
    """Return a table of all figures of two files, with changes beyond the noise in bold, and other differences.

    Raises:
        ValueError: as `compare`.
    """
    changes = compare(old, new)
    lines = [
        f"{names[0]} ({about(old)}) against {names[1]} ({about(new)}):",
        "",
        f"| | {names[0]} | {names[1]} | times as good (20 % to 80 %) | |",
        "|---|---|---|---|---|",
        *(_row(change) for change in changes),
    ]
    judged = [change for change in changes if change.verdict in ("better", "worse", "within noise")]
    better, worse = (sum(change.verdict == verdict for change in judged) for verdict in ("better", "worse"))
    lines += ["", f"Of {len(judged)} figures whose noise is known {better} got better and {worse} worse beyond it."]
    if found := differences(old, new):
        lines += ["", "Not only the code differs: " + "; ".join(found) + "."]
    return "\n".join(lines)


def about(content: dict[str, Any]) -> str:
    """Return a file's device, its date, and its version or commit."""
    parts = [_at(content, "device.name") or content.get("cpu"), str(content.get("written", ""))[:16].replace("T", " ")]
    if commit := content.get("commit"):
        parts.append(f"commit {commit}" + (" with changes" if content.get("dirty") else ""))
    elif version := content.get("fastddpm"):
        parts.append(f"fastddpm {version}")
    return ", ".join(str(part) for part in parts if part)


def _change(old: Figure | None, new: Figure | None) -> Change:
    known = new or old
    assert known is not None
    if old is None or new is None:
        only = "only new" if old is None else "only old"
        before, after = (None, known.median) if old is None else (known.median, None)
        return Change(known.what, known.unit, before, after, None, None, None, only)
    slow, fast = (old, new) if new.more_is_better else (new, old)  # ratio = fast / slow
    ratio = fast.median / slow.median if slow.median else None
    low = high = None
    verdict = "noise not known"
    if ratio is not None and fast.p20 and fast.p80 and slow.p20 and slow.p80:
        low, high = fast.p20 / slow.p80, fast.p80 / slow.p20
        verdict = "better" if low > 1 else "worse" if high < 1 else "within noise"
    return Change(new.what, new.unit, old.median, new.median, ratio, low, high, verdict)


def _row(change: Change) -> str:
    old, new = (_shown(value, change.unit) for value in (change.old, change.new))
    if change.ratio is None:
        ratio = "-"
    else:
        ratio = f"{change.ratio:.2f}"
        if change.low is not None and change.high is not None:
            ratio += f" ({change.low:.2f} to {change.high:.2f})"
    bold = "**" if change.verdict in ("better", "worse") else ""
    return f"| {change.what} | {old} | {new} | {bold}{ratio}{bold} | {bold}{change.verdict}{bold} |"


def _shown(value: float | None, unit: str) -> str:
    return "-" if value is None else (f"{value:.0f} {unit}" if abs(value) >= 1000 else f"{value:.3g} {unit}").strip()


def _at(content: dict[str, Any], path: str) -> Any:
    value: Any = content
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _measured(what: str, unit: str, spread: Any, *, rate: bool = False) -> Iterator[Figure]:
    """Yield the figure of a spread or of a bare number; nothing if it was not measured."""
    if isinstance(spread, (int, float)):
        yield Figure(what, unit, float(spread), None, None, rate)
    elif isinstance(spread, dict) and "median" in spread:
        known = spread.get("samples", 0) >= LEAST_SAMPLES
        low, high = (float(spread[q]) if known else None for q in ("p20", "p80"))
        yield Figure(what, unit, float(spread["median"]), low, high, rate)


def _of_profile(content: dict[str, Any]) -> Iterator[Figure]:
    for record in content["batches"]:
        if record["status"] != "ok":
            continue
        batch = f"batch {record['batch']}"
        yield from _measured(f"{batch}: step", "us", record["us_per_step"])
        yield from _measured(f"{batch}: network", "us", record["network_us"])
        for kind, spread in record["kinds"].items():
            yield from _measured(f"{batch}: {kind} layers", "us", spread)
        memory = record["peak_memory"]["bytes"]
        yield from _measured(f"{batch}: peak memory", "MB", None if memory is None else memory / 1e6)
    yield from _ceilings(content["ceilings"])


def _of_gpu_check(content: dict[str, Any]) -> Iterator[Figure]:
    for name, section in content["sections"].items():
        for record in section.get("records", []):
            if record.get("status") == "ok" and "us_per_step" in record:
                what = f"{name}, {record['group']}: {record['arm']}"
                yield from _measured(what, "us", record["us_per_step"])
    yield from _ceilings(content["sections"].get("machine", {}))


def _ceilings(machine: dict[str, Any]) -> Iterator[Figure]:
    for name, rate in machine.get("matmul_tflops", {}).items():
        yield from _measured(f"ceiling: matmul {name}", "TFLOP/s", rate, rate=True)
    for name, what in (("copy_gb_s", "copy"), ("copy_cached_gb_s", "copy in a cache")):
        yield from _measured(f"ceiling: {what}", "GB/s", machine.get(name), rate=True)
    for name, value in machine.get("latency", {}).items():
        if name.endswith("_us"):
            yield from _measured(f"ceiling: {name.removesuffix('_us').replace('_', ' ')}", "us", value)


def _of_cpu_check(content: dict[str, Any]) -> Iterator[Figure]:
    for record in content["records"]:
        what = f"{record['network']}, batch {record['batch']}: {record['arm']}"
        yield from _measured(what, "s", record["median_s"])
        if record["arm"] != "original":
            ratio = {"median": record["times_as_fast"], "samples": content["rounds"]}
            ratio |= {q: record[f"times_as_fast_{q}"] for q in ("p20", "p80")}
            yield from _measured(f"{what}, times as fast as the original", "", ratio, rate=True)
    steps = {"step of": content.get("step", {})}
    steps |= {f"{name} step of": section for name, section in content.get("isa", {}).items()}
    for title, section in steps.items():
        for record in section.get("records", []):
            if record["status"] == "ok":
                what = f"{title} {record['network']}, batch {record['batch']}: {record['arm']} {record['dtype']}"
                yield from _measured(what, "s", record["seconds"])
                yield from _measured(f"{what}, times as fast as diffusers", "", record["times_as_fast"], rate=True)
    for record in content.get("crowd", {}).get("records", []):
        if record["status"] == "ok":
            what = f"loop of {record['network']}, batch {record['batch']}: {record['arm']} {record['dtype']}"
            for condition in ("idle", "busy", "two"):
                yield from _measured(f"{what}, {condition}", "s", record.get(condition))
            for condition in ("busy", "two"):
                yield from _measured(f"{what}, {condition} over idle", "", record.get(f"{condition}_over_idle"))
    start = content.get("start", {})
    for record in start.get("records", []):
        if record["status"] == "ok":
            what = f"fastddpm sample of {start['samples']} digits, {start['steps']} steps: {record['arm']}"
            yield from _measured(what, "s", record["seconds"])


_READERS: dict[Any, Callable[[dict[str, Any]], Iterator[Figure]]] = {
    SCHEMA: _of_profile,
    GPU_SCHEMA: _of_gpu_check,
    CPU_SCHEMA: _of_cpu_check,
}
