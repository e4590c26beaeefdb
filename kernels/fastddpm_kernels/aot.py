"""Compile every Triton kernel variant for any GPU on any machine, and report what each uses.

    python -m fastddpm_kernels.aot [--target sm_90 ...] [--op NAME ...] [--json PATH] [--jobs N] [--every N]

The command prints registers, spills, shared memory, the widest load and store and the number of instructions of every
variant. It exits with 1 if a variant spills or does not compile: a spill adds traffic to kernels that are already bound
by device memory.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from fastddpm_kernels.backend import TRITON_OPS as OPS

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
COLUMNS = ("registers", "spills", "shared", "load_bits", "store_bits", "instructions", "matrix", "per_element")


def compile_all(
    targets: Sequence[str] = TARGETS, ops: Sequence[str] = OPS, jobs: int = 1, every: int = 1
) -> list[dict[str, Any]]:
    """Compile the variants of `ops` for `targets`.

    Args:
        targets: GPUs, as `sm_90` or `gfx942`.
        ops: their names.
        jobs: processes.
        every: compile one in so many variants of an op, others for each target. The first target has every op's first.

    Returns:
        One row per variant and target: `variant`, `target`, and either the fields of
        `fastddpm_kernels.device.compile.Usage` and `per_element` (`Variant.per_element`) or `error`, the first line of
        what the compiler said.
    """
    # The interpreter's stand-ins for kernels cannot be compiled, and are chosen when triton is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    work = []
    for place, name in enumerate(targets):
        for op in ops:
            own = [index for index, variant in enumerate(variants(op)) if variant.target in (None, name)]
            work += [(op, index, name) for index in own[-place % every :: every]]
    if jobs == 1:
        return [_compile_one(*item) for item in work]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile_one, *zip(*work, strict=True), chunksize=4))


def variants(op: str) -> list[Any]:
    """Return every variant of an op."""
    return importlib.import_module(f"fastddpm_kernels.{op}.triton").aot_variants()


def _compile_one(op: str, index: int, target: str) -> dict[str, Any]:
    from fastddpm_kernels.device.compile import compile_variant

    variant = variants(op)[index]
    row: dict[str, Any] = {"variant": variant.name, "target": target}
    try:
        used = compile_variant(variant, target)
        return row | used.as_dict() | {"per_element": variant.per_element(used.instructions)}
    except Exception as error:  # whatever the compiler raises is a row of the report, and fails the run
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return row | {"error": f"{type(error).__name__}: {lines[-1]}"}


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for every row that spills or did not compile."""
    return [
        f"{row['variant']} for {row['target']}: {row.get('error') or str(row['spills']) + ' bytes spilled'}"
        for row in rows
        if row.get("error") or row["spills"]
    ]


def write_json(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write {"triton": its version, "rows": rows}, a line per row: the form of `benchmarks/results/aot.json`."""
    lines = ",\n".join(map(json.dumps, rows))
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'{{"triton": {json.dumps(importlib.metadata.version("triton"))}, "rows": [\n{lines}\n]}}\n')


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastddpm_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", default=list(TARGETS), metavar="T", help="sm_80, sm_90, gfx942, ...")
    parser.add_argument("--op", nargs="+", default=list(OPS), choices=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--json", metavar="PATH", help="write the rows to a file as well, with triton's version")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of an op's variants, one in N (default: 1)")
    options = parser.parse_args(arguments)

    rows = compile_all(options.target, options.op, options.jobs, options.every)
    width = max(len(row["variant"]) for row in rows)
    print(f"{'variant':{width}}  {'target':7}  " + "  ".join(f"{name:>12}" for name in COLUMNS))
    for row in rows:
        values = row.get("error") or "  ".join(f"{row[name] or 0:>12}" for name in COLUMNS)
        print(f"{row['variant']:{width}}  {row['target']:7}  {values}")
    if options.json:
        write_json(options.json, rows)
    bad = failures(rows)
    print(f"{len(rows)} compiled, {len(bad)} of them with spills or errors")
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
