"""Read traces of torch's profiler: a device's kernels and their gaps, operators of the CPU, and the layers they run in.

On CUDA the profiler reads CUPTI, on ROCm roctracer; both end in the same Chrome trace.
"""

from __future__ import annotations

import json
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastddpm.common.files import atomic_write
from fastddpm.networks.frozen.instructions import Instruction
from fastddpm.perf.profiling.layers import replaced
from fastddpm.perf.profiling.timing import synchronize

DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
HOST_EVENTS = ("cpu_op", "user_annotation")
# Every step ends with a kernel of this name.
MARKER = "reverse_step"
LABEL = "layer "  # prefix of annotations: "layer 12: conv down_blocks.0.resnets.0.conv1"


class Event(NamedTuple):
    """An operation of the device; times in microseconds."""

    name: str
    start: float
    duration: float


def start_profiler(device: torch.device) -> None:
    """Make a first trace, which starts the tracing library and takes seconds.

    Once started, the library slows graphs with loops, so time everything before this call.
    """
    with _profiler(device):
        torch.zeros(1, device=device).add_(1)
        synchronize(device)


def record(run: Callable[[], object], device: torch.device, *, host: bool, path: Path | None = None) -> dict[str, Any]:
    """Return the Chrome trace of one run.

    Args:
        run: to trace.
        device: on CUDA and ROCm its kernels are traced.
        host: also trace operators on the CPU and their annotations.
        path: where to keep a copy; `chrome://tracing` and Perfetto show it.
    """
    synchronize(device)
    with _profiler(device, host) as profiler:
        run()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = path or Path(folder) / "trace.json"
        atomic_write(file, lambda temporary: profiler.export_chrome_trace(str(temporary)))
        return json.loads(file.read_text(encoding="utf-8"))


def profile_steps(
    make: Callable[[str | bool], Callable[[], object]], device: torch.device, steps: int, us: float
) -> dict[str, Any]:
    """Trace a loop so that each step is visible, and return `analyse` of the trace.

    The tracing library shows only one round of a loop in a graph (pytorch/kineto issue 1062), and has crashed on some
    (pytorch issue 134308). So the graph of a single step is replayed. Where its trace lacks steps, no graph is used.

    Args:
        make: makes a run of `steps` steps, given the `cuda_graph` of `Sampler`.
        device: a GPU.
        steps: the number of steps in a run.
        us: microseconds of a step without a profiler.

    Returns:
        The result of `analyse`, with "traced", how the loop was captured for the trace, and "busy_share_untraced", the
        busy share of `us`.
    """
    for graph in ("step", False):
        run = make(graph)
        run()
        events = read_trace(record(run, device, host=False))
        if sum(MARKER in event.name for event in events) == steps:
            break
    found = {"traced": graph, **analyse(events, steps)}
    found["busy_share_untraced"] = found["busy_us_per_step"] / us
    if graph is False:  # Python runs between its kernels
        found["idle_share"] = max(0.0, 1 - found["busy_share_untraced"])
        found["counted"] += "; idle is what kernels leave of an untraced step"
    return found


def read_trace(content: dict[str, Any]) -> list[Event]:
    """Return the device's events of a Chrome trace, ordered by start."""
    events = [
        Event(str(event["name"]), float(event["ts"]), float(event.get("dur", 0.0)))
        for event in content.get("traceEvents", [])
        if event.get("ph") == "X" and event.get("cat") in DEVICE_EVENTS
    ]
    return sorted(events, key=lambda event: event.start)


def analyse(events: list[Event], steps: int, top: int = 15) -> dict[str, Any]:
    """Count kernels per step, and find the share of time without one and the kernels that take longest.

    It counts from the end of the first step to the end of the last one, to leave out work before and after the loop.
    Where it finds no ends of steps, it counts the whole run.

    Raises:
        ValueError: the trace has no event of the device.
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
    return {
        "counted": note,
        "kernels_per_step": len(inside) / counted,
        "kinds_of_kernels": len(sums),
        "traced_us_per_step": (last - first) / counted,
        "busy_us_per_step": busy / counted,
        "idle_share": 1 - busy / (last - first) if last > first else 0.0,
        "top": _top(sums, counted, top),
    }


@contextmanager
def annotated(instructions: list[Instruction]) -> Iterator[None]:
    """Annotate traces with the instruction that each operator and kernel belongs to."""

    def labelled(index: int, run: Callable[[], object]) -> None:
        with record_function(f"{LABEL}{index}: {instructions[index].kind} {instructions[index].name}"):
            run()

    with replaced(instructions, labelled):
        yield


def kernels_of_layers(content: dict[str, Any]) -> dict[int, dict[str, float]]:
    """Return the kernels that each annotated instruction launched, and the sums of their microseconds.

    A kernel belongs to the annotation during which the host launched it.

    Returns:
        {index of the instruction: {name of a kernel: microseconds}}.
    """
    events = [event for event in content.get("traceEvents", []) if event.get("ph") == "X"]
    spans: dict[Any, list[tuple[float, float, int]]] = {}
    for event in events:
        if event.get("cat") == "user_annotation" and str(event["name"]).startswith(LABEL):
            index = int(str(event["name"])[len(LABEL) :].partition(":")[0])
            start = float(event["ts"])
            spans.setdefault(event.get("tid"), []).append((start, start + float(event.get("dur", 0.0)), index))
    for of_thread in spans.values():
        of_thread.sort()
    layer_of: dict[Any, int] = {}
    for event in events:
        if event.get("cat") in LAUNCHES and (correlation := event.get("args", {}).get("correlation")) is not None:
            of_thread, ts = spans.get(event.get("tid"), []), float(event["ts"])
            at = bisect_right(of_thread, (ts, float("inf"), 0)) - 1
            if at >= 0 and ts <= of_thread[at][1]:
                layer_of[correlation] = of_thread[at][2]
    result: dict[int, dict[str, float]] = {}
    for event in events:
        layer = layer_of.get(event.get("args", {}).get("correlation"))
        if event.get("cat") in DEVICE_EVENTS and layer is not None:
            of_layer = result.setdefault(layer, {})
            name = str(event["name"])[:160]
            of_layer[name] = of_layer.get(name, 0.0) + float(event.get("dur", 0.0))
    return result


def host_operators(content: dict[str, Any], steps: int, top: int = 15) -> dict[str, Any]:
    """Return the operators on the CPU that take longest by their own time, without the operators they call.

    The time of an annotated layer outside of torch's operators (native code called directly, and Python) counts for
    the layer's kind.

    Raises:
        ValueError: the trace has no operator.
    """
    threads: dict[Any, list[dict[str, Any]]] = {}
    for event in content.get("traceEvents", []):
        if event.get("ph") == "X" and event.get("cat") in HOST_EVENTS:
            threads.setdefault(event.get("tid"), []).append(event)
    if not threads:
        raise ValueError("the trace holds no operator")
    sums: dict[str, list[float]] = {}
    for events in threads.values():
        open_: list[tuple[float, list[float]]] = []  # (end, entry) of the events that enclose the current one
        for event in sorted(events, key=lambda e: (float(e["ts"]), -float(e.get("dur", 0.0)))):
            start, duration = float(event["ts"]), float(event.get("dur", 0.0))
            while open_ and open_[-1][0] <= start:
                open_.pop()
            name = str(event["name"])
            if name.startswith(LABEL):
                name = f"({name.partition(': ')[2].split(' ')[0]}, outside of operators)"
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0] += duration
            entry[1] += 1
            if open_:
                open_[-1][1][0] -= duration
            open_.append((start + duration, entry))
    return {
        "counted": "operators on the CPU under the profiler, which slows small ones down; their own time",
        "operators_per_step": sum(count for name, (_, count) in sums.items() if not name.startswith("(")) / steps,
        "top": _top(sums, steps, top),
    }


def _top(sums: dict[str, list[float]], steps: int, top: int) -> list[dict[str, Any]]:
    total = sum(entry[0] for entry in sums.values()) or 1.0
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    return [
        {"kernel": name[:160], "us_per_step": us / steps, "calls_per_step": calls / steps, "share": us / total}
        for name, (us, calls) in ordered[:top]
    ]


def _profiler(device: torch.device, host: bool = False) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the library's own log off standard error
    if device.type == "cuda":
        return profile(activities=[ProfilerActivity.CUDA, *([ProfilerActivity.CPU] if host else [])], acc_events=True)
    return profile(activities=[ProfilerActivity.CPU], acc_events=True)
