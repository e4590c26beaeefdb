"""Section `tune`: the fastest choices for the shapes of the CIFAR-10 architecture, and what a step gains by them.

What is found is also written beside the results file as a table, `<results>.tuned.json`, in the form in which
`fastddpm tune --into-package` writes one: as `tuned_tables/<gpu>.json` of the package, all who have that GPU use it.
The tables that there are, the user's and the package's, are neither changed nor followed here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastddpm_kernels import tuned as _tuned
from fastddpm_kernels.tuned import Choice, Key
from fastddpm_kernels.tuning import make_task, tuned_ops

from fastddpm.perf.profiling.timing import release
from fastddpm.perf.tuning.search import Outcome, tune
from fastddpm.perf.tuning.shapes import sampler_keys, training_keys
from fastddpm.perf.tuning.store import save
from fastddpm.training.objective import GaussianDiffusion
from gpu.arms import OUT_OF_TIME, Arm, Group
from gpu.engine import make_sampler, network_alone
from gpu.networks import Problem, make_problem
from gpu.results import Record, Section
from gpu.timing import split_time

STEP_S = 8.0  # for a step with and without what was found


class Plan(NamedTuple):
    """Shapes that are tuned together: of "sampling" or "training" with so many images, in a precision."""

    what: str
    batch: int
    precision: str

    @property
    def name(self) -> str:
        return f"{self.what} batch {self.batch}"


PLANS = (Plan("sampling", 64, "fp16"), Plan("sampling", 1, "fp16"), Plan("training", 64, "bf16"))
SMALL_PLANS = (Plan("sampling", 2, "fp32"), Plan("training", 2, "fp32"))


def table_path(results: Path) -> Path:
    """Where the table is written that belongs to a file of results."""
    return results.with_suffix(".tuned.json")


def run(section: Section, device: torch.device, small: bool) -> None:
    """Searches, for each plan in its share of the time. A shape that an earlier run has measured is not searched."""
    ops = tuned_ops(device)
    if not ops:
        section.close("skipped", reason=f"nothing has choices on {device}")
        return
    path = table_path(section.results.path)
    if not section.data["groups"]:
        path.unlink(missing_ok=True)  # of other sources, or of a run that is not to be kept
    problem = make_problem("small" if small else "cifar10", device)
    section.set(problem=problem.describe(), table=path.name, package=_tuned.package_path(device).name)
    plans = SMALL_PLANS if small else PLANS
    for index, plan in enumerate(plans):
        seconds = split_time(section.left(), dict.fromkeys((p.name for p in plans[index:]), 1.0))[plan.name]
        _run_plan(section, problem, plan, ops, seconds, path)
        release(device)
    section.close()


def _run_plan(
    section: Section, problem: Problem, plan: Plan, ops: tuple[str, ...], seconds: float, path: Path
) -> None:
    device, sampling = problem.device, plan.what == "sampling"
    with _tuned.using(device, {}):
        keys = shapes(problem, plan, ops)
    missing = {key: calls for key, calls in keys.items() if not section.has(group_of(plan, key, device))}

    def done(outcome: Outcome) -> None:
        save([outcome], device, path)
        section.add(record_of(plan, outcome))
        section.close_group(f"{plan.name}: {outcome.title}")

    if missing:
        tune(missing, device, max(seconds - (STEP_S if sampling else 0), seconds / 2), done=done)
    if sampling and path.is_file():
        name = f"{plan.name}: step"
        if missing:
            section.data["groups"].pop(name, None)  # what there is is of fewer shapes
        found = _tuned.read(path, device).entries
        arms = {"heuristics": {}, "tuned": {key: found.get(key) for key in keys}}
        _time_steps(section, problem, plan, name, arms)


def shapes(problem: Problem, plan: Plan, ops: tuple[str, ...]) -> dict[Key, int]:
    """How often a step of a plan runs each shape."""
    if plan.what == "sampling":
        precision = {"fp16": "float16", "fp32": "float32"}[plan.precision]
        return sampler_keys(make_sampler(problem, plan.precision, 3, False), plan.batch, ops, precision)
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    diffusion = GaussianDiffusion(problem.unet, problem.schedule)
    return training_keys(diffusion, (plan.batch, *problem.shape), None, problem.device, ops, dtype)


def group_of(plan: Plan, key: Key, device: torch.device) -> str:
    """The group of a shape's record: each its own, so that a later run goes on where this one ends."""
    return f"{plan.name}: {make_task(key, device).title()}"


def record_of(plan: Plan, outcome: Outcome) -> Record:
    """What became of a shape. `choice` None: the heuristics' is the best."""
    record: Record = {
        "group": f"{plan.name}: {outcome.title}", "arm": "search", "what": "tune", "batch": plan.batch,
        "plan": plan.name, "op": outcome.key.op, "dtype": str(outcome.key.dtype).removeprefix("torch."),
        "shape": outcome.key.named(), "calls": outcome.calls, "heuristic": outcome.heuristic, "tried": outcome.tried,
        "refused": len(outcome.refused),
    }  # fmt: skip
    if outcome.done:
        best = outcome.heuristic_us if outcome.winner is None else outcome.winner_us
        times = {"heuristic_us": round(outcome.heuristic_us, 3), "tuned_us": round(best, 3)}
        return record | {"status": "ok", "choice": outcome.winner, **times}
    if outcome.status == "out of time":
        return record | {"status": "not run", "reason": OUT_OF_TIME}
    return record | {"status": "failed", "error": outcome.status}


def _time_steps(
    section: Section, problem: Problem, plan: Plan, name: str, arms: dict[str, dict[Key, Choice | None]]
) -> None:
    """The network alone, by the heuristics' choices and by those that were found, in turn."""
    repeats = 10 if problem.device.type == "cuda" else 1

    def build(choices: dict[Key, Any]) -> Callable[[], object]:
        with _tuned.using(problem.device, choices):
            return network_alone(problem, plan.precision, plan.batch, repeats)

    group = Group(section, name, problem.device, min(STEP_S, max(section.left(), 0.0)), fields={"what": "tuned step"})
    group.run(
        [Arm(arm, partial(build, choices), repeats, plan.batch, plan.precision) for arm, choices in arms.items()]
    )
