"""Sections `cifar10` and `celeba256`: the network alone and the whole loop, ours and others', side by side."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace

import torch
from fastddpm_kernels.conv import error_factor
from fastddpm_kernels.testing import FLOORS

from fastddpm.perf.profiling.timing import first_lines, release
from gpu.arms import OUT_OF_TIME, Arm, Group, Unavailable
from gpu.baselines import DTYPES, CompiledLoop, EagerLoop, EagerNetwork, Noise, matches
from gpu.engine import GRAPHS, SamplerLoop, make_sampler, network_alone, philox_noise
from gpu.networks import Problem, make_problem
from gpu.peers import DiffusersPipeline, Lucidrains
from gpu.results import Record, Results, Section
from gpu.timing import OutOfTime, split_time

PRECISIONS = ("fp16", "bf16", "tf32", "fp32")


@dataclass
class Plan:
    """What is measured of one architecture.

    Attributes:
        problem: its configuration's name.
        steps: batch -> steps of a loop of fastddpm. 1000 is the whole loop.
        slow_steps: batch -> steps of a loop of the others, which take many times longer.
        alone: batch -> evaluations of the network in one run, where it is timed alone.
        more: batches at which every precision and every kind of graph is measured, not only the main ones.
        check: (batch, steps) of the comparison of images.
        compile_s: seconds that compiling the step may be thought to take before one has been compiled.
        precisions: the main one first.
        most: rounds at most.
        graphs: which kinds of graph are compared and timed, of the main precision.
    """

    problem: str
    steps: dict[int, int]
    slow_steps: dict[int, int]
    alone: dict[int, int]
    more: tuple[int, ...]
    check: tuple[int, int]
    compile_s: float
    precisions: tuple[str, ...] = PRECISIONS
    most: int = 25
    graphs: tuple[str | bool, ...] = GRAPHS


PLANS = {
    "cifar10": Plan(
        "cifar10",
        steps={1: 1000, 8: 1000, 64: 200, 256: 50, 1024: 20},
        slow_steps={1: 50, 8: 50, 64: 20, 256: 10, 1024: 4},
        alone={1: 20, 8: 20, 64: 10, 256: 5, 1024: 2},
        more=(1, 8, 256),
        check=(4, 50),
        compile_s=90,
    ),
    "celeba256": Plan(
        "celeba256",
        steps={1: 100, 8: 20, 32: 10},
        slow_steps={1: 20, 8: 4, 32: 2},
        alone={1: 5, 8: 2, 32: 1},
        more=(1,),
        check=(1, 10),
        compile_s=180,
        graphs=("auto", False),
    ),
}
SMALL_PLAN = Plan(
    "small",
    steps={1: 4, 2: 4},
    slow_steps={1: 2, 2: 2},
    alone={1: 2, 2: 2},
    more=(1,),
    check=(2, 4),
    compile_s=60,
    precisions=("fp16", "fp32"),
    most=3,
    graphs=("auto", False),
)
SMALL_PLANS = {"cifar10": SMALL_PLAN, "celeba256": replace(SMALL_PLAN, steps={1: 2}, slow_steps={1: 2}, alone={1: 1})}


def plan_of(section: str, small: bool) -> Plan:
    """What a section measures."""
    return (SMALL_PLANS if small else PLANS)[section]


def finished(results: Results, section: str, small: bool, compile_batches: tuple[int, ...]) -> bool:
    """Whether a section needs no further run, the batch sizes that are to be compiled for included."""
    groups = results.sections.get(section, {}).get("groups", {})
    wanted = [f"compiled batch {batch}" for batch in compile_batches if batch in plan_of(section, small).steps]
    return results.finished(section) and all(groups.get(group) == "done" for group in wanted)


def run(section: Section, device: torch.device, small: bool, compile_batches: tuple[int, ...]) -> None:
    """Checks images first, then times groups of arms; the section's `problem` says what the network costs."""
    plan = plan_of(section.name, small)
    problem = make_problem(plan.problem, device)
    section.set(problem=problem.describe())
    groups = [f"loop batch {batch}" for batch in plan.steps] + [f"network batch {batch}" for batch in plan.alone]
    compiled = [batch for batch in compile_batches if batch in plan.steps]
    groups += [f"compiled batch {batch}" for batch in compiled]
    weights = {name: _weight(name, plan) for name in groups if not section.has(name)}
    wrong = check_images(section, problem, plan)
    compile_s = plan.compile_s
    while weights:
        name = next(iter(weights))
        kind, batch = name.split(" batch ")
        seconds = split_time(section.left(), weights)[name]
        weights.pop(name)
        if kind == "compiled":
            seconds = section.left()  # all of it: compiling cannot be done in part
        fields, derive = {"what": kind, "problem": plan.problem}, None if kind == "network" else _images_per_second
        most = min(plan.most, 8) if kind == "compiled" else plan.most
        group = Group(section, name, device, seconds, fields=fields, derive=derive, most=most)
        if kind == "loop":
            arms = loop_arms(problem, plan, int(batch), wrong)
        elif kind == "network":
            arms = network_arms(problem, plan, int(batch), wrong)
        else:
            arms = compiled_arms(problem, plan, int(batch), wrong, compile_s, first=int(batch) == compiled[0])
        group.run(arms)
        if kind == "compiled":
            torch._dynamo.reset()
            release(device)
            arm = f"torch.compile {plan.precisions[0]}"
            taken = [float(r["build_s"]) for r in section.records(group=name, arm=arm) if "build_s" in r]
            compile_s = max(1.2 * taken[0], 20.0) if taken else compile_s
    _note_not_compiled(section, plan, compiled, device)
    section.close()


def _weight(group: str, plan: Plan) -> float:
    kind, batch = group.split(" batch ")
    if kind == "loop":
        return 4.0 if int(batch) in plan.more else 2.0
    return 3.0 if kind == "compiled" else 0.6


def _images_per_second(record: Record, seconds: float) -> None:
    """Of a whole loop of 1000 steps."""
    record["images_per_s_1000"] = record["batch"] / (1000 * seconds)


def check_images(section: Section, problem: Problem, plan: Plan) -> dict[str, str]:
    """Compares images after a few steps with float64 eager torch at equal noise: every precision, every kind of graph.

    The bound is the repository's for kernels: the dtype's floor or twice what eager torch loses in that precision, and
    in float32 on a CPU, where convolutions are Winograd's, what these lose besides (`conv.error_factor`).

    Returns:
        What is wrong, by the name of the arm that must not be timed then.
    """
    wrong: dict[str, str] = {}
    batch, steps = plan.check
    cuda = problem.device.type == "cuda"
    noise = philox_noise(problem, batch)
    images = functools.cache(lambda precision: _images(problem, precision, plan, noise))
    for precision in plan.precisions:
        if precision == "tf32" and not cuda:
            continue
        graphs = plan.graphs if precision == plan.precisions[0] else ("auto",)
        for graph in graphs:
            name = arm_name(precision, graph)
            record = {
                "group": "images",
                "arm": name,
                "what": "images",
                "problem": plan.problem,
                "batch": batch,
                "steps": steps,
                "dtype": precision,
                "settings": {"cuda_graph": graph},
            }
            try:
                if section.left() < 5:
                    raise OutOfTime("5 s")
                got = make_sampler(problem, precision, steps, graph).sample(batch, seed=0)
                # A TF32 product has the eleven bits of a float16 one.
                floor = FLOORS[torch.float16 if precision == "tf32" else DTYPES[precision]]
                factor = 2 * error_factor("winograd4") if precision == "fp32" and not cuda else 2.0
                found = matches(got, images("fp64"), images(precision), floor, factor)
                found["rms_to_float32"] = float((got - images("fp32")).double().square().mean().sqrt())
            except OutOfTime:
                record |= {"status": "not run", "reason": OUT_OF_TIME}
                wrong[name] = f"{OUT_OF_TIME} (its images were not compared)"
            except Unavailable as error:
                record |= {"status": "unavailable", "reason": str(error)}
            except Exception as error:
                record |= {"status": "failed", "error": first_lines(error)}
                wrong[name] = f"its images could not be compared: {first_lines(error, 1)}"
            else:
                record |= {"status": "ok" if found["ok"] else "failed", "errors": found}
                if not found["ok"]:
                    record["error"] = (
                        f"rms error {found['rms']:.3g} (bound {found['bound_rms']:.3g}), "
                        f"max {found['max']:.3g} (bound {found['bound_max']:.3g})"
                    )
                    wrong[name] = f"its images are wrong: {record['error']}"
            section.add(record)
    release(problem.device)
    return wrong


def _images(problem: Problem, precision: str, plan: Plan, noise: Noise) -> torch.Tensor:
    """Images of the eager loop, in float64 as the truth."""
    dtype = torch.float64 if precision == "fp64" else DTYPES[precision]
    batch, steps = plan.check
    return EagerLoop(problem, dtype, batch, steps, noise=noise, allow_tf32=precision == "tf32")()


def arm_name(precision: str, graph: str | bool) -> str:
    """The name of one of our arms."""
    return f"fastddpm {precision}" + {"auto": "", False: " plain"}.get(graph, f" {graph}")


def loop_arms(problem: Problem, plan: Plan, batch: int, wrong: dict[str, str]) -> list[Arm]:
    """Arms of the whole loop, the most telling first, since time may run out."""
    steps, slow = plan.steps[batch], plan.slow_steps[batch]
    more = batch in plan.more
    main = plan.precisions[0]

    def ours(precision: str, graph: str | bool) -> Arm:
        name = arm_name(precision, graph)
        count = steps if graph is not False else min(steps, 4 * slow)
        return Arm(
            name,
            lambda: SamplerLoop(problem, precision, batch, count, graph),
            steps=count,
            batch=batch,
            dtype=precision,
            settings={"cuda_graph": graph},
            unchecked=wrong.get(name),
        )

    def eager(name: str, precision: str, **options: bool) -> Arm:
        return Arm(
            name,
            lambda: EagerLoop(problem, DTYPES[precision], batch, slow, **options),
            steps=slow,
            batch=batch,
            dtype=precision,
            settings={**options, "cudnn.benchmark": True},
        )

    arms = [
        ours(main, "auto"),
        Arm(
            "DDPMPipeline",
            lambda: DiffusersPipeline(problem, batch, slow),
            steps=slow,
            batch=batch,
            dtype="fp32",
            settings={"call": "pipe(batch_size, num_inference_steps)", "flags": "torch's defaults"},
        ),
        eager(f"eager {main} channels-last", main, channels_last=True),
        eager("eager fp32", "fp32"),
    ]
    arms += [ours(main, graph) for graph in plan.graphs if graph != "auto" and more]
    arms += [ours(precision, "auto") for precision in plan.precisions[1:] if more]
    if problem.device.type == "cuda":
        arms.append(eager("eager tf32", "tf32", allow_tf32=True))
    # Linear attention and a softmax over all pixels at the innermost level: its default network is not meant for
    # large images.
    if problem.shape[1] <= 64:
        arms.append(
            Arm(
                "denoising_diffusion_pytorch",
                lambda: Lucidrains(problem, batch, slow, dim=16 if problem.name == "small" else 64),
                steps=slow,
                batch=batch,
                dtype="fp32",
                settings={"call": "GaussianDiffusion(Unet(dim)).sample(batch_size)", "note": "another network"},
            )
        )
    return arms


def network_arms(problem: Problem, plan: Plan, batch: int, wrong: dict[str, str]) -> list[Arm]:
    """Arms of the network alone."""
    repeats = plan.alone[batch]
    main = plan.precisions[0]
    arms = [
        Arm(
            f"fastddpm {precision}",
            lambda precision=precision: network_alone(problem, precision, batch, repeats),
            steps=repeats,
            batch=batch,
            dtype=precision,
            settings={"graph": problem.device.type == "cuda"},
            unchecked=wrong.get(arm_name(precision, "auto")),
        )
        for precision in (main, "fp32")
    ]
    for name, precision, options in (
        (f"eager {main} channels-last", main, {"channels_last": True}),
        ("eager fp32", "fp32", {}),
        ("eager tf32", "tf32", {"allow_tf32": True}),
    ):
        if precision == "tf32" and problem.device.type != "cuda":
            continue
        arms.append(
            Arm(
                name,
                lambda precision=precision, options=options: EagerNetwork(
                    problem, DTYPES[precision], batch, repeats, **options
                ),
                steps=repeats,
                batch=batch,
                dtype=precision,
                settings=dict(options),
            )
        )
    return arms


def compiled_arms(
    problem: Problem, plan: Plan, batch: int, wrong: dict[str, str], compile_s: float, *, first: bool
) -> list[Arm]:
    """Arms beside torch.compile: ours again, so that the ratio comes from one interleaved run."""
    steps, slow, main = plan.steps[batch], plan.slow_steps[batch], plan.precisions[0]
    steps = min(steps, 4 * slow)
    arms = [
        Arm(
            f"torch.compile {main}",
            lambda: CompiledLoop(problem, DTYPES[main], batch, steps),
            steps=steps,
            batch=batch,
            dtype=main,
            settings={"options": "max-autotune and more, see COMPILE_OPTIONS", "graph": "one step, replayed"},
            build_s=compile_s,
        ),
        Arm(
            f"fastddpm {main}",
            lambda: SamplerLoop(problem, main, batch, steps, "auto"),
            steps=steps,
            batch=batch,
            dtype=main,
            settings={"cuda_graph": "auto"},
            unchecked=wrong.get(f"fastddpm {main}"),
        ),
    ]
    if first:
        arms.append(
            Arm(
                "DDPMPipeline compiled",
                lambda: DiffusersPipeline(problem, batch, slow, compiled="reduce-overhead"),
                steps=slow,
                batch=batch,
                dtype="fp32",
                settings={"compile": "mode='reduce-overhead', fullgraph=True"},
                build_s=40,
            )
        )
    return arms


def _note_not_compiled(section: Section, plan: Plan, compiled: list[int], device: torch.device) -> None:
    others = [batch for batch in plan.steps if batch not in compiled and not section.has(f"compiled batch {batch}")]
    section.set(not_compiled=others, seconds_at_end=round(time.monotonic() - section.started, 1))
