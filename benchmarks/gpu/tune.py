"""Section `tune`: the fastest choices for the shapes of the CIFAR-10 architecture.

What is found is also written beside the results file as a table, `<results>.tuned.json`, in the form in which
`fastddpm tune --into-package` writes one: as `tuned_tables/<gpu>.json` of the package, all who have that GPU use it.
The tables that there are, the user's and the package's, are neither changed nor followed here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from fastddpm_kernels import tuned
from fastddpm_kernels.tuned import Key
from fastddpm_kernels.tuning import make_task, tuned_ops
from networks import Problem, make_problem

from fastddpm import Sampler
from fastddpm.perf.profiling.timing import release
from fastddpm.perf.tuning.search import Outcome, tune
from fastddpm.perf.tuning.shapes import sampler_keys, training_keys
from fastddpm.perf.tuning.store import save
from fastddpm.training.objective import GaussianDiffusion
from gpu.results import Record, Section


class Plan(NamedTuple):
    """Shapes that are tuned together: of "sampling" or "training" with so many images, in a precision."""

    what: str
    batch: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.what} batch {self.batch}"


PLANS = (
    Plan("sampling", 64, torch.float16),
    Plan("sampling", 1, torch.float16),
    Plan("training", 64, torch.bfloat16),
)
SMALL_PLANS = (Plan("sampling", 2, torch.float32),)


def run(section: Section, device: torch.device, small: bool) -> None:
    """Search, for each plan in its share of the time. A shape that an earlier run has measured is not searched."""
    ops = tuned_ops(device)
    if not ops:
        section.close("skipped", reason=f"nothing has choices on {device}")
        return
    path = section.results.path.with_suffix(".tuned.json")
    if not section.data["records"]:
        path.unlink(missing_ok=True)  # of other sources, or of a run that is not to be kept
    section.set(table=path.name, package=tuned.package_path(device).name)
    problem = make_problem("small" if small else "cifar10", device)
    plans = SMALL_PLANS if small else PLANS
    for index, plan in enumerate(plans):
        with tuned.using(device, {}):
            keys = shapes(problem, plan, ops)
        groups = {key: f"{plan.name}: {make_task(key, device).title()}" for key in keys}
        missing = {key: calls for key, calls in keys.items() if not section.has(groups[key])}

        def done(outcome: Outcome, plan: Plan = plan) -> None:
            save([outcome], device, path)
            section.add(record_of(plan, outcome))

        if missing:
            tune(missing, device, max(section.left() / (len(plans) - index), 1.0), done=done)
        release(device)
    section.close()


def shapes(problem: Problem, plan: Plan, ops: tuple[str, ...]) -> dict[Key, int]:
    """Return how often a step of a plan runs each shape."""
    if plan.what == "sampling":
        sampler = Sampler(problem.unet, problem.schedule, "ddpm", 3, dtype=plan.dtype, cuda_graph=False)
        return sampler_keys(sampler, plan.batch, ops, str(plan.dtype).removeprefix("torch."))
    diffusion = GaussianDiffusion(problem.unet, problem.schedule)
    return training_keys(diffusion, (plan.batch, *problem.shape), None, problem.device, ops, plan.dtype)


def record_of(plan: Plan, outcome: Outcome) -> Record:
    """Return what became of a shape. `choice` None: the heuristics' is the best."""
    record: Record = {
        "group": f"{plan.name}: {outcome.title}", "arm": "search", "op": outcome.key.op, "calls": outcome.calls,
        "shape": outcome.key.named(), "heuristic": outcome.heuristic, "tried": outcome.tried,
        "refused": len(outcome.refused),
    }  # fmt: skip
    if outcome.done:
        best = outcome.heuristic_us if outcome.winner is None else outcome.winner_us
        times = {"heuristic_us": round(outcome.heuristic_us, 3), "tuned_us": round(best, 3)}
        return record | {"status": "ok", "choice": outcome.winner, **times}
    return record | {"status": "not run" if outcome.status == "out of time" else "failed", "reason": outcome.status}
