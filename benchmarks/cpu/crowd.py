"""Steps of the loop on an idle CPU, beside a busy loop, and in two processes at once, in turn with OpenVINO and others.

    idle    one process evaluates
    busy    one process evaluates beside another that never rests, and needs one processor of its own
    two     two processes evaluate at once; the slower of the two counts

Arms are processes (`worker.py`), so that another version of fastddpm can be one of them. Every round visits the three
conditions and in each of them all arms; ratios are of one round.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from measuring import ROOT
from networks import CONFIGS, make_problem

from cpu.floor import CPU, Ceilings
from cpu.step import floor_of
from fastddpm.perf.profiling.timing import quantiles

CONDITIONS = ("idle", "busy", "two")
OURS = "fastddpm"  # the loop of this version
STEPS = {"cifar10": 10, "digits": 100, "small": 4}  # of a loop


class Case(NamedTuple):
    """A network (its name in `networks.CONFIGS`) at one batch size and dtype, and the libraries beside it."""

    network: str
    batch: int
    dtype: str
    peers: tuple[str, ...] = ("openvino",)

    def __str__(self) -> str:
        return f"{self.network}, batch {self.batch}, {self.dtype}"


CASES = (
    Case("digits", 1, "float32"),
    Case("digits", 8, "float32"),
    Case("cifar10", 1, "float32"),
    Case("cifar10", 1, "bfloat16"),
)


class Worker:
    """A process of `worker.py`, on this version or on another checkout.

    Args:
        threads: that it computes with.
        checkout: its folder.
    """

    def __init__(self, threads: int, checkout: Path = ROOT) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(checkout),
        )  # fmt: skip

    def ask(self, **command: Any) -> None:
        """Send a command, whose reply `reply` returns."""
        assert self._process.stdin is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)

    def reply(self) -> dict[str, Any]:
        """Return the reply to a command.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of cpu/worker.py ended with exit code {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def environment(checkout: Path) -> dict[str, str]:
    """Return the environment in which Python imports fastddpm from a checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "kernels")])}


@contextmanager
def busy_loop() -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that never rests, stopped until `signal.SIGCONT` comes."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()  # ends one that is stopped, too
        process.wait()


def measure(
    cases: Sequence[Case],
    conditions: Sequence[str],
    rounds: int,
    seconds: float,
    threads: int,
    ceilings: Ceilings,
    others: dict[str, Path],
) -> list[dict[str, Any]]:
    """Return a record for every case and arm, with what is measured of it.

    "idle", "busy" and "two" are quantiles of the seconds of a step, "busy_over_idle" and "two_over_idle" of ratios of
    one round. "times_as_fast" is {condition: {other arm: quantiles of how many times as fast this version is}}.

    Args:
        cases: what is measured.
        conditions: some of `CONDITIONS`.
        rounds: of all conditions and arms.
        seconds: of a sample, after a call that is not counted.
        threads: of each process.
        ceilings: of the CPU.
        others: other checkouts, by what they are called.
    """
    records: list[dict[str, Any]] = []
    with ExitStack() as stack:
        pairs = {
            name: [stack.enter_context(Worker(threads, folder)) for _ in range(2 if "two" in conditions else 1)]
            for name, folder in {OURS: ROOT, **others}.items()
        }
        busy = stack.enter_context(busy_loop())
        for case in cases:
            found = {name: _build(pairs.get(name, pairs[OURS]), name, case) for name in (*pairs, *case.peers)}
            for name, record in found.items():
                print(f"{case}: {name} {record.get('reason') or 'is ready'}", flush=True)
            ready = {n: pairs.get(n, pairs[OURS]) for n, record in found.items() if record["status"] == "ok"}
            samples = _rounds(case, ready, conditions, rounds, seconds, busy)
            floor = floor_of(make_problem(case.network, CPU), case.batch, case.dtype, ceilings)
            for name, record in found.items():
                if name in ready:
                    record |= _figures(samples[name]) | {"floor": floor}
            if OURS in ready:
                found[OURS]["times_as_fast"] = {
                    condition: {
                        other: _ratios(samples[other][condition], samples[OURS][condition])
                        for other in ready
                        if other != OURS
                    }
                    for condition in conditions
                }
            records += found.values()
    return records


def _build(workers: list[Worker], name: str, case: Case) -> dict[str, Any]:
    """Build an arm in all its processes; return the first one's record."""
    command = case._asdict() | {"arm": name if name in case.peers else "loop", "steps": STEPS[case.network]}
    command["configuration"] = None if case.network == "digits" else CONFIGS[case.network]
    for worker in workers:
        worker.ask(build=f"{case} {name}", **command)
    replies = [worker.reply() for worker in workers]
    bad = [reply for reply in replies if reply["status"] != "ok"]
    about = {"network": case.network, "batch": case.batch, "dtype": case.dtype}
    return (bad or replies)[0] | about | {"arm": name}


def _rounds(
    case: Case, ready: dict[str, list[Worker]], conditions: Sequence[str], rounds: int, seconds: float, busy: Any
) -> dict[str, dict[str, list[float]]]:
    """Return the samples, {arm: {condition: seconds of a step, one a round}}."""
    samples: dict[str, dict[str, list[float]]] = {name: {c: [] for c in conditions} for name in ready}

    def sample(name: str, condition: str) -> float:
        workers = ready[name][: 2 if condition == "two" else 1]
        for worker in workers:
            worker.ask(run=f"{case} {name}", seconds=seconds)
        return max(worker.reply()["seconds"] for worker in workers)

    for round_ in range(rounds):
        for condition in conditions:
            busy.send_signal(signal.SIGCONT if condition == "busy" else signal.SIGSTOP)
            names = list(ready)
            turn = round_ % len(names) if names else 0
            for name in names[turn:] + names[:turn]:
                samples[name][condition].append(sample(name, condition))
        busy.send_signal(signal.SIGSTOP)
    return samples


def _figures(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Return an arm's quantiles by condition, and of its ratios to idle."""
    found: dict[str, Any] = {condition: quantiles(values) for condition, values in samples.items()}
    if "idle" in samples:
        found |= {f"{c}_over_idle": _ratios(v, samples["idle"]) for c, v in samples.items() if c != "idle"}
    return found


def _ratios(slow: list[float], fast: list[float]) -> dict[str, float | int]:
    return quantiles([a / b for a, b in zip(slow, fast, strict=True)])
