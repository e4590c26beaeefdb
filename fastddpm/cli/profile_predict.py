"""Print and return what a step is predicted to take on a GPU: `fastddpm profile --predict`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fastddpm.cli.options import plain
from fastddpm.common.version import __version__
from fastddpm.perf.profiling import predict
from fastddpm.perf.profiling.causes import duration

Record = dict[str, Any]


def prediction(model: Any, name: str, batches: Sequence[int]) -> Record:
    """Return the content of the file: the rows and the sum of every batch size, in fp16, on the GPU `name`."""
    from fastddpm.networks.frozen import cuda_instructions

    machine = predict.MACHINES[name]
    found = []
    for batch in batches:
        instructions = cuda_instructions(model.unet, batch)
        config = model.unet.config
        rows = predict.predict(instructions, machine, batch, (config.in_channels, *_size(config.sample_size)))
        us = sum(row["us"] for row in rows)
        found.append({"batch": batch, "us_per_step": us, "kernels": sum(row["kernels"] for row in rows), "rows": rows})
    return {"schema": predict.SCHEMA, "device": machine.name, "fastddpm": __version__, "batches": found}


def _size(sample_size: Any) -> tuple[int, int]:
    return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)


def show(content: Record, console: Console, measured: Record | None = None) -> None:
    """Print a table per batch size, beside what an earlier `fastddpm profile` measured."""
    plain(console, f"predicted for {content['device']}, fp16; nothing of it is measured")
    of_file = {record["batch"]: record for record in (measured or {}).get("batches", []) if record["status"] == "ok"}
    for record in content["batches"]:
        theirs = of_file.get(record["batch"])
        table = Table(title=f"batch {record['batch']}", title_justify="left")
        for name in ("layers", "kernels", "bound", "predicted"):
            table.add_column(name, justify="left" if name in ("layers", "bound") else "right")
        if theirs is not None:
            table.add_column(f"measured on {measured['device']['name']}" if measured else "", justify="right")
        seen = _measured(theirs)
        for group in predict.grouped(record["rows"]):
            size = f" at {group['size'][0]}x{group['size'][1]}" if group["size"] else ""
            cells = [group["kind"] + size, str(group["kernels"]), group["bound"], duration(group["us"])]
            if theirs is not None:
                us = seen.get((group["kind"], group["size"]))
                cells.append("" if us is None else duration(us))
            table.add_row(*cells)
        table.add_section()
        cells = ["step", str(record["kernels"]), "", duration(record["us_per_step"])]
        table.add_row(*cells, *([] if theirs is None else [duration(theirs["us_per_step"]["median"])]))
        console.print(table)


def _measured(record: Record | None) -> dict[tuple[str, Any], float]:
    """Return the microseconds of each kind and size of layers in a record of a profile."""
    found: dict[tuple[str, Any], float] = {}
    for layer in (record or {}).get("layers", []):
        key = layer["kind"], tuple(layer["size"]) if layer["size"] else None
        found[key] = found.get(key, 0.0) + float(layer.get("traced_us") or layer["us"]["median"])
    return found
