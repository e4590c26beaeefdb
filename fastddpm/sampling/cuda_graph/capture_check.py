"""Find the operation in a body that a CUDA graph cannot hold, and where it is called; and the error for it.

A graph is a list of device work with fixed shapes and addresses. The host sees none of its results. So a graph cannot
hold an operation that brings a value, a shape or an error flag to the host, or data from ordinary host memory to the
device (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

import contextlib
import linecache
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CaptureError(RuntimeError):
    """A CUDA graph cannot hold a body, or this machine cannot run it in the mode asked for."""


# What an operation does that a graph cannot do, and what to use instead.
_VALUE = "waits for the GPU to bring a value to the host", "keep it in a tensor on the device (torch.where, multiply)"
_SHAPE = "waits for the GPU to learn the shape of its result", "use an operation whose shapes are fixed (torch.where)"
_TO_HOST = "copies from the device to the host", "leave the tensor on the device, or copy it after the sampling"
_TO_DEVICE = "copies from ordinary host memory to the device", "make the tensor on the device once, before the sampling"
_WAITS = "waits for the GPU", "leave it out: work on one stream is in order"
_RANDOM = (
    "draws from torch's generator, whose state the host advances",
    "use fastddpm_kernels.philox, or run it without a WHILE node",
)

_OPERATIONS = {
    "aten::_local_scalar_dense": _VALUE,
    "aten::is_nonzero": _VALUE,
    "aten::equal": _VALUE,
    "aten::allclose": _VALUE,
    "aten::_linalg_check_errors": _VALUE,
    "aten::nonzero": _SHAPE,
    "aten::masked_select": _SHAPE,
    "aten::_unique": _SHAPE,
    "aten::_unique2": _SHAPE,
    "aten::unique_dim": _SHAPE,
    "aten::unique_consecutive": _SHAPE,
    "aten::unique_dim_consecutive": _SHAPE,
    "aten::bincount": _SHAPE,
}
_NAMES = {"aten::_local_scalar_dense": "Tensor.item()", "aten::lift_fresh": "torch.tensor()", "aten::index": "x[mask]"}
# On CPU tensors these call no operation, so only the method itself can be observed.
_METHODS = {
    torch.Tensor.cpu: "Tensor.cpu()",
    torch.Tensor.numpy: "Tensor.numpy()",
    torch.Tensor.tolist: "Tensor.tolist()",
    torch.Tensor.__array__: "Tensor.__array__()",
}


class Finding(NamedTuple):
    """One thing that a graph cannot hold.

    Attributes:
        what: the operation, by the name its caller uses.
        why, way_out: what it does, and what to do instead.
        where: file, line, code and module.
        device: the type of the device that it ran on.
    """

    what: str
    why: str
    way_out: str
    where: str
    device: str

    def __str__(self) -> str:
        return f"{self.what} {self.where} {self.why}, which a CUDA graph cannot hold: {self.way_out}"


def explain(body: Callable[[], None], *, random: bool = True) -> str | None:
    """Run `body` once and name the first thing in it that a CUDA graph cannot hold; None if nothing was found.

    It works on any device: on the CPU it tells what would fail on a GPU. `body` advances its state by one step. If it
    raises and nothing was found before, the sentence says what it raised.

    Args:
        random: whether to name, if there is nothing else, an operation that draws from torch's generator. Only a WHILE
            node cannot hold such an operation.
    """
    notes = _Notes(random)
    try:
        with _module_stack(notes), _synchronizing(notes), _Methods(notes), _Operations(notes):
            body()
    except Exception as error:
        if notes.first() is None:
            return f"the body raised {type(error).__name__}: {error}"
    found = notes.first()
    return None if found is None else str(found)


class _Notes:
    """Findings made while a body ran, and the modules that are running now."""

    def __init__(self, random: bool) -> None:
        self.random = random
        self.findings: list[Finding] = []
        self.devices: set[str] = set()
        self.modules: list[str] = []
        self.names: dict[int, str] = {}

    def add(self, what: str, reason: tuple[str, str], device: str) -> None:
        self.findings.append(Finding(what, *reason, self._where(), device))

    def first(self) -> Finding | None:
        """Return the first finding, generators last. Beside a GPU, what happens on the CPU alone does not count."""
        beside = self.devices - {"cpu"}
        findings = [finding for finding in self.findings if not beside or finding.device != "cpu"]
        drawing = [finding for finding in findings if finding.why == _RANDOM[0]]
        others = [finding for finding in findings if finding.why != _RANDOM[0]]
        return next(iter(others + drawing if self.random else others), None)

    def _where(self) -> str:
        module = f", in {self.modules[-1]}" if self.modules else ""
        frame = _caller()
        if frame is None:
            return module.removeprefix(", ")
        path = Path(frame.f_code.co_filename)
        code = linecache.getline(str(path), frame.f_lineno).strip()
        return f"at {'/'.join(path.parts[-2:])}:{frame.f_lineno}{f' (`{code}`)' if code else ''}{module}"


def _caller() -> FrameType | None:
    """Return the innermost frame that is neither torch's nor of this file."""
    inside = str(Path(torch.__file__).parent)
    frame: FrameType | None = sys._getframe()
    while frame is not None and (
        frame.f_code.co_filename.startswith((inside, "<")) or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    return frame


class _Operations(TorchDispatchMode):
    """Notes the operations that a graph cannot hold, below autograd and on all devices."""

    def __init__(self, notes: _Notes) -> None:
        super().__init__()
        self.notes = notes

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # lets compiled networks run unchanged

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        reason = _reason(func, args, kwargs, tensors)
        if "device" in kwargs and kwargs["device"] is not None:
            devices.add(torch.device(kwargs["device"]).type)
        self.notes.devices |= devices
        if reason is not None:
            name = func._schema.name
            device = next(iter(devices - {"cpu"}), "cpu")
            self.notes.add(_NAMES.get(name, name.replace("aten::", "torch.ops.aten.")), reason, device)
        return func(*args, **kwargs)


def _reason(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> tuple[str, str] | None:
    """Return why a graph cannot hold this operation, and the way out; or None."""
    name = func._schema.name
    if name in _OPERATIONS:
        return _OPERATIONS[name]
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        # One value under one mask is a masked_fill, of fixed shape.
        filled = name != "aten::index" and len(masks) == len(args[1]) == 1 and args[2].numel() == 1
        return _SHAPE if masks and not filled else None
    if name == "aten::repeat_interleave" and isinstance(args[0], Tensor) and func._overloadname == "Tensor":
        return None if kwargs.get("output_size") is not None else _SHAPE
    if name == "aten::lift_fresh":
        return _TO_DEVICE if args[0].device.type != "cpu" else None
    if name in ("aten::_to_copy", "aten::copy_", "aten::copy"):
        source = args[0] if name == "aten::_to_copy" else args[1]
        target = kwargs.get("device") if name == "aten::_to_copy" else args[0].device
        ways = source.device.type, source.device.type if target is None else torch.device(target).type
        if ways[0] != ways[1] and "cpu" in ways:
            if ways[1] == "cpu":
                return _TO_HOST
            return None if source.is_pinned() else _TO_DEVICE
    if torch.Tag.nondeterministic_seeded in func.tags and not _draws_nothing(func, args, kwargs):
        return _RANDOM
    return None


def _draws_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether this is attention without dropout, which could draw but does not."""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return False
    position = names.index("dropout_p")
    default = func._schema.arguments[position].default_value
    return (args[position] if position < len(args) else kwargs.get("dropout_p", default)) == 0


class _Methods(TorchFunctionMode):
    """Notes the methods that bring a tensor to the host."""

    def __init__(self, notes: _Notes) -> None:
        super().__init__()
        self.notes = notes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METHODS and args:
            self.notes.add(_METHODS[func], _TO_HOST, args[0].device.type)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _module_stack(notes: _Notes) -> Iterator[None]:
    """Keep `notes.modules`, the modules whose forward is running, with their names within the outermost one."""
    thread = threading.get_ident()

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() != thread:
            return
        if not notes.modules:
            notes.names = {id(child): name for name, child in module.named_modules()}
        name = notes.names.get(id(module))
        notes.modules.append(f"{type(module).__name__} {name!r}" if name else type(module).__name__)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread and notes.modules:
            notes.modules.pop()

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _synchronizing(notes: _Notes) -> Iterator[None]:
    """Note calls that wait for a device, a stream or an event; without CUDA they do nothing else."""
    thread = threading.get_ident()
    places: list[tuple[Any, str]]
    places = [(torch.cuda, "torch.cuda"), (torch.cuda.Stream, "Stream"), (torch.cuda.Event, "Event")]
    originals = [owner.synchronize for owner, _ in places]

    def noting(original: Callable[..., None], name: str) -> Callable[..., None]:
        def synchronize(*args: Any, **kwargs: Any) -> None:
            if threading.get_ident() == thread:
                notes.devices.add("cuda")
                notes.add(f"{name}.synchronize()", _WAITS, "cuda")
            if torch.cuda.is_available():
                original(*args, **kwargs)

        return synchronize

    try:
        for (owner, name), original in zip(places, originals, strict=True):
            owner.synchronize = noting(original, name)
        yield
    finally:
        for (owner, _), original in zip(places, originals, strict=True):
            owner.synchronize = original
