"""Compiles the kernels of the loops that are to be timed, in many processes at once, into Triton's cache on disk.

One process compiles one kernel after the other: a loop of a new shape or dtype would spend its time on that.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from gpu.engine import SamplerLoop
from gpu.loops import Plan
from gpu.networks import make_problem
from gpu.results import ROOT

STEPS = 2  # run every kernel of a step


def jobs(plans: Iterable[Plan]) -> list[list[str]]:
    """[architecture, precision, batch] of every loop and network of ours that `plans` time, the main precision first.

    The network alone is timed in float32 too, at every batch.
    """
    found = {
        (precision != plan.precisions[0], plan.problem, precision, batch)
        for plan in plans
        for batch in plan.steps
        for precision in plan.precisions
        if batch in plan.more or precision in (plan.precisions[0], "fp32")
    }
    return [[problem, precision, str(batch)] for _, problem, precision, batch in sorted(found)]


def run(plans: Iterable[Plan], seconds: float) -> list[str]:
    """Does `jobs` side by side for at most `seconds`. Returns those that failed or were not done, in words.

    Nothing depends on them: what is not compiled here is when it is run.
    """
    paths = [str(Path(__file__).parents[1]), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}

    def start(job: Sequence[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "gpu.precompile", *job]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)

    return side_by_side(jobs(plans), start, seconds, max(1, min(14, (os.cpu_count() or 1) - 2)))


def side_by_side(
    todo: list[list[str]], start: Callable[[Sequence[str]], subprocess.Popen[bytes]], seconds: float, workers: int
) -> list[str]:
    """Keeps `workers` processes going until all of `todo` is done or `seconds` are over; then kills what still runs."""
    end, waiting, missed = time.monotonic() + seconds, list(todo), []
    running: list[tuple[list[str], subprocess.Popen[bytes]]] = []
    try:
        while (waiting or running) and time.monotonic() < end:
            going = []
            for job, process in running:
                status = process.poll()
                if status is None:
                    going.append((job, process))
                elif status:
                    missed.append(f"{' '.join(job)} (exit status {status})")
            running = going
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running.append((job, start(job)))
            time.sleep(0.05)
    finally:
        late = [(job, process) for job, process in running if process.poll() is None]
        for _, process in late:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return missed + [f"{' '.join(job)} (out of time)" for job in [job for job, _ in late] + waiting]


def main(name: str, precision: str, batch: str) -> None:
    """One job: a loop of two steps, without a graph."""
    problem = make_problem(name, torch.device("cuda", torch.cuda.current_device()))
    SamplerLoop(problem, precision, int(batch), STEPS, False)()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
