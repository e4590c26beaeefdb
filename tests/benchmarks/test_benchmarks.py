"""The scripts of `benchmarks/` run, on tiny networks, and what was measured before can be read."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def python(*arguments: str | Path) -> str:
    """Run python on the sources here, with nothing of the pytest that this runs in, and return what it printed."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = [str(ROOT), str(ROOT / "kernels"), own.get("PYTHONPATH", "")]
    environment = own | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_can_be_read(path: Path) -> None:
    assert read(path)


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a script of `benchmarks/`, to be run in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def test_the_readme_and_the_page_say_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = script("report", monkeypatch)
    assert report.main(["--check"]) == 0
    cpu = str(ROOT / "benchmarks" / "results" / "cpu.json")
    assert report.main(["--compare", cpu, cpu]) == 0
    assert "within noise" in capsys.readouterr().out


@pytest.mark.long
def test_timing_from_the_command_line(tmp_path: Path) -> None:
    """A row for every arm that runs here, with all that is to be said of it."""
    out = tmp_path / "out.json"
    shown = python(
        "-m", "pytest", "-p", "no:cacheprovider", "-q", "--benchmark-only", "--bench-size", "small",
        "benchmarks/test_philox.py", "-k", "not fused", f"--benchmark-json={out}",
    )  # fmt: skip
    rows = {row["params"]["arm"]: row for row in read(out)["benchmarks"]}
    assert set(rows) == {"eager", "reference", "torch"}
    row = rows["eager"]
    info = row["extra_info"]
    assert row["group"] == "normal 16x3x32x32"
    assert row["stats"]["median"] == pytest.approx(info["seconds"]["median"] * info["calls"])
    assert info["gb_per_s"] == pytest.approx(info["bytes"] / info["seconds"]["median"] / 1e9)
    assert {"device", "hardware", "state", "versions", "commit", "percent_of_roof"} <= set(info)
    assert "normal 16x3x32x32: eager" in shown


def test_cpu_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole calls and steps, in turn with a peer; --long runs every section."""
    out = tmp_path / "cpu.json"
    threads = torch.get_num_threads()
    words = "--small --sections lucidrains,step --step-networks cifar10 --arms diffusers,fastddpm --batch-sizes 1"
    words += f" --steps 2 --rounds 3 --step-rounds 3 --no-bfloat16 --threads {threads} --out {out}"
    assert script("cpu_check", monkeypatch).main(words.split()) == 0
    content = read(out)
    assert {record["network"] for record in content["records"]} == {"lucidrains"}
    assert all(record["images"]["largest"] < 1e-4 for record in content["records"])
    steps = content["step"]["records"]
    assert {record["arm"]: record["status"] for record in steps} == {"diffusers": "ok", "fastddpm": "ok"}
    assert all(record["floor"]["seconds"] > 0 for record in steps)
    assert "times as fast" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.slow
def test_gpu_check(tmp_path: Path) -> None:
    """A section of each kind runs on the CPU. An interrupted run goes on where it ended and keeps what it had."""
    out = tmp_path / "gpu.json"
    command = ["benchmarks/gpu_check.py", "--device", "cpu", "--small", "--out", out, "--commit", "abc"]
    python(*command, "--section", "machine", "cifar10", "profile", "tune", "--budget", "500")
    content = read(out)
    sections = content["sections"]
    assert {section["status"] for section in sections.values()} <= {"done", "partial", "skipped"}
    groups = {record["group"] for record in sections["cifar10"]["records"]}
    assert groups == {"loop ddim 50 steps fp32 batch 4"}
    (ours,) = (record for record in sections["cifar10"]["records"] if record["arm"] == "fused")
    assert ours["us_per_step"]["median"] > 0
    assert ours["percent_of_roof"] > 0
    lost = sections["cifar10"]["records"].pop()
    sections["cifar10"]["status"] = "partial"
    out.write_text(json.dumps(content))
    python(*command, "--section", "machine", "cifar10", "--resume")
    again = read(out)["sections"]
    assert again["machine"] == sections["machine"]
    kept = {record["arm"]: record for record in again["cifar10"]["records"]}
    assert kept["fused"] == ours
    assert kept[lost["arm"]]["status"] == lost["status"]


@pytest.mark.long
@pytest.mark.slow
def test_cpu_check_whole(tmp_path: Path) -> None:
    """Every section runs, this version held against itself as another checkout, and says what it measured."""
    out = tmp_path / "cpu.json"
    shown = python(
        "benchmarks/cpu_check.py", "--small", "--arms", "diffusers,fastddpm", "--batch-sizes", "1", "--steps", "2",
        "--rounds", "3", "--step-rounds", "3", "--no-bfloat16", "--out", out, "--against", ROOT, "--threads", "1",
        "--step-networks", "cifar10", "--crowd-rounds", "3", "--crowd-seconds", "0.01", "--start-rounds", "1",
        "--samples", "2", "--sample-steps", "3",
    )  # fmt: skip
    content = read(out)
    assert {record["network"] for record in content["records"]} == {"cifar10", "lucidrains"}
    assert "times as fast" in shown
    avx2 = content["isa"]["avx2"]
    assert avx2["status"] == "unavailable" or avx2["ceilings"]["capability"] == "AVX2"
    crowd = {(r["network"], r["batch"], r["arm"]): r for r in content["crowd"]["records"]}
    assert {(network, batch) for network, batch, _ in crowd} == {("digits", 1), ("digits", 8), ("small", 1)}
    for record in crowd.values():
        assert record["status"] == "ok"
        assert {record[name]["samples"] for name in ("idle", "busy", "two", "busy_over_idle", "two_over_idle")} == {3}
    here, there = content["start"]["records"]
    assert here["seconds"]["median"] > 0
    assert there["pixels_differ"] == 0
    assert set(here["times_as_fast"]) == {there["arm"]} == {arm for _, _, arm in crowd} - {"fastddpm"}
    assert "within noise" in python("benchmarks/report.py", "--compare", out, out)
