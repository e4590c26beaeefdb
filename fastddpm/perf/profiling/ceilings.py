"""Measure the ceilings of a device: matrix products, copies, launches.

All are measured, none comes from a data sheet. Rates come with their quantiles.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fastddpm_kernels.tuned import device_name as device_name
from fastddpm_kernels.tuned import slug as slug

from fastddpm.networks.precision import tf32
from fastddpm.perf.profiling.timing import (
    capture,
    first_lines,
    quantile,
    quantiles,
    release,
    repeat,
    synchronize,
    timed,
)

PACKAGES = ("torch", "triton", "diffusers", "denoising_diffusion_pytorch", "cuda-bindings", "numpy")
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,memory.total"
# Short name of a precision -> (dtype, whether TF32 is allowed).
MATMULS = {
    "fp16": (torch.float16, False),
    "bf16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}
# Names of precisions in torch -> short names.
SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "tf32": "tf32"}
LARGE_COPY = {"cuda": 2**32, "mps": 2**28, "cpu": 2**28}  # bytes; far larger than any cache
CACHED_COPY = {"cuda": 2**23, "mps": 2**22, "cpu": 2**18}  # bytes that fit into a cache twice
MATMUL_SIZES = {"cuda": (4096, 8192, 12288), "mps": (1024, 2048, 4096), "cpu": (512, 1024, 2048)}

CONVOLVED = (4, 256, 16)  # images, channels and pixels of a side of the convolution that measures a CPU's products

Rate = dict[str, Any]


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that a profile depends on; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"], found["hip"] = torch.version.cuda, torch.version.hip
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    found["cudnn"] = str(cudnn) if cudnn else None
    return found


def driver_state() -> dict[str, str]:
    """Return driver, clocks and temperature as nvidia-smi reports them; {"error": ...} where it fails."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": first_lines(error, 1)}
    values = [value.strip() for value in out.splitlines()[0].split(",")]
    return dict(zip(QUERY.split(","), values, strict=False))


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what torch reports about the device: processors, memory, caches; for a CPU threads and instruction set."""
    if device.type != "cuda":
        found = {"threads": torch.get_num_threads(), "processors": os.cpu_count()}
        return found | ({"capability": torch.backends.cpu.get_cpu_capability()} if device.type == "cpu" else {})
    properties = torch.cuda.get_device_properties(device)
    return {
        "processors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "capability": list(torch.cuda.get_device_capability(device)),
    }


def state(device: torch.device) -> dict[str, Any]:
    """Return values that may change between two runs: a GPU's clocks and temperature; elsewhere the load average."""
    if device.type == "cuda":
        return driver_state()
    try:
        return {"load_average": round(os.getloadavg()[0], 2)}
    except (OSError, AttributeError) as error:
        return {"error": first_lines(error, 1)}


def unreadable(device: torch.device, found: dict[str, Any]) -> list[dict[str, str]]:
    """Return the counters that could not be read, [{"counter", "why"}]; `found` is the result of `state`."""
    missing = []
    clocks = "driver, clocks, power limit, temperature" if device.type == "cuda" else "load average"
    if "error" in found:
        missing.append({"counter": clocks, "why": found["error"]})
    missing += [
        {"counter": name, "why": f"nvidia-smi says {value}"}
        for name, value in found.items()
        if isinstance(value, str) and ("N/A" in value or "Not Supported" in value)
    ]
    if device.type == "cuda":
        if torch.profiler.ProfilerActivity.CUDA not in torch.profiler.supported_activities():
            library = "roctracer" if torch.version.hip else "CUPTI"
            missing.append({"counter": "times of kernels, idle time", "why": f"this torch has no {library}"})
    else:
        missing.append({"counter": "launch and graph-node latency, idle time", "why": f"no meaning on {device.type}"})
        missing.append({"counter": "clocks, power, temperature", "why": "not read on this kind of device"})
    why = "need privileges; bytes and operations are counted from the layers, each operand once"
    missing.append({"counter": "hardware counters (bytes moved, cache hits, tensor-core use)", "why": why})
    return missing


def measure(
    device: torch.device, precisions: Sequence[str], *, quick: bool = False, done: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Measure all ceilings of a device.

    Args:
        device: to measure.
        precisions: precisions of the matrix products, keys of `MATMULS`.
        quick: measure less accurately, in a few seconds.
        done: called after each of `len(precisions) + 3` measurements.

    Returns:
        "matmul_tflops": {precision: rate}; "copy_gb_s" and "copy_cached_gb_s": rates of copies far larger than the
        caches, and small enough for one, with reads and writes both counted; "latency": see `latencies`. A rate has
        `timing.quantiles` and "best", which is the ceiling, because other work on the machine only lowers a rate. A
        rate that could not be measured is {"error": why}.
    """
    kind = device.type if device.type in LARGE_COPY else "cpu"
    seconds = 0.4 if quick else 1.5
    result: dict[str, Any] = {"matmul_tflops": {}}
    large = LARGE_COPY[kind] // (4 if quick else 1)
    rounds = 25 if device.type == "cuda" else 200  # enough for some rounds without an interruption
    for name, size in (("copy_gb_s", large), ("copy_cached_gb_s", CACHED_COPY[kind])):
        result[name] = _attempt(partial(copy_rate, device, size, seconds=seconds, rounds=rounds))
        done()
    sizes = MATMUL_SIZES[kind][: 2 if quick else 3]
    for name in precisions:
        run = partial(matmul_rate, device, name, sizes, seconds=seconds, rounds=rounds)
        result["matmul_tflops"][name] = _attempt(run)
        done()
    if device.type == "cuda":
        result["latency"] = _attempt(partial(latencies, device))
    else:
        result["latency"] = {"note": "kernel launches and graph nodes have no meaning here"}
    done()
    return result


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Return the median GB/s of a large copy, with bytes read and bytes written both counted."""
    return float(copy_rate(device, size)["median"])


def copy_rate(device: torch.device, size: int, *, seconds: float = 10.0, rounds: int = 15) -> Rate:
    """Measure GB/s of copying `size` bytes, read and written bytes both counted; repeat small copies in a row."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    source.view(torch.int32).random_()
    target = torch.empty_like(source)
    times = max(1, 2**25 // size)

    def one() -> None:
        target.copy_(source)

    copies = capture([one] * times, device) if times > 1 else one
    copies()
    synchronize(device)
    samples = repeat(lambda: timed(copies, device), seconds=seconds, least=5, most=rounds)
    return _rate([2 * size * times / value / 1e9 for value in samples])


def matmul(device: torch.device, precision: str, sizes: Sequence[int], rounds: int = 8) -> float:
    """Return the median TFLOP/s of square matrix products of random numbers, for the best size."""
    return float(matmul_rate(device, precision, sizes, rounds=rounds)["median"])


def matmul_rate(
    device: torch.device, precision: str, sizes: Sequence[int], *, seconds: float = 60.0, rounds: int = 8
) -> Rate:
    """Measure TFLOP/s of square matrix products of random numbers; "size" is the best of the sizes.

    On a CPU it also measures 3x3 convolutions, because torch uses another library for them, which is twice as fast on
    some processors. The ceiling is the better of the two, and "by" names it: "mm" or "conv2d".

    Args:
        device: to measure.
        precision: a key of `MATMULS`.
        sizes: growing; after the first, sizes that would take more than `seconds` are left out.
        seconds: the approximate limit for one size.
        rounds: number of rounds, with three products each on CUDA, else with one.
    """
    dtype, allow = MATMULS[precision]
    best: dict[str, Any] = {}
    times = 3 if device.type == "cuda" else 1
    for n in sizes:
        if best and 4 * times * 2 * n**3 / float(best["median"]) / 1e12 > 2 * seconds:
            break
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)

        def products(a: Any = a, b: Any = b, out: Any = out) -> None:
            for _ in range(times):
                torch.mm(a, b, out=out)

        with tf32(allow):
            products()
            synchronize(device)
            samples = repeat(partial(timed, products, device), seconds=seconds, least=3, most=rounds)
        rate = _rate([times * 2 * n**3 / value / 1e12 for value in samples])
        if not best or rate["best"] > best["best"]:
            best = {**rate, "size": n, "by": "mm"}
    if device.type == "cpu":
        rate = _convolution_rate(dtype, seconds, rounds)
        if rate["best"] > best["best"]:
            best = {**rate, "size": CONVOLVED[1], "by": "conv2d"}
    release(device)
    return best


def _convolution_rate(dtype: torch.dtype, seconds: float, rounds: int) -> Rate:
    """Measure TFLOP/s of a 3x3 convolution on the CPU, counting every product of its definition."""
    n, channels, side = CONVOLVED
    x = torch.randn(n, channels, side, side).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3).to(dtype).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def convolve() -> None:
        F.conv2d(x, weight, padding=1)

    convolve()
    samples = repeat(partial(timed, convolve, torch.device("cpu")), seconds=seconds, least=3, most=rounds)
    return _rate([2 * 9 * n * side**2 * channels**2 / value / 1e12 for value in samples])


def latencies(device: torch.device, count: int = 1000) -> dict[str, float]:
    """Measure microseconds of a launch and of a graph node, in a chain of kernels that add one number to another.

    `launch_to_end_us` is the time that the host waits for a single kernel.
    """
    x = torch.zeros(1, device=device)

    def add() -> None:
        x.add_(1)

    def chain() -> None:
        for _ in range(count):
            add()

    chain()
    torch.cuda.synchronize()
    launch = quantile([timed(chain, device) for _ in range(5)], 0.5) / count
    replay = capture([add] * count, device)
    replay()
    node = quantile([timed(replay, device) for _ in range(10)], 0.5) / count
    single = quantile([timed(add, device) for _ in range(50)], 0.5)
    return {"launch_us": launch * 1e6, "graph_node_us": node * 1e6, "launch_to_end_us": single * 1e6}


def _rate(samples: Sequence[float]) -> Rate:
    return {**quantiles(samples), "best": max(samples)}


def _attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of `run`, or {"error": why} where the device lacks the dtype, the memory or the function."""
    try:
        return run()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return {"error": first_lines(error, 1)}
