"""How benchmarks measure: what is wrong has no speed, arms take turns, and rates are those of the samples."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measuring() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("measuring")


@pytest.fixture
def session(measuring: ModuleType) -> Any:
    session = measuring.Session(torch.device("cpu"), "small", True, {})
    session.copy_gb_s, session._tflops = 10.0, {"fp32": 0.5}  # as if measured
    return session


def test_an_arm_that_is_wrong_is_not_timed(measuring: ModuleType, session: Any) -> None:
    called = []

    def wrong() -> None:
        raise AssertionError("wrong")

    def build(arm: str) -> Any:
        if arm == "missing":
            raise measuring.Missing("it is not installed")
        return measuring.Candidate([lambda: called.append(arm)], wrong if arm == "wrong" else None)

    arms = ["right", "wrong", "missing"]
    found = {arm: session.outcome("group", arm, arms, build, seconds=1.0, least=3, most=3) for arm in arms}
    assert called == ["right"] * (2 + 3)  # the first call, the warm-up, and the rounds
    assert len(found["right"].samples) == len(found["right"].cpu) == 3
    assert (found["wrong"].samples, str(found["wrong"].error)) == ([], "wrong")
    assert isinstance(found["missing"].error, measuring.Missing)


def test_arms_take_turns_and_each_call_has_its_own_inputs(measuring: ModuleType, session: Any) -> None:
    order: list[str] = []

    def build(arm: str) -> Any:
        return measuring.Candidate([lambda: order.append(arm + "0"), lambda: order.append(arm + "1")])

    session.outcome("group", "a", ["a", "b"], build, seconds=1.0, least=3, most=3)
    assert order[6:] == ["a0", "a1", "b0", "b1", "b0", "b1", "a0", "a1", "a0", "a1", "b0", "b1"]


def test_rates_are_those_of_the_median(measuring: ModuleType, session: Any) -> None:
    outcome = measuring.Outcome([0.1, 0.2, 0.4], info={"bytes": 10**9, "flops": 2 * 10**10, "precision": "fp32"})
    session._rate(outcome)
    info = outcome.info
    assert info["seconds"]["median"] == 0.2
    assert info["gb_per_s"] == pytest.approx(5)
    assert info["tflops"] == pytest.approx(0.1)
    assert (info["roof"], info["percent_of_roof"]) == ("copy", pytest.approx(50))  # 0.1 s; the products 0.04 s
    assert measuring.ratio([1.0, 2.0, 4.0], [3.0, 4.0, 20.0])["median"] == 3


@pytest.mark.parametrize(("size", "expected"), [(10**12, 2), (1, 64)])
def test_inputs_are_more_than_a_cache_holds(measuring: ModuleType, session: Any, size: int, expected: int) -> None:
    assert session.sets(size) == expected
    cache = measuring.second_level_cache(session.device)
    assert session.sets(cache // 4) * (cache // 4) >= 4 * cache


def test_from_the_command_line(tmp_path: Path) -> None:
    """A row for every arm that runs here, with all that is to be said of it."""
    out = tmp_path / "out.json"
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--benchmark-only", "--bench-size", "small",
         "benchmarks/test_philox.py", "-k", "not fused", f"--benchmark-json={out}"],
        cwd=ROOT, env=own, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    rows = {row["params"]["arm"]: row for row in json.loads(out.read_text(encoding="utf-8"))["benchmarks"]}
    assert set(rows) == {"eager", "reference", "torch"}
    row = rows["eager"]
    info = row["extra_info"]
    assert row["group"] == "normal 16x3x32x32"
    assert row["stats"]["median"] == pytest.approx(info["seconds"]["median"])
    assert info["gb_per_s"] == pytest.approx(info["bytes"] / info["seconds"]["median"] / 1e9)
    assert set(info["times_as_fast_as"]) == {"reference", "torch"}
    assert {"device", "hardware", "state", "versions", "commit", "percent_of_roof"} <= set(info)
    assert {"build_s", "first_call_s", "warmup_s"} <= set(info)
    assert "times as fast as" in run.stdout
