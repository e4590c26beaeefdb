"""Timing, ceilings and memory: what is measured is what it says."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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


class Recording:
    """A GPU whose streams and graphs note what is done, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []

        @contextlib.contextmanager
        def graph(target: Any, stream: Any) -> Iterator[None]:
            self.log.append("begin")
            yield
            self.log.append("end")

        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {
            "Stream": lambda device: stream, "current_stream": lambda device: stream,
            "stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda device: None, "graph": graph,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
        }  # fmt: skip
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: self.log.append("clear"), raising=False)


def test_a_captured_call_keeps_its_own_scratch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS' workspace is taken within the capture: one from before it would be freed under the graph."""
    seen = Recording(monkeypatch)
    replay = timing.capture([lambda: seen.log.append("call")] * 2, torch.device("cuda"))
    assert seen.log == ["call", "call", "clear", "begin", "call", "call", "end", "clear"]
    replay()
    assert seen.log[-1] == "replay"


def test_names() -> None:
    assert ceilings.slug("NVIDIA H200") == "nvidia-h200"
    assert ceilings.slug("AMD Instinct MI300X / OAM") == "amd-instinct-mi300x-oam"


def test_rates_are_those_of_the_time_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations and bytes over seconds: with a clock that says how long everything took."""
    monkeypatch.setattr(ceilings, "timed", lambda run, device: 2e-3)
    n, channels, side = ceilings.CONVOLVED
    convolved = 2 * 9 * n * side**2 * channels**2
    rate = ceilings.matmul_rate(CPU, "fp32", (32, 64), rounds=3)  # these two take too few operations for the time
    assert (rate["by"], rate["size"], rate["samples"]) == ("conv2d", channels, 3)
    assert rate["best"] == pytest.approx(convolved / 2e-3 / 1e12)
    monkeypatch.setattr(ceilings, "timed", lambda run, device: 2e3 if run.__name__ == "convolve" else 2e-3)
    rate = ceilings.matmul_rate(CPU, "fp32", (32, 64), rounds=3)
    assert (rate["by"], rate["size"], rate["samples"]) == ("mm", 64, 3)
    assert rate["best"] == pytest.approx(2 * 64**3 / 2e-3 / 1e12)
    monkeypatch.setattr(ceilings, "timed", lambda run, device: 2e-3)
    assert ceilings.copy_bandwidth(CPU, 2**25) == pytest.approx(2 * 2**25 / 2e-3 / 1e9)
    assert ceilings.copy_rate(CPU, 2**20)["median"] == pytest.approx(32 * 2 * 2**20 / 2e-3 / 1e9)  # 32 in a row


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
    state = ceilings.driver_state()
    assert "nvidia-smi" in state["error"]
    on_gpu = ceilings.unreadable(torch.device("cuda"), {"clocks.sm": "[N/A]", "name": "a GPU"})
    assert {"counter": "clocks.sm", "why": "nvidia-smi says [N/A]"} in on_gpu


def test_peak_memory(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux can reset the peak")
    # Of the system, not of malloc, which may have as much left over from what ran before.
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
