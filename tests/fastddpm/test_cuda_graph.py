"""A captured body gives what the plain one gives, whichever way it is run."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastddpm.cuda_graph import MODES, CapturedBody, CaptureError, captured, tuned, while_graph, why_not

CUDA = torch.device("cuda")


# ---- without a GPU


def fake_bindings(version: str = "13.0.0", driver: int = 13000, **functions: Any) -> dict[str, Any]:
    """cuda-bindings as far as it is called, with a driver that is not there."""
    calls = {
        "cuDriverGetVersion": lambda: (0, driver),
        "cuGraphConditionalHandleCreate": lambda *a: (0, 0x1122334455667788),
    }
    package = types.ModuleType("cuda.bindings")
    package.__version__ = version  # type: ignore[attr-defined]
    package.driver = types.SimpleNamespace(**calls | functions)  # type: ignore[attr-defined]
    package.nvrtc = types.SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0))  # type: ignore[attr-defined]
    top = types.ModuleType("cuda")
    top.bindings = package  # type: ignore[attr-defined]
    names = {"cuda": top, "cuda.bindings": package}
    return names | {f"cuda.bindings.{name}": getattr(package, name) for name in ("driver", "nvrtc")}


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, Any]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_why_not_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not("twice", CUDA) == "it is none of while, unrolled, step"
    for mode in MODES:
        assert why_not(mode, torch.device("cpu")) == "CUDA graphs need a CUDA device, not cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for mode in MODES:
        assert why_not(mode, CUDA) == "there is no CUDA device"

    install(monkeypatch, fake_bindings())
    assert [why_not(mode, CUDA) for mode in MODES] == [None] * 3
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert [why_not(mode, CUDA) for mode in MODES] == ["ROCm has no conditional graph nodes", None, None]


def no_driver() -> None:
    raise RuntimeError("libcuda.so.1: cannot open shared object file\nand more")


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ({"cuda": None, "cuda.bindings": None}, "cuda-bindings cannot be imported (.*); pip install cuda-bindings"),
        (fake_bindings(driver=12040), "the driver is for CUDA 12.4, conditional nodes need 12.6"),
        (fake_bindings(cuDriverGetVersion=no_driver), "no driver or no NVRTC \\(libcuda.so.1: cannot .* file\\)$"),
        (fake_bindings(cuDriverGetVersion=lambda: (types.SimpleNamespace(__int__=0), 0)), "finds no driver"),
    ],
    ids=["no bindings", "old driver", "no driver", "broken"],
)
def test_why_not_while(monkeypatch: pytest.MonkeyPatch, modules: dict[str, Any], reason: str) -> None:
    install(monkeypatch, modules)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(why_not("while", CUDA))
    assert why_not("unrolled", CUDA) is why_not("step", CUDA) is None


def test_why_not_old_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = fake_bindings(version="12.2.0")
    del modules["cuda.bindings.driver"].cuGraphConditionalHandleCreate
    install(monkeypatch, modules)
    assert why_not("while", CUDA) == (
        "cuda-bindings 12.2.0 has no conditional graph nodes; pip install -U cuda-bindings"
    )


def test_arguments() -> None:
    step = torch.zeros(1, dtype=torch.int64)
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"body": 3}, TypeError, "body is a int, must be callable"),
        ({"reset": 3}, TypeError, "reset is a int, must be callable or None"),
        ({"step": 0}, TypeError, "step is a int, must be a tensor"),
        ({"step": step.int()}, ValueError, r"step is torch.int32 of shape \[1\], must be torch.int64 of shape \[1\]"),
        ({"step": step[0]}, ValueError, r"of shape \[\], must be"),
        ({"mode": "loop"}, ValueError, "mode is 'loop', must be one of 'auto', 'while', 'unrolled', 'step'"),
        ({"unroll": 1}, ValueError, "unroll is 1, must be at least 2"),
        ({"unroll": 2.0}, TypeError, "unroll is a float, must be an int"),
        ({"warmup": 0}, ValueError, "warmup is 0, must be at least 1"),
        ({"max_steps": True}, TypeError, "max_steps is a bool, must be an int"),
    ]
    for arguments, error, message in bad:
        given: dict[str, Any] = {"body": lambda: None, "step": step} | arguments
        with pytest.raises(error, match=message):
            CapturedBody(given.pop("body"), given.pop("step"), **given)


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_no_graph_on_the_cpu(mode: str) -> None:
    ran: list[int] = []
    with pytest.raises(CaptureError, match="CUDA graphs need a CUDA device, not cpu"):
        CapturedBody(lambda: ran.append(1), torch.zeros(1, dtype=torch.int64), mode=mode)
    assert not ran


def test_auto_leaves_out_what_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, fake_bindings(driver=12040))
    with caplog.at_level(logging.INFO, "fastddpm"):
        assert captured._usable("auto", CUDA, 8, 24) == ["unrolled", "step"]
        assert captured._usable("auto", CUDA, 8, 7) == ["step"]
    assert "mode 'while' is left out: the driver is for CUDA 12.4" in caplog.text
    assert "mode 'unrolled' is left out: a graph of 8 steps is longer than 7" in caplog.text
    with pytest.raises(CaptureError, match="mode 'while' cannot be used: the driver is for CUDA 12.4"):
        captured._usable("while", CUDA, 8, 24)


def test_tuned_is_put_back_by_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = False
        if not torch.cuda.is_available():
            with tuned():
                assert not torch.backends.cudnn.benchmark, "without CUDA it does nothing"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        inside, leave = threading.Event(), threading.Event()

        def other() -> None:
            with tuned():
                inside.set()
                leave.wait(10)

        thread = threading.Thread(target=other)
        with tuned(), tuned():
            assert torch.backends.cudnn.benchmark
            thread.start()
            assert inside.wait(10)
        assert torch.backends.cudnn.benchmark, "the other thread is in it still"
        leave.set()
        thread.join()
        assert not torch.backends.cudnn.benchmark
        with pytest.raises(KeyError), tuned():
            raise KeyError
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = before


WITHOUT = """
import sys
sys.modules["cuda"] = sys.modules["cuda.bindings"] = None
import torch
from fastddpm import cuda_graph
assert not torch.cuda.is_initialized()
assert cuda_graph.why_not("while", torch.device("cpu")) is not None
assert cuda_graph.while_graph.why_not(torch.device("cuda")).startswith("cuda-bindings cannot be imported")
"""


def test_imports_without_cuda_bindings() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, timeout=120)


def has_nvrtc() -> bool:
    try:
        from cuda.bindings import nvrtc

        return int(nvrtc.nvrtcVersion()[0]) == 0
    except Exception:
        return False


@pytest.mark.skipif(not has_nvrtc(), reason="NVRTC or cuda-bindings is not installed")
def test_kernel_compiles_without_a_gpu() -> None:
    for capability in [(8, 0), (8, 6), (9, 0)]:
        code = while_graph.compile_kernel(capability)
        assert code.startswith(b"\x7fELF"), "a cubin, which no older driver refuses"
        assert b"fastddpm_next_step" in code
        assert b"cudaGraphSetConditional" in code, "the driver resolves this when it loads the cubin"
    newer = while_graph.compile_kernel((99, 0))
    assert b".entry fastddpm_next_step" in newer, "PTX, for a GPU that NVRTC does not know"
    with pytest.raises(CaptureError, match="NVRTC does not compile for GPUs of compute capability 1.0"):
        while_graph.compile_kernel((1, 0))


@pytest.mark.skipif(not has_nvrtc(), reason="NVRTC or cuda-bindings is not installed")
def test_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(while_graph, "SOURCE", "not CUDA")
    with pytest.raises(CaptureError, match=r"nvrtcCompileProgram returned NVRTC_ERROR_COMPILATION: (.|\n)*error"):
        while_graph.compile_kernel((8, 9))


class Record:
    """A structure of the driver."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


@pytest.mark.parametrize("version", ["12.8.0", "13.2.0"])
def test_while_graph_calls(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """The calls of the driver and what they are given: the order of arguments is not the same in all versions."""
    calls: list[tuple[str, Any]] = []

    def returning(name: str, *values: Any) -> Any:
        def function(*args: Any) -> Any:
            calls.append((name, args))
            return (0, *values)

        function.__name__ = name
        return function

    def add_node(*args: Any) -> Any:
        calls.append(("cuGraphAddNode", args))
        args[-1].conditional.phGraph_out = ["inside"]
        return 0, "node"

    read: list[int] = []

    def add_kernel(*args: Any) -> Any:
        calls.append(("cuGraphAddKernelNode", args))
        pointers = (ctypes.c_void_p * 2).from_address(args[-1].kernelParams)
        read.extend(ctypes.c_uint64.from_address(pointer or 0).value for pointer in pointers)
        return 0, "end"

    install(
        monkeypatch,
        fake_bindings(
            version=version,
            cuCtxGetCurrent=returning("cuCtxGetCurrent", "context"),
            cuGraphCreate=returning("cuGraphCreate", "graph"),
            cuGraphAddNode=add_node,
            cuGraphAddChildGraphNode=returning("cuGraphAddChildGraphNode", "child"),
            cuGraphAddKernelNode=add_kernel,
            cuGraphInstantiate=returning("cuGraphInstantiate", "executable"),
            cuGraphDestroy=returning("cuGraphDestroy"),
            cuGraphLaunch=returning("cuGraphLaunch"),
            cuGraphExecDestroy=returning("cuGraphExecDestroy"),
            CUgraph=lambda handle: f"body {handle}",
            CUgraphNodeParams=lambda: Record(conditional=Record()),
            CUDA_KERNEL_NODE_PARAMS=Record,
            CUgraphNodeType=Record(CU_GRAPH_NODE_TYPE_CONDITIONAL="conditional"),
            CUgraphConditionalNodeType=Record(CU_GRAPH_COND_TYPE_WHILE="while"),
        ),
    )
    monkeypatch.setattr(while_graph, "_kernel", lambda device: "kernel")
    with torch.inference_mode():
        graph = while_graph.WhileGraph(7, torch.device("cpu"))
    node = calls[2][1][-1]
    assert vars(node.conditional) | {"phGraph_out": 0} == {
        "handle": 0x1122334455667788, "type": "while", "size": 1, "ctx": "context", "phGraph_out": 0
    }  # fmt: skip
    edges: tuple[Any, ...] = ([], [], 0) if version.startswith("13") else ([], 0)
    assert calls[2] == ("cuGraphAddNode", ("graph", *edges, node))
    assert calls[3] == ("cuGraphAddChildGraphNode", ("inside", [], 0, "body 7"))
    assert calls[4][1][:3] == ("inside", ["child"], 1)
    assert calls[4][1][3].func == "kernel"
    assert read == [0x1122334455667788, graph._remaining.data_ptr()]
    assert calls[5:] == [("cuGraphInstantiate", ("graph", 0)), ("cuGraphDestroy", ("graph",))]

    graph.launch(5, types.SimpleNamespace(cuda_stream=11))  # type: ignore[arg-type]
    assert graph._remaining.tolist() == [5]
    graph.close()
    graph.close()
    assert calls[7:] == [("cuGraphLaunch", ("executable", 11)), ("cuGraphExecDestroy", ("executable",))]


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
        def graph(
            target: Graph, *, pool: object = None, stream: Stream, capture_error_mode: str
        ) -> Iterator[None]:
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
        monkeypatch.setattr(captured, "why_not", lambda mode, device: None)
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

    with pytest.raises(CaptureError, match=r"^Tensor.item\(\) at .*test_cuda_graph.py.* ended with: operation"):
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


# ---- with one


class Chain:
    """A state that a small network and a table of rows advance, with a convolution, a matrix product and a norm."""

    def __init__(self, seed: int = 0, rows: int = 1024) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.network = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU())
        self.network.append(nn.Conv2d(32, 8, 3, padding=1))
        self.network.requires_grad_(False).to(CUDA)
        self.mix = (torch.randn(64, 64, generator=generator) / 8).to(CUDA)
        self.table = torch.randn(rows, generator=generator).to(CUDA)
        self.first = torch.randn(4, 8, 8, 8, generator=generator).to(CUDA)
        self.x, self.step = self.first.clone(), torch.zeros(1, dtype=torch.int64, device=CUDA)
        self.highest = torch.zeros_like(self.step)

    def body(self) -> None:
        out = self.network(self.x) + (self.x.flatten(2) @ self.mix).view_as(self.x)
        self.x.mul_(0.9).add_(torch.tanh(out) * self.table.index_select(0, self.step))
        torch.maximum(self.highest, self.step, out=self.highest)
        self.step += 1

    def reset(self) -> None:
        self.x.copy_(self.first)
        self.step.zero_()

    def plain(self, count: int) -> Tensor:
        """The state after `count` steps that no graph runs, in the thread and with the algorithms of a capture."""
        self.reset()
        with tuned():
            for _ in range(count):
                self.body()
        return self.x.clone()


@pytest.fixture
def chain() -> Chain:
    return Chain()


def new_stream() -> torch.cuda.Stream:
    """A stream on which nothing is captured: torch has 32, which it hands out in turn."""
    return next(s for s in (torch.cuda.Stream() for _ in range(8)) if s not in captured._sides.values())


def usable(mode: str) -> str:
    reason = why_not(mode, CUDA)
    if reason is not None:
        pytest.skip(f"mode {mode!r}: {reason}")
    return mode


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_plain_bits(mode: str, chain: Chain) -> None:
    captured = CapturedBody(chain.body, chain.step, mode=usable(mode), unroll=8, reset=chain.reset)
    assert (captured.mode, captured.measured) == (mode, {})
    assert captured.captures == (2 if mode == "unrolled" else 1)
    assert torch.equal(chain.x, chain.first), "reset is called last"
    assert int(chain.step) == 0
    for count in (0, 1, 7, 8, 9, 24, 1000):
        expected = chain.plain(count)
        chain.reset()
        captured.advance(count)
        assert int(chain.step) == count
        assert torch.equal(chain.x, expected), f"{count} steps"


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_advances_follow_each_other(mode: str, chain: Chain) -> None:
    captured = CapturedBody(chain.body, chain.step, mode=usable(mode), unroll=4, reset=chain.reset)
    expected = chain.plain(17)
    chain.reset()
    for count in (3, 5, 0, 1, 8):
        captured.advance(count)
    assert torch.equal(chain.x, expected)


@pytest.mark.gpu
def test_auto_measures_and_chooses(chain: Chain, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastddpm"):
        captured = CapturedBody(chain.body, chain.step, reset=chain.reset)
    tried = {mode for mode in MODES if why_not(mode, CUDA) is None}
    assert set(captured.measured) == tried, caplog.text
    assert captured.mode == min(captured.measured, key=lambda mode: captured.measured[mode])
    assert all(0.1 < us < 1e5 for us in captured.measured.values())
    assert captured.captures == 2
    assert int(chain.highest) < 24, "no more than max_steps run after a reset"
    expected = chain.plain(30)
    chain.reset()
    captured.advance(30)
    assert torch.equal(chain.x, expected)


@pytest.mark.gpu
def test_few_rows(chain: Chain) -> None:
    captured = CapturedBody(chain.body, chain.step, reset=chain.reset, max_steps=5)
    assert "unrolled" not in captured.measured
    assert int(chain.highest) < 5


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_without_reset_the_step_is_put_back(mode: str, chain: Chain) -> None:
    chain.step.fill_(3)
    captured = CapturedBody(chain.body, chain.step, mode=usable(mode))
    assert int(chain.step) == 3
    captured.advance(2)
    assert int(chain.step) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_host_does_not_wait(mode: str, chain: Chain) -> None:
    captured = CapturedBody(chain.body, chain.step, mode=usable(mode), reset=chain.reset)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured.advance(11)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert int(chain.step) == 11


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_objects_take_turns(mode: str) -> None:
    chains = Chain(1), Chain(2)
    bodies = [CapturedBody(each.body, each.step, mode=usable(mode), unroll=4, reset=each.reset) for each in chains]
    expected = [each.plain(26) for each in chains]
    for each in chains:
        each.reset()
    for _ in range(2):
        for one in bodies:
            one.advance(6)
            one.advance(7)
    for each, plain in zip(chains, expected, strict=True):
        assert torch.equal(each.x, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_shared_pool(mode: str) -> None:
    pool = torch.cuda.graph_pool_handle()
    chains = Chain(1), Chain(2)
    bodies = [CapturedBody(e.body, e.step, mode=usable(mode), reset=e.reset, pool=pool) for e in chains]
    del bodies[0]
    gc.collect()
    expected = chains[1].plain(20)
    chains[1].reset()
    bodies[0].advance(20)
    assert torch.equal(chains[1].x, expected), "the memory stays as long as one of them needs it"


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_streams_in_the_order_of_calls(mode: str, chain: Chain) -> None:
    captured = CapturedBody(chain.body, chain.step, mode=usable(mode), reset=chain.reset)
    expected = chain.plain(120)
    chain.reset()
    streams = new_stream(), new_stream()
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for turn in range(6):
        with torch.cuda.stream(streams[turn % 2]):
            captured.advance(20)
    captured.advance(0)  # orders the current stream behind them
    assert torch.equal(chain.x, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_threads(mode: str) -> None:
    if mode != "auto":
        usable(mode)
    results: dict[int, tuple[Tensor, Tensor]] = {}
    errors: list[BaseException] = []
    start = threading.Barrier(2, timeout=60)

    def work(seed: int) -> None:
        try:
            with torch.cuda.stream(new_stream()):
                chain = Chain(seed)
                start.wait()
                captured = CapturedBody(chain.body, chain.step, mode=mode, reset=chain.reset)
                expected = chain.plain(100)
                chain.reset()
                for _ in range(10):
                    captured.advance(10)
                results[seed] = chain.x.cpu(), expected.cpu()
        except BaseException as error:
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors, errors
    assert set(results) == {1, 2}
    for state, expected in results.values():
        assert torch.equal(state, expected)
    assert not torch.equal(results[1][0], results[2][0])


def reserved() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_memory_returns(mode: str, chain: Chain) -> None:
    def once() -> None:
        captured = CapturedBody(chain.body, chain.step, mode=mode, reset=chain.reset)
        captured.advance(9)

    if mode != "auto":
        usable(mode)
    once()  # what libraries keep for good
    before = reserved()
    for _ in range(3):
        once()
    assert reserved() <= before


@pytest.mark.gpu
def test_memory_returns_without_the_collector(chain: Chain) -> None:
    """No cycle keeps a graph: it goes with the last reference."""
    gc.disable()
    try:
        captured = CapturedBody(chain.body, chain.step, mode="unrolled", reset=chain.reset)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        del captured
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() < before
    finally:
        gc.enable()


class Peeking(nn.Module):
    """Looks at a value on the host."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().max().clamp(min=1).item()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_body_that_looks_at_a_value(mode: str, chain: Chain) -> None:
    if mode != "auto":
        usable(mode)
    good = CapturedBody(chain.body, chain.step, mode="step", reset=chain.reset)
    before = reserved()
    bad = Chain(3)
    bad.network.insert(1, Peeking())
    stream = torch.cuda.current_stream()
    with pytest.raises(CaptureError, match=r"Tensor.item\(\) at .*test_cuda_graph.py.*Peeking.*waits for the GPU"):
        CapturedBody(bad.body, bad.step, mode=mode, reset=bad.reset)
    assert torch.cuda.current_stream() == stream
    del bad
    assert reserved() <= before
    assert torch.rand(3, device=CUDA).shape == (3,), "torch can draw"
    expected = chain.plain(10)
    chain.reset()
    good.advance(10)
    assert torch.equal(chain.x, expected), "others go on"
    again = CapturedBody(chain.body, chain.step, mode="unrolled", reset=chain.reset)
    again.advance(10)
    assert torch.equal(chain.x, expected), "and can be captured"


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_body_that_draws_from_torch(mode: str, chain: Chain, caplog: pytest.LogCaptureFixture) -> None:
    usable(mode)

    def body() -> None:
        chain.x.copy_(torch.randn_like(chain.x))
        chain.step.add_(1)

    if mode == "while":
        with pytest.raises(CaptureError, match=r"randn_like.* draws from torch's generator.*philox"):
            CapturedBody(body, chain.step, mode=mode)
        with caplog.at_level(logging.INFO, "fastddpm"):
            assert CapturedBody(body, chain.step).mode != "while"
        assert "mode 'while' is left out: torch.ops.aten.randn_like" in caplog.text
        return
    captured = CapturedBody(body, chain.step, mode=mode)
    captured.advance(1)
    first = chain.x.clone()
    captured.advance(9)
    assert not torch.equal(chain.x, first)


@pytest.mark.gpu
def test_body_that_does_not_count(chain: Chain) -> None:
    def body() -> None:
        chain.x.mul_(2)

    with pytest.raises(ValueError, match="body added 0 to step, must add 1"):
        CapturedBody(body, chain.step)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_inference_mode(mode: str, chain: Chain) -> None:
    with torch.inference_mode():
        captured = CapturedBody(chain.body, chain.step, mode=usable(mode), reset=chain.reset)
        captured.advance(3)
    captured.advance(4)
    assert int(chain.step) == 7


@pytest.mark.gpu
def test_count_and_close(chain: Chain) -> None:
    captured = CapturedBody(chain.body, chain.step, mode="step", reset=chain.reset)
    with pytest.raises(ValueError, match="count is -1, must be at least 0"):
        captured.advance(-1)
    with pytest.raises(TypeError, match="count is a float, must be an int"):
        captured.advance(1.0)  # type: ignore[arg-type]
    captured.advance(2)
    captured.close()
    captured.close()
    assert int(chain.step) == 2
    with pytest.raises(RuntimeError, match="closed"):
        captured.advance(1)


@pytest.mark.gpu
def test_tuned_sets_and_restores() -> None:
    before = torch.backends.cudnn.benchmark
    with tuned():
        assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark == before
