"""How every benchmark measures: an arm is built and checked before it is timed, and the arms of a group take turns.

pytest-benchmark keeps and prints the figures. It reads `CLOCK`, which stands still but for what is played to it: the
samples that `Session` took, by CUDA events on a GPU, of all arms of a group in turn. So a ratio between arms is one of
the same minutes, and a row of the table is the device's time, not that of asking for it.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fastddpm_kernels.backend import why_not
from fastddpm_kernels.conv import error_factor
from fastddpm_kernels.testing import FLOORS, assert_close, errors
from gpu.arms import Missing, Unavailable
from gpu.op_cases import Case, Tensors
from torch import Tensor

from fastddpm.perf.profiling import ceilings
from fastddpm.perf.profiling.timing import capture, interleave, quantiles, release, synchronize, timed

ARMS = ("fused", "eager", "compiled", "reference")
PEERS = ("diffusers", "denoising_diffusion_pytorch")
MOST_SETS = 64  # of inputs, however small they are
# What torch.compile is given for whole networks: the best of its settings that fit into a session's minutes.
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "cuda": {"options": {"max_autotune": True, "freezing": True, "conv_1x1_as_mm": True, "triton.cudagraphs": False}},
    "cpu": {"options": {"freezing": True}},
}
COPY_BYTES = {"cuda": 2**31, "cpu": 2**27}


class Clock:
    """A clock for pytest-benchmark that only moves by what is played to it, in seconds."""

    __name__ = "samples of benchmarks/measuring.py"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def play(self, seconds: float) -> None:
        """Lets `seconds` pass."""
        self._now += seconds


CLOCK = Clock()


@dataclass
class Candidate:
    """An arm that is ready to be timed.

    Attributes:
        calls: what is timed: all of them in turn, each on inputs of its own, so that none finds its own in a cache.
        check: raises AssertionError where the result is wrong; None where `build` has compared it.
        steps: how many steps a call does; times are of one.
        bytes: of a step: each input read once, each output written once. 0: not counted.
        flops: of a step's matrix products and convolutions, two to a multiplication and addition.
        precision: which of `ceilings.MATMULS` its products are held against.
        settings: what a reader must know to repeat it.
        graph: on a GPU, all calls are replayed from one CUDA graph, without the gaps of launching.
        device: where it runs, if not on the session's device.
    """

    calls: Sequence[Callable[[], object]]
    check: Callable[[], None] | None = None
    steps: int = 1
    bytes: int = 0
    flops: int = 0
    precision: str = "fp32"
    settings: dict[str, Any] = field(default_factory=dict)
    graph: bool = False
    device: torch.device | None = None


Build = Callable[[str], Candidate]


@dataclass
class Outcome:
    """What came of an arm: samples in seconds per step, with what is said of them, or why there are none.

    `cpu`: on a CPU, the same of all threads' time on it, which what else the machine does hardly changes.
    """

    samples: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


class Session:
    """The benchmarks of one run of pytest: the device, its ceilings, and the groups that have been measured.

    Args:
        device: what is timed.
        size: "small" or "full".
        timed: False for a smoke test: every arm is built and checked, and called once.
        commit: of the sources, and whether they have been changed since.
    """

    def __init__(self, device: torch.device, size: str, timed: bool, commit: dict[str, Any]) -> None:
        self.device, self.size, self.timed, self.commit = device, size, timed, commit
        self._groups: dict[str, dict[str, Outcome]] = {}
        self._tflops: dict[str, float] = {}

    @functools.cached_property
    def machine(self) -> dict[str, Any]:
        """The device as every benchmark names it: hardware, driver, versions, commit."""
        return {
            "device": ceilings.device_name(self.device),
            "hardware": ceilings.hardware(self.device),
            "state": ceilings.state(self.device),
            "versions": ceilings.versions(),
            "commit": self.commit,
        }

    @functools.cached_property
    def copy_gb_s(self) -> float:
        """The ceiling of device memory, measured once: a copy far larger than any cache, bytes both ways."""
        size = COPY_BYTES.get(self.device.type, 2**27)
        return float(ceilings.copy_rate(self.device, size, seconds=2.0)["best"])

    def matmul_tflops(self, precision: str) -> float:
        """The ceiling of products in a precision, measured once."""
        if precision not in self._tflops:
            sizes = ceilings.MATMUL_SIZES.get(self.device.type, ceilings.MATMUL_SIZES["cpu"])[:2]
            self._tflops[precision] = float(ceilings.matmul_rate(self.device, precision, sizes, seconds=2.0)["best"])
        return self._tflops[precision]

    def sets(self, size: int) -> int:
        """How many sets of inputs of `size` bytes are more than the second-level cache holds, four times over."""
        if not self.timed:
            return 1
        return min(max(2, math.ceil(4 * second_level_cache(self.device) / max(size, 1))), MOST_SETS)

    def outcome(
        self, group: str, arm: str, arms: Sequence[str], build: Build, *, seconds: float, least: int, most: int
    ) -> Outcome:
        """What came of `arm`; all `arms` of the group are measured when the first is asked for.

        Args:
            group: its name, unique in the session.
            seconds: of timing, about, for each arm.
            least, most: rounds.
        """
        if group not in self._groups:
            self._groups[group] = self._measure(arms, build, seconds * len(arms), least, most)
        return self._groups[group][arm]

    def _measure(self, arms: Sequence[str], build: Build, seconds: float, least: int, most: int) -> dict[str, Outcome]:
        outcomes = {arm: Outcome() for arm in arms}
        ready: dict[str, Callable[[], float]] = {}
        for arm in arms:
            try:
                ready[arm] = self._prepare(arm, build, outcomes[arm])
            except Exception as error:  # it is the arm's own, and raised by its test
                outcomes[arm].error = error
        # Time for the least number of rounds, as long as they take.
        round_s = sum(outcomes[arm].info["warmup_s"] for arm in ready)
        for arm, value in interleave(ready, seconds=max(seconds, least * round_s), least=least, most=most):
            outcomes[arm].samples.append(value)
        for arm in [arm for arm in ready if not outcomes[arm].samples]:
            outcomes[arm].error = Unavailable("not run: out of time")
            del ready[arm]
        for arm in ready:
            self._rate(outcomes[arm])
            ours, others = outcomes[arm], {other: outcomes[other] for other in ready if other != arm}
            ours.info["times_as_fast_as"] = {other: ratio(ours.samples, o.samples) for other, o in others.items()}
            if ours.cpu:
                ours.info["cpu_seconds"] = quantiles(ours.cpu)
                ours.info["times_less_cpu_than"] = {o: ratio(ours.cpu, v.cpu) for o, v in others.items() if v.cpu}
        ready.clear()
        release(self.device)
        return outcomes

    def _prepare(self, arm: str, build: Build, outcome: Outcome) -> Callable[[], float]:
        """Builds an arm, checks it and warms it up; returns what takes one sample. Each part's seconds are kept."""
        torch.manual_seed(0)
        marks = [time.perf_counter()]
        candidate = build(arm)
        device = candidate.device or self.device
        synchronize(device)
        marks.append(time.perf_counter())
        (candidate.calls[0] if candidate.check is None else candidate.check)()
        synchronize(device)
        marks.append(time.perf_counter())
        run = self._all(candidate)
        run()
        synchronize(device)
        marks.append(time.perf_counter())
        names = ("build_s", "first_call_s", "warmup_s")  # the first call, compared, compiles what has to be
        outcome.info |= {name: round(b - a, 4) for name, a, b in zip(names, marks, marks[1:], strict=False)}
        outcome.info |= {
            "bytes": candidate.bytes,
            "flops": candidate.flops,
            "precision": candidate.precision,
            "settings": candidate.settings,
            "calls_per_sample": len(candidate.calls),
            "steps_per_call": candidate.steps,
        }
        steps = len(candidate.calls) * candidate.steps

        def sample() -> float:
            before = time.process_time()
            seconds = timed(run, device)
            if device.type == "cpu":
                outcome.cpu.append((time.process_time() - before) / steps)
            return seconds / steps

        return sample

    def _all(self, candidate: Candidate) -> Callable[[], object]:
        if candidate.graph:
            return capture(candidate.calls, candidate.device or self.device)

        def run() -> None:
            for call in candidate.calls:
                call()

        return run

    def _rate(self, outcome: Outcome) -> None:
        """Adds the rates that follow from the median, and their share of the ceiling that is nearer."""
        info, times = outcome.info, quantiles(outcome.samples)
        info["seconds"] = times
        median = float(times["median"])
        floors = {}
        if info["bytes"]:
            info |= {"gb_per_s": info["bytes"] / median / 1e9, "copy_gb_s": self.copy_gb_s}
            floors["copy"] = info["bytes"] / self.copy_gb_s / 1e9
        if info["flops"]:
            peak = self.matmul_tflops(info["precision"])
            info |= {"tflops": info["flops"] / median / 1e12, "matmul_tflops": peak}
            floors["matmul"] = info["flops"] / peak / 1e12
        if floors:
            nearer = max(floors, key=lambda name: floors[name])
            info |= {"roof": nearer, "percent_of_roof": 100 * floors[nearer] / median}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | int]:
    """Quantiles of how many times our seconds theirs are, by rounds in which both ran."""
    return quantiles([b / a for a, b in zip(ours, theirs, strict=False)])


def second_level_cache(device: torch.device) -> int:
    """Bytes of a GPU's L2, or of a core's where the system tells, else a megabyte."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 2**20
    except (ValueError, OSError, AttributeError):
        return 2**20


def case_candidate(session: Session, arm: str, case: Case) -> Candidate:
    """An arm of `ARMS` of one of `gpu.op_cases`, which holds what is right for it.

    Raises:
        Unavailable: there is no such arm here.
    """
    settings: dict[str, Any] = {}
    if arm == "fused":
        settings["backend"] = fused_backend(case.op + "_", session.device, case.dtype)
        run: Callable[[Tensors], Any] = functools.partial(case.run, backend=settings["backend"])
    elif arm == "reference":
        run = case.truth
    else:
        run = case.eager
        if arm == "compiled":
            run, settings = compiled(session, case.eager)

    def call(tensors: Tensors) -> Any:
        with torch.no_grad():
            return run(tensors)

    def check() -> None:
        tensors = case.make()
        own, exact, eager = ({name: t.clone() for name, t in tensors.items()} for _ in range(3))
        with torch.no_grad():
            results = zip(call(own), case.truth(exact), case.run(eager, "eager"), strict=True)
            for index, (got, expected, granted) in enumerate(results):
                assert_close(got, expected, eager=granted, dtype=case.dtype, name=f"{case.op}, result {index}")

    calls = [functools.partial(call, case.make()) for _ in range(session.sets(case.bytes))]
    precision = {torch.float16: "fp16", torch.float32: "fp32"}[case.dtype]
    return Candidate(
        calls, check, bytes=case.bytes, flops=case.flops, precision=precision, settings=settings, graph=True
    )


def fused_backend(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend of the fused kernels of an op.

    Raises:
        Unavailable: there are none here. Triton's interpreter does not count: its speed says nothing.
    """
    name = "triton" if device.type == "cuda" else "native"
    reason = why_not(name, device.type, op, dtype)
    if reason is not None:
        raise Unavailable(f"no fused {op.rstrip('_')} on {device.type}: {reason}")
    return name


def compiled(
    session: Session, function: Callable[..., Any], **options: Any
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """`function` under torch.compile without graph breaks, and its settings.

    A smoke test only traces it (backend "aot_eager"): compiling takes longer than all that is tested.

    Raises:
        Unavailable: torch.compile has no compiler to call.
    """
    if session.timed and session.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise Unavailable("torch.compile finds no C++ compiler")
    torch._dynamo.reset()  # else functions of one source count together against its limit
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    settings |= options if session.timed else {"backend": "aot_eager"}
    return torch.compile(function, **settings), settings


def compiled_network(session: Session, network: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A whole network under torch.compile, with its best settings.

    Raises:
        Unavailable: in a smoke test, or without a compiler.
    """
    if not session.timed:
        raise Unavailable("networks are compiled with --benchmark-only alone; tests/sampling/test_counts.py traces one")
    return compiled(session, network, **COMPILE_OPTIONS[session.device.type])


def assert_network_close(actual: Tensor, expected: Tensor, eager: Tensor, dtype: torch.dtype, backend: str) -> None:
    """Asserts that what networks computed in `dtype` is as near to the truth as eager torch's, times two.

    `backend` "native" is granted, above that, what Winograd's convolutions lose (`conv.error_factor`).
    """
    mean, worst = (
        2 * (error_factor("winograd4", worst=worst) if backend == "native" else 1.0) for worst in (False, True)
    )
    assert_close(actual, expected, eager=eager, factor=mean, max_factor=worst, dtype=dtype)


def assert_same_as_peer(actual: Tensor, expected: Tensor, name: str) -> None:
    """Asserts that a peer's `actual` is our float64 result `expected`, to four times the floor of its dtype.

    Peers multiply a thousand factors in float32 to have their coefficients: that alone loses up to 1e-6.
    """
    got, floor = errors(actual, expected), FLOORS[actual.dtype]
    assert all(e <= 4 * f for e, f in zip(got, floor, strict=True)), f"{name}: errors {got}, floor {floor}"


def peer(name: str) -> None:
    """Makes sure that a library is there to compare with.

    Raises:
        Missing: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise Missing(f"{name} is not installed")
