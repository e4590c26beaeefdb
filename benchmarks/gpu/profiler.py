"""Section `profile`: the kernels of a step, the gaps between them, and how far the loop is from what is possible."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastddpm.perf.profiling import kernels
from fastddpm.perf.profiling.timing import first_lines, release, spread, timed
from gpu.arms import OUT_OF_TIME
from gpu.engine import SamplerLoop, described_program
from gpu.machine import copy_bandwidth, matmul
from gpu.networks import Problem, make_problem
from gpu.results import Record, Section

PRECISION = "fp16"
# batch -> steps that are profiled
STEPS = {1: 100, 64: 30, 256: 12}


def run(section: Section, device: torch.device, small: bool) -> None:
    """Profiles loops of the CIFAR-10 architecture at a few batch sizes."""
    if device.type != "cuda":
        section.close("skipped", reason="kernels of a device are profiled on a GPU only")
        return
    machine = section.results.sections.get("machine", {})
    tflops = (machine.get("matmul_tflops") or {}).get(PRECISION) or matmul(device, PRECISION, small)
    copy = machine.get("copy_gb_s") or copy_bandwidth(device)
    section.set(matmul_tflops=tflops, copy_gb_s=copy)
    problem = make_problem("small" if small else "cifar10", device)
    records: dict[int, Record] = {}
    # The tracing library, once started, stays in the way of graphs with loops in them: so all is timed before.
    for batch, steps in STEPS.items():
        group = f"batch {batch}"
        if section.has(group):
            continue
        records[batch] = {
            "group": group,
            "arm": f"fastddpm {PRECISION}",
            "what": "profile",
            "problem": problem.name,
            "batch": batch,
            "steps": steps,
            "dtype": PRECISION,
            "status": "ok",
        }
        _extend(section, device, records[batch], partial(time_loop, problem, batch, steps))
    if any(record["status"] == "ok" for record in records.values()):
        kernels.start_profiler(device)
    for batch, record in records.items():
        if record["status"] == "ok":
            _extend(section, device, record, partial(trace_loop, problem, batch, record, tflops, copy))
        section.close_group(record["group"])
    section.close()


def _extend(section: Section, device: torch.device, record: Record, measure: Callable[[], Record]) -> None:
    """Adds to a record what `measure` returns, or why it does not."""
    try:
        if section.left() < 4:
            record |= {"status": "not run", "reason": OUT_OF_TIME}
        else:
            record |= measure()
    except Exception as error:
        record |= {"status": "failed", "error": first_lines(error)}
    section.add(record)
    release(device)


def time_loop(problem: Problem, batch: int, steps: int) -> Record:
    """How long a step takes, in the loop as it is by default, which nothing watches."""
    loop = SamplerLoop(problem, PRECISION, batch, steps, "auto")
    loop()
    seconds = [timed(loop, problem.device) for _ in range(5)]
    return {"us_per_step": spread(seconds, steps), "report": loop.report()}


def trace_loop(problem: Problem, batch: int, timing: Record, tflops: float, copy: float) -> Record:
    """What the device does in a step, by a trace; `timing` is what `time_loop` said of the same batch."""
    steps = int(timing["steps"])

    def make(graph: str | bool) -> SamplerLoop:
        return SamplerLoop(problem, PRECISION, batch, steps, graph)

    us = float(timing["us_per_step"]["median"])
    record = kernels.profile_steps(make, problem.device, steps, us)
    settings = {"cuda_graph": "auto", "traced": record.pop("traced")}
    return {"settings": settings, **record, "floor": floors(problem, batch, tflops, copy, us)}


def floors(problem: Problem, batch: int, tflops: float, copy: float, us: float) -> dict[str, Any]:
    """The least time that a step can take at the measured ceilings, in microseconds, and the share reached.

    Operations are those of the network as it is written; apart, those of the network as frozen. Bytes are the weights,
    once, and apart each operand and each result of the frozen network's instructions.
    """
    program = described_program(problem, torch.float16, batch)
    compute = problem.flops * batch / tflops / 1e6
    weights = 2 * problem.parameters / copy / 1e3
    return {
        "compute_us": compute,
        "weights_us": weights,
        "share_of_compute": compute / us,
        "share_of_floor": max(compute, weights) / us,
        "program": program,
        "frozen_compute_us": program["flops"] / tflops / 1e6,
        "instructions_bytes_us": program["bytes"] / copy / 1e3,
    }
