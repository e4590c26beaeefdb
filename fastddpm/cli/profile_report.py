"""Print a result of `model.profile` as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fastddpm.cli.options import plain
from fastddpm.perf.profiling import causes
from fastddpm.perf.profiling.causes import duration
from fastddpm.perf.profiling.ceilings import SHORT

TOP = 8
CAUSES = 3

Record = dict[str, Any]


def show(content: Record, console: Console) -> None:
    """Print ceilings, a line per batch size, layers and kernels of the largest one, causes, and unreadable counters."""
    device, network = content["device"], content["network"]
    kind = "frozen for sampling" if network["frozen"] else "as it is, not frozen"
    threads = f", {device['threads']} threads" if "threads" in device else ""
    plain(console, f"{content.get('model') or network['class']} on {device['name']}{threads}")
    plain(
        console,
        f"{network['class']}, {kind}, {network['parameters'] / 1e6:.3g} M parameters; {content['precision']}, backend "
        f"{content['backend']}, {content['steps']} steps an image",
    )
    _ceilings(content, console)
    _batches(content, console)
    measured = [record for record in content["batches"] if record["status"] == "ok"]
    roofs = causes.ceilings_of(content["ceilings"], SHORT[content["precision"]])
    if measured:
        _groups(measured[-1], console, judged=roofs is not None)
        _layers(measured[-1], console)
        _kernels(measured[-1], console)
    for record in measured:
        _causes(record, console)
    plain(console, "not read: " + "; ".join(f"{entry['counter']} ({entry['why']})" for entry in content["unreadable"]))


def _ceilings(content: Record, console: Console) -> None:
    roofs = content["ceilings"]
    parts = [f"products {name} {_rate(rate, 'TFLOP/s')}" for name, rate in roofs["matmul_tflops"].items()]
    parts.append(f"copy {_rate(roofs['copy_gb_s'], 'GB/s')}")
    parts.append(f"copy in a cache {_rate(roofs['copy_cached_gb_s'], 'GB/s')}")
    for name, value in roofs["latency"].items():
        if name.endswith("_us"):
            parts.append(f"{name.removesuffix('_us').replace('_', ' ')} {value:.2f} us")
    plain(console, "ceilings: " + ", ".join(parts))
    after = content.get("state", {}).get("after", {})
    load, processors = after.get("load_average"), content["device"].get("processors")
    if load is not None and processors and load > processors:
        plain(console, f"this machine was busy: load {load} on {processors} processors; times are of a shared machine")


def _batches(content: Record, console: Console) -> None:
    table = Table(title="batch sizes", title_justify="left")
    gpu = content["device"]["kind"] == "cuda"
    names = ["batch", "images/s", "ms/step", "20 % to 80 %", "layers' floor", "network's floor", "peak memory"]
    for name in [*names, "prepare", "first run"] + ["GPU idle"] * gpu:
        table.add_column(name, justify="right")
    measured = [record for record in content["batches"] if record["status"] == "ok"]
    for record in measured:
        us, floor = record["us_per_step"], record.get("floor") or {}
        idle, memory = record["kernels"].get("idle_share"), record["peak_memory"]["bytes"]
        table.add_row(
            str(record["batch"]), f"{record['images_per_s']:.3g}", f"{us['median'] / 1e3:.3g}",
            f"{us['p20'] / 1e3:.3g} to {us['p80'] / 1e3:.3g}", _percent(floor.get("share_of_layers")),
            _percent(floor.get("share_of_network")), "-" if memory is None else f"{memory / 1e6:.0f} MB",
            f"{record['prepare_s']:.2f} s", f"{record['first_run_s']:.2f} s", *([_percent(idle)] * gpu),
        )  # fmt: skip
    if measured:
        console.print(table)
    for record in content["batches"]:
        if record["status"] != "ok":
            failed = "failed: " * (record["status"] == "failed")
            why = str(record.get("error") or record.get("reason") or "").partition("\n")[0]
            plain(console, f"batch {record['batch']}: {failed}{why}")
    if measured:
        first = measured[0]
        steps = f"runs of {first['steps_per_run']} steps, fewer at larger batches"
        mode, reason = first["graph"]["mode"], first["graph"]["why_not"]
        loop = f"loop {mode}" + (f" ({reason})" if reason else "")
        memory = f"memory: {first['peak_memory']['what']}"
        plain(console, f"{steps}; {loop}; the first run compiles, tunes and captures; {memory}")


def _groups(record: Record, console: Console, *, judged: bool) -> None:
    if not record["layers"] or not judged:
        return
    table = Table(title=f"layers by kind and size, batch {record['batch']}", title_justify="left")
    for name in ("kind", "size", "layers", "time", "of the network", "GFLOP/s", "GB/s", "of the roof", "bound by"):
        table.add_column(name, justify="left" if name in ("kind", "bound by") else "right")
    total = sum(causes.time_of(layer) for layer in record["layers"])
    for group in sorted(causes.grouped(record["layers"]), key=lambda group: -group["us"]):
        same = [r for r in record["layers"] if (r["kind"], r["size"]) == (group["kind"], group["size"])]
        bounds = dict.fromkeys(layer["bound"] for layer in same)
        table.add_row(
            group["kind"], _size(group), str(group["layers"]), duration(group["us"]), _percent(group["us"] / total),
            *_rates(group, group["us"]), _percent(group["floor_us"] / group["us"]), ", ".join(bounds),
        )  # fmt: skip
    console.print(table)
    plain(console, f"timed: {record['layers_timed']}")
    if any(layer["share"] > 1 for layer in record["layers"]):
        why = "operands came from a cache, or fewer operations were needed than are counted (Winograd)"
        plain(console, f"above 100 %: {why}")


def _layers(record: Record, console: Console) -> None:
    if not record["layers"]:
        return
    table = Table(title=f"the {TOP} costliest layers, batch {record['batch']} (all are in the JSON)")
    table.title_justify = "left"
    for name in ("layer", "kind", "size", "time", "20 % to 80 %", "GFLOP/s", "GB/s", "of the roof", "bound by"):
        table.add_column(name, justify="left" if name in ("layer", "kind", "bound by") else "right")
    for layer in sorted(record["layers"], key=lambda layer: -causes.time_of(layer))[:TOP]:
        us = causes.time_of(layer)
        table.add_row(
            layer["name"], layer["kind"], _size(layer), duration(us),
            f"{duration(layer['us']['p20'])} to {duration(layer['us']['p80'])}", *_rates(layer, us),
            _percent(layer.get("share")), layer.get("bound", "-"),
        )  # fmt: skip
    console.print(table)


def _kernels(record: Record, console: Console) -> None:
    found = record["kernels"]
    if "error" in found:
        plain(console, f"kernels were not traced: {found['error']}")
        return
    if "kernels_per_step" in found:
        title = f"kernels, batch {record['batch']}: {found['kernels_per_step']:.0f} a step"
    else:
        title = f"operators of the network, batch {record['batch']}: {found['operators_per_step']:.0f} an evaluation"
    table = Table(title=title, title_justify="left", caption=found["counted"], caption_justify="left")
    for name in ("name", "time", "calls", "share"):
        table.add_column(name, justify="left" if name == "name" else "right", overflow="fold")
    for entry in found["top"][:TOP]:
        table.add_row(
            entry["kernel"][:90], duration(entry["us_per_step"]), f"{entry['calls_per_step']:.0f}",
            _percent(entry["share"]),
        )  # fmt: skip
    console.print(table)


def _causes(record: Record, console: Console) -> None:
    us, floor = record["us_per_step"]["median"], record["floor"]
    if floor is None:
        plain(console, f"batch {record['batch']}: {duration(us)} a step; no floor without layers and ceilings")
        return
    plain(
        console,
        f"batch {record['batch']}: {duration(us)} a step; at the ceilings its layers take "
        f"{duration(floor['layers_us'])}, the network in one piece {duration(floor['network_us'])}. Costliest:",
    )
    for cause in record["causes"][:CAUSES]:
        share = f"({100 * cause['share']:.0f} % of the step)"
        plain(console, f"  {duration(cause['us']):>8} above the floor {share}: {cause['what']}")


def _rates(entry: Record, us: float) -> Sequence[str]:
    flops = f"{entry['flops'] / us / 1e3:.3g}" if entry["flops"] else "-"
    return flops, f"{entry['bytes'] / us / 1e3:.3g}"


def _rate(rate: Record, unit: str) -> str:
    if "error" in rate:
        return f"not measured ({rate['error']})"
    return f"{rate['best']:.3g} {unit}"


def _size(entry: Record) -> str:
    return f"{entry['size'][0]}x{entry['size'][1]}" if entry["size"] else "-"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"
