"""A CUDA device that is not there, for a process of its own (`fake_cuda_runs`): `install` changes torch for good.

Its tensors say `cuda:0` and hold the CPU's memory. Triton's kernels run through the interpreter, cuDNN's convolutions
as torch's. As on a GPU

- an operation on tensors of two devices, or a kernel given a tensor of the CPU, raises;
- cuDNN is given channels-last tensors at addresses that 16 divides;
- while a graph is captured, whatever brings a value to the host or data from it raises; a graph replays its operations.

What would make the host wait for the device is noted in `waits`, and every launch of a Triton kernel in `launches`.
With `computes` False kernels are launched but not run, and new memory is zero: the interpreter takes seconds where the
host's work takes none.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
computes = True
waits: list[str] = []
launches: list[tuple[str, str]] = []  # the kernel, and what it is compiled for
_locked: set[int] = set()  # addresses of the host's page-locked memory
_graph: list[Callable[[], object]] | None = None  # the operations of the capture under way

_TO_HOST = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"}
_ACROSS = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}
_INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}  # takes indices of the CPU


class OnDevice(Tensor):
    """A tensor on the device: `inner` is its memory."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=CUDA, requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __getitem__(self, index: Any) -> OnDevice:
        own, where = self.inner, tree_map(_inner, index)
        with _disable_current_modes():
            out = own[where]
            if out.untyped_storage().data_ptr() != own.untyped_storage().data_ptr():
                _record(lambda: out.copy_(own[where]))
        return OnDevice(out)

    def __setitem__(self, index: Any, value: Any) -> None:
        own, where, values = self.inner, tree_map(_inner, index), _inner(value)
        if isinstance(value, Tensor) and not isinstance(value, OnDevice):
            _wait("a copy from the host")

        def put() -> None:
            with _disable_current_modes():
                own[where] = values

        put()
        _record(put)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
        return torch.ops.aten.contiguous.default(self, memory_format=memory_format)

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Any:
        return torch.ops.aten.copy_.default(self, source, non_blocking)

    def isfinite(self) -> Any:  # torch's own asks the driver, as does its ~
        return (self == self) & (self.abs() != float("inf"))

    def __invert__(self) -> Any:
        return torch.ops.aten.bitwise_not.default(self)

    def nonzero(self, **_: Any) -> Any:
        _wait("Tensor.nonzero")
        return OnDevice(self.inner.nonzero())

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        _wait("Tensor.cpu")
        return self.inner.clone()

    def item(self) -> Any:
        _wait("Tensor.item")
        return self.inner.item()

    def tolist(self) -> Any:
        _wait("Tensor.tolist")
        return self.inner.tolist()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def is_pinned(self, *_: Any) -> bool:
        return False

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"


class _Mode(TorchDispatchMode):
    """Sees the operations that make tensors on the device from none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnDevice) else x


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _record(operation: Callable[[], object]) -> None:
    if _graph is not None:
        _graph.append(operation)


def _wait(what: str) -> None:
    place = _place()
    waits.append(f"{what} at {place}")
    if _graph is not None:
        raise RuntimeError(f"{what} while a graph is captured, at {place}")


def _place() -> str:
    """Return the innermost line of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        if "fastddpm" in frame.f_code.co_filename and "/tests/" not in frame.f_code.co_filename:
            return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "a test"


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the memory of its operands, with the checks of a device."""
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    own = [leaf for leaf in tensors if isinstance(leaf, OnDevice)]
    device = kwargs.get("device")
    if not own and not _is_cuda(device):
        if not kwargs.pop("pin_memory", False):
            return func(*args, **kwargs)
        made = func(*args, **kwargs)
        _locked.add(made.data_ptr())
        return made
    others = [leaf for leaf in tensors if not isinstance(leaf, OnDevice) and leaf.ndim > 0]
    if own and others and name not in _ACROSS | _INDEXING:
        raise RuntimeError(f"{name} has operands on cuda:0 and on cpu, at {_place()}")
    if name in _TO_HOST:
        _wait(name)
    to_host = name == "aten::_to_copy" and device is not None and not _is_cuda(device)
    waits_not = name == "aten::copy_" and len(args) > 2 and args[2] and args[1].data_ptr() in _locked
    if to_host or (name in _ACROSS and others and not waits_not):
        _wait(name)
    if name == "aten::_fused_sdp_choice":
        return 0
    if name.startswith("fastddpm::"):
        from torch._library.custom_ops import OPDEFS

        with _Mode():
            return OPDEFS[f"{name}"]._init_fn(*args, **kwargs)
    inner_args = tree_map(_inner, args)
    inner_kwargs = {key: tree_map(_inner, value) for key, value in kwargs.items()}
    if _is_cuda(device):
        inner_kwargs["device"] = torch.device("cpu")
    call = _REPLACED.get(func, func)
    if not computes and name.partition("::")[2].startswith(("empty", "new_empty")):
        call = functools.partial(_zeros, func)
    out = call(*inner_args, **inner_kwargs)
    results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    written = {id(leaf.inner): leaf for leaf in own}
    memory = {leaf.inner.untyped_storage().data_ptr() for leaf in own}

    def again() -> None:
        for old, new in zip(results, tree_leaves(call(*inner_args, **inner_kwargs)), strict=True):
            if id(old) not in written:
                old.copy_(new)

    views = all(leaf.untyped_storage().data_ptr() in memory and id(leaf) not in written for leaf in results)
    if (not views or not results) and "empty" not in name:
        _record(again)

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, OnDevice) or to_host:
            return x
        return written.get(id(x)) if id(x) in written else OnDevice(x)

    return tree_map(wrapped, out)


def _zeros(func: Any, *args: Any, **kwargs: Any) -> Tensor:
    return func(*args, **kwargs).zero_()


def _check_cudnn(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.is_contiguous(memory_format=torch.channels_last), f"cuDNN would copy {tuple(x.shape)} {x.stride()}"
        assert x.data_ptr() % 16 == 0, f"{tuple(x.shape)} is not aligned"
        assert x.dtype == tensors[0].dtype


def _convolve(x: Tensor, w: Tensor, pad: Any, stride: Any, dilation: Any, groups: int, *_: Any, out: Tensor) -> Tensor:
    _check_cudnn(x, w, out)
    y = F.conv2d(x.float(), w.float(), None, stride, pad, dilation, groups)
    assert y.shape == out.shape, (y.shape, out.shape)
    return out.copy_(y)


def _transpose(
    x: Tensor, w: Tensor, pad: Any, out_pad: Any, stride: Any, dilation: Any, groups: int, *_: Any
) -> Tensor:
    _check_cudnn(x, w)
    y = F.conv_transpose2d(x.float(), w.float(), None, stride, pad, out_pad, groups, dilation)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


_REPLACED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.cudnn_convolution.out: _convolve,
    torch.ops.aten.cudnn_convolution_transpose.default: _transpose,
}


class _Stream:
    count = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        _Stream.count += 1
        self.cuda_stream, self.device, self.device_index = _Stream.count, CUDA, 0

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None:
        _wait("Stream.synchronize")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return self.cuda_stream


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        _wait("Event.synchronize")

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Event) -> float:
        return max((end.at - self.at) * 1e3, 1e-3)


class Graph:
    """A captured graph; `made` has every graph by the number that stands for its address."""

    made: dict[int, Graph] = {}  # noqa: RUF012 (one for all)

    def __init__(self, keep_graph: bool = False) -> None:
        self.operations: list[Callable[[], object]] = []

    def replay(self) -> None:
        with _disable_current_modes():
            for operation in self.operations:
                operation()

    def raw_cuda_graph(self) -> int:
        Graph.made[id(self)] = self
        return id(self)

    def reset(self) -> None:
        self.operations = []

    def pool(self) -> tuple[int, int]:
        return 0, 1


class WhileGraph:
    """Stands for `while_graph.WhileGraph`: repeats its body as often as a launch says."""

    def __init__(self, body: int, device: torch.device) -> None:
        self._body = Graph.made[body]

    def launch(self, count: int, stream: Any) -> None:
        for _ in range(count):
            self._body.replay()

    def close(self) -> None: ...


_default, _here = _Stream(), threading.local()


def _current_stream(device: Any = None) -> _Stream:
    return getattr(_here, "stream", _default)


@contextlib.contextmanager
def _on_stream(stream: _Stream | None) -> Iterator[None]:
    before = _current_stream()
    _here.stream = stream or before
    try:
        yield
    finally:
        _here.stream = before


@contextlib.contextmanager
def _capture(graph: Graph, pool: Any = None, stream: _Stream | None = None, **_: Any) -> Iterator[None]:
    global _graph
    assert stream != _default, "a capture is on a stream of its own"
    _graph = []
    try:
        with _on_stream(stream or _Stream()):
            yield
    finally:
        graph.operations, _graph = _graph, None


class _Nothing:
    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _Generator:
    def get_offset(self) -> int:
        return 0

    def get_state(self) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)


def install() -> None:
    """Put the device in the place of torch's, for the rest of the process.

    Triton runs through its interpreter, or the caller has replaced its driver.
    """
    about = types.SimpleNamespace(
        multi_processor_count=4, warp_size=32, major=9, minor=0, name="a pretended GPU", total_memory=140 << 30,
        L2_cache_size=60 << 20, gcnArchName="", shared_memory_per_block_optin=232448, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
    )  # fmt: skip
    places: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "get_device_properties": lambda device=None: about,
        "get_device_capability": lambda device=None: (about.major, about.minor),
        "get_device_name": lambda device=None: about.name,
        "current_stream": _current_stream,
        "default_stream": lambda device=None: _default,
        "stream": _on_stream,
        "Stream": _Stream,
        "Event": _Event,
        "CUDAGraph": Graph,
        "graph": _capture,
        "graph_pool_handle": lambda: (0, 1),
        "synchronize": lambda device=None: _wait("torch.cuda.synchronize"),
        "device": _Nothing,
        "device_of": _Nothing,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (100 << 30, about.total_memory),
        "memory_reserved": lambda device=None: 1 << 30,
        "memory_allocated": lambda device=None: 1 << 29,
        "max_memory_allocated": lambda device=None: 1 << 30,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_per_process_memory_fraction": lambda device=None: 1.0,
        "is_current_stream_capturing": lambda: _graph is not None,
        "default_generators": [_Generator()],
        "is_bf16_supported": lambda including_emulation=True: True,
        "memory_snapshot": lambda *_, **__: [],
        "manual_seed_all": lambda seed: None,
    }
    for name, value in places.items():
        setattr(torch.cuda, name, value)
    for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool"):
        setattr(torch._C, name, lambda *_: None)
    torch._C._cuda_getCurrentRawStream = lambda device=0: 1
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _on_device(torch, "tensor")
    _on_device(torch, "as_tensor")
    if triton.knobs.runtime.interpret:
        _run_kernels()
    from fastddpm.sampling.cuda_graph import captured, while_graph

    while_graph.WhileGraph = WhileGraph  # type: ignore[assignment, misc]
    while_graph.why_not = lambda device: None
    captured._STEPS, captured._ROUNDS = 2, 1
    captured.CapturedBody.__init__.__kwdefaults__["warmup"] = 1
    _Mode().__enter__()


@contextlib.contextmanager
def in_the_loop() -> Iterator[list[str]]:
    """Yield what the host waits for inside the loop's steps, after their set-up."""
    from fastddpm.sampling.runner import GraphRunner, Runner

    seen: list[str] = []
    before = {cls: cls.advance for cls in (Runner, GraphRunner)}

    def noting(advance: Callable[..., None]) -> Callable[..., None]:
        def run(self: Any, kind: Any, steps: int) -> None:
            first = len(waits)
            advance(self, kind, steps)
            seen.extend(waits[first:])

        return run

    for cls, advance in before.items():
        cls.advance = noting(advance)  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        for cls, advance in before.items():
            cls.advance = advance  # type: ignore[method-assign]


def _on_device(owner: Any, name: str) -> None:
    """Let a function that makes a tensor of the host's numbers make one on the device."""
    original = getattr(owner, name)

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if isinstance(data, OnDevice):
            return data.to(device=device, **kwargs)
        if not _is_cuda(device):
            return original(data, *args, device=device, **kwargs)
        return original(data, *args, **kwargs).to(CUDA)

    setattr(owner, name, made)


def _run_kernels() -> None:
    """Let the interpreter run kernels on the memory of the device's tensors, and no others."""
    from triton.runtime import interpreter

    original, prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang
    prepared: set[Any] = set()

    def prepare_once(fn: Any) -> Any:  # half of the interpreter's time
        if fn in prepared:
            return interpreter._LangPatchScope()
        prepared.add(fn)
        return prepare(fn)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        name = getattr(self.fn, "__name__", "?")

        def checked(x: Any) -> Any:
            if isinstance(x, Tensor) and not isinstance(x, OnDevice):
                raise RuntimeError(f"the kernel {name} is given a tensor of the CPU, at {_place()}")
            return _inner(x)

        own, named = tuple(map(checked, args)), {key: checked(value) for key, value in kwargs.items()}
        constants = {key: value for key, value in kwargs.items() if key.isupper() or key == "num_warps"}
        dtypes = [str(x.dtype) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        launches.append((name, f"{dtypes} {constants}"))

        def go() -> None:
            with _disable_current_modes():
                original(self, *own, **named)

        if computes:
            go()
            _record(go)

    interpreter.GridExecutor.__call__ = call
