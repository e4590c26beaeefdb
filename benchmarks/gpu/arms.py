"""Arms that are measured side by side: built one by one, then run in turn, each recorded whatever happens to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastddpm.perf.profiling.timing import first_lines, interleave, release, spread, synchronize, timed
from gpu.results import Record, Section
from gpu.timing import OutOfTime, time_limit

OUT_OF_TIME = "not run: out of time"


class Missing(Exception):
    """What an arm compares with is not installed."""


class Unavailable(Exception):
    """What an arm measures does not exist on this device or in this version."""


@dataclass
class Arm:
    """One thing to be timed.

    Attributes:
        name: of the arm, unique in its group.
        build: makes it ready and returns what is timed: a function without arguments, which may have a method
            `report() -> dict` that is asked once, at the end, for what goes into the record.
        steps: how many steps (or calls) one run does; times are divided by it.
        batch: images per step.
        dtype: of the network, as a word.
        settings: what else a reader must know to repeat it.
        build_s: about how long `build` takes, in seconds; it is not begun with less time left.
        unchecked: why this arm must not be timed, such as that its images are wrong; None if it may. Where that is
            for want of time it begins with `OUT_OF_TIME`.
    """

    name: str
    build: Callable[[], Callable[[], object]]
    steps: int = 1
    batch: int = 1
    dtype: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    build_s: float = 2.0
    unchecked: str | None = None


class Group:
    """Arms that are interleaved in one go.

    Args:
        section: where the records go.
        name: of the group; a finished group is not run again when a file is resumed.
        device: what is timed.
        seconds: how long it may take, building included.
        fields: what every record says besides, such as `what`.
        derive: adds to a record what follows from the median, in seconds per step.
        most: rounds at most.
    """

    def __init__(
        self,
        section: Section,
        name: str,
        device: torch.device,
        seconds: float,
        *,
        fields: dict[str, Any] | None = None,
        derive: Callable[[Record, float], None] | None = None,
        most: int = 25,
    ) -> None:
        self.section, self.name, self.device, self.seconds = section, name, device, seconds
        self.fields, self.derive, self.most = fields or {}, derive, most

    def run(self, arms: list[Arm]) -> None:
        """Measures `arms`. An arm that fails, is missing or finds no time left is recorded so; the others go on."""
        if self.section.has(self.name):
            return
        end = time.monotonic() + self.seconds
        ready: dict[str, tuple[Arm, Callable[[], object], Record]] = {}
        for arm in arms:
            record = self._blank(arm)
            run = self._prepare(arm, record, end)
            if run is not None:
                ready[arm.name] = (arm, run, record)
            else:
                self.section.add(record)
        self._measure(ready, end)
        ready.clear()
        release(self.device)
        self.section.close_group(self.name)

    def _blank(self, arm: Arm) -> Record:
        return {
            "group": self.name,
            "arm": arm.name,
            "batch": arm.batch,
            "steps": arm.steps,
            "dtype": arm.dtype,
            "settings": dict(arm.settings),
            "status": "not run",
            **self.fields,
        }

    def _prepare(self, arm: Arm, record: Record, end: float) -> Callable[[], object] | None:
        """Builds an arm and runs it once, untimed."""
        left = end - time.monotonic()
        if arm.unchecked is not None:
            late = arm.unchecked.startswith(OUT_OF_TIME)
            status, why = ("not run", "reason") if late else ("failed", "error")
            record |= {"status": status, why: arm.unchecked}
            return None
        if left < arm.build_s:
            record |= {"status": "not run", "reason": f"{OUT_OF_TIME} ({left:.0f} s left, needs {arm.build_s:.0f})"}
            return None
        start = time.monotonic()
        try:
            # What is begun may overrun a little: half of what it was thought to need.
            with time_limit(left + arm.build_s / 2):
                run = arm.build()
                run()
                synchronize(self.device)
                record["build_s"] = round(time.monotonic() - start, 2)
        except OutOfTime as error:
            record |= {"status": "not run", "reason": f"{OUT_OF_TIME} (building took more than {error})"}
        except Missing as error:
            record |= {"status": "missing", "reason": str(error)}
        except Unavailable as error:
            record |= {"status": "unavailable", "reason": str(error)}
        except Exception as error:  # whatever an arm does, the others go on
            record |= {"status": "failed", "error": first_lines(error)}
        else:
            return run
        run = None  # an error's traceback may hold its memory until here
        release(self.device)
        return None

    def _measure(self, ready: dict[str, tuple[Arm, Callable[[], object], Record]], end: float) -> None:
        samples: dict[str, list[float]] = {name: [] for name in ready}

        def timer(name: str) -> Callable[[], float]:
            def run() -> float:
                if ready[name][2]["status"] == "failed":
                    return 0.0
                try:
                    return timed(ready[name][1], self.device)
                except Exception as error:
                    ready[name][2].update(status="failed", error=first_lines(error))
                    return 0.0

            return run

        runs = {name: timer(name) for name in ready}
        for name, seconds in interleave(runs, seconds=max(end - time.monotonic(), 0.5), most=self.most):
            arm, _, record = ready[name]
            if record["status"] != "failed":
                samples[name].append(seconds)
                record |= {"status": "ok", "us_per_step": spread(samples[name], arm.steps)}
            if len(samples[name]) <= 1:  # so that a run that is killed has kept something
                self.section.add(record)
        for _, run, record in ready.values():
            if record["status"] == "not run":
                record["reason"] = OUT_OF_TIME
            if record["status"] == "ok":
                median = float(record["us_per_step"]["median"]) / 1e6
                if self.derive is not None:
                    self.derive(record, median)
                record |= _reported(run)
            self.section.add(record)


def _reported(run: Callable[[], object]) -> Record:
    report = getattr(run, "report", None)
    if report is None:
        return {}
    try:
        return {"report": dict(report())}
    except Exception as error:  # a report is no reason to lose a measurement
        return {"report": {"error": first_lines(error)}}
