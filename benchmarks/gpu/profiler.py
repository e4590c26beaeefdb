"""Section `profile`: the kernels of a step, the gaps between them, and how far the loop is from what is possible."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from gpu.arms import OUT_OF_TIME
from gpu.engine import SamplerLoop, described_program
from gpu.machine import copy_bandwidth, matmul
from gpu.networks import Problem, make_problem
from gpu.results import Record, Section
from gpu.timing import first_lines, release, spread, timed

PRECISION = "fp16"
# batch -> steps that are profiled
STEPS = {1: 100, 64: 30, 256: 12}
DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
# The kernel that ends every step.
MARKER = "reverse_step"


class Event(NamedTuple):
    """What the device did: times in microseconds."""

    name: str
    start: float
    duration: float


def run(section: Section, device: torch.device, small: bool) -> None:
    """Profiles loops of the CIFAR-10 architecture at a few batch sizes."""
    if device.type != "cuda":
        section.close("skipped", reason="kernels of a device are profiled on a GPU only")
        return
    machine = section.results.sections.get("machine", {})
    tflops = (machine.get("matmul_tflops") or {}).get(PRECISION) or matmul(device, PRECISION, small)
    copy = machine.get("copy_gb_s") or copy_bandwidth(device, 2**32)
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
        _start_profiler(device)
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
    """What the device does in a step, by a trace; `timing` is what `time_loop` said of the same batch.

    Of a loop in a graph the tracing library shows one round (pytorch/kineto issue 1062), and has crashed on some
    (pytorch issue 134308): so a step's graph is replayed, or no graph is used, where that does not show all steps.
    """
    steps = int(timing["steps"])
    for graph in ("step", False):
        loop = SamplerLoop(problem, PRECISION, batch, steps, graph)
        loop()
        events = trace(loop, problem.device)
        if sum(MARKER in event.name for event in events) == steps:
            break
    record: Record = {"settings": {"cuda_graph": "auto", "traced": graph}, **analyse(events, steps)}
    us = float(timing["us_per_step"]["median"])
    record["busy_share_untraced"] = record["busy_us_per_step"] / us
    if graph is False:  # between its kernels is Python
        record["idle_share"] = max(0.0, 1 - record["busy_share_untraced"])
        record["counted"] += "; idle is what kernels leave of an untraced step"
    return record | {"floor": floors(problem, batch, tflops, copy, us)}


def trace(run: SamplerLoop, device: torch.device) -> list[Event]:
    """All that the device does during one run, in order."""
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text(encoding="utf-8")))


def read_trace(content: dict[str, Any]) -> list[Event]:
    """The device's events of a Chrome trace, by their start."""
    events = [
        Event(str(event["name"]), float(event["ts"]), float(event.get("dur", 0.0)))
        for event in content.get("traceEvents", [])
        if event.get("ph") == "X" and event.get("cat") in DEVICE_EVENTS
    ]
    return sorted(events, key=lambda event: event.start)


def analyse(events: list[Event], steps: int, top: int = 15) -> dict[str, Any]:
    """Kernels per step, the share of time without any, and those that take most.

    Counted from the end of the first step's last kernel to that of the last one's, so that what comes before and
    after the loop is left out; where the steps' ends cannot be told, over everything.

    Raises:
        ValueError: nothing was traced.
    """
    if not events:
        raise ValueError("the trace holds no event of the device")
    ends = [event.start + event.duration for event in events if MARKER in event.name]
    counted, note = steps, "over the whole run: the ends of the steps were not found"
    first, last = events[0].start, max(event.start + event.duration for event in events)
    if len(ends) == steps and steps > 1:
        first, last, counted, note = ends[0], ends[-1], steps - 1, "from the end of the first step to that of the last"
    inside = [event for event in events if event.start >= first - 1e-6 and event.start < last]
    busy, until = 0.0, first
    for event in inside:
        end = event.start + event.duration
        busy += max(0.0, end - max(event.start, until))
        until = max(until, end)
    sums: dict[str, list[float]] = {}
    for event in inside:
        entry = sums.setdefault(event.name, [0.0, 0.0])
        entry[0] += event.duration
        entry[1] += 1
    total = sum(entry[0] for entry in sums.values()) or 1.0
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    return {
        "counted": note,
        "kernels_per_step": len(inside) / counted,
        "kinds_of_kernels": len(sums),
        "traced_us_per_step": (last - first) / counted,
        "busy_us_per_step": busy / counted,
        "idle_share": 1 - busy / (last - first) if last > first else 0.0,
        "top": [
            {"kernel": name[:160], "us_per_step": us / counted, "calls_per_step": calls / counted, "share": us / total}
            for name, (us, calls) in ordered[:top]
        ],
    }


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


def _start_profiler(device: torch.device) -> None:
    """The first trace starts the tracing library, which takes seconds."""
    with profile(activities=[ProfilerActivity.CUDA]):
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize(device)
