"""fastddpm's side: the one place that knows how its loops are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastddpm_kernels import philox
from torch import Tensor

from fastddpm.networks.frozen import freeze
from fastddpm.perf.profiling.layers import evaluation
from fastddpm.perf.profiling.timing import capture
from fastddpm.sampling.sampler import Sampler
from gpu.arms import Unavailable
from gpu.networks import Problem

# What `Sampler` is asked for. TF32 is a precision by name, since it is no dtype of a tensor.
PRECISIONS: dict[str, torch.dtype | str] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "tf32": "tf32",
}
GRAPHS: tuple[str | bool, ...] = ("auto", "while", "unrolled", "step", False)


def make_sampler(problem: Problem, precision: str, steps: int, cuda_graph: str | bool) -> Sampler:
    """A DDPM sampler of `problem`, as diffusers' pipeline of these models is set up.

    Raises:
        Unavailable: this device or version has no such precision or graph.
    """
    if problem.device.type != "cuda" and cuda_graph not in ("auto", False):
        raise Unavailable(f"cuda_graph={cuda_graph!r} needs a GPU")
    dtype: Any = PRECISIONS[precision]
    try:
        return Sampler(
            problem.unet,
            problem.schedule,
            num_inference_steps=steps,
            variance_type="fixed_large",
            dtype=dtype,
            cuda_graph=cuda_graph,
            device=problem.device,
        )
    except ValueError as error:
        # A setting that is not supported here is said so by its name; anything else is a failure.
        if str(error).startswith(("cuda_graph", "dtype")):
            raise Unavailable(str(error)) from None
        raise


class SamplerLoop:
    """A whole loop of fastddpm: `steps` steps on `batch` images of seed 0."""

    def __init__(self, problem: Problem, precision: str, batch: int, steps: int, cuda_graph: str | bool) -> None:
        self.sampler = make_sampler(problem, precision, steps, cuda_graph)
        self.batch = batch

    def __call__(self) -> Tensor:
        return self.sampler.sample(self.batch, seed=0)

    def report(self) -> dict[str, Any]:
        """What was captured, as far as the sampler tells."""
        return plain(self.sampler.graph_report())


def network_alone(problem: Problem, precision: str, batch: int, repeats: int) -> Callable[[], object]:
    """`repeats` evaluations of the network as the loop runs it, without the reverse step; on a GPU from a graph."""
    sampler = make_sampler(problem, precision, 10, False)
    name = {"fp32": "float32", "tf32": "tf32"}.get(precision)
    ready = evaluation(sampler.network, (batch, *problem.shape), sampler.table.timesteps, precision=name)
    with ready.running():
        replay = capture([ready] * repeats, problem.device)

    def run() -> None:
        with ready.running():
            replay()

    return run


def described_program(problem: Problem, dtype: torch.dtype, batch: int) -> dict[str, Any]:
    """Kernels, operations and bytes of one evaluation of the frozen network, as it counts them without running."""
    frozen = freeze(problem.unet, [0], dtype, problem.device)
    instructions = frozen.bind(frozen.new_input((batch, *problem.shape))).instructions
    counted = {name: sum(getattr(i, name) for i in instructions) for name in ("kernels", "flops", "bytes")}
    return {"instructions": len(instructions), **counted}


def philox_noise(problem: Problem, batch: int) -> Callable[[int], Tensor]:
    """The noise that fastddpm draws for seed 0: of row i of the table, and for i = -1 the state it starts from."""
    keys = philox.sample_keys([0] * batch, range(batch), problem.device)

    def noise(index: int) -> Tensor:
        step, stream = (0, philox.STREAM_INITIAL) if index < 0 else (index, philox.STREAM_STEP)
        return philox.normal(keys, problem.shape, step=step, stream=stream, backend="eager")

    return noise


def plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
