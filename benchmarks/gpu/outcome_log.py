"""A pytest plugin: one line of JSON for every test as it ends, so that a run that is killed has told what it knew."""

from __future__ import annotations

import json
import os
from typing import Any

VARIABLE = "FASTDDPM_OUTCOME_LOG"


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.outcome == "passed":
        return  # a test that passed its setup has not passed yet
    line: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        line["error"] = str(crash.message if crash is not None else report.longrepr)
    _write(line)


def pytest_collectreport(report: Any) -> None:
    if report.outcome == "failed":
        _write({"test": report.nodeid, "outcome": "failed", "seconds": 0, "error": str(report.longrepr)})


def _write(line: dict[str, Any]) -> None:
    path = os.environ.get(VARIABLE)
    if path and "PYTEST_XDIST_WORKER" not in os.environ:  # the controller hears of all workers' tests
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
