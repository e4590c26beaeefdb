"""Section `machine`: what the device is, and the ceilings that everything else is held against."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from typing import Any

import torch

from fastddpm.precision import tf32
from gpu.results import Section
from gpu.timing import capture, first_lines, quantile, release, timed

PACKAGES = ("torch", "triton", "diffusers", "denoising_diffusion_pytorch", "cuda-bindings", "numpy")
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,memory.total"
# precision -> (dtype, whether TF32 is allowed)
MATMULS = {
    "fp16": (torch.float16, False),
    "bf16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"


def versions() -> dict[str, str | None]:
    """Versions of what was measured and of what it was compared with; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    found["cudnn"] = str(cudnn) if cudnn else None
    return found


def driver_state() -> dict[str, str]:
    """Driver, clocks and temperature as nvidia-smi reads them; {"error": ...} where it cannot."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": first_lines(error, 1)}
    values = [value.strip() for value in out.splitlines()[0].split(",")]
    return dict(zip(QUERY.split(","), values, strict=False))


def run(section: Section, device: torch.device, small: bool) -> None:
    """Measures the ceilings; the section holds `matmul_tflops`, `copy_gb_s` and latencies in microseconds."""
    state: dict[str, Any] = {"name": device_name(device), "versions": versions()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        state |= {
            "processors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "capability": list(torch.cuda.get_device_capability(device)),
            "before": driver_state(),
        }
    section.set(**state)
    section.set(copy_gb_s=copy_bandwidth(device, 2**24 if small else 2**32))
    section.set(matmul_tflops={name: matmul(device, name, small) for name in MATMULS})
    if device.type == "cuda":
        section.set(latency=latencies(device), after=driver_state())
    else:
        section.set(latency={"note": "kernel launches and graph nodes have no meaning on the CPU"})
    section.close()


def copy_bandwidth(device: torch.device, size: int) -> float:
    """GB/s of a large copy, bytes read and bytes written both counted."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    source.view(torch.int32).random_()
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = quantile([timed(lambda: target.copy_(source), device) for _ in range(15)], 0.5)
    return 2 * size / seconds / 1e9


def matmul(device: torch.device, precision: str, small: bool) -> float:
    """TFLOP/s of square matrix products of random numbers, the best median of a few sizes."""
    dtype, allow = MATMULS[precision]
    sizes = (256, 384) if small else (4096, 8192) if precision == "fp32" else (4096, 8192, 12288)
    best = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)
        with tf32(allow):
            for _ in range(3):
                torch.mm(a, b, out=out)
            rounds = 3 if small else 8

            def products(a: Any = a, b: Any = b, out: Any = out) -> None:
                for _ in range(3):
                    torch.mm(a, b, out=out)

            seconds = quantile([timed(products, device) / 3 for _ in range(rounds)], 0.5)
        best = max(best, 2 * n**3 / seconds / 1e12)
    release(device)
    return best


def latencies(device: torch.device, count: int = 1000) -> dict[str, float]:
    """Microseconds of a launch, and of a node in a graph, in a chain of kernels that add one number to one other.

    `launch_to_end_us` is the host's wait for a single one.
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
