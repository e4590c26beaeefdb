"""What torch's profiler sees: kernels of a device and the gaps between them, operators of the CPU, and whose they are.

On CUDA the profiler reads CUPTI, on ROCm roctracer; both come out as the same Chrome trace, which is read here.
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
from fastddpm.perf.profiling.timing import synchronize

DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
HOST_EVENTS = ("cpu_op", "user_annotation")
# The kernel that ends every step.
MARKER = "reverse_step"
LABEL = "layer "  # begins the names of annotations: "layer 12: conv down_blocks.0.resnets.0.conv1"


class Event(NamedTuple):
    """What the device did: times in microseconds."""

    name: str
    start: float
    duration: float


def start_profiler(device: torch.device) -> None:
    """The first trace starts the tracing library, which takes seconds.

    Once started, it stays in the way of graphs with loops in them: what is timed is timed before.
    """
    with _profiler(device):
        torch.zeros(1, device=device).add_(1)
        synchronize(device)


def record(run: Callable[[], object], device: torch.device, *, host: bool, path: Path | None = None) -> dict[str, Any]:
    """The Chrome trace of one run.

    Args:
        run: what is traced.
        device: on CUDA and ROCm its kernels are traced.
        host: whether operators on the CPU and their annotations are too.
        path: where to keep the trace as well; `chrome://tracing` and Perfetto show it.
    """
    synchronize(device)
    with _profiler(device, host) as profiler:
        run()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        text = file.read_text(encoding="utf-8")
    if path is not None:
        atomic_write(path, lambda temporary: _write(temporary, text))
    return json.loads(text)


def trace(run: Callable[[], object], device: torch.device) -> list[Event]:
    """All that the device does during one run, in order."""
    return read_trace(record(run, device, host=False))


def profile_steps(
    make: Callable[[str | bool], Callable[[], object]], device: torch.device, steps: int, us: float
) -> dict[str, Any]:
    """What the device does in a step of a loop: `analyse` of a trace that shows each of its steps.

    Of a loop in a graph the tracing library shows one round (pytorch/kineto issue 1062), and has crashed on some
    (pytorch issue 134308): so a step's graph is replayed, or no graph is used, where that does not show all steps.

    Args:
        make: a run of `steps` steps, given what `Sampler` takes as `cuda_graph`.
        device: a GPU.
        steps: how many.
        us: microseconds of a step that nothing watched.

    Returns:
        Also "traced": how the loop was captured for it, and "busy_share_untraced": of a step that nothing watched.
    """
    for graph in ("step", False):
        run = make(graph)
        run()
        events = trace(run, device)
        if sum(MARKER in event.name for event in events) == steps:
            break
    found = {"traced": graph, **analyse(events, steps)}
    found["busy_share_untraced"] = found["busy_us_per_step"] / us
    if graph is False:  # between its kernels is Python
        found["idle_share"] = max(0.0, 1 - found["busy_share_untraced"])
        found["counted"] += "; idle is what kernels leave of an untraced step"
    return found


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
    """Inside, a trace shows which instruction each operator and kernel belongs to."""
    originals = [instruction.run for instruction in instructions]

    def inside(label: str, run: Callable[[], object]) -> Callable[[], object]:
        def labelled() -> object:
            with record_function(label):
                return run()

        return labelled

    for index, instruction in enumerate(instructions):
        instruction.run = inside(f"{LABEL}{index}: {instruction.kind} {instruction.name}", instruction.run)
    try:
        yield
    finally:
        for instruction, run in zip(instructions, originals, strict=True):
            instruction.run = run


def kernels_of_layers(content: dict[str, Any]) -> dict[int, dict[str, float]]:
    """Of a trace of annotated instructions: which kernels each launched, and their microseconds in sum.

    A kernel belongs to the annotation within which the host launched it.

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
    """Operators on the CPU that take most, by the time that is theirs and not of operators that they call.

    What an annotated layer does outside of torch's operators (compiled code that is called directly, and Python) is
    given to the layer's kind.

    Raises:
        ValueError: nothing was traced.
    """
    threads: dict[Any, list[dict[str, Any]]] = {}
    for event in content.get("traceEvents", []):
        if event.get("ph") == "X" and event.get("cat") in HOST_EVENTS:
            threads.setdefault(event.get("tid"), []).append(event)
    if not threads:
        raise ValueError("the trace holds no operator")
    sums: dict[str, list[float]] = {}
    for events in threads.values():
        open_: list[tuple[float, list[float]]] = []  # (end, the entry of who is open)
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the library writes its own log to standard error
    if device.type == "cuda":
        return profile(activities=[ProfilerActivity.CUDA, *([ProfilerActivity.CPU] if host else [])], acc_events=True)
    return profile(activities=[ProfilerActivity.CPU], acc_events=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
