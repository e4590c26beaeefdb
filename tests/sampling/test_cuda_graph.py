"""What can be captured and what is missing where it cannot, and the calls of a WHILE node: without a GPU."""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
import types
from typing import Any

import pytest
import torch

from fastddpm.sampling.cuda_graph import MODES, CapturedBody, CaptureError, captured, tuned, while_graph, why_not

CUDA = torch.device("cuda")


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


def test_auto_leaves_out_what_cannot_be_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
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
