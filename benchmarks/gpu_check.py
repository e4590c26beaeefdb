"""Test, measure, profile and tune fastddpm on this machine's GPU, beside its peers, in at most nine minutes.

    python benchmarks/gpu_check.py                            # all sections; results in benchmarks/results/<gpu>.json
    python benchmarks/gpu_check.py --section ops profile      # some of them
    python benchmarks/gpu_check.py --skip tune                # all but some
    python benchmarks/gpu_check.py --resume                   # only what is not there yet, of the same sources
    python benchmarks/gpu_check.py --call 1                   # the first half, in six and a half minutes; then --call 2
    python benchmarks/gpu_check.py --device cpu --small --out /tmp/x.json    # the same code on a tiny network

fastddpm is installed, or PYTHONPATH names the repository and its folder `kernels`. The sections `ops`, `cifar10` and
`celeba256` are the benchmarks of `pytest --benchmark-only --bench-size full`; what is not installed to compare with is
recorded as unavailable. Everything that runs a kernel does so in a process of its own. The file is written after every
arm, so that a run that is killed keeps what it measured; what there was no time for is recorded as not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' progress bars
sys.path.insert(0, str(Path(__file__).parent))

import torch
from gpu import children, plans, precompile, summary, tune
from gpu.results import Record, Results, Section, commit_here, source_digest
from measuring import ROOT
from networks import make_problem

from fastddpm import save_pretrained
from fastddpm.common.files import read_json
from fastddpm.perf.profiling import ceilings
from fastddpm.perf.profiling.timing import first_lines, release

# Section -> its share of the time; what one leaves over goes to those after it. Tests are the first and have time to
# end: nothing else counts if they fail. Then comes batch 1 with each choice of plans, which decides what to do next.
# `tune` is the last, because it runs what nobody has run before.
SHARES = {
    "tests": 200, "plans": 90, "machine": 20, "profile": 60, "ops": 75, "cifar10": 165, "celeba256": 45, "tune": 55,
}  # fmt: skip
TESTS_S = 150  # at least
BUDGET_S = 530
# Where a GPU comes in pieces: two calls of six and a half minutes, thirteen in all.
CALLS = {1: ("tests", "plans", "machine", "profile"), 2: ("ops", "cifar10", "celeba256", "tune")}
CALL_S = 390
PRECOMPILE_S = 45  # at most, before loops are timed
TESTS = {
    "marked gpu": ["-m", "gpu", "tests"],
    "kernels": ["-m", "not gpu and not slow", "tests/kernels", "--ignore=tests/kernels/test_aot.py"],
}
OPS = ("reverse_step", "q_sample", "group_norm_silu", "pointwise_conv", "residual_add")
NETWORKS = ["benchmarks/test_loop.py", "benchmarks/test_unet_step.py"]
BENCHMARKS = {
    "ops": [*(f"benchmarks/test_{op}.py" for op in OPS), "-k", "not reference"],
    "cifar10": [*NETWORKS, "-k", "cifar10 and not reference"],
    "celeba256": [*NETWORKS, "-k", "celeba256 and not reference"],
}
# On a CPU these say nothing of a GPU: a few, to try the code.
SMALL_TESTS = {"a few": ["tests/process/test_schedule.py"]}
SMALL_BENCHMARKS = {
    "ops": ["benchmarks/test_residual_add.py"],
    "cifar10": ["benchmarks/test_loop.py", "-k", "ddim and (fused or DDPMPipeline or eager)"],
    "celeba256": ["benchmarks/test_unet_step.py", "-k", "small and (fused or eager)"],
}
MACHINE = ("device", "hardware", "state", "versions", "commit")  # of a benchmark's figures; the file's head has them


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status: 0, or 2 for bad arguments."""
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
    wanted = [s for s in SHARES if s in options.section and s not in options.skip and not results.finished(s)]
    print(f"gpu_check: {name}, sections: {', '.join(wanted) or 'none left to run'}; at most {options.budget:.0f} s")
    compile_for = not options.small and device.type == "cuda"
    for index, section in enumerate(wanted):
        left = options.budget - (time.monotonic() - started)
        if compile_for and section in ("cifar10", "celeba256"):
            compile_for = False
            missed = children.side_by_side(
                [["-m", "gpu.precompile", *job] for job in precompile.JOBS], min(PRECOMPILE_S, left / 5),
                max(1, min(14, (os.cpu_count() or 1) - 2)),
            )  # fmt: skip
            print(f"gpu_check: kernels compiled beforehand; not done: {', '.join(missed) or 'none'}", flush=True)
            left = options.budget - (time.monotonic() - started)
        share = left * SHARES[section] / sum(SHARES[s] for s in wanted[index:])
        share = min(max(share, TESTS_S), left) if section == "tests" else share
        run_section(Section(results, section, share), device, options.small)
    results.save()
    summary.show(results.content)
    print(f"gpu_check: {time.monotonic() - started:.0f} s; results in {out}")
    return 0


def run_section(section: Section, device: torch.device, small: bool) -> None:
    """Run one section. Its failure is recorded and does not reach the others."""
    print(f"gpu_check: {section.name} (at most {section.left():.0f} s)", flush=True)
    try:
        if section.left() < 3:
            section.close("not run", reason="out of time")
        elif section.name == "tests":
            run_tests(section, SMALL_TESTS if small else TESTS)
        elif section.name == "machine":
            measure_machine(section, device, small)
        elif section.name == "profile":
            run_profile(section, device, small)
        elif section.name == "tune":
            tune.run(section, device, small)
        elif section.name == "plans":
            plans.run(section, device, small)
        else:
            size = "small" if small else "full"
            run_benchmarks(section, [*(SMALL_BENCHMARKS if small else BENCHMARKS)[section.name], "--bench-size", size])
    except Exception as error:
        section.close("failed", reason=first_lines(error))
    try:
        release(device)
    except RuntimeError as error:  # a device that is lost gives nothing back
        print(f"gpu_check: after {section.name}: {first_lines(error, 1)}", flush=True)


def run_tests(section: Section, runs: dict[str, list[str]]) -> None:
    """Record of each run of pytest how many tests passed, failed and were skipped, and the errors of the failed."""
    workers = min(12, (os.cpu_count() or 1) - 2)
    # A file that needs what is not installed is one failure, and no reason to run none of the others.
    more = ["--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None and workers > 1:
        more += ["-n", str(workers)]  # compiling kernels keeps the processors busy, not the GPU
    for index, (name, arguments) in enumerate(runs.items()):
        if section.has(name):
            continue
        lines: dict[tuple[str, str], dict[str, Any]] = {}  # workers repeat each other

        def heard(line: dict[str, Any], lines: dict[Any, Any] = lines) -> bool:
            lines[line["test"], line["outcome"]] = line
            return True

        # The first run takes what it needs; what it leaves is the others'.
        seconds = section.left() * (0.75 if index + 1 < len(runs) else 1.0)
        code, _, tail = children.run_pytest([*arguments, *more], seconds, heard)
        counts = {kind: sum(o == kind for _, o in lines) for kind in ("passed", "failed", "skipped")}
        failures = [
            {"test": test, "error": first_lines(line.get("error", ""))}
            for (test, outcome), line in lines.items()
            if outcome == "failed"
        ]
        record: Record = {"group": name, "arm": "pytest", "status": "ok", **counts, "failures": failures[:50]}
        if code is None:
            record |= {"status": "not run", "reason": f"out of time after {seconds:.0f} s: {counts}"}
        elif code:
            named = [f"{failure['test']}: {failure['error']}" for failure in failures[:10]]
            record |= {"status": "failed", "reason": f"{counts}\n" + "\n".join(named or tail)}
        section.add(record)
    section.close()


def run_benchmarks(section: Section, arguments: list[str]) -> None:
    """Record every benchmark as it ends. One that brings its process down is recorded so, and the others go on."""
    known = {record["test"] for record in section.data["records"]}

    def heard(line: dict[str, Any]) -> bool:
        known.add(line["test"])
        section.add(record_of(line))
        return "CUDA error" not in line.get("error", "")  # after which the process can do nothing more

    while section.left() > 5:
        deselected = [word for test in sorted(known) for word in ("--deselect", test)]
        command = ["--benchmark-only", *arguments, *deselected]
        code, running, tail = children.run_pytest(command, section.left(), heard)
        late = section.left() < 1
        if running is not None:  # when the process ended or was killed
            known.add(running)
            status, reason = ("not run", "out of time") if late else ("failed", f"its process ended with {code}")
            section.add({"group": running, "arm": "pytest", "test": running, "status": status, "reason": reason})
        elif code in (0, 1, 5):  # all passed; some failed; none was left
            return section.close()
        elif code is not None:  # pytest itself failed
            return section.close("failed", reason="\n".join(tail))
    section.close("partial", reason="out of time")


def record_of(line: dict[str, Any]) -> Record:
    """Return the record of a line that `outcome_log` wrote of a benchmark."""
    info = dict(line.get("benchmark", {}))
    record: Record = {"group": info.pop("group", line["test"]), "arm": info.pop("arm", "pytest"), "test": line["test"]}
    if line["outcome"] == "passed" and "seconds" in info:
        seconds = info.pop("seconds")
        times = {name: value * (1 if name == "samples" else 1e6) for name, value in seconds.items()}
        about = {name: value for name, value in info.items() if name not in MACHINE}
        return {**record, "status": "ok", "us_per_step": times, **about}
    status = "unavailable" if line["outcome"] == "skipped" else "failed"
    return {**record, "status": status, "reason": first_lines(line.get("error", ""))}


def measure_machine(section: Section, device: torch.device, small: bool) -> None:
    """Measure the ceilings: `matmul_tflops`, `copy_gb_s`, latencies in microseconds."""
    section.set(versions=ceilings.versions(), **ceilings.hardware(device), state=ceilings.state(device))
    section.set(copy_gb_s=ceilings.copy_bandwidth(device, 2**24 if small else 2**32))
    rates = {}
    for name in ceilings.MATMULS:
        sizes = (256, 384) if small else (4096, 8192) if name == "fp32" else (4096, 8192, 12288)
        rates[name] = ceilings.matmul(device, name, sizes, rounds=3 if small else 8)
    section.set(matmul_tflops=rates)
    if device.type == "cuda":
        section.set(latency=ceilings.latencies(device))
    section.close()


def run_profile(section: Section, device: torch.device, small: bool) -> None:
    """Record what `fastddpm profile` finds of the CIFAR-10 architecture: idle share, floor, causes, per batch size."""
    problem = make_problem("small" if small else "cifar10", torch.device("cpu"))
    batches = ["1", "2"] if small else ["1", "64", "256"]
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(f"{folder}/model", problem.unet, problem.schedule, variance_type="fixed_large")
        command = ["-m", "fastddpm", "profile", f"{folder}/model", "--device", str(device), "--quick"]
        command += ["--dtype", "float32" if small else "float16", "--steps", "20" if small else "1000"]
        command += [
            "--budget",
            f"{max(section.left() - 8, 5):.0f}",
            "--json",
            f"{folder}/out.json",
            "--batch",
            *batches,
        ]
        wrong = children.run(command, section.left() + 5)
        content = {} if wrong else read_json(Path(folder, "out.json"))
    for found in content.get("batches", []):
        record: Record = {"group": f"batch {found['batch']}", "arm": "fused", "batch": found["batch"]}
        if found["status"] != "ok":
            reason = found.get("error") or found.get("reason")
            section.add({**record, "status": found["status"], "reason": reason})
            continue
        kernels = found["kernels"]
        section.add({
            **record, "status": "ok", "us_per_step": found["us_per_step"], "floor": found["floor"],
            "idle_share": kernels.get("idle_share"), "kernels_per_step": kernels.get("kernels_per_step"),
            "graph": found["graph"],
            "causes": [f"{cause['us']:.0f} us: {cause['what']}" for cause in found["causes"][:3]],
        })  # fmt: skip
    section.close("failed" if wrong else None, **({"reason": wrong} if wrong else {}))


def _parse(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", nargs="+", choices=list(SHARES), default=list(SHARES), help="which to run")
    parser.add_argument("--skip", nargs="+", choices=list(SHARES), default=[], help="which not to run")
    parser.add_argument("--resume", action="store_true", help="keep what the file holds of the same source and device")
    parser.add_argument("--call", type=int, choices=list(CALLS), help=f"sections and {CALL_S} s of one of two calls")
    parser.add_argument("--out", type=Path, help="the results file; must be given with --small")
    parser.add_argument("--budget", type=float, help=f"seconds in all, {BUDGET_S} by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--small", action="store_true", help="a tiny network and few steps, to try the code")
    parser.add_argument("--commit", help="which commit this is, where git cannot tell")
    options = parser.parse_args(arguments)
    if options.call is not None:
        options.section, options.resume = list(CALLS[options.call]), options.resume or options.call > 1
    if options.budget is None:
        options.budget = BUDGET_S if options.call is None else CALL_S
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
