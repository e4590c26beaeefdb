"""Processes in which things are measured, so that a crash or a hang of one loses nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measuring import ROOT

from gpu.outcome_log import VARIABLE

Line = dict[str, Any]


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a child that imports the sources here; nothing of a pytest that this may run in."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "kernels"), own.get("PYTHONPATH", "")]
    return own | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | more


def run(command: Sequence[str], seconds: float, **more: str) -> str | None:
    """Run python with `command` and kill it, with its children, when `seconds` are over; return what went wrong."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment(**more), stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            return f"out of time after {seconds:.0f} s"
        finally:
            end(process)
        output.seek(0)
        last = output.read().decode(errors="replace").strip().splitlines()[-3:]
    return None if code == 0 else f"exit status {code}: " + "\n".join(last)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_pytest(
    arguments: Sequence[str], seconds: float, heard: Callable[[Line], bool]
) -> tuple[int | None, str | None, list[str]]:
    """Run pytest for at most `seconds`.

    Args:
        heard: called with each line of `outcome_log` as it comes; where it returns False, the process is killed.

    Returns:
        pytest's exit status, None if it was killed; the test that was running then, or None; its last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        log, output = Path(folder, "outcomes"), Path(folder, "output")
        log.touch()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu.outcome_log", "-p", "no:cacheprovider"]
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*command, *arguments], cwd=ROOT, env=environment(**{VARIABLE: str(log)}), stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        last, rest, running, going = time.monotonic() + seconds, "", None, True
        try:
            with log.open(encoding="utf-8") as lines:
                while going:
                    ended = process.poll() is not None
                    *whole, rest = (rest + lines.read()).split("\n")
                    for line in map(json.loads, whole):
                        if line["outcome"] == "started":
                            running = line["test"]
                        else:
                            running = None if running == line["test"] else running
                            going = heard(line) and going
                    if ended or time.monotonic() > last:
                        break
                    time.sleep(0.1)
        finally:
            code = process.poll()
            end(process)
        return code, running, output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]


def side_by_side(commands: Sequence[Sequence[str]], seconds: float, workers: int) -> list[str]:
    """Run commands of python, `workers` at a time, for `seconds` in all; return what was not done, in words."""
    last = time.monotonic() + seconds

    def one(command: Sequence[str]) -> str | None:
        left = last - time.monotonic()
        wrong = "out of time" if left < 1 else run(command, left, OMP_NUM_THREADS="1")
        return wrong and f"{' '.join(command[2:])} ({wrong.splitlines()[0]})"

    with ThreadPoolExecutor(workers) as pool:
        return [wrong for wrong in pool.map(one, commands) if wrong]
