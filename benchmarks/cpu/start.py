"""`fastddpm sample` from the start of its process to its end, of this version and of others, in turn."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measuring import ROOT

from cpu.crowd import OURS, environment
from fastddpm.perf.profiling.timing import interleave, quantiles

BOUND = 8  # of the 8-bit pixels' mean difference, of 255: rounding turns few digits into others


def measure(samples: int, steps: int, rounds: int, others: dict[str, Path]) -> list[dict[str, Any]]:
    """Return a record for this version and each other one.

    "seconds" are quantiles, "times_as_fast" of this version's quotient to each other one, "pixels_differ" the share of
    8-bit pixels that differ from this version's.

    Args:
        samples: how many digits are drawn.
        steps: of the loop.
        rounds: of all versions.
        others: other checkouts, by what they are called.
    """
    checkouts = {OURS: ROOT, **others}
    seconds: dict[str, list[float]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{index}.npz" for index, name in enumerate(checkouts)}

        def run(name: str, count: int, length: int) -> float:
            words = ["sample", "-n", str(count), "--steps", str(length), "--device", "cpu", "-o", str(files[name])]
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "fastddpm", *words], env=environment(checkouts[name]), check=True, cwd=folder,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            return time.perf_counter() - start

        for name in checkouts:
            run(name, 1, 2)  # builds what is built once, and has the files in memory
        runs = {name: partial(run, name, samples, steps) for name in checkouts}
        for name, value in interleave(runs, seconds=float("inf"), least=rounds, most=rounds):
            seconds[name].append(value)
            print(f"sample, {samples} digits, {steps} steps: {name} {value:.1f} s", flush=True)
        images = {name: np.load(path)["arr_0"].astype(np.int16) for name, path in files.items()}
    records = []
    for name, own in seconds.items():
        difference = np.abs(images[name] - images[OURS])
        record: dict[str, Any] = {
            "arm": name, "status": "ok", "seconds": quantiles(own), "pixels_differ": float((difference > 0).mean()),
        }  # fmt: skip
        if difference.mean() > BOUND:
            reason = f"draws other images: pixels differ by {difference.mean():.1f} of 255 on average, at most {BOUND}"
            record = {"arm": name, "status": "wrong", "reason": reason}
        elif name == OURS:
            ratios = {other: [a / b for a, b in zip(seconds[other], own, strict=True)] for other in others}
            record["times_as_fast"] = {other: quantiles(values) for other, values in ratios.items()}
        records.append(record)
    return records
