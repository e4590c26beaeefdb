"""Time each layer of a network, on the buffers and in the order of a sampling step.

A frozen network is timed by its instructions, any other by its leaf modules. On the CPU each layer is timed as it runs
in a whole evaluation. On CUDA each is replayed many times from a graph of its own, without the gaps of launches. It may
then read from the cache what a step reads from memory.
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
        size: (height, width) of its result; None if that is no image.
        kernels: the number that it launches on CUDA; 0 if that is not known.
        flops, bytes: as in `frozen.instructions.Instruction`.
        seconds: one per round.
    """

    name: str
    kind: str
    size: tuple[int, int] | None
    kernels: int
    flops: int
    bytes: int
    seconds: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the layer for JSON, with its times as `timing.spread` in microseconds."""
        size = None if self.size is None else list(self.size)
        counts = {"kernels": self.kernels, "flops": self.flops, "bytes": self.bytes}
        return {"name": self.name, "kind": self.kind, "size": size, **counts, "us": spread(self.seconds)}


@dataclass
class Evaluation:
    """A network bound to buffers of its own, as a loop calls it.

    Attributes:
        network: to evaluate.
        inputs: [N, C, ...], normal random numbers.
        bound: the network on `inputs`.
        step: int64 [1], the row of the table.
        precision: of the network, by name; None if not known.
    """

    network: Network
    inputs: Tensor
    bound: BoundNetwork
    step: Tensor
    precision: str | None = None

    def __call__(self) -> Tensor:
        """Evaluate the network once."""
        return self.bound(self.step)

    @property
    def instructions(self) -> list[Instruction]:
        """The instructions of a frozen network; empty for any other."""
        return getattr(self.bound, "instructions", [])

    def running(self) -> AbstractContextManager[object]:
        """Return a context in which the network runs as in the sampler's loop."""
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
    """Bind a network to buffers for a batch.

    Args:
        network: a sampler's.
        shape: [N, C, ...] of a batch.
        timesteps: int64 [S] of the sampler's table.
        labels: int64 [N], if the network has classes.
        precision: its name, which says how float32 products are rounded.
        self_condition: whether the network also reads the last predicted x0, as an argument or as channels.
    """
    batch, channels, *size = shape
    concatenates = self_condition and not network.takes_self_condition
    inputs = network.new_input((batch, 2 * channels if concatenates else channels, *size))
    generator = torch.Generator().manual_seed(0)
    inputs.copy_(torch.randn(tuple(inputs.shape), generator=generator).to(network.device))
    before = torch.zeros_like(inputs) if self_condition and not concatenates else None
    with torch.no_grad():
        conditions = network.some_conditions(batch)
        bound = network.bind(inputs, timesteps.to(network.device), labels, before, conditions)
        bound.load()
    step = torch.zeros(1, dtype=torch.int64, device=network.device)
    return Evaluation(network, inputs, bound, step, precision)


def timed_network(ready: Evaluation) -> Callable[[], float]:
    """Return a function that times one whole evaluation, from a graph on CUDA."""
    device = ready.network.device
    with ready.running():
        run = capture([ready], device)
        run()

    def one_round() -> float:
        with ready.running():
            return timed(run, device)

    return one_round


def timed_layers(ready: Evaluation) -> tuple[list[Layer], Callable[[], float]]:
    """Return the layers of a network, and a function that times each of them once and returns the sum.

    Layers have no times before the first call. A callable that is not a module has no layers.
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
    """Return a function that times every instruction as it runs in an evaluation."""

    def clocked(index: int, run: Callable[[], object]) -> None:
        layers[index].seconds.append(timed(run, ready.network.device))

    def one_round() -> None:
        with replaced(ready.instructions, clocked):
            ready()

    return one_round


def _replayed(ready: Evaluation, layers: list[Layer]) -> Callable[[], object]:
    """Return a function that times `REPEATS` runs of every instruction from a graph, captured during an evaluation."""
    device, graphs = ready.network.device, []

    def captured(index: int, run: Callable[[], object]) -> None:
        graphs.append(capture([run] * REPEATS, device))
        run()  # an instruction may allocate its result; later ones must read this one, not the graph's

    with replaced(ready.instructions, captured):
        ready()

    def one_round() -> None:
        for layer, graph in zip(layers, graphs, strict=True):
            layer.seconds.append(timed(graph, device) / REPEATS)

    return one_round


@contextmanager
def replaced(instructions: list[Instruction], around: Callable[[int, Callable[[], object]], object]) -> Iterator[None]:
    """Run `around(index, run)` in place of each instruction's `run`."""
    originals = [instruction.run for instruction in instructions]
    for index, instruction in enumerate(instructions):
        instruction.run = partial(around, index, instruction.run)
    try:
        yield
    finally:
        for instruction, run in zip(instructions, originals, strict=True):
            instruction.run = run


def _modules(ready: Evaluation) -> tuple[list[Layer], Callable[[], object]]:
    """Return the leaf modules of a network that is not frozen as layers, and a function that times them."""
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
        for name, start, end in marks:  # a module may be called twice
            of_round[name] += start.elapsed_time(end) / 1e3 if device.type == "cuda" else end - start
        for name, value in of_round.items():
            layers[name].seconds.append(value)

    return list(layers.values()), one_round


@contextmanager
def _count(layers: dict[str, Layer], name: str, module: nn.Module, result: list[Any]) -> Iterator[None]:
    """Count the operations and bytes of one call of a leaf module, and add them to its layer."""
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
    """Return the kind of layer that a module is, as a frozen network names it."""
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
    """Wrap each call of a module in the context `around(name, module, [arguments, result])`."""
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
        for context, _ in open_.values():  # calls that raised
            context.__exit__(None, None, None)
