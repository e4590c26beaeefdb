"""`benchmarks/cpu_check.py`'s evaluations of a network: what is recorded of an arm, and the table made of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_check_parts import CPU, read
from torch import Tensor

PUBLISHED = "cifar10"


@pytest.fixture
def problem(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(gpu.cpu_step, "SAMPLE_SECONDS", 0.0)  # one evaluation a sample
    return gpu.networks.make_problem("small", CPU)


def test_records_of_arms(gpu: SimpleNamespace, problem: Any) -> None:
    """Those that run have figures; what is wrong, missing or broken has no time, and stops no other."""
    step, said, calls = gpu.cpu_step, [], []

    def wrong(problem: Any, x: Tensor, dtype: torch.dtype) -> Any:
        return step.Ready(lambda: calls.append(1) or torch.zeros_like(x), "nothing")

    def missing(problem: Any, x: Tensor, dtype: torch.dtype) -> Any:
        raise gpu.arms.Missing("it is not installed")

    def broken(problem: Any, x: Tensor, dtype: torch.dtype) -> Any:
        raise ZeroDivisionError("by zero")

    arms = {name: step.ARMS[name] for name in ("diffusers", "fastddpm")}
    arms |= {"wrong": wrong, "missing": missing, "broken": broken}
    found = step.measure(problem, 2, 3, ["float32", "bfloat16"], arms, said.append)
    records = {(record["arm"], record["dtype"]): record for record in json.loads(json.dumps(found))}
    assert list(records) == [(arm, dtype) for dtype in ("float32", "bfloat16") for arm in arms]
    assert len(said) == len(records)
    for (arm, dtype), record in records.items():
        assert (record["network"], record["batch"]) == ("small", 2)
        if arm not in ("diffusers", "fastddpm"):
            assert "seconds" not in record
            continue
        assert record["status"] == "ok", record
        assert record["seconds"]["samples"] == record["times_as_fast"]["samples"] == 3
        assert record["seconds"]["p20"] <= record["seconds"]["median"] <= record["seconds"]["p80"]
        assert 0 < record["error"]["rms"] < (1e-5 if dtype == "float32" else 5e-2)
        assert (record["compile_s"] is None) == (arm == "diffusers")
    assert records["diffusers", "float32"]["times_as_fast"]["median"] == 1
    assert records["diffusers", "float32"]["given"] == "as it comes"
    assert "one product" in records["diffusers", "bfloat16"]["given"]
    assert (records["wrong", "float32"]["status"], len(calls)) == ("wrong", 2)  # one to compare in either dtype
    assert "is wrong: errors 1.0e+00" in records["wrong", "float32"]["reason"]
    for arm, expected in (
        ("missing", ("missing", "it is not installed")),
        ("broken", ("failed", "ZeroDivisionError: by zero")),
    ):
        assert (records[arm, "float32"]["status"], records[arm, "float32"]["reason"]) == expected


@pytest.mark.parametrize("library", ["diffusers", "openvino"])
def test_a_library_that_is_not_there(
    gpu: SimpleNamespace, problem: Any, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    arms = {name: gpu.cpu_step.ARMS[name] for name in ("diffusers", "openvino", "fastddpm")}
    if library == "openvino":
        del arms["diffusers"]
    records = {r["arm"]: r for r in gpu.cpu_step.measure(problem, 1, 1, ["float32"], arms, lambda _: None)}
    assert records["openvino"]["reason"] == f"{library} is not installed"
    assert records["fastddpm"]["status"] == "ok"
    assert records["fastddpm"]["times_as_fast"] is None  # there is nothing to compare with


def test_a_setting_that_fails_leaves_the_others(
    gpu: SimpleNamespace, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(unet: Any, *, options: dict[str, Any], **_: Any) -> Any:
        if "cpp_wrapper" in options:
            raise RuntimeError("no wrapper")
        return unet

    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(gpu.cpu_step.shutil, "which", lambda _: "g++")
    x = torch.randn(1, *problem.shape)
    with torch.no_grad():
        ready = gpu.cpu_step.compiled(problem, x, torch.float32)
        assert ready.call().shape == x.shape
    assert "C++ wrapper" not in ready.given
    assert ready.tried["freezing, max-autotune, C++ wrapper"] == {"failed": "RuntimeError: no wrapper"}
    assert ready.compile_s == min(ready.tried.values(), key=lambda t: t.get("seconds", float("inf")))["compile_s"]
    monkeypatch.setattr(gpu.cpu_step.shutil, "which", lambda _: None)
    with pytest.raises(gpu.arms.Unavailable, match="no C.. compiler"):
        gpu.cpu_step.compiled(problem, x, torch.float32)


def test_the_command_writes_them(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.cpu_check, "STEP", "small")
    monkeypatch.setattr(gpu.cpu_step, "ARMS", {n: gpu.cpu_step.ARMS[n] for n in ("diffusers", "openvino")})
    monkeypatch.setitem(sys.modules, "openvino", None)
    out = tmp_path / "cpu.json"
    options = ["--networks", "step", "--batch-sizes", "1,2", "--step-rounds", "3", "--no-bfloat16", "--out", str(out)]
    assert gpu.cpu_check.main(options) == 1  # something was not measured
    content = read(out)
    assert content["records"] == []
    assert content["step"]["rounds"] == 3
    assert {"torch", "diffusers"} <= set(content["step"]["versions"])
    found = [(r["batch"], r["arm"], r["status"]) for r in content["step"]["records"]]
    assert found == [(n, *rest) for n in (1, 2) for rest in (("diffusers", "ok"), ("openvino", "missing"))]
    assert "small, batch 2: openvino float32 openvino is not installed" in capsys.readouterr().out
    table = gpu.report.table([content])
    assert table.count("| diffusers | float32 |") == 2
    assert "Not measured: openvino in float32: openvino is not installed (batch 1 and 2)." in table


def record(arm: str, dtype: str, batch: int, seconds: float, given: str, compile_s: float | None) -> dict[str, Any]:
    spread = {"p20": 0.9, "p80": 1.25, "min": 0.5, "samples": 15}
    return {
        "network": PUBLISHED, "batch": batch, "arm": arm, "dtype": dtype, "status": "ok", "given": given,
        "seconds": {name: seconds * value for name, value in spread.items()} | {"median": seconds, "samples": 15},
        "times_as_fast": {name: 0.1 / seconds * value for name, value in spread.items()} | {"median": 0.1 / seconds}
        | {"samples": 15}, "error": {"rms": 7e-7, "max": 9e-7}, "compile_s": compile_s,
    }  # fmt: skip


def results() -> dict[str, Any]:
    records = [
        record("diffusers", "float32", 1, 0.1, "as it comes", None),
        record("torch.compile", "float32", 1, 0.05, "freezing", 61.25),
        record("torch.compile", "float32", 16, 0.05, "autotuned", 99),
        record("torch.compile", "bfloat16", 1, 0.04, "freezing", 61),
        {"network": PUBLISHED, "batch": 1, "arm": "openvino", "dtype": "bfloat16", "status": "unavailable",
         "reason": "not on\nthis CPU."},
    ]  # fmt: skip
    return {
        "schema": "fastddpm.cpu_check/1", "commit": "abc", "dirty": False, "written": "2026-01-02T00:00:00Z",
        "cpu": "Some CPU", "threads": 2, "torch": "2.11", "native": "yes", "steps": 10, "rounds": 5, "records": [],
        "step": {"rounds": 15, "versions": {"torch": "2.11", "diffusers": "0.30"}, "records": records},
    }  # fmt: skip


def test_the_table(gpu: SimpleNamespace) -> None:
    content = results()
    lines = gpu.report.table([content]).splitlines()
    head = next(line for line in lines if line.startswith("**Some CPU**, 2 threads, torch 2.11, commit abc"))
    assert "google/ddpm-cifar10-32" in head
    assert "(torch 2.11, diffusers 0.30)" in head
    assert head.endswith("15 rounds in turn:")
    assert "| diffusers | float32 | 1 | 100 | **1.00** (0.90 to 1.25) | 7.0e-07 | - |" in lines
    assert "| torch.compile | float32 | 1 | 50.0 | **2.00** (1.80 to 2.50) | 7.0e-07 | 61.2 |" in lines
    assert "- diffusers: as it comes" in lines
    assert "- torch.compile: in float32 at batch 1 and in bfloat16 freezing; in float32 at batch 16 autotuned" in lines
    assert "Not measured: openvino in bfloat16: not on this CPU (batch 1)." in lines
    content["step"]["records"][1]["times_as_fast"] = None
    assert "| torch.compile | float32 | 1 | 50.0 | - | 7.0e-07 | 61.2 |" in gpu.report.table([content])
    content["step"]["rounds"] = 1  # tried, not measured
    assert gpu.report.table([content]) == gpu.report.NOTHING
    del content["step"]
    assert gpu.report.table([content]) == gpu.report.NOTHING


def test_two_runs_are_compared(gpu: SimpleNamespace) -> None:
    old, new = results(), results()
    new["step"]["records"][1] = record("torch.compile", "float32", 1, 0.02, "freezing", 5)
    changes = {change.what: change for change in gpu.report.compare.compare(old, new)}
    what = "step of cifar10, batch 1: torch.compile float32"
    assert (changes[what].ratio, changes[what].verdict) == (pytest.approx(2.5), "better")
    assert changes[f"{what}, times as fast as diffusers"].ratio == pytest.approx(2.5)
    assert not any("openvino" in name for name in changes)
