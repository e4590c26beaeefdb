"""Section `plans`: batch 1 with each way of choosing among cuDNN's plans, and with each kind of graph.

torch times cuDNN's plans once each, keeps the fastest for the life of the process and offers no other way to name one.
So every way is a process of its own: ten plans or all, deterministic ones or any. What torch found is then timed as it
runs, by replaying the loop's graphs. `python -m gpu.plans NETWORK LIMIT DETERMINISTIC DEVICE` prints a line of JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from fastddpm_kernels.conv import upsampling
from networks import make_problem

from fastddpm import Sampler
from gpu import children
from gpu.results import Record, Section

# The limit of plans (0: all), and whether plans must be deterministic. The first is what the package does.
WAYS = ((10, True), (0, True), (10, False), (0, False))
MODES = ("step", "unrolled", "while")
STEPS, ROUNDS = 100, 5


def run(section: Section, device: torch.device, small: bool) -> None:
    """Record the microseconds of a step for every way and kind of graph, each way as its process ends."""
    ways = WAYS[:1] if small else WAYS
    for index, (limit, deterministic) in enumerate(ways):
        group = f"{'all' if limit == 0 else limit} plans, {'deterministic' if deterministic else 'any'}"
        if section.has(group):
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "times.json")
            words = ["small" if small else "cifar10", str(limit), str(int(deterministic)), str(device), str(path)]
            wrong = children.run(["-m", "gpu.plans", *words], section.left() / (len(ways) - index))
            times = json.loads(path.read_text()) if path.exists() else {}
        for mode, seconds in times.items():
            us = sorted(1e6 * value for value in seconds)
            spread = {"median": statistics.median(us), "p20": us[len(us) // 5], "p80": us[-1 - len(us) // 5]}
            record: Record = {"group": group, "arm": mode, "status": "ok", "us_per_step": spread | {"samples": len(us)}}
            section.add(record)
        if wrong:
            section.add({"group": group, "arm": "process", "status": "failed", "reason": wrong})
    section.close()


def main(network: str, limit: str, deterministic: str, place: str, path: str) -> None:
    """Time the loop of one sample, and write {mode: [seconds of a step]} after every mode."""
    torch.backends.cudnn.benchmark_limit = int(limit)
    upsampling._DETERMINISTIC = bool(int(deterministic))
    device = torch.device(place)
    problem = make_problem(network, device)
    cuda = device.type == "cuda"
    times: dict[str, list[float]] = {}
    for mode in MODES if cuda else ("plain",):
        sampler = Sampler(
            problem.unet, problem.schedule, "ddpm", STEPS if cuda else 5, dtype="float16" if cuda else "float32",
            cuda_graph=mode if cuda else False,
        )  # fmt: skip
        steps = len(sampler.table)
        sampler.sample(1, seed=0, progress=False)  # searches, compiles and captures
        times[mode] = []
        for index in range(ROUNDS):
            if cuda:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            sampler.sample(1, seed=index, progress=False)
            if cuda:
                torch.cuda.synchronize()
            times[mode].append((time.perf_counter() - begin) / steps)
        Path(path).write_text(json.dumps(times))


if __name__ == "__main__":
    main(*sys.argv[1:])
