"""How long each layer of a network takes, on the buffers and in the order of a sampling step.

A frozen network is timed by its instructions, any other by its leaf modules. On the CPU the layers of a whole
evaluation are timed as they run. On CUDA each is replayed many times from a graph of its own, without the gaps of
launching; what it reads again may then come from the cache, where a step would read memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastddpm.networks.frozen.instructions import Instruction
from fastddpm.networks.network import BoundNetwork, Network
from fastddpm.networks.precision import tf32
from fastddpm.perf.profiling.timing import capture, spread, synchronize, timed
from fastddpm.sampling.cuda_graph import tuned

REPEATS = 20  # of an instruction, in a graph
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Layer:
    """One layer and its times.

    Attributes:
        name: in the network.
        kind: "conv", "norm", "pointwise", "attention", "residual", "time" or "other".
        size: (height, width) of what it writes, None if it is no image.
        kernels: kernels that it launches on CUDA; 0 where that is not known.
        flops, bytes: as `frozen.instructions.Instruction` has them.
        seconds: of every round.
    """

    name: str
    kind: str
    size: tuple[int, int] | None
    kernels: int
    flops: int
    bytes: int
    seconds: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As it is written: times as `timing.spread`, in microseconds."""
        size = None if self.size is None else list(self.size)
        counts = {"kernels": self.kernels, "flops": self.flops, "bytes": self.bytes}
        return {"name": self.name, "kind": self.kind, "size": size, **counts, "us": spread(self.seconds)}


@dataclass
class Evaluation:
    """A network on buffers of its own, at the state in which a loop calls it.

    Attributes:
        network: what is evaluated.
        inputs: [N, C, ...], normal random numbers.
        bound: the network on `inputs`.
        step: int64 [1], the row that is evaluated.
        precision: of the network, by name, or None where that is not known.
    """

    network: Network
    inputs: Tensor
    bound: BoundNetwork
    step: Tensor
    precision: str | None = None

    def __call__(self) -> Tensor:
        """One evaluation."""
        return self.bound(self.step)

    @property
    def instructions(self) -> list[Instruction]:
        """Of a frozen network; else none."""
        return getattr(self.bound, "instructions", [])

    def running(self) -> AbstractContextManager[object]:
        """Inside, it runs as the sampler's loop runs it."""
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(self.network.evaluating())
        stack.enter_context(tuned())
        if self.network.device.type == "cuda" and self.precision in ("float32", "tf32"):
            stack.enter_context(tf32(self.precision == "tf32"))
        return stack


def evaluation(
    network: Network, shape: Sequence[int], timesteps: Tensor, labels: Tensor | None = None,
    precision: str | None = None, *, self_condition: bool = False,
) -> Evaluation:  # fmt: skip
    """A network on buffers for a batch.

    Args:
        network: a sampler's.
        shape: [N, C, ...] of a batch.
        timesteps: int64 [S], those of the sampler's table.
        labels: int64 [N], where the network has classes.
        precision: its name, for what float32 products are rounded to.
        self_condition: whether it reads the x0 predicted before, as a further argument or as further channels.
    """
    batch, channels, *size = shape
    concatenates = self_condition and not network.takes_self_condition
    inputs = network.new_input((batch, 2 * channels if concatenates else channels, *size))
    generator = torch.Generator().manual_seed(0)
    inputs.copy_(torch.randn(tuple(inputs.shape), generator=generator).to(network.device))
    more = (torch.zeros_like(inputs),) if self_condition and not concatenates else ()
    with torch.no_grad():
        bound = network.bind(inputs, timesteps.to(network.device), labels, *more)
        bound.load()
    step = torch.zeros(1, dtype=torch.int64, device=network.device)
    return Evaluation(network, inputs, bound, step, precision)


def timed_network(ready: Evaluation) -> Callable[[], float]:
    """A function that times one whole evaluation; on CUDA from a graph of it."""
    device = ready.network.device
    with ready.running():
        run = capture([ready], device)
        run()

    def one_round() -> float:
        with ready.running():
            return timed(run, device)

    return one_round


def timed_layers(ready: Evaluation) -> tuple[list[Layer], Callable[[], float]]:
    """The layers of a network, and a function that times each of them once and returns the sum.

    A layer has no times before that is called. Of a network that is no module there are no layers.
    """
    device, instructions = ready.network.device, ready.instructions
    layers = [Layer(i.name, i.kind, i.size, i.kernels, i.flops, i.bytes) for i in instructions]
    with ready.running():
        ready()
        synchronize(device)
        if not instructions:
            layers, time_once = _modules(ready)
        elif device.type == "cuda":
            time_once = _replayed(ready, layers)
        else:
            time_once = _in_place(ready, layers)

    def one_round() -> float:
        with ready.running():
            time_once()
        return sum(layer.seconds[-1] for layer in layers)

    return layers, one_round


def _in_place(ready: Evaluation, layers: list[Layer]) -> Callable[[], object]:
    """Times every instruction as it runs in an evaluation."""
    device = ready.network.device

    def clocked(run: Callable[[], object], layer: Layer) -> Callable[[], object]:
        def run_and_note() -> None:
            layer.seconds.append(timed(run, device))

        return run_and_note

    def one_round() -> None:
        with _replaced(ready.instructions, [partial(clocked, layer=layer) for layer in layers]):
            ready()

    return one_round


def _replayed(ready: Evaluation, layers: list[Layer]) -> Callable[[], object]:
    """Times every instruction from a graph that holds it `REPEATS` times, captured at its turn in an evaluation."""
    device, graphs = ready.network.device, []

    def captured(run: Callable[[], object]) -> Callable[[], object]:
        def run_and_capture() -> None:
            graphs.append(capture([run] * REPEATS, device))
            run()  # where it makes its result anew, this is what later instructions read

        return run_and_capture

    with _replaced(ready.instructions, [captured] * len(layers)):
        ready()

    def one_round() -> None:
        for layer, graph in zip(layers, graphs, strict=True):
            layer.seconds.append(timed(graph, device) / REPEATS)

    return one_round


@contextmanager
def _replaced(
    instructions: list[Instruction], wrappers: Sequence[Callable[[Callable[[], object]], Callable[[], object]]]
) -> Iterator[None]:
    """Inside, each instruction is run through its wrapper."""
    originals = [instruction.run for instruction in instructions]
    for instruction, wrapper in zip(instructions, wrappers, strict=True):
        instruction.run = wrapper(instruction.run)
    try:
        yield
    finally:
        for instruction, run in zip(instructions, originals, strict=True):
            instruction.run = run


def _modules(ready: Evaluation) -> tuple[list[Layer], Callable[[], object]]:
    """Times the leaf modules of a network that is not frozen."""
    model, device = ready.network.model, ready.network.device
    if not isinstance(model, nn.Module):
        return [], lambda: None
    leaves = {name or "model": module for name, module in model.named_modules() if not list(module.children())}
    layers: dict[str, Layer] = {}
    with _hooks(leaves, partial(_count, layers)):
        ready()
    marks: list[tuple[str, Any, Any]] = []

    def clock() -> Any:
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        synchronize(device)
        return time.perf_counter()

    @contextmanager
    def note(name: str, module: nn.Module, result: list[Any]) -> Iterator[None]:
        start = clock()
        yield
        marks.append((name, start, clock()))

    def one_round() -> None:
        marks.clear()
        with _hooks({name: leaves[name] for name in layers}, note):
            ready()
        synchronize(device)
        of_round = dict.fromkeys(layers, 0.0)
        for name, start, end in marks:  # a module that is called twice counts twice
            of_round[name] += start.elapsed_time(end) / 1e3 if device.type == "cuda" else end - start
        for name, value in of_round.items():
            layers[name].seconds.append(value)

    return list(layers.values()), one_round


@contextmanager
def _count(layers: dict[str, Layer], name: str, module: nn.Module, result: list[Any]) -> Iterator[None]:
    """Counts what a leaf module does in one call, and adds it to its layer."""
    with FlopCounterMode(display=False) as counter:
        yield
    arguments, *rest = result
    if not rest or not isinstance(out := rest[0], Tensor):
        return
    tensors = [t for t in (*arguments, out, *module.parameters()) if isinstance(t, Tensor)]
    size = (out.shape[-2], out.shape[-1]) if out.ndim == 4 else None
    layer = layers.setdefault(name, Layer(name, kind_of(module), size, 0, 0, 0))
    layer.flops += int(counter.get_total_flops())
    layer.bytes += sum(t.numel() * t.element_size() for t in tensors)


def kind_of(module: nn.Module) -> str:
    """The kind of layer that a module is, in the words of a frozen network."""
    name = type(module).__name__
    if isinstance(module, _CONVS):
        return "pointwise" if set(module.kernel_size) == {1} else "conv"
    if isinstance(module, nn.Linear):
        return "pointwise"
    if "Norm" in name:
        return "norm"
    return "attention" if "attention" in name.lower() or "attend" in name.lower() else "other"


@contextmanager
def _hooks(
    modules: dict[str, nn.Module], around: Callable[[str, nn.Module, list[Any]], AbstractContextManager[None]]
) -> Iterator[None]:
    """Inside, each call of a module is within `around(name, module, [arguments, result])`."""
    open_: dict[str, tuple[AbstractContextManager[None], list[Any]]] = {}
    handles = []

    def enter(name: str, module: nn.Module, arguments: Any) -> None:
        result: list[Any] = [arguments]
        context = around(name, module, result)
        context.__enter__()
        open_[name] = context, result

    def leave(name: str, module: nn.Module, arguments: Any, out: Any) -> None:
        context, result = open_.pop(name)
        result.append(out)
        context.__exit__(None, None, None)

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(partial(enter, name)))
            handles.append(module.register_forward_hook(partial(leave, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for context, _ in open_.values():  # of a call that raised
            context.__exit__(None, None, None)
