"""Timing, ceilings and memory: each figure is what it says."""

from __future__ import annotations

import mmap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastddpm.perf.profiling import ceilings, timing
from fastddpm.perf.profiling.memory import peak_memory

CPU = torch.device("cpu")


def test_spread() -> None:
    spread = timing.spread([5e-6, 1e-6, 3e-6, 2e-6, 4e-6], per=2)
    assert spread == pytest.approx({"median": 1.5, "p20": 0.9, "p80": 2.1, "min": 0.5, "samples": 5})


def test_interleaving_ends_in_time_and_turns() -> None:
    seen = list(timing.interleave({"a": lambda: time.sleep(0.05) or 1.0}, seconds=0.12, least=1, most=1000))
    assert 1 <= len(seen) <= 4
    assert timing.repeat(lambda: 1.0, seconds=9, most=7) == [1.0] * 7
    order = [name for name, _ in timing.interleave({"a": lambda: 0.0, "b": lambda: 0.0}, seconds=9, most=2)]
    assert order == ["a", "b", "b", "a"]


@pytest.mark.gpu
def test_a_captured_call_keeps_its_own_workspace(device: torch.device) -> None:
    """A graph must not use cuBLAS's workspace of the stream, which the next capture frees."""
    a, b = (torch.randn(512, 512, device=device) for _ in range(2))
    out = torch.empty_like(a)
    replay = timing.capture([lambda: torch.mm(a, b, out=out)] * 2, device)
    timing.capture([lambda: torch.mm(b, a)], device)
    out.zero_()
    replay()
    torch.testing.assert_close(out, a @ b)


@pytest.mark.parametrize(
    ("name", "slug"),
    [("NVIDIA H200", "nvidia-h200"), ("AMD Instinct MI300X / OAM", "amd-instinct-mi300x-oam")],
)
def test_names(name: str, slug: str) -> None:
    assert ceilings.slug(name) == slug


def test_rates_are_those_of_the_time_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations, which torch counts too, and bytes over seconds."""
    taken: list[tuple[int, float]] = []

    def timed(run: Any, device: torch.device) -> float:
        with FlopCounterMode(display=False) as counter:
            seconds = timing.timed(run, device)
        taken.append((int(counter.get_total_flops()), seconds))
        return seconds

    monkeypatch.setattr(ceilings, "timed", timed)
    monkeypatch.setattr(ceilings, "CONVOLVED", (1, 16, 16))
    rate = ceilings.matmul_rate(CPU, "fp32", (32, 64), rounds=3)
    assert rate["samples"] == 3
    assert rate["by"] in ("mm", "conv2d")
    assert rate["best"] == pytest.approx(max(flops / seconds / 1e12 for flops, seconds in taken))
    for size, times in ((2**25, 1), (2**20, 32)):  # a small copy is repeated in a row
        taken.clear()
        rate = ceilings.copy_rate(CPU, size, rounds=5)
        assert rate["best"] == pytest.approx(max(times * 2 * size / seconds / 1e9 for _, seconds in taken))


def test_what_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise RuntimeError('"addmm_impl_cpu_" not implemented for this')

    monkeypatch.setattr(ceilings, "matmul_rate", none)
    monkeypatch.setattr(ceilings, "copy_rate", lambda *_, **__: {"median": 1.0, "best": 1.0})
    calls: list[int] = []
    found = ceilings.measure(CPU, ["fp16", "fp32"], quick=True, done=lambda: calls.append(1))
    assert "not implemented" in found["matmul_tflops"]["fp16"]["error"]
    assert len(calls) == 5
    missing = ceilings.unreadable(CPU, {"error": "OSError: no load average"})
    assert {"counter": "load average", "why": "OSError: no load average"} in missing
    assert any("hardware counters" in entry["counter"] for entry in missing)
    monkeypatch.setenv("PATH", "")
    assert "nvidia-smi" in ceilings.driver_state()["error"]
    on_gpu = ceilings.unreadable(torch.device("cuda"), {"clocks.sm": "[N/A]", "name": "a GPU"})
    assert {"counter": "clocks.sm", "why": "nvidia-smi says [N/A]"} in on_gpu


def test_peak_memory(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux can reset the peak")
    # Of the system, not of malloc, which may hold as much from earlier tests.
    with peak_memory(CPU) as found, mmap.mmap(-1, 2**26) as block:
        block[::4096] = bytes(2**14)
    assert found["bytes"] - found["before_bytes"] > 2**26 * 0.9
    with peak_memory(CPU) as later:  # an earlier peak is forgotten
        pass
    assert later["bytes"] < found["bytes"]
    with peak_memory(CPU, tmp_path / "nothing") as found:
        pass
    assert found["bytes"] is None
    assert "not measured" in found["what"]
