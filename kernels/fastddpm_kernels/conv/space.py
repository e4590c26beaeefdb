"""Compile, or check in triton's interpreter, every configuration of the search space of `conv_`.

    python -m fastddpm_kernels.conv.space compile [--target sm_90 ...] [--dtype fp16 ...] [--json PATH]
    TRITON_INTERPRET=1 python -m fastddpm_kernels.conv.space check [--dtype fp16 fp32] [--json PATH]

`compile` reports registers, spills, shared memory and the products of the tensor cores (instructions of PTX) of every
configuration for every target; `check` the largest relative error of every configuration at small hard shapes, as a
share of what is allowed. Each takes minutes: the tests have a sample of both.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from fastddpm_kernels.conv.examples import Example, results
from fastddpm_kernels.conv.plan import FMA_SHAPES, NORMS, SHARED, TENSOR_SHAPES, Tile, most_stages

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
# What a configuration is compiled for: a layer, of one source and of two with a shortcut.
LAYERS = {
    "block": Example(4, 16, 16, 256, 256, groups=32),
    "concat": Example(4, 16, 16, 256, 256, 128, groups=32, shortcut=True, residual=False),
}
# What it is checked at. The interpreter takes a second for each.
HARD = {
    "odd, two sources": Example(2, 5, 7, 20, 24, 12, groups=4, film=True, shortcut=True),
    "4x4, batch 3": Example(3, 4, 4, 32, 72, groups=8),
    "upsample": Example(1, 5, 3, 32, 20, upsample=True),
    "downsample": Example(2, 7, 6, 12, 20, stride=2, groups=2, time=False),
}
_COUNTED = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "cp_async": r"cp\.async\.c[ag]",
}
SPLIT = ((1, True), (3, True), (3, False))


def configurations(kind: str) -> Iterator[Tile]:
    """Yield every configuration of a kind of product, in `DTYPES`, as far as a kernel differs by it."""
    block_k = {"fp32": 16, "tf32": 32}.get(kind, 64)
    shapes = FMA_SHAPES if kind == "fp32" else TENSOR_SHAPES
    for (m, n, warps), (splits, one), norm in itertools.product(shapes, SPLIT, NORMS):
        tile = Tile(m, n, block_k, splits, one, warps, 4, norm)
        yield tile
        if one and norm != "table" and kind != "fp32":
            yield replace(tile, pdl=True, tma=True, persistent=splits == 1)


def compile_all(targets: Sequence[str], kinds: Sequence[str], jobs: int = 1, every: int = 1) -> list[dict[str, Any]]:
    """Return a row for every kernel, configuration and target; `every`: only for each such one, as a sample."""
    work = [
        (kind, layer, tile, target)
        for target, kind, layer in itertools.product(targets, kinds, LAYERS)
        for tile in configurations(kind)
        if (layer == "block" or (tile.norm == "merge" and tile.one_launch and tile.splits > 1))
        and not (tile.tma and target in ("sm_80", "sm_89"))
    ][::every]
    if jobs == 1:
        found = [_compile_one(*item) for item in work]
    else:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(_compile_one, *zip(*work, strict=True), chunksize=4))
    rows = {(row["variant"], row["target"]): row for rows in found for row in rows}
    return list(rows.values())


def _compile_one(kind: str, layer: str, tile: Tile, target: str) -> list[dict[str, Any]]:
    from fastddpm_kernels.conv.triton import operands_of, problem_of, variants_of
    from fastddpm_kernels.device.compile import compiled, usage

    o = operands_of(LAYERS[layer], DTYPES[kind], kind == "tf32")
    problem = problem_of(o)
    limit = {"sm_80": SHARED, "sm_89": 99 * 1024}.get(target, 227 * 1024)
    tile = replace(tile, num_stages=most_stages(problem, tile.block_m, tile.block_n, tile.block_k, limit))
    if tile.num_stages < 2 or tile.why_not(problem) is not None:
        return []
    rows = []
    for variant in variants_of(o, tile, f"{kind}, {layer}, {_name(tile)}"):
        if not variant.name.startswith("conv.tile"):
            continue  # the others do not depend on the tile, and are in `aot`
        row: dict[str, Any] = {"variant": variant.name, "target": target}
        try:
            kernel = compiled(variant, target)
            ptx = kernel.asm["ptx"]
            used = {name: value for name, value in usage(kernel).as_dict().items() if not name.endswith("_bits")}
            rows.append(row | used | {name: len(re.findall(pattern, ptx)) for name, pattern in _COUNTED.items()})
        except Exception as error:  # whatever the compiler raises is a row of the report
            rows.append(row | {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"})
    return rows


def _name(tile: Tile) -> str:
    split = "" if tile.splits == 1 else f", split {'1' if tile.one_launch else '2'}"
    split += (", tma" if tile.tma else "") + (", persistent" if tile.persistent else "")
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.num_warps} warps, {tile.norm}{split}"


def random(name: str, *shape: int) -> Tensor:
    """Return random float64 values; those of x have a mean larger than their deviation."""
    generator = torch.Generator().manual_seed(len(name) + sum(shape))
    shift = {"x": 3.0, "x2": -2.0, "norm.weight": 1.0}.get(name, 0.0)
    return torch.randn(shape, dtype=torch.float64, generator=generator) + shift


def check_all(kinds: Sequence[str], device: torch.device, every: int = 1) -> list[dict[str, Any]]:
    """Return a row for every configuration at every hard shape: its error over the bound, the worst of its results.

    Args:
        kinds: of `DTYPES`.
        device: where the kernels run; the CPU for the interpreter.
        every: check only each such configuration, for a sample.
    """
    from fastddpm_kernels.conv import conv_
    from fastddpm_kernels.conv.triton import Operands, problem_of, run_tile
    from fastddpm_kernels.testing import FLOORS, errors

    rows = []
    for kind, (name, example) in itertools.product(kinds, HARD.items()):
        dtype = DTYPES[kind]
        values = {key: value.to(device, dtype).double() for key, value in example.make(random).items()}
        truth, eager = example.call(values, torch.float64), example.call(values, dtype)
        conv_(**truth, backend="reference")
        conv_(**eager, backend="eager")
        exact, plain = results(truth), results(eager)
        for index, tile in enumerate(configurations(kind)):
            tile = replace(tile, block_k=min(tile.block_k, 16), pdl=False)  # the interpreter has no such launches
            call = example.call(values, dtype)
            o = Operands(**call, allow_tf32=kind == "tf32")
            if index % every or tile.why_not(problem_of(o)) is not None:
                continue
            run_tile(o, tile)
            floor = FLOORS[torch.float16 if kind == "tf32" else dtype]
            worst = 0.0
            for result, value in results(call).items():
                got, granted = errors(value, exact[result]), errors(plain[result], exact[result])
                bounds = (max(f, 4 * g) for f, g in zip(floor, granted, strict=True))
                worst = max(worst, *(a / b for a, b in zip(got, bounds, strict=True)))
            rows.append({"shape": name, "dtype": kind, "tile": _name(tile), "of_bound": round(worst, 4)})
    return rows


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for every row that does not compile or is wrong. A spill is no failure: it is not chosen."""
    return [str(row) for row in rows if row.get("error") or not row.get("of_bound", 0) <= 1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastddpm_kernels.conv.space", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("compile", "check"))
    parser.add_argument("--target", nargs="+", default=list(TARGETS), metavar="T", help="sm_80, sm_90, ...")
    parser.add_argument("--dtype", nargs="+", default=["fp16"], choices=list(DTYPES))
    parser.add_argument("--json", metavar="PATH", help="add the rows to a file, in place of those that it has of them")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take only each Nth configuration, a sample")
    options = parser.parse_args(arguments)

    if options.what == "compile":
        rows = compile_all(options.target, options.dtype, options.jobs, options.every)
    else:
        rows = check_all(options.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.every)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if options.json:
        write(options.json, options.what, rows)
    bad = failures(rows)
    spilled = sum(row.get("spills", 0) > 0 for row in rows)
    print(f"{len(rows)} configurations, {len(bad)} of them fail, {spilled} spill")
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


def write(path: str, what: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write {"triton": its version, "compile": rows, "check": rows}, a line per row, keeping rows of other names."""
    names = ("variant", "target") if what == "compile" else ("shape", "dtype", "tile")
    content: dict[str, Any] = {"triton": "", "compile": [], "check": []}
    try:
        with open(path, encoding="utf-8") as file:
            content |= json.load(file)
    except FileNotFoundError:
        pass
    new = {tuple(row[name] for name in names) for row in rows}
    kept = [row for row in content[what] if tuple(row[name] for name in names) not in new]
    content[what] = [*kept, *rows]
    content["triton"] = importlib.metadata.version("triton")
    parts = (f'"{part}": [\n' + ",\n".join(map(json.dumps, content[part])) + "\n]" for part in ("compile", "check"))
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'{{"triton": {json.dumps(content["triton"])},\n' + ",\n".join(parts) + "}\n")


if __name__ == "__main__":
    sys.exit(main())
