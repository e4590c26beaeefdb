"""What fastddpm is worth on this CPU, in one run: beside other libraries, on a busy machine, from a process's start.

    python benchmarks/cpu_check.py --out results.json [--against CHECKOUT] [--threads 2]     at most 15 minutes
    python benchmarks/cpu_check.py --quick --out results.json [--against CHECKOUT]           at most 4 minutes

    cifar10, lucidrains   other libraries' samplers before and after `accelerate`, whole calls (`cpu/calls.py`)
    step                  one evaluation of the U-Nets of google/ddpm-cifar10-32 and of the bundled digits, beside
                          diffusers, torch.compile and OpenVINO at their best (`cpu/step.py`)
    isa                   that beside diffusers where all are held to fewer instructions: AVX2, in a process of its own
    crowd                 a step of the loop, idle, beside a busy loop, and of two processes at once (`cpu/crowd.py`)
    start                 `fastddpm sample` from the start of its process, 100 digits and 1000 steps (`cpu/start.py`)
    text_to_image         only if named: Stable Diffusion 1.5, SDXL and DeepFloyd IF (`cpu/text_to_image.py`)

The arms of a section take turns, so that a ratio is one of the same minutes: medians, and the 20 % and 80 % quantiles
of the rounds' ratios. Every arm is checked before it is timed. `--against` adds another checkout of fastddpm to crowd
and start; it is named by its commit. Beside each time of a step stands its floor (`cpu/floor.py`).

`float32` is the default and what is claimed; `bfloat16` of whole calls is shown for information.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for what it shares with gpu_check.py

import torch
from cpu import calls, crowd, start, step, tables, text_to_image
from cpu.floor import Ceilings
from fastddpm_kernels import backend as _backend
from fastddpm_kernels.native.build import compiler
from gpu.results import commit_here
from measuring import Missing
from networks import make_problem

from fastddpm.common.files import read_json, write_json
from fastddpm.perf.profiling.compare import CPU_SCHEMA

SECTIONS = (*calls.NETWORKS, "step", "isa", "crowd", "start")
ON_DEMAND = ("text_to_image",)  # sections that take ten minutes and 20 GB
# Sets of instructions: what the compiler of the native library is told, and the variables that hold torch to the same.
INSTRUCTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "avx2": (
        "-mno-avx512f",
        {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    ),
    "avx512": ("-mno-avx512bf16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}),
}
DIGITS_BATCHES = (1, 8)
STEP_BATCHES_OF_ISA = "1,8"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code: 1 where something was not measured, as for want of a library."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    if options.threads:
        torch.set_num_threads(options.threads)
    dtypes = ["float32"] + ([] if options.no_bfloat16 else ["bfloat16"])
    commit, dirty = commit_here()
    content: dict[str, Any] = {
        "schema": CPU_SCHEMA,
        "commit": commit,
        "dirty": dirty,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native": _backend.why_not("native", "cpu") or "yes",
        "quick": options.quick,
        "steps": options.steps,
        "rounds": options.rounds,
        "records": [],
    }
    print(f"{content['cpu']}, {content['threads']} threads, torch {content['torch']}, native: {content['native']}")
    ceilings = Ceilings(0.5 if options.quick or options.small else 1.5)
    others = {_commit_of(path): path.resolve() for path in options.against}
    missing = False
    for section in options.sections:
        began = time.monotonic()
        if section in calls.NETWORKS:
            missing |= not _calls(section, dtypes, options, content)
        elif section == "step":
            missing |= not _step(dtypes, options, content, ceilings)
        elif section == "isa":
            for name in options.isa:
                content.setdefault("isa", {})[name] = _held_to(name, options)
        elif section == "crowd":
            found = crowd.measure(
                _cases(options), crowd.CONDITIONS, options.crowd_rounds, options.crowd_seconds,
                content["threads"], ceilings, others,
            )  # fmt: skip
            content["crowd"] = {"rounds": options.crowd_rounds, "versions": step.versions(), "records": found}
        elif section == "text_to_image":
            names = ["tiny"] if options.small else ["sd15", "sdxl", "if1"]
            arms = [name for name in options.arms if name in text_to_image.ARMS]
            content[section] = text_to_image.run(names, arms, dtypes, options.rounds, content["threads"])
        else:
            found = start.measure(options.samples, options.sample_steps, options.start_rounds, others)
            content["start"] = {"samples": options.samples, "steps": options.sample_steps, "records": found}
        content["ceilings"] = ceilings.to_dict()
        content.setdefault("seconds", {})[section] = round(time.monotonic() - began, 1)
        print(f"{section}: {content['seconds'][section]} s", flush=True)
        if options.out:
            write_json(options.out, content)
    print(tables.of(content))
    return int(missing or any(map(_is_bad, _records(content))))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, help="write the figures there, as JSON")
    add("--quick", action="store_true", help="step and whole calls are left out, fewer rounds; at most 4 minutes")
    add(
        "--sections", type=_names, help=f"of {','.join(SECTIONS + ON_DEMAND)} (default: all but the last; of --quick 3)"
    )
    add(
        "--against", type=Path, action="append", default=[], metavar="PATH", help="another checkout, of crowd and start"
    )
    add("--batch-sizes", type=_counts, default=[1, 16], metavar="N,N", help="default: 1,16; the digits' are 1 and 8")
    add("--steps", type=int, default=10, help="of a call (default: %(default)s)")
    add("--rounds", type=int, default=5, help="of all arms of calls (default: %(default)s)")
    add("--step-rounds", type=int, help="of all arms of step (default: 9; --quick: 7)")
    add("--step-networks", type=_names, default=["cifar10", "digits"], help="of step (default: cifar10,digits)")
    add("--crowd-rounds", type=int, help="of crowd (default: 5; --quick: 3)")
    add("--crowd-seconds", type=float, help="of a sample of crowd (default: 0.5; --quick: 0.25)")
    add("--start-rounds", type=int, help="of start (default: 2; --quick: 1)")
    add("--samples", type=int, default=100, help="digits that start draws (default: %(default)s)")
    add("--sample-steps", type=int, default=1000, help="of start (default: %(default)s)")
    add("--isa", type=_names, default=["avx2"], help=f"of {','.join(INSTRUCTIONS)} (default: avx2)")
    add("--threads", type=int, help="default: torch's")
    add("--no-bfloat16", action="store_true", help="leave out what is only for information")
    add("--arms", type=_names, default=list(step.ARMS), help=f"of step (default: {','.join(step.ARMS)})")
    add("--every-setting", action="store_true", help="torch.compile at the fastest of three settings, 4 minutes more")
    add("--small", action="store_true", help="tiny U-Nets, to try the code")
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in what depends on --quick, and refuse what cannot be."""
    quick = options.quick
    options.sections = options.sections or list(SECTIONS[-3:] if quick else SECTIONS)
    options.step_rounds = options.step_rounds or (7 if quick else 9)
    options.crowd_rounds = options.crowd_rounds or (3 if quick else 5)
    options.crowd_seconds = options.crowd_seconds or (0.25 if quick else 0.5)
    options.start_rounds = options.start_rounds or (1 if quick else 2)
    known = {
        "sections": (*SECTIONS, *ON_DEMAND),
        "arms": tuple(step.ARMS),
        "isa": tuple(INSTRUCTIONS),
        "step_networks": ("cifar10", "digits"),
    }
    for name, values in known.items():
        if unknown := set(getattr(options, name)) - set(values):
            flag = name.replace("_", "-")
            parser.error(f"--{flag} has unknown {', '.join(sorted(unknown))}, may have {', '.join(values)}")
    counts = ("steps", "rounds", "step_rounds", "crowd_rounds", "start_rounds", "samples", "sample_steps")
    for name in counts:
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, must be at least 1")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads is {options.threads}, must be at least 1")
    for path in options.against:
        if not (path / "fastddpm").is_dir() or not (path / "kernels").is_dir():
            parser.error(f"--against is {path}, must be a checkout: a folder with fastddpm/ and kernels/")


def _calls(network: str, dtypes: list[str], options: argparse.Namespace, content: dict[str, Any]) -> bool:
    """Measure whole calls; return False where the library is missing."""
    for batch in options.batch_sizes:
        try:
            arms = calls.NETWORKS[network]("small" if options.small else "cifar10", batch, options.steps, dtypes)
        except Missing as error:
            print(f"{network}: {error}")
            return False
        found = calls.compare(arms, options.rounds)
        content["records"] += [{"network": network, "batch": batch, **record} for record in found]
    return True


def _step(dtypes: list[str], options: argparse.Namespace, content: dict[str, Any], ceilings: Ceilings) -> bool:
    """Measure evaluations; return False where an arm could have been measured and was not."""
    arms = {name: build for name, build in step.ARMS.items() if name in options.arms}
    if "torch.compile" in arms and not options.every_setting:
        arms["torch.compile"] = partial(step.compiled, settings=1)
    about = {"rounds": options.step_rounds, "versions": step.versions(), "records": []}
    records = content.setdefault("step", about)["records"]
    for network in options.step_networks:
        own = network == "digits"  # small, and bfloat16 is nothing that anyone needs there
        problem = make_problem("small" if options.small and not own else network, torch.device("cpu"))
        for batch in DIGITS_BATCHES if own else options.batch_sizes:
            chosen = ["float32"] if own else dtypes
            records += step.measure(problem, batch, options.step_rounds, chosen, arms, ceilings)
    return not any(map(_is_bad, records))


def _held_to(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the section "step" of a process in which nobody uses more than a set of instructions."""
    flag, variables = INSTRUCTIONS[name]
    if platform.machine() != "x86_64" or (command := compiler()) is None:
        return {"status": "unavailable", "reason": "x86 and a C++ compiler are needed", "records": []}
    own = {**os.environ, **variables, "CXX": shlex.join([*command, flag])}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        words = [
            "--sections", "step", "--step-networks", "cifar10", "--arms", "diffusers,fastddpm", "--out", str(out),
            "--batch-sizes", STEP_BATCHES_OF_ISA, "--step-rounds", str(options.step_rounds),
            "--threads", str(torch.get_num_threads()),
        ]  # fmt: skip
        words += ["--small"] * options.small + ["--quick"] * options.quick
        words += ["--no-bfloat16"] * (name == "avx2" or options.no_bfloat16)
        run = subprocess.run([sys.executable, __file__, *words], env=own, capture_output=True, text=True)
        if not out.exists():
            return {"status": "failed", "reason": run.stderr[-300:], "records": []}
        found = read_json(out)
    about = {"status": "ok", "cxx": flag, "variables": variables, "native": found["native"]}
    return {**about, "ceilings": found["ceilings"], **found["step"]}


def _cases(options: argparse.Namespace) -> list[crowd.Case]:
    """Return what crowd measures: --quick has OpenVINO beside CIFAR-10 alone."""
    cases = []
    for case in crowd.CASES:
        if options.no_bfloat16 and case.dtype == "bfloat16":
            continue
        peers = () if options.small or (options.quick and case.network == "digits") else case.peers
        network = "small" if options.small and case.network == "cifar10" else case.network
        cases.append(case._replace(network=network, peers=peers))
    return cases


def _records(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all records and sections that say how they ended."""
    sections = [
        *content.get("isa", {}).values(),
        *(content.get(name, {}) for name in ("step", "crowd", "start", "text_to_image")),
    ]
    return [*sections, *(record for section in sections for record in section.get("records", []))]


def _is_bad(record: dict[str, Any]) -> bool:
    return record.get("status", "ok") not in ("ok", "unavailable")


def _commit_of(path: Path) -> str:
    """Return the commit of a checkout, its first seven digits; its folder's name where it has none."""
    command = ["git", "-C", str(path), "rev-parse", "--short=7", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return path.resolve().name


def _names(text: str) -> list[str]:
    return text.split(",")


def _counts(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be positive whole numbers, separated by commas")
    return values


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
