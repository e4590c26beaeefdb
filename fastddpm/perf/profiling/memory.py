"""Measure the peak memory of a run, and say what the figure means."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

PROC = Path("/proc/self")


@contextlib.contextmanager
def peak_memory(device: torch.device, proc: Path = PROC) -> Iterator[dict[str, Any]]:
    """Yield a dictionary that receives the peak when the context ends: {"bytes", "before_bytes", "what"}.

    On CUDA it is the memory that torch allocated on the device. Elsewhere it is the resident memory of the process.
    Only Linux can reset an earlier peak, so on other systems "bytes" is None and "what" says why.
    """
    found: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        found |= {"before_bytes": torch.cuda.memory_allocated(device), "what": "allocated by torch on the device"}
        yield found
        found["bytes"] = torch.cuda.max_memory_allocated(device)
        return
    try:
        (proc / "clear_refs").write_text("5")  # proc(5): resets the peak
        found["before_bytes"] = _read(proc, "VmRSS")
    except (OSError, ValueError) as error:
        found |= {"bytes": None, "what": f"not measured: this system does not tell ({type(error).__name__})"}
        yield found
        return
    yield found
    found |= {"bytes": _read(proc, "VmHWM"), "what": "resident memory of the whole process, Python and torch included"}


def _read(proc: Path, name: str) -> int:
    for line in (proc / "status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{proc}/status has no {name}")
