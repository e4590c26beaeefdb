"""Section `tests`: the tests that need the device, and those of the kernels, run on it within a time limit."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastddpm.perf.profiling.timing import first_lines
from gpu.outcome_log import VARIABLE
from gpu.results import ROOT, Section

# What is run, in this order: name -> arguments of pytest.
RUNS = {
    "marked gpu": ["-m", "gpu", "tests"],
    "kernels": ["-m", "not gpu and not slow", "tests/kernels", "--ignore=tests/kernels/test_aot.py"],
}
# On the CPU these tests mean nothing here; a few show that the way of running them works.
SMALL_RUNS = {"a few, to try the way": ["tests/kernels/test_backend.py"]}


def run(section: Section, device: torch.device, small: bool) -> None:
    """Records of each run how many tests passed, failed and were skipped, and the names and errors of the failed."""
    runs = SMALL_RUNS if small else RUNS
    for index, (name, arguments) in enumerate(runs.items()):
        seconds = section.left() / (len(runs) - index)
        if not section.has(name):
            section.add(run_tests(name, arguments, seconds))
            section.close_group(name)
    if device.type != "cuda":
        section.set(note="tests of the device have no meaning on the CPU")
    section.close()


def run_tests(name: str, arguments: list[str], seconds: float) -> dict[str, Any]:
    """Runs pytest in a process of its own and kills it, with its children, when `seconds` are over."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "outcomes"
        here, root = Path(__file__).parents[1], [ROOT, ROOT / "kernels"]
        paths = [str(here), *map(str, root), os.environ.get("PYTHONPATH", "")]
        # Not those of a pytest that this may run in.
        own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment = own | {VARIABLE: str(log), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu.outcome_log", "-p", "no:cacheprovider"]
        # A file that needs what is not installed is one failure, and no reason to run none of the others.
        command += ["--continue-on-collection-errors", *arguments]
        workers = min(12, (os.cpu_count() or 1) - 2)
        if importlib.util.find_spec("xdist") is not None and workers > 1:
            command += ["-n", str(workers)]  # compiling kernels keeps the processors busy, not the GPU
        output = Path(folder) / "output"
        with output.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code: int | None = process.wait(timeout=max(seconds, 1))
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                code = None
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        tail = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
    return summarise(name, command[1:], code, seconds, [json.loads(line) for line in lines], tail)


def summarise(
    name: str, command: list[str], code: int | None, seconds: float, lines: list[dict[str, Any]], tail: list[str]
) -> dict[str, Any]:
    """The record of a run: `code` is pytest's exit status, None if it was killed for time."""
    lines = list({(line["test"], line["outcome"]): line for line in lines}.values())  # workers repeat each other
    counts = {kind: sum(line["outcome"] == kind for line in lines) for kind in ("passed", "failed", "skipped")}
    failures = [
        {"test": line["test"], "error": first_lines(line.get("error", ""))}
        for line in lines
        if line["outcome"] == "failed"
    ]
    record: dict[str, Any] = {
        "group": name,
        "arm": name,
        "status": "ok" if code == 0 else "failed",
        "exit": code,
        **counts,
        "failures": failures[:50],
        "command": command,
    }
    if code is None:
        record |= {"status": "not run", "reason": f"not run to the end: out of time after {seconds:.0f} s"}
    elif code == 5:  # pytest's word for: nothing collected
        record["error"] = "no tests were found"
    elif code:
        record["error"] = "\n".join(tail)
    return record
