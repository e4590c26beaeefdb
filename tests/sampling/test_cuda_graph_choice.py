"""What `CapturedBody` decides, on a pretended GPU: the mode it takes, what it frees, what a failed capture says."""

from __future__ import annotations

import contextlib
import gc
import logging
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastddpm.sampling.cuda_graph import MODES, CapturedBody, CaptureError, captured, while_graph


class Pretended:
    """A GPU whose graphs call the body anew, so that what `CapturedBody` decides can be seen without one.

    Attributes:
        cost: microseconds per step that the events measure, by mode.
        skips: modes that take one step too few.
        log: captures, replays and resets, in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step, self.x = torch.zeros(1, dtype=torch.int64), torch.zeros(3)
        self.cost = {"while": 3.0, "unrolled": 1.0, "step": 2.0}
        self.skips: set[str] = set()
        self.log: list[str] = []
        self.clock, self.offset, self.enqueued, self.waits = 0.0, 0, 0, 0
        self.draws = self.fails = False
        gpu = self

        class Stream:
            def wait_stream(self, other: Stream) -> None: ...

            def synchronize(self) -> None: ...

            def wait_event(self, event: Event) -> None:
                gpu.waits += 1

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.at = 0.0

            def record(self, stream: Stream | None = None) -> None:
                self.at = gpu.clock

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) / 1000

        class Graph:
            def __init__(self, keep_graph: bool = False) -> None:
                self.keep, self.bodies, self.pool = keep_graph, 0, 0

            def replay(self) -> None:
                gpu.run("unrolled" if self.bodies > 1 else "step", self.bodies)

            def raw_cuda_graph(self) -> int:
                assert self.keep
                return 7

            def reset(self) -> None:
                gpu.log.append(f"reset {self.bodies}")

        @contextlib.contextmanager
        def graph(target: Graph, *, pool: object = None, stream: Stream, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            assert not gc.isenabled()
            assert torch.backends.cudnn.benchmark
            before = gpu.step.clone(), gpu.x.clone()
            try:
                yield
                if gpu.fails and pool is not None:
                    raise RuntimeError("operation not permitted when stream is capturing\nand more")
                target.bodies = int(gpu.step - before[0])
                gpu.log.append(f"capture {target.bodies}")
            finally:
                gpu.step.copy_(before[0])
                gpu.x.copy_(before[1])

        class While:
            def __init__(self, body: int, device: torch.device) -> None:
                assert body == 7

            def launch(self, count: int, stream: Stream) -> None:
                gpu.run("while", count)

            def close(self) -> None:
                gpu.log.append("close while")

        streams = [Stream()]

        @contextlib.contextmanager
        def on(stream: Stream) -> Iterator[None]:
            streams.append(stream)
            yield
            streams.pop()

        self.on, self.new_stream = on, Stream
        fakes = {
            "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph, "stream": on,
            "current_stream": lambda device=None: streams[-1], "current_device": lambda: 0,
            "device": lambda device: contextlib.nullcontext(), "graph_pool_handle": lambda: (0, 1),
            "is_available": lambda: True, "is_current_stream_capturing": lambda: False,
            "empty_cache": lambda: self.log.append("empty"),
            "memory_snapshot": lambda: [{"segment_pool_id": (0, 1)}],
            "default_generators": [types.SimpleNamespace(get_offset=lambda: self.offset)],
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *a, name=name: self.log.append(name), raising=False)
        monkeypatch.setattr(captured, "_sides", {})
        monkeypatch.setattr(captured, "why_not", lambda mode, device, trusted=False: None)
        monkeypatch.setattr(while_graph, "WhileGraph", While)

    def body(self) -> None:
        self.offset += 4 if self.draws else 0
        self.x.add_(self.step + 1)
        self.step += 1

    def reset(self) -> None:
        self.step.zero_()
        self.x.zero_()

    def run(self, mode: str, steps: int) -> None:
        self.clock += self.cost[mode] * steps
        self.enqueued += 1
        for _ in range(steps - (mode in self.skips)):
            self.body()

    def capture(self, mode: str = "auto", **settings: Any) -> CapturedBody:
        return CapturedBody(self.body, self.step, mode=mode, reset=self.reset, **settings)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    return Pretended(monkeypatch)


@pytest.mark.parametrize("best", MODES)
def test_auto_takes_the_fastest(gpu: Pretended, best: str) -> None:
    gpu.cost[best] = 0.5
    captured = gpu.capture(unroll=4)
    assert captured.mode == best
    assert captured.measured == pytest.approx(gpu.cost)
    assert captured.captures == 2
    assert gpu.x.tolist() == [0, 0, 0], "reset is called last"
    assert ("close while" in gpu.log) == (best != "while")
    assert ("reset 4" in gpu.log) == (best != "unrolled"), "what is not used is freed"
    assert "reset 1" not in gpu.log
    gpu.enqueued = 0
    captured.advance(11)
    assert gpu.enqueued == {"while": 1, "unrolled": 2 + 3, "step": 11}[best]
    assert gpu.x.tolist() == [66.0] * 3
    assert gc.isenabled()
    captured.close()
    assert gpu.log[-1] == {"while": "reset 1", "unrolled": "reset 4", "step": "reset 1"}[best]


def test_auto_goes_on_without_a_mode_that_miscounts(gpu: Pretended, caplog: pytest.LogCaptureFixture) -> None:
    gpu.cost["while"] = 0.1
    gpu.skips = {"while"}
    with caplog.at_level(logging.INFO, "fastddpm"):
        assert gpu.capture().mode == "unrolled"
    assert "mode 'while' is left out: mode 'while' took 8 steps for 9" in caplog.text
    with pytest.raises(CaptureError, match="mode 'while' took 8 steps for 9: is all the body's work on one stream?"):
        gpu.capture("while")


def test_auto_goes_on_without_a_while_node_for_generators(gpu: Pretended) -> None:
    gpu.draws, gpu.cost["while"] = True, 0.1
    assert gpu.capture().mode == "unrolled"
    with pytest.raises(CaptureError, match="draws from torch's generator"):
        gpu.capture("while")


def test_capture_that_fails_is_explained_and_cleaned_up(gpu: Pretended) -> None:
    gpu.fails = True
    for mode in ("auto", *MODES):
        gpu.log.clear()
        with pytest.raises(CaptureError, match="cannot be captured.* ended with: operation not .* capturing$"):
            gpu.capture(mode)
        assert gpu.log[1:7] == [
            "_cuda_endAllocateToPool", "reset 0", "empty", "_cuda_releasePool", "empty", "capture 0"
        ], "the last one, of nothing, ends the generator's part in the one that failed"  # fmt: skip
        assert gc.isenabled()
        assert not captured._capturing.locked()

    def peeking() -> None:
        gpu.x.sum().item()
        gpu.body()

    with pytest.raises(CaptureError, match=r"^Tensor.item\(\) at .*test_cuda_graph_choice.py.* ended with: operation"):
        CapturedBody(peeking, gpu.step)


def test_another_stream_waits(gpu: Pretended) -> None:
    captured = gpu.capture("step")
    gpu.waits = 0
    captured.advance(1)
    captured.advance(1)
    assert gpu.waits == 0
    with gpu.on(gpu.new_stream()):
        captured.advance(1)
        captured.advance(0)
        assert gpu.waits == 1
    captured.advance(0)
    assert gpu.waits == 2


def test_dies_with_the_last_reference(gpu: Pretended) -> None:
    gc.disable()
    try:
        for mode in ("auto", *MODES):
            captured = gpu.capture(mode)
            gpu.log.clear()
            del captured
            assert "reset 1" in gpu.log, "no cycle keeps it"
    finally:
        gc.enable()
