"""A pytest plugin: a line of JSON for every test as it begins and ends, so that a run that is killed has told much."""

from __future__ import annotations

import json
import os
from typing import Any

VARIABLE = "FASTDDPM_OUTCOME_LOG"


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"test": nodeid, "outcome": "started"})


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.outcome == "passed":
        return  # a test that passed its setup has not passed yet
    line: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, **dict(report.user_properties)}
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        line["error"] = str(crash.message if crash is not None else report.longrepr)
    elif report.outcome == "skipped":
        line["error"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    _write(line)


def pytest_collectreport(report: Any) -> None:
    if report.outcome == "failed":
        _write({"test": report.nodeid, "outcome": "failed", "error": str(report.longrepr)})


def _write(line: dict[str, Any]) -> None:
    path = os.environ.get(VARIABLE)
    if path and "PYTEST_XDIST_WORKER" not in os.environ:  # the controller hears of all workers' tests
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
