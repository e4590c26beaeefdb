"""What a benchmark measures: arms, each checked before it is timed, and the figures that follow from its times.

`conftest.py` times them by pytest-benchmark; on a GPU `triton.testing.do_bench` times the device alone besides.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastddpm_kernels.backend import why_not
from fastddpm_kernels.conv import error_factor
from fastddpm_kernels.testing import FLOORS, assert_close, errors
from torch import Tensor

from fastddpm.perf.profiling import ceilings
from fastddpm.perf.profiling.timing import capture, quantiles

ROOT = Path(__file__).parents[1]
ARMS = ("fused", "eager", "compiled", "reference")
PEERS = ("diffusers", "denoising_diffusion_pytorch")
PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
MOST_SETS = 64  # of inputs, however small they are
LARGE = 32 * 2**20  # bytes; with fewer a call is over before a GPU has its memory busy
# What torch.compile is given for whole networks: the best of its settings that fit into a session's minutes.
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "cuda": {"options": {"max_autotune": True, "freezing": True, "conv_1x1_as_mm": True, "triton.cudagraphs": False}},
    "cpu": {"options": {"freezing": True}},
}
COPY_BYTES = {"cuda": 2**31, "cpu": 2**27}


class Missing(Exception):
    """The library that an arm compares with is not installed."""


class Unavailable(Exception):
    """An arm does not exist on this device or in this version."""


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
        graph: on a GPU, replay all calls from one CUDA graph, without the gaps of launching.
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


class Session:
    """The benchmarks of one run of pytest.

    Args:
        device: what is timed.
        size: "small" or "full".
        timed: False for a smoke test: every arm is built, checked and called once.
        commit: of the sources, and whether they have been changed since.
    """

    def __init__(self, device: torch.device, size: str, timed: bool, commit: dict[str, Any]) -> None:
        self.device, self.size, self.timed, self.commit = device, size, timed, commit
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
        """Return the ceiling of products in a precision, measured once."""
        if precision not in self._tflops:
            sizes = ceilings.MATMUL_SIZES.get(self.device.type, ceilings.MATMUL_SIZES["cpu"])[:2]
            self._tflops[precision] = float(ceilings.matmul_rate(self.device, precision, sizes, seconds=2.0)["best"])
        return self._tflops[precision]

    def sets(self, size: int) -> int:
        """Return how many sets of inputs of `size` bytes are more than the cache holds, four times over."""
        return (
            min(max(2, math.ceil(4 * second_level_cache(self.device) / max(size, 1))), MOST_SETS) if self.timed else 1
        )

    def ready(self, candidate: Candidate) -> Callable[[], object]:
        """Return a function that runs all calls; it does not wait for the device."""
        device = candidate.device or self.device
        if candidate.graph and device.type == "cuda":
            return capture(candidate.calls, device)
        return functools.partial(_in_turn, candidate.calls)

    def figures(self, candidate: Candidate, seconds: Sequence[float]) -> dict[str, Any]:
        """Return the times of a step, rates and shares of a roof that follow from the `seconds` of all calls."""
        steps = len(candidate.calls) * candidate.steps
        times = quantiles([value / steps for value in seconds])
        info: dict[str, Any] = {
            "seconds": times,
            "bytes": candidate.bytes,
            "flops": candidate.flops,
            "precision": candidate.precision,
            "settings": candidate.settings,
            "calls": len(candidate.calls),
            "steps": candidate.steps,
            "large": candidate.bytes >= LARGE,
        }
        median, floors = float(times["median"]), {}
        if candidate.bytes:
            info |= {"gb_per_s": candidate.bytes / median / 1e9, "copy_gb_s": self.copy_gb_s}
            floors["copy"] = candidate.bytes / self.copy_gb_s / 1e9
        if candidate.flops:
            peak = self.matmul_tflops(candidate.precision)
            info |= {"tflops": candidate.flops / median / 1e12, "matmul_tflops": peak}
            floors["matmul"] = candidate.flops / peak / 1e12
        if floors:
            nearer = max(floors, key=lambda name: floors[name])
            info |= {"roof": nearer, "percent_of_roof": 100 * floors[nearer] / median}
        return info


def _in_turn(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def device_seconds(run: Callable[[], object]) -> list[float]:
    """Return samples of the GPU's own time for `run`, by triton's do_bench, which flushes the L2 before each."""
    from triton.testing import do_bench

    return [value / 1e3 for value in do_bench(run, rep=150, return_mode="all")]


def second_level_cache(device: torch.device) -> int:
    """Return the bytes of a GPU's L2, or of a core's where the system tells, else a megabyte."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 2**20
    except (ValueError, OSError, AttributeError):
        return 2**20


def image(device: torch.device, dtype: torch.dtype, n: int, c: int, side: int) -> Tensor:
    """Return a random [n, c, side, side], channels-last."""
    return torch.randn(n, side, side, c, device=device).to(dtype).permute(0, 3, 1, 2)


def fused_backend(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend of the fused kernels of an op.

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
    """Return `function` under torch.compile without graph breaks, and its settings.

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
    """Return a whole network, or a step with it, under torch.compile, and the settings: its best.

    Raises:
        Unavailable: in a smoke test, or without a compiler.
    """
    if not session.timed:
        raise Unavailable("networks are compiled with --benchmark-only alone; tests/sampling traces one")
    return compiled(session, network, **COMPILE_OPTIONS[session.device.type])


def op_candidate(
    session: Session,
    arm: str,
    op: str,
    dtype: torch.dtype,
    make: Callable[[], dict[str, Tensor]],
    run: Callable[[dict[str, Tensor], str], Tensor],
    plain: Callable[[dict[str, Tensor]], Tensor],
    *,
    size: int,
    flops: int = 0,
) -> Candidate:
    """Return an arm of `ARMS` of an op that writes into a tensor that it is given.

    Args:
        make: fresh random tensors for one call, in `dtype`.
        run: the op with a backend; returns what it wrote.
        plain: the same in idiomatic torch.
        size: bytes of a call.
        flops: of a call.

    Raises:
        Unavailable: there is no such arm here.
    """
    settings: dict[str, Any] = {}
    if arm == "fused":
        settings["backend"] = fused_backend(op, session.device, dtype)
        function: Callable[..., Tensor] = functools.partial(run, backend=settings["backend"])
    elif arm == "reference":
        function = functools.partial(in_float64, run)
    else:
        function, settings = (plain, {}) if arm == "eager" else compiled(session, plain)

    def call(tensors: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return function(tensors)

    def check() -> None:
        tensors = make()
        own, eager = ({name: t.clone() for name, t in tensors.items()} for _ in range(2))
        assert_close(call(own), in_float64(run, tensors), eager=run(eager, "eager"), dtype=dtype, name=op)

    calls = [functools.partial(call, make()) for _ in range(session.sets(size))]
    return Candidate(calls, check, 1, size, flops, PRECISIONS[dtype], settings, graph=True)


def in_float64(run: Callable[[dict[str, Tensor], str], Tensor], tensors: dict[str, Tensor]) -> Tensor:
    """Return what `run` computes by its specification."""
    return run({name: t.double() for name, t in tensors.items()}, "reference")


def matches(
    got: Tensor, truth: Tensor, eager: Tensor, floor: tuple[float, float], factor: float = 2.0
) -> dict[str, Any]:
    """Return how far `got` is from `truth`, and whether within a dtype's floor or `factor` times what eager loses."""
    ours, theirs = errors(got, truth), errors(eager, truth)
    bounds = [max(f, factor * e) for f, e in zip(floor, theirs, strict=True)]
    ok = ours[0] <= bounds[0] and ours[1] <= bounds[1]
    return {"rms": ours[0], "max": ours[1], "bound_rms": bounds[0], "bound_max": bounds[1], "ok": ok}


def assert_network_close(actual: Tensor, expected: Tensor, eager: Tensor, dtype: torch.dtype, backend: str) -> None:
    """Assert that what networks computed in `dtype` is as near to the truth as eager torch's, times two.

    `backend` "native" is granted, above that, what Winograd's convolutions lose (`conv.error_factor`).
    """
    mean, worst = (
        2 * (error_factor("winograd4", worst=worst) if backend == "native" else 1.0) for worst in (False, True)
    )
    assert_close(actual, expected, eager=eager, factor=mean, max_factor=worst, dtype=dtype)


def assert_same_as_peer(actual: Tensor, expected: Tensor, name: str) -> None:
    """Assert that a peer's `actual` is our float64 result `expected`, to four times the floor of its dtype.

    Peers multiply a thousand factors in float32 to have their coefficients: that alone loses up to 1e-6.
    """
    got, floor = errors(actual, expected), FLOORS[actual.dtype]
    assert all(e <= 4 * f for e, f in zip(got, floor, strict=True)), f"{name}: errors {got}, floor {floor}"


def peer(name: str) -> None:
    """Make sure that a library is there to compare with.

    Raises:
        Missing: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise Missing(f"{name} is not installed")
