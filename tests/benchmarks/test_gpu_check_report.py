"""What is made of the results of `benchmarks/gpu_check.py`: profiles, marks, the README's table and plots."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from gpu_check_parts import CPU, MODULES, ROOT, measured

from fastddpm.perf.profiling import kernels


def test_profile_of_a_loop(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, Event = gpu.networks.make_problem("small", CPU), kernels.Event
    step = [Event("conv", 0, 5), Event("_reverse_step", 8, 1)]
    one_round = [Event("memset", 0, 1), *step, Event("noise", 20, 1)]
    traces = [one_round, [Event(n, 9 * i + s, us) for i in range(4) for n, s, us in step]]
    monkeypatch.setattr(kernels, "trace", lambda run, device: traces.pop(0))
    make, graphs = gpu.profiler.SamplerLoop, []

    def plain_loop(problem: Any, precision: str, batch: int, steps: int, graph: str | bool) -> Any:
        graphs.append(graph)
        return make(problem, precision, batch, steps, False)

    monkeypatch.setattr(gpu.profiler, "SamplerLoop", plain_loop)
    record = {"steps": 4, **gpu.profiler.time_loop(problem, 2, 4)}
    record |= gpu.profiler.trace_loop(problem, 2, record, tflops=100.0, copy=4000.0)
    assert graphs == ["auto", "step", False]  # the first trace held too little
    assert record["settings"]["traced"] is False
    assert record["kernels_per_step"] == 2
    assert record["busy_us_per_step"] == pytest.approx(6)
    assert record["idle_share"] == pytest.approx(1 - 6 / record["us_per_step"]["median"])
    floor, us = record["floor"], record["us_per_step"]["median"]
    assert floor["compute_us"] == pytest.approx(2 * problem.flops / 100e6)
    assert floor["weights_us"] == pytest.approx(2 * problem.parameters / 4000e3)
    assert floor["share_of_floor"] == pytest.approx(max(floor["compute_us"], floor["weights_us"]) / us)
    program = floor["program"]
    assert 0 < program["flops"] < 2 * problem.flops  # frozen, it computes less
    assert program["kernels"] >= program["instructions"] > 20


def test_marks(gpu: SimpleNamespace) -> None:
    good = {mark.what: mark for mark in gpu.marks.judge(measured(200, 2100, 300))}
    assert all(mark.passed for mark in good.values()), good
    assert good["CIFAR-10 batch 8, times as fast as DDPMPipeline"].found == pytest.approx(10.5)
    floor_us = 256 * 12.444e9 / 790e12 * 1e6
    share = good["CIFAR-10 batch 256, share of the compute floor, %"].found
    assert share == pytest.approx(100 * floor_us / 6400, rel=1e-4)
    slow = {mark.what: mark for mark in gpu.marks.judge(measured(450, 2100, 300))}
    assert slow["CIFAR-10 batch 1, us per step"].short == "50 over"
    assert slow["CIFAR-10 batch 1, times as fast as DDPMPipeline"].short == "5.33 short"
    assert slow["least times as fast as the best torch.compile"].passed is False
    content = measured(200, 2100, 300)
    content["sections"]["ops"]["records"][0] |= {"status": "failed", "error": "wrong: rms"}
    content["sections"]["profile"]["records"] = []
    marks = {mark.what: mark for mark in gpu.marks.judge(content)}
    assert marks["reverse_step, % of copy"].passed is False  # a wrong result has no speed
    assert marks["idle share at batch 1, %"].passed is None
    nothing = gpu.marks.judge({"sections": {}})
    assert len(nothing) == len(good)
    assert all(mark.passed is None and mark.where for mark in nothing)


def test_report_invents_nothing(gpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    readme.write_text("before\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nafter\n", encoding="utf-8")
    arguments = ["--readme", str(readme), "--results", str(results)]
    (results / "curves.json").write_text('{"loss": 1}')
    small = measured(200, 2100, 300) | {"small": True}
    (results / "small.json").write_text(json.dumps(small))
    cpu = measured(200, 2100, 300) | {"device": {"kind": "cpu", "name": "cpu", "slug": "cpu"}}
    (results / "cpu.json").write_text(json.dumps(cpu))
    assert gpu.report.main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text(encoding="utf-8")
    assert gpu.report.main(arguments) == 0
    text = readme.read_text(encoding="utf-8")
    assert text == f"before\n<!-- speed:begin -->\n{gpu.report.NOTHING}\n<!-- speed:end -->\nafter\n"
    assert gpu.report.main([*arguments, "--check"]) == 0

    content = measured(200, 2100, 300)
    # An arm that was not measured at one batch size is a dash there.
    content["sections"]["cifar10"]["records"] = [
        r for r in content["sections"]["cifar10"]["records"] if (r["batch"], r["arm"]) != (64, "DDPMPipeline")
    ]
    (results / "some-gpu.json").write_text(json.dumps(content))
    assert gpu.report.main(arguments) == 0
    lines = readme.read_text(encoding="utf-8").splitlines()
    assert "**Some GPU**, torch 2.11, commit abc, 2026-01-02:" in lines
    assert "| google/ddpm-cifar10-32 | 8 | 200 | 40 | 10.5 | 1.5 | 63 % |" in lines
    assert any(line.startswith("| google/ddpm-cifar10-32 | 64 |") and "| - | - |" in line for line in lines)
    assert any("`reverse_step` 90 %" in line for line in lines)
    assert "![images per second on Some GPU](results/some-gpu.svg)" in lines
    drawing = (results / "some-gpu.svg").read_text(encoding="utf-8")
    assert "<svg" in drawing
    assert gpu.report.main([*arguments, "--check"]) == 0
    assert gpu.report.main(arguments) == 0
    assert (results / "some-gpu.svg").read_text(encoding="utf-8") == drawing  # the same figures, the same drawing
    (results / "some-gpu.svg").unlink()
    assert gpu.report.main([*arguments, "--check"]) == 1
    assert "some-gpu.svg differs" in capsys.readouterr().err

    readme.write_text("no markers", encoding="utf-8")
    assert gpu.report.main(arguments) == 2
    assert "must be there once each" in capsys.readouterr().err


def test_the_cpu_s_table(gpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = {"largest": 1e-5, "rms": 1e-6, "pixels": 1000, "pixels_differ": 3, "pixels_differ_by_more_than_1": 1}
    ratio = {"times_as_fast": 2.0, "times_as_fast_p20": 1.9, "times_as_fast_p80": 2.125}
    one = {"times_as_fast": 1.0, "times_as_fast_p20": 1.0, "times_as_fast_p80": 1.0}
    records = [
        {"network": "cifar10", "batch": 1, "arm": "original", "median_s": 0.5, "images": images, **one},
        {"network": "cifar10", "batch": 1, "arm": "float32", "median_s": 0.25, "images": images, **ratio},
    ]
    content = {
        "schema": "fastddpm.cpu_check/1", "commit": "abc", "dirty": False, "written": "2026-01-02T00:00:00Z",
        "cpu": "Some CPU", "threads": 2, "torch": "2.11", "native": "yes", "steps": 10, "rounds": 5, "records": records,
    }  # fmt: skip
    readme, path = tmp_path / "README.md", tmp_path / "cpu.json"
    readme.write_text("<!-- speed:begin -->\n<!-- speed:end -->", encoding="utf-8")
    path.write_text(json.dumps(content))
    arguments = ["--readme", str(readme), "--results", str(tmp_path)]
    assert gpu.report.main(arguments) == 0
    lines = readme.read_text(encoding="utf-8").splitlines()
    assert lines[1] == gpu.report.NOTHING
    head = "**Some CPU**, 2 threads, torch 2.11, commit abc, 2026-01-02; 10-step calls with all that is in them:"
    assert head in lines
    name = "diffusers' `DDPMPipeline`, google/ddpm-cifar10-32"
    expected = f"| {name} | 1 | float32 | 50.0 | 25.0 | **2.00** (1.90 to 2.12) | 0.3 % (0.1 %) |"
    assert [line for line in lines if line.startswith("| diffusers")] == [expected]
    (tmp_path / "new.json").write_text(json.dumps(content | {"rounds": 1}))  # tried, not measured: left out
    assert gpu.report.main([*arguments, "--check"]) == 0
    faster = {"times_as_fast": 3.0, "times_as_fast_p20": 2.9, "times_as_fast_p80": 3.1}
    (tmp_path / "new.json").write_text(json.dumps(content | {"records": [records[1] | faster]}))
    assert gpu.report.main(["--compare", str(path), str(tmp_path / "new.json")]) == 0
    table = capsys.readouterr().out
    assert "| cifar10, batch 1: float32, times as fast as the original | 2 | 3 | **1.50 (1.36 to 1.63)** " in table
    assert "| cifar10, batch 1: original | 0.5 s | - | - | only old |" in table


def test_two_runs_are_compared(gpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    before, after = measured(400, 2100, 300), measured(200, 2100, 300)
    after["sections"]["cifar10"]["records"].pop()
    old.write_text(json.dumps(before))
    new.write_text(json.dumps(after))
    assert gpu.report.main(["--compare", str(old), str(new)]) == 0
    lines = capsys.readouterr().out.splitlines()
    mine = "cifar10, loop batch 8: fastddpm fp16"
    assert f"| {mine} | 400 us | 200 us | **2.00 (2.00 to 2.00)** | **better** |" in lines
    assert "| cifar10, loop batch 8: DDPMPipeline | 2100 us | 2100 us | 1.00 (1.00 to 1.00) | within noise |" in lines
    assert "| cifar10, compiled batch 8: torch.compile fp16 | 300 us | - | - | only old |" in lines
    old.write_text('{"loss": 1}')
    assert gpu.report.main(["--compare", str(old), str(new)]) == 2
    assert "schema is None" in capsys.readouterr().err


def test_digest_of_the_sources(gpu: SimpleNamespace, tmp_path: Path) -> None:
    for name in gpu.results.SOURCES:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.py").write_text("1")
    first = gpu.results.source_digest(tmp_path)
    (tmp_path / "README.md").write_text("not measured")
    assert gpu.results.source_digest(tmp_path) == first
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert gpu.results.source_digest(tmp_path) != first
    assert len(first) == 12


def test_modules_stand_alone(gpu: SimpleNamespace) -> None:
    assert all(isinstance(getattr(gpu, name), ModuleType) for name in MODULES.split())
    for path in sorted((ROOT / "benchmarks" / "gpu").glob("*.py")):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
