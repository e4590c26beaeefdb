"""Find the fastest correct choice for every shape, within a budget of seconds.

A choice is compiled (and refused if it spills), run, compared with float64, and only then timed. The fastest of a short
timing enter a longer one against the heuristics' choice. They run in turn, so that both see the same other work on the
machine. A winner must be faster in nearly all rounds, and by more than 2 %; else the heuristics' choice stays.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastddpm_kernels import tuned
from fastddpm_kernels.testing import assert_close
from fastddpm_kernels.tuned import Choice, Key
from fastddpm_kernels.tuning import Operands, Task, make_task

from fastddpm.perf.profiling.timing import capture, first_lines, interleave, quantile, release, timed
from fastddpm.perf.tuning.compiling import Compiling

FINALISTS = 3
ROUNDS = (7, 25)  # least and most rounds of the finals
CERTAIN = 0.9  # least share of the rounds in which a winner is faster
GAIN = 0.98  # a winner takes at most this share of the heuristics' time, median of the rounds
# The least time for a shape; less is not enough to compile anything. A small budget does not reach the last shapes.
LEAST_S = {"cuda": 2.0}
START_S = 20.0  # most seconds to wait for the start of the processes that compile
SHARES = (0.55, 0.75)  # of a shape's time: after the first no further choice is tried, after the second finals begin
SETS = 16  # most sets of operands; they are used in turn, so that none is still in a cache
GRAPH_CALLS = 20  # least calls between two events on a GPU
CACHE = 32 * 2**20  # bytes, if the device does not report the size

Stopwatch = Callable[[Sequence[Callable[[], object]], torch.device], Callable[[], float]]
_log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """The result of the search for a shape.

    Attributes:
        key: op, dtype, shape.
        title: the key in words.
        calls: the number of calls in a step.
        heuristic: the heuristics' choice.
        winner: the choice that is faster beyond the noise, or None.
        heuristic_us, winner_us: medians.
        tried: choices that were timed.
        refused: (choice, why) of those that were not.
        status: "done", or why the search is not done.
    """

    key: Key
    title: str
    calls: int
    heuristic: Choice | None = None
    winner: Choice | None = None
    heuristic_us: float = math.nan
    winner_us: float = math.nan
    tried: int = 0
    refused: list[tuple[Choice, str]] = field(default_factory=list)
    status: str = "out of time"

    @property
    def done(self) -> bool:
        return self.status == "done"


def stopwatch(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], float]:
    """Return a function that runs all `calls`, on a GPU as a graph, and returns the seconds of one."""
    run = capture(calls, device)
    run()
    return lambda: timed(run, device) / len(calls)


def tune(
    keys: dict[Key, int],
    device: torch.device,
    seconds: float,
    *,
    clock: Stopwatch = stopwatch,
    done: Callable[[Outcome], object] = lambda outcome: None,
) -> list[Outcome]:
    """Search the best choice for every key, first for those on which a step spends most time.

    Args:
        keys: the shapes, with the number of calls in a step.
        device: the device to tune for.
        seconds: the budget for all keys; a key that it does not reach is "out of time".
        clock: times calls, as `stopwatch` does.
        done: called with the outcome of each key, as soon as it is known.
    """
    end = time.monotonic() + seconds
    tasks = [make_task(key, device) for key in keys]
    tasks.sort(key=lambda task: -keys[task.key] * _weight(task))
    outcomes = [Outcome(task.key, task.title(), keys[task.key]) for task in tasks]
    target = tuned.target(device) if device.type == "cuda" else None
    with Compiling(tasks, target) as compiling:
        if tasks:
            compiling.start(time.monotonic() + min(START_S, seconds / 4))
        for left, (task, outcome) in zip(range(len(tasks), 0, -1), zip(tasks, outcomes, strict=True), strict=True):
            now = time.monotonic()
            if now < end:
                try:
                    share = min(max((end - now) / left, LEAST_S.get(device.type, 0.0)), end - now)
                    _search(task, outcome, now, share, compiling, clock)
                except (RuntimeError, MemoryError) as error:  # a shape that does not fit must not end the others
                    _log.info("%s was not tuned: %s", outcome.title, error)
                    outcome.status = first_lines(error, 1, 100)
                release(device)
            done(outcome)
    return outcomes


def _search(task: Task, outcome: Outcome, begin: float, seconds: float, compiling: Compiling, clock: Stopwatch) -> None:
    device = task.device
    candidates = task.candidates()
    outcome.heuristic = candidates[0]
    operands = task.operands(0)
    truth = task.truth(operands, task.samples())
    right: list[Choice] = []
    for choice in candidates:
        if len(right) > 1 and time.monotonic() - begin > SHARES[0] * seconds:
            break
        reason = None
        if right:  # do not wait for the heuristics' choice, which runs in any case if nothing is found
            reason = compiling.why_not(task, choice, begin + SHARES[0] * seconds)
        reason = reason or why_wrong(task, choice, operands, truth)
        if reason is None:
            right.append(choice)
            continue
        _log.debug("%s: %s is refused: %s", outcome.title, choice, reason)
        outcome.refused.append((choice, reason))
        if choice == outcome.heuristic:
            outcome.status = f"the heuristics' choice is refused: {reason}"
            return
    del truth
    sets = _sets(task, operands)
    times = max(-(-GRAPH_CALLS // len(sets)), 1) if device.type == "cuda" else 1

    def arm(choice: Choice) -> Callable[[], float]:
        return clock([task.call(choice, one) for one in sets] * times, device)

    def rounds(choices: Sequence[Choice], until: float, least: int, most: int) -> list[list[float]]:
        """Return the seconds of each choice in every round that all choices had."""
        runs = {str(index): arm(choice) for index, choice in enumerate(choices)}
        found: dict[str, list[float]] = {name: [] for name in runs}
        left = max(until - time.monotonic(), 1e-3)
        for name, value in interleave(runs, seconds=left, least=least, most=most):
            found[name].append(value)
        whole = min(map(len, found.values()))
        return [values[:whole] for values in found.values()]

    short = [quantile(values, 0.5) for values in rounds(right, begin + SHARES[1] * seconds, 2, 5) if values]
    outcome.tried = len(short)
    if not short:
        return
    ranked = sorted(range(1, len(right)), key=lambda index: short[index])[:FINALISTS]
    finals = [right[0], *(right[index] for index in ranked)]
    own, *others = rounds(finals, begin + seconds, *ROUNDS)
    if len(own) < ROUNDS[0]:
        return
    outcome.heuristic_us, outcome.status = quantile(own, 0.5) * 1e6, "done"
    for choice, values in zip(finals[1:], others, strict=True):
        ratios = [value / before for value, before in zip(values, own, strict=True)]
        microseconds = quantile(values, 0.5) * 1e6
        faster = quantile(ratios, CERTAIN) < 1 and quantile(ratios, 0.5) <= GAIN
        if faster and not microseconds >= outcome.winner_us:
            outcome.winner, outcome.winner_us = choice, microseconds


def why_wrong(task: Task, choice: Choice, operands: Operands, truth: dict[str, Any]) -> str | None:
    """Return why a choice must not be used (it fails, leaves values unwritten, or differs from the truth), or None."""
    for result in task.results(operands).values():
        result.fill_(math.nan)
    try:
        task.call(choice, operands)()
        for name, result in task.results(operands).items():
            exact, eager = truth[name]
            if not bool(torch.isfinite(result).all()):
                return f"{name} is not finite everywhere"
            assert_close(result[task.samples()], exact, eager=eager, name=name, **task.tolerance(choice))
    except AssertionError as error:
        return first_lines(error, 1)
    except Exception as error:  # compilers and drivers raise errors of any type
        if task.device.type == "cuda":
            with suppress(RuntimeError):
                torch.cuda.synchronize(task.device)
        return first_lines(error, 1)
    return None


def _sets(task: Task, operands: Operands) -> list[Operands]:
    """Return sets of operands with twice the size of the cache, so that timed calls read from memory."""
    size = task.cost()[0]
    count = min(max(math.ceil(2 * cache_bytes(task.device) / max(size, 1)), 1), SETS)
    return [operands, *(task.another(operands) for _ in range(count - 1))]


def cache_bytes(device: torch.device) -> int:
    """Return the bytes of the last cache before memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 2**10, "M": 2**20}
    found = 0
    for index in itertools.count():
        try:
            text = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size").read_text(encoding="ascii").strip()
            found = max(found, int(text[:-1]) * units[text[-1]])
        except (OSError, ValueError, KeyError, IndexError):
            return found or CACHE
    raise AssertionError


def _weight(task: Task) -> float:
    """Return an estimate of the cost of a call, in bytes."""
    size, operations = task.cost()
    return size + operations / (200 if task.device.type == "cuda" else 5)


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the results in one line."""
    done = [outcome for outcome in outcomes if outcome.done]
    better = [outcome for outcome in done if outcome.winner is not None]
    before = sum(outcome.calls * outcome.heuristic_us for outcome in done)
    after = before - sum(outcome.calls * (outcome.heuristic_us - outcome.winner_us) for outcome in better)
    text = f"{len(done)} of {len(outcomes)} shapes measured, {len(better)} faster than the heuristics' choice"
    return text + (f"; of these ops' time in a step, {before:.0f} us are now {after:.0f}" if better else "")
