"""One evaluation of a U-Net on a CPU: frozen, beside the same weights in other libraries at their best, in turn.

    diffusers       UNet2DModel as it comes in float32; in lower precision channels-last, q, k and v as one product
    torch.compile   that in either precision under inductor, weights frozen; with max-autotune where it is faster
    openvino        that converted for the batch size, as OpenVINO's hint for the precision says; `pip install openvino`
    fastddpm        `fastddpm.networks.frozen.freeze`

`cpu_check.py` runs it as "step", and beside a crowd. Every arm is held against float64 first, and one that is wrong is
not timed.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial
from importlib import metadata
from itertools import product
from typing import Any, NamedTuple

import torch
from fastddpm_kernels import backend as _backend
from fastddpm_kernels.conv import error_factor
from fastddpm_kernels.testing import FLOORS
from measuring import Missing, Unavailable, matches, peer
from networks import Problem, plain_unet, predict
from torch import Tensor, nn

from cpu.floor import CPU, DTYPES, Ceilings
from fastddpm.networks.frozen import freeze
from fastddpm.perf.profiling.timing import first_lines, interleave, quantiles, release

# OpenVINO reports its import and use over the network, but not where the environment says that this is CI.
os.environ.setdefault("CI", "true")
T = 500
BASELINE = ("diffusers", "float32")  # what ratios are to
SAMPLE_SECONDS, MOST_CALLS = 0.3, 20  # of a sample: short evaluations are timed several at once
# Of inductor, all with frozen weights; the fastest is taken. Autotuning tries templates for matrix products, and the
# wrapper launches without Python.
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "freezing": {"freezing": True},
    "freezing, max-autotune": {"freezing": True, "max_autotune": True},
    "freezing, max-autotune, C++ wrapper": {"freezing": True, "max_autotune": True, "cpp_wrapper": True},
}


class Ready(NamedTuple):
    """An arm that can be called.

    Attributes:
        call: evaluates the network; what it returns may be overwritten by the next call.
        given: in words, what a reader must know to repeat it.
        compile_s: seconds of converting, compiling or folding, up to the first result; None where nothing is.
        tried: seconds of compiling and of an evaluation with each setting, or why it failed; the fastest was taken.
    """

    call: Callable[[], Tensor]
    given: str
    compile_s: float | None = None
    tried: dict[str, dict[str, Any]] | None = None


Build = Callable[[Problem, Tensor, torch.dtype], Ready]


class _Output(nn.Module):
    """A UNet2DModel that returns a tensor, of classes that stay the same."""

    def __init__(self, unet: nn.Module, labels: Tensor | None) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("labels", labels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t, class_labels=self.labels, return_dict=False)[0]


def _timesteps(x: Tensor) -> Tensor:
    return torch.full((len(x),), T)


def diffusers(problem: Problem, x: Tensor, dtype: torch.dtype) -> Ready:
    """Return the library's own module."""
    peer("diffusers")
    t, best = _timesteps(x), dtype != torch.float32
    unet = plain_unet(problem, dtype, channels_last=best, fused=best)
    own = x.to(dtype, memory_format=torch.channels_last) if best else x
    given = "channels-last, q, k and v as one product" if best else "as it comes"
    labels = problem.labels(len(x))
    return Ready(lambda: predict(unet, own, t, labels), given)


def compiled(problem: Problem, x: Tensor, dtype: torch.dtype, settings: int | None = None) -> Ready:
    """Return it under torch.compile, with the fastest of the first `settings` of `COMPILE_OPTIONS`; None for all."""
    peer("diffusers")
    if not any(map(shutil.which, ("g++", "clang++"))):
        raise Unavailable("torch.compile finds no C++ compiler")
    from torch._inductor.utils import fresh_cache

    unet = _Output(plain_unet(problem, dtype, channels_last=True, fused=True), problem.labels(len(x)))
    own, t = x.to(dtype, memory_format=torch.channels_last), _timesteps(x)
    runs: dict[str, partial[Tensor]] = {}
    tried: dict[str, dict[str, Any]] = {}
    error: Exception | None = None
    for name, options in list(COMPILE_OPTIONS.items())[:settings]:
        start = time.perf_counter()
        try:
            # Nothing is reset in between: what was compiled before would have to be compiled again, while it is timed.
            with fresh_cache(), warnings.catch_warnings():  # its own, so that the seconds are those of compiling
                warnings.simplefilter("ignore")
                run = partial(torch.compile(unet, fullgraph=True, dynamic=False, options=options), own, t)
                run()
        except Exception as wrong:  # the others may do
            error, tried[name] = wrong, {"failed": first_lines(wrong)}
        else:
            runs[name], tried[name] = run, {"compile_s": time.perf_counter() - start, "seconds": float("inf")}
    if error is not None and not runs:
        raise error
    for _, (name, run) in product(range(3), runs.items()):
        tried[name]["seconds"] = min(tried[name]["seconds"], _seconds(run))
    best = min(runs, key=lambda name: tried[name]["seconds"])
    given = f"inductor, fullgraph, static shapes, {best}; channels-last, q, k and v as one product"
    return Ready(runs[best], given, tried[best]["compile_s"], tried)


def openvino(problem: Problem, x: Tensor, dtype: torch.dtype) -> Ready:
    """Return the module converted and compiled by OpenVINO, which reads and writes memory that stays in place."""
    peer("diffusers")
    peer("openvino")
    import openvino as ov

    unet = _Output(plain_unet(problem, torch.float32, channels_last=False, fused=True), problem.labels(len(x)))
    t = _timesteps(x)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, of checks of shapes
        model = ov.convert_model(unet, example_input=(x, t), input=[tuple(x.shape), tuple(t.shape)])
    hint = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    core, threads = ov.Core(), torch.get_num_threads()
    if dtype == torch.bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("OpenVINO does not multiply bfloat16 on this CPU")
    settings = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    held = [x.contiguous().numpy(), t.numpy()]  # which the tensors do not copy
    for index, array in enumerate(held):
        request.set_input_tensor(index, ov.Tensor(array, shared_memory=True))

    def call(held: Any = held) -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    call()
    given = f"static shapes, PERFORMANCE_HINT LATENCY, precision hinted, {threads} threads; q, k and v as one product"
    return Ready(call, given, time.perf_counter() - start)


def fastddpm(problem: Problem, x: Tensor, dtype: torch.dtype) -> Ready:
    """Return the frozen U-Net, as the sampling loop runs it."""
    _backend.why_not("native", "cpu")  # builds the library, once for all, if it never was
    start = time.perf_counter()
    frozen = freeze(problem.unet, [T], dtype, CPU)
    inputs, step = frozen.new_input(x.shape), torch.zeros(1, dtype=torch.int64)
    inputs.copy_(x)
    program = frozen.bind(inputs, labels=problem.labels(len(x)))
    program.load()
    program(step)
    return Ready(lambda: program(step), f"frozen, backend {frozen.backend}", time.perf_counter() - start)


ARMS: dict[str, Build] = {"diffusers": diffusers, "torch.compile": compiled, "openvino": openvino, "fastddpm": fastddpm}


def versions() -> dict[str, str]:
    """Return the versions of the libraries that are installed."""
    found = {}
    for name in ("torch", "diffusers", "openvino"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _seconds(call: Callable[[], object], calls: int = 1) -> float:
    """Return the seconds of a call, but the first: threads of another library's runtime may still be spinning."""
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


@torch.no_grad()
def measure(
    problem: Problem,
    batch: int,
    rounds: int,
    dtypes: Sequence[str],
    arms: dict[str, Build],
    ceilings: Ceilings,
) -> list[dict[str, Any]]:
    """Return a record for every arm and dtype: "ok", "missing", "unavailable", "wrong" or "failed", and its figures.

    `seconds` (of an evaluation) and `times_as_fast` (as `BASELINE`, by rounds) are quantiles, `error` the relative one
    against float64 with its bounds, `floor` what `Ceilings.floor` returns, `reason` why there are none.
    """
    records, ready = [], {}
    for dtype, exact in results(problem, batch, dtypes).items():
        for arm, build in arms.items():
            record: dict[str, Any] = {"network": problem.name, "batch": batch, "arm": arm, "dtype": dtype}
            records.append(record)
            call = prepare(build, record, problem, exact)
            print(f"{problem.name}, batch {batch}: {arm} {dtype} " + (record.get("reason") or "is ready"), flush=True)
            if call is not None:
                calls = min(max(round(SAMPLE_SECONDS / _seconds(call)), 1), MOST_CALLS)
                ready[arm, dtype] = partial(_seconds, call, calls)
    samples: dict[str, list[float]] = {" ".join(key): [] for key in ready}
    runs = {" ".join(key): run for key, run in ready.items()}
    for name, seconds in interleave(runs, seconds=float("inf"), least=rounds, most=rounds):
        samples[name].append(seconds)
    against = samples.get(" ".join(BASELINE))
    floors = {dtype: floor_of(problem, batch, dtype, ceilings) for dtype in dtypes}
    for record in records:
        if record["status"] == "ok":
            own_samples = samples[f"{record['arm']} {record['dtype']}"]
            record["seconds"], record["floor"] = quantiles(own_samples), floors[record["dtype"]]
            pairs = None if against is None else zip(own_samples, against, strict=True)
            record["times_as_fast"] = None if pairs is None else quantiles([b / a for a, b in pairs])
    ready.clear()
    runs.clear()
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch._dynamo.reset()
    release(CPU)
    return records


def floor_of(problem: Problem, batch: int, dtype: str, ceilings: Ceilings) -> dict[str, Any]:
    """Return the floor of a step of a batch, see `Ceilings.floor`."""
    return ceilings.floor(batch * problem.flops, problem.parameters * DTYPES[dtype].itemsize, dtype)


class Results(NamedTuple):
    """An input [N, C, H, W], what the network makes of it in float64, and what eager torch makes of it in a dtype."""

    x: Tensor
    truth: Tensor
    eager: Tensor


@torch.no_grad()
def results(problem: Problem, batch: int, dtypes: Sequence[str]) -> dict[str, Results]:
    """Return what arms are held against, by dtype."""
    torch.manual_seed(0)
    x, labels = torch.randn(batch, *problem.shape), problem.labels(batch)
    exact = deepcopy(problem.unet).double()
    exact.backend = "reference"  # type: ignore[assignment]
    truth = predict(exact, x.double(), _timesteps(x), labels)
    found = {}
    for dtype in dtypes:
        own = x.to(DTYPES[dtype], memory_format=torch.channels_last)
        eager = predict(plain_unet(problem, DTYPES[dtype], channels_last=True), own, _timesteps(x), labels)
        found[dtype] = Results(x, truth, eager.clone())
    return found


def prepare(build: Build, record: dict[str, Any], problem: Problem, exact: Results) -> Callable[[], Tensor] | None:
    """Build an arm, check it, complete its record; return what evaluates it, None if it is not to be timed."""
    dtype = DTYPES[record["dtype"]]
    try:
        ready = build(problem, exact.x, dtype)
        # Winograd's convolutions lose more than the definition, and an arm may use them any number of times.
        factor = 2 * error_factor("winograd4" if dtype == torch.float32 else "winograd2")
        found = matches(ready.call(), exact.truth, exact.eager, FLOORS[dtype], factor)
    except Missing as error:
        record |= {"status": "missing", "reason": str(error)}
    except Unavailable as error:
        record |= {"status": "unavailable", "reason": str(error)}
    except Exception as error:  # whatever an arm does, the others go on
        record |= {"status": "failed", "reason": first_lines(error)}
    else:
        record |= {"given": ready.given, "compile_s": ready.compile_s, "tried": ready.tried}
        ok = found.pop("ok")
        record["error"] = found
        if ok:
            record["status"] = "ok"
            return ready.call
        bound = f"{found['bound_rms']:.1e} and {found['bound_max']:.1e}"
        reason = f"is wrong: errors {found['rms']:.1e} and {found['max']:.1e}, at most {bound}"
        record |= {"status": "wrong", "reason": reason}
    return None
