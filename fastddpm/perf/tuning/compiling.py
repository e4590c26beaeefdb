"""Compile choices ahead in other processes: compiling takes longer than timing, and shows which choices spill.

They leave the kernels in triton's cache on disk, where this process finds them. They are plain processes, because those
of `multiprocessing` would run the caller's script again.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, TimeoutError
from pathlib import Path
from types import TracebackType
from typing import Any

import fastddpm_kernels
from fastddpm_kernels import tuned
from fastddpm_kernels.tuned import Choice, Key
from fastddpm_kernels.tuning import Task

AHEAD = 2  # tasks to compile while another one is timed
MOST = 14  # most processes


class Compiling:
    """A context that compiles the choices of tasks, in their order.

    Args:
        tasks: in the order in which they will be timed.
        target: "sm_90", "gfx942", ...; None compiles nothing.
        workers: the number of processes; None for two fewer than the processors.
    """

    def __init__(self, tasks: Sequence[Task], target: str | None, workers: int | None = None) -> None:
        self._tasks, self._target = list(tasks), target
        self._workers = workers or max(1, min(MOST, (os.cpu_count() or 1) - 2))
        self._found: dict[Key, list[tuple[Choice, Future[str | None]]]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._of_thread = threading.local()
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Compiling:
        if self._target is not None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="fastddpm-compile")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self._processes):
            process.kill()
        self._pool.shutdown(wait=True)
        for process in self._processes:
            process.communicate()

    def start(self, end: float) -> None:
        """Begin with the first task, and wait for its first choice until `end`.

        The processes take seconds to start. Without this wait that would shorten the search for the first shape, which
        is the most important one.
        """
        if self._pool is not None:
            self.why_not(self._tasks[0], self._tasks[0].candidates()[0], end)

    def why_not(self, task: Task, choice: Choice, end: float) -> str | None:
        """Wait for the compilation of a choice until `end` (`time.monotonic`); return why it must not run, or None."""
        if self._pool is None:
            return None
        self._submit(task)
        future = next(future for own, future in self._found[task.key] if own == choice)
        try:
            return future.result(max(end - time.monotonic(), 0.01))
        except (TimeoutError, CancelledError):
            return "it was not compiled in time"
        except OSError as error:
            return f"the process that compiled it has died: {error}"

    def _submit(self, task: Task) -> None:
        """Queue the choices of a task and of the next ones; cancel those of earlier tasks."""
        assert self._pool is not None
        index = self._tasks.index(task)
        for other in self._tasks[:index]:
            for _, future in self._found.pop(other.key, ()):
                future.cancel()
        for other in self._tasks[index : index + 1 + AHEAD]:
            if other.key not in self._found:
                self._found[other.key] = [
                    (choice, self._pool.submit(self._ask, tuned.record(other.key, choice)))
                    for choice in other.candidates()
                ]

    def _ask(self, record: Mapping[str, Any]) -> str | None:
        process = getattr(self._of_thread, "process", None)
        if process is None or process.poll() is not None:
            process = self._of_thread.process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([self._target, record]) + "\n")
        process.stdin.flush()
        if not (answer := process.stdout.readline()):
            raise OSError(f"exit code {process.wait()}")
        reason: str | None = json.loads(answer)
        return reason

    def _start(self) -> subprocess.Popen[str]:
        roots = [str(Path(__file__).parents[3]), str(Path(fastddpm_kernels.__file__).parents[1])]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment["OMP_NUM_THREADS"] = "1"
        process = subprocess.Popen(
            [sys.executable, "-m", "fastddpm.perf.tuning.compiling"], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._processes.append(process)
        return process


def why_not_compiled(key: Key, choice: Choice, target: str) -> str | None:
    """Return why the kernels of a choice must not be used on a target ("sm_90", ...), or None.

    Call it only in a process without `TRITON_INTERPRET`, because the interpreter's kernels cannot be compiled.
    """
    from fastddpm_kernels.device.compile import compile_variant

    name = tuned.tunable(key.op).kernels
    if name is None:
        return None
    module = importlib.import_module(f"fastddpm_kernels.{tuned.FOLDERS[key.op]}.{name}")
    try:
        for variant in module.tuned_variants(key, choice):
            usage = compile_variant(variant, target)
            if usage.spills:
                return f"{usage.spills} bytes spilled"
    except Exception as error:  # the compiler raises errors of many types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"{type(error).__name__}: {lines[-1]}"
    return None


def main() -> None:
    """Answer each line [target, entry] with a reason or null, until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keep the compilers' output out of the answers
    for line in sys.stdin:
        target, entry = json.loads(line)
        key, choice = tuned.entry(entry)
        reason = None if choice is None else why_not_compiled(key, choice, target)
        print(json.dumps(reason), file=answers, flush=True)


if __name__ == "__main__":
    main()
