"""Section `machine`: what the device is, and the ceilings that everything else is held against."""

from __future__ import annotations

from typing import Any

import torch

from fastddpm.perf.profiling import ceilings
from gpu.results import Section

MATMULS = ceilings.MATMULS


def run(section: Section, device: torch.device, small: bool) -> None:
    """Measures the ceilings; the section holds `matmul_tflops`, `copy_gb_s` and latencies in microseconds."""
    state: dict[str, Any] = {"name": ceilings.device_name(device), "versions": ceilings.versions()}
    if device.type == "cuda":
        state |= {**ceilings.hardware(device), "before": ceilings.driver_state()}
    section.set(**state)
    section.set(copy_gb_s=copy_bandwidth(device, small))
    section.set(matmul_tflops={name: matmul(device, name, small) for name in MATMULS})
    if device.type == "cuda":
        section.set(latency=ceilings.latencies(device), after=ceilings.driver_state())
    else:
        section.set(latency={"note": "kernel launches and graph nodes have no meaning on the CPU"})
    section.close()


def copy_bandwidth(device: torch.device, small: bool = False) -> float:
    """GB/s of a copy as large as none of the caches, or of a small one."""
    return ceilings.copy_bandwidth(device, 2**24 if small else 2**32)


def matmul(device: torch.device, precision: str, small: bool = False) -> float:
    """TFLOP/s of the best of a few sizes."""
    sizes = (256, 384) if small else (4096, 8192) if precision == "fp32" else (4096, 8192, 12288)
    return ceilings.matmul(device, precision, sizes, rounds=3 if small else 8)
