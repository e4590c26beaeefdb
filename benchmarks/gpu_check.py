"""Tests, measures, profiles and tunes fastddpm on this machine's GPU, beside its peers, in at most nine minutes.

    python benchmarks/gpu_check.py                            # all sections; results in benchmarks/results/<gpu>.json
    python benchmarks/gpu_check.py --section ops profile      # some of them
    python benchmarks/gpu_check.py --skip tune                # all but some
    python benchmarks/gpu_check.py --section tune --resume    # more of the table of tuned choices, <results>.tuned.json
    python benchmarks/gpu_check.py --resume                   # only what is not there yet, of the same sources
    python benchmarks/gpu_check.py --section cifar10 --resume --compile-batch 1 8 64 256   # compile for more sizes
    python benchmarks/gpu_check.py --device cpu --small --out /tmp/x.json    # the same code on a tiny network

fastddpm is installed, or PYTHONPATH names the repository and its folder `kernels`. What is not installed to compare
with is recorded as missing. Before loops are timed, their kernels are compiled in many processes at once. The file is
written after every arm, so that a run that is killed keeps what it measured;
what there was no time for is recorded as not run. Figures of the CPU say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' progress bars

import torch
from gpu import loops, machine, ops, precompile, profiler, pytest_run, summary, tune
from gpu.results import ROOT, Results, Section, commit_here, source_digest
from gpu.timing import OutOfTime, split_time, time_limit

from fastddpm.perf.profiling import ceilings
from fastddpm.perf.profiling.timing import first_lines, release

# Section -> its share of the time; what one leaves over goes to those after it. `tune` is the last, because it runs
# what nobody has run before: should a kernel bring the device down, nothing else is lost.
SHARES = {"machine": 20, "tests": 50, "ops": 80, "cifar10": 220, "celeba256": 60, "profile": 35, "tune": 55}
BUDGET_S = 520
PRECOMPILE_S = 75  # at most, of the whole


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for; returns the exit status: 0, or 2 for bad arguments."""
    options = _parse(arguments)
    started = time.monotonic()
    try:
        device = torch.empty(0, device=options.device).device
    except (RuntimeError, AssertionError) as error:
        print(f"gpu_check: --device {options.device} cannot be used: {first_lines(error, 1)}", file=sys.stderr)
        return 2
    name = ceilings.device_name(device)
    slug = ceilings.slug(name)
    out = options.out or ROOT / "benchmarks" / "results" / f"{slug}.json"
    versions = ceilings.versions()
    identity = {
        "device": {"kind": device.type, "name": name, "slug": slug},
        "source": source_digest(),
        "torch": versions["torch"],
        "triton": versions["triton"],
        "small": options.small,
    }
    commit, dirty = (options.commit, None) if options.commit else commit_here()
    results = Results(out, identity, options.resume, {"commit": commit, "dirty": dirty})
    if results.dropped:
        print(f"gpu_check: nothing of {out} is kept: {results.dropped}")
    torch.manual_seed(0)
    compiled = tuple(options.compile_batch)

    def finished(section: str) -> bool:
        if section in loops.PLANS:
            return loops.finished(results, section, options.small, compiled)
        return results.finished(section)

    wanted = [s for s in SHARES if s in options.section and s not in options.skip]
    weights = {s: float(SHARES[s]) for s in wanted if not finished(s)}
    print(f"gpu_check: {name}, sections: {', '.join(weights) or 'none left to run'}; at most {options.budget:.0f} s")
    plans = [loops.PLANS[section] for section in weights if section in loops.PLANS]
    if plans and device.type == "cuda" and not options.small:
        missed = ", ".join(precompile.run(plans, min(PRECOMPILE_S, options.budget / 5))) or "none"
        print(f"gpu_check: {time.monotonic() - started:.0f} s for compiling kernels; not done: {missed}", flush=True)
    while weights:
        section = next(iter(weights))
        seconds = split_time(options.budget - (time.monotonic() - started), weights)[section]
        weights.pop(section)
        run_section(results, section, seconds, device, options.small, compiled)
    results.save()
    summary.show(results.content)
    print(f"gpu_check: {time.monotonic() - started:.0f} s; results in {out}")
    return 0


def run_section(
    results: Results, name: str, seconds: float, device: torch.device, small: bool, compile_batches: tuple[int, ...]
) -> None:
    """Runs one section. Its failure is recorded and does not reach the others."""
    if seconds < 3:
        results.sections.setdefault(name, {"status": "not run", "reason": "not run: out of time", "records": []})
        results.save()
        return
    section = Section(results, name, seconds)
    print(f"gpu_check: {name} (at most {seconds:.0f} s)", flush=True)
    try:
        with time_limit(seconds * 1.5 + 20):  # against a hang; arms watch their time themselves
            if name == "machine":
                machine.run(section, device, small)
            elif name == "tests":
                pytest_run.run(section, device, small)
            elif name == "ops":
                ops.run(section, device, small)
            elif name == "profile":
                profiler.run(section, device, small)
            elif name == "tune":
                tune.run(section, device, small)
            else:
                loops.run(section, device, small, compile_batches)
    except OutOfTime as error:
        section.close("partial", reason=f"stopped after {error}: out of time")
    except Exception as error:
        section.close("failed", error=first_lines(error))
        print(f"gpu_check: {name} failed: {first_lines(error, 1)}", flush=True)
    with contextlib.suppress(RuntimeError):  # a device that is lost gives nothing back
        release(device)


def _parse(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", nargs="+", choices=list(SHARES), default=list(SHARES), help="which to run")
    parser.add_argument("--skip", nargs="+", choices=list(SHARES), default=[], help="which not to run")
    parser.add_argument("--resume", action="store_true", help="keep what the file holds of the same source and device")
    parser.add_argument("--out", type=Path, help="the results file; must be given with --small")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help=f"seconds in all, {BUDGET_S} by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--small", action="store_true", help="a tiny network and few steps, to try the code")
    parser.add_argument(
        "--compile-batch", type=int, nargs="*", default=[8, 256], help="batch sizes to compile for (minutes each)"
    )
    parser.add_argument("--commit", help="which commit this is, where git cannot tell")
    options = parser.parse_args(arguments)
    if options.budget <= 0:
        parser.error(f"--budget is {options.budget}, must be positive")
    if options.out is not None and options.out.is_dir():
        parser.error(f"--out is {options.out}, a folder, must be a file")
    if options.small and options.out is None:
        parser.error("--out is missing: what a small run measures does not belong among the results")
    if torch.device(options.device).type == "cpu" and not options.small:
        parser.error("--device is cpu without --small: the full sizes are for a GPU")
    return options


if __name__ == "__main__":
    sys.exit(main())
