"""Profile a model on this machine per batch size: the time of a step, its parts, and its floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.networks.network import Network
from fastddpm.perf.profiling import causes, ceilings, kernels
from fastddpm.perf.profiling.layers import Evaluation, Layer, evaluation, timed_layers, timed_network
from fastddpm.perf.profiling.memory import peak_memory
from fastddpm.perf.profiling.timing import first_lines, interleave, release, spread, synchronize, timed
from fastddpm.sampling.sampler import Sampler

SCHEMA = "fastddpm.profile/1"
TRACED = 3  # evaluations on the CPU
TRACED_STEPS = 20  # of a loop on a GPU
OUT_OF_TIME = "not run: out of time"

Record = dict[str, Any]


@dataclass
class Plan:
    """The model to profile, and for how long.

    Attributes:
        make: makes the sampler; its argument is a `cuda_graph`, or None for the user's choice.
        shape: of one sample.
        precision: of the network: "float32", "tf32", "float16" or "bfloat16".
        batches: batch sizes, growing.
        labels: returns class labels for a number of samples, or None.
        seconds: for the whole profile; a batch size that would take longer is recorded as not run.
        quick: measure the ceilings less accurately.
        trace: where to write the Chrome trace of the largest batch size that was measured.
        done: called after every measurement.
    """

    make: Callable[[str | bool | None], Sampler]
    shape: tuple[int, ...]
    precision: str
    batches: Sequence[int]
    labels: Callable[[int], list[int] | None] = lambda count: None
    seconds: float = 180.0
    quick: bool = False
    trace: Path | None = None
    done: Callable[[], object] = lambda: None
    _end: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds
        self.short = ceilings.SHORT[self.precision]

    def left(self) -> float:
        """Return the seconds that remain."""
        return self._end - time.monotonic()

    def measurements(self) -> int:
        """Return the number of calls of `done`."""
        return 4 + 4 * len(self.batches)


def profile(plan: Plan) -> Record:
    """Measure the ceilings, then every batch size, and find the largest costs.

    Returns:
        The content of the file that `fastddpm profile` writes: "device", "versions", "ceilings" (`ceilings.measure`),
        "unreadable" counters, "batches" with a record each. A record's "status" is "ok", "failed" or "not run"; if it
        is ok it has "us_per_step" (quantiles), "images_per_s" (through all steps of the sampler), "first_run_s"
        (compiles kernels, captures graphs), "peak_memory", "layers", "kinds", "floor", "causes", "kernels".
    """
    sampler = plan.make(None)
    device = sampler.device
    name = ceilings.device_name(device)
    before = ceilings.state(device)
    roofs = ceilings.measure(device, [plan.short], quick=plan.quick, done=plan.done)
    result: Record = {
        "schema": SCHEMA,
        "device": {"kind": device.type, "name": name, "slug": ceilings.slug(name), **ceilings.hardware(device)},
        "versions": ceilings.versions(),
        "precision": plan.precision,
        "backend": sampler.network.frozen.backend if sampler.network.frozen else sampler.backend,
        "steps": len(sampler.table),
        "quick": plan.quick,
        "network": describe(sampler.network, plan.shape),
        "ceilings": roofs,
        "unreadable": ceilings.unreadable(device, before),
    }
    del sampler
    records: list[Record] = []
    for index, batch in enumerate(plan.batches):
        records.append(_guarded(plan, batch, len(plan.batches) - index, records))
        release(device)
    measured = [record for record in records if record["status"] == "ok"]
    if measured and device.type == "cuda":
        kernels.start_profiler(device)  # slows everything timed after it, so it comes late
    for record in records:
        if record["status"] == "ok":
            path = plan.trace if record is measured[-1] else None
            record["kernels"] = _attempt(partial(_trace, plan, record, device, path))
            _judge(record, causes.ceilings_of(roofs, plan.short), result["network"]["parameters"], plan)
        plan.done()
    return result | {"batches": records, "state": {"before": before, "after": ceilings.state(device)}}


def describe(network: Network, shape: tuple[int, ...]) -> Record:
    """Return the network's class, size and image, and whether it is frozen."""
    model = network.model
    parameters = sum(p.numel() for p in model.parameters()) if isinstance(model, nn.Module) else 0
    frozen = network.frozen is not None
    return {"class": type(model).__name__, "frozen": frozen, "parameters": parameters, "image": list(shape)}


def _guarded(plan: Plan, batch: int, remaining: int, before: Sequence[Record]) -> Record:
    """Return the record of one batch size; a failure becomes part of it."""
    record: Record = {"batch": batch, "status": "not run"}
    expected = _expected(batch, before)
    if plan.left() < max(expected, 1.0):
        left = f"{max(plan.left(), 0.0):.0f} s left, needs about {max(expected, 1.0):.0f}"
        record["reason"] = f"{OUT_OF_TIME} ({left})"
        for _ in range(3):
            plan.done()
        return record
    try:
        return record | _measure(plan, batch, plan.left() / remaining) | {"status": "ok"}
    except (RuntimeError, MemoryError) as error:  # torch's out of memory is a RuntimeError
        return record | {"status": "failed", "error": first_lines(error)}


def _expected(batch: int, before: Sequence[Record]) -> float:
    """Estimate the seconds of the shortest measurement of a batch size from the one before it."""
    for record in reversed(before):
        if record["status"] == "ok":
            per_step = record["us_per_step"]["median"] / 1e6
            return record["prepare_s"] + 12 * per_step * batch / record["batch"]
    return 0.0


def _measure(plan: Plan, batch: int, seconds: float) -> Record:
    """Time a batch size for about `seconds`: the loop, the network and its layers, before anything is traced."""
    begun = time.monotonic()
    sampler = plan.make(None)
    prepared = time.monotonic() - begun
    device, rows = sampler.device, len(sampler.table)
    run = last_steps(plan, sampler, batch)
    with peak_memory(device) as memory:
        start = time.monotonic()
        few = min(2, rows)
        run(few)
        synchronize(device)
        first = time.monotonic() - start
    plan.done()
    ready = ready_for(plan, sampler, batch)
    network, (layers, layers_once) = timed_network(ready), timed_layers(ready)
    plan.done()
    short = min(timed(partial(run, few), device) for _ in range(3)) / few
    steps = max(1, min(rows, int(seconds / 12 / max(short, 1e-9))))
    samples: dict[str, list[float]] = {"loop": [], "network": [], "layers": []}
    loop: Callable[[], float] = partial(timed, partial(run, steps), device)
    # In turn, so that all three see the same clocks and the same other work.
    often = max(1, steps // 3)
    runs = {"loop": loop, "network": _often(network, often), "layers": _often(layers_once, often)}
    for name, value in interleave(runs, seconds=seconds - (time.monotonic() - begun), least=3, most=15):
        samples[name].append(value)
    for name, once in runs.items():
        if not samples[name]:  # the time was over before its turn
            samples[name].append(once())
    plan.done()
    times = spread(samples["loop"], steps)
    return {
        "prepare_s": round(prepared, 3),
        "first_run_s": round(first, 3),
        "steps_per_run": steps,
        "us_per_step": times,
        "images_per_s": batch / (float(times["median"]) / 1e6 * rows),
        "peak_memory": memory,
        "graph": {"mode": sampler.graph_report()["mode"], "why_not": sampler.graph_report()["why_not"]},
        "network_us": spread(samples["network"]),
        "layers_us": spread(samples["layers"]),
        "layers_timed": how_timed(ready),
        "layers": [layer.to_dict() for layer in layers if layer.seconds],
        "kinds": by_kind(layers),
    }


def _often(run: Callable[[], float], times: int) -> Callable[[], float]:
    """Return a function that gives the mean of some calls of `run`, interruptions included.

    A run of the loop is such a mean of its steps, so the two compare.
    """
    return lambda: sum(run() for _ in range(times)) / times


def last_steps(plan: Plan, sampler: Sampler, batch: int) -> Callable[[int], object]:
    """Return a function that runs a number of the sampler's last steps on a batch of random states."""
    x = torch.randn((batch, *plan.shape), generator=torch.Generator().manual_seed(0)).to(sampler.device)
    labels, rows = plan.labels(batch), len(sampler.table)
    given = sampler.network.some_conditions(batch)
    return lambda steps: sampler.sample(batch, x_T=x, start=rows - steps, class_labels=labels, conditions=given)


def ready_for(plan: Plan, sampler: Sampler, batch: int) -> Evaluation:
    """Bind the sampler's network to buffers for a batch."""
    labels: Tensor | None = None
    if (given := plan.labels(batch)) is not None:
        labels = torch.tensor(given, dtype=torch.int64, device=sampler.device)
    return evaluation(
        sampler.network, (batch, *plan.shape), sampler.table.timesteps, labels, plan.precision,
        self_condition=sampler.settings.self_condition,
    )  # fmt: skip


def how_timed(ready: Evaluation) -> str:
    """Return in words how `timed_layers` times the layers of a network."""
    if not ready.instructions:
        return "leaf modules, by hooks; the time between them is not counted"
    if ready.network.device.type == "cuda":
        return "instructions, each replayed alone from a graph; it may then read from the cache"
    return "instructions, each as it runs in an evaluation"


def by_kind(layers: Sequence[Layer]) -> dict[str, Record]:
    """Return the microseconds of all layers of a kind, as `timing.spread` of the sums of each round."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.seconds:
            kinds.setdefault(layer.kind, []).append(layer)
    return {
        kind: spread([sum(round_) for round_ in zip(*(layer.seconds for layer in of_kind), strict=False)])
        for kind, of_kind in kinds.items()
    }


def _trace(plan: Plan, record: Record, device: torch.device, path: Path | None) -> Record:
    """Trace a step; on CUDA also give the layers the times of their kernels."""
    batch = record["batch"]
    ready = ready_for(plan, plan.make(None), batch)
    times = 1 if device.type == "cuda" else TRACED

    def evaluations() -> None:
        for _ in range(times):
            ready()

    with ready.running(), kernels.annotated(ready.instructions):
        ready()
        content = kernels.record(evaluations, device, host=True, path=path)
    if device.type != "cuda":
        return kernels.host_operators(content, times)
    steps = min(TRACED_STEPS, record["steps_per_run"])
    of_layers = kernels.kernels_of_layers(content)
    if ready.instructions and len(of_layers) == len(record["layers"]):
        for index, layer in enumerate(record["layers"]):
            layer |= {"traced_us": sum(of_layers[index].values()), "kernel_names": sorted(of_layers[index])}
        record["layers_timed"] = "the kernels of each instruction, traced in an evaluation; quantiles: replayed alone"

    def loop(graph: str | bool) -> Callable[[], object]:
        return partial(last_steps(plan, plan.make(graph), batch), steps)

    return kernels.profile_steps(loop, device, steps, record["us_per_step"]["median"])


def _judge(record: Record, roofs: causes.Ceilings | None, parameters: int, plan: Plan) -> None:
    """Add the floor and the causes of the time above it; both need ceilings and layers."""
    if roofs is None or not record["layers"]:
        record["floor"], record["causes"] = None, []
        return
    size = 2 if plan.precision in ("float16", "bfloat16") else 4
    us = record["us_per_step"]["median"]
    causes.judge_layers(record["layers"], roofs)
    record["floor"] = causes.floors(record["layers"], roofs, parameters * size, us)
    network, idle = record["network_us"]["median"], record["kernels"].get("idle_share")
    together = None if "traced_us" in record["layers"][0] else record["layers_us"]["median"]
    record["causes"] = causes.causes(record["layers"], roofs, us, network, together, idle_share=idle)


def _attempt(run: Callable[[], Record]) -> Record:
    """Return the result of `run`, or {"error": why}, so that a failed trace does not lose the times."""
    try:
        return run()
    except (RuntimeError, ValueError) as error:
        return {"error": first_lines(error)}
