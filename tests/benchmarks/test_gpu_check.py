"""`benchmarks/gpu_check.py`: what a run records, keeps and refuses; tried on the CPU's tiny network."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_check_parts import SMALL, SOURCE, read


@pytest.fixture(scope="module")
def finished(gpu: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a small run in which one peer is not installed and one arm of each group fails."""
    path = tmp_path_factory.mktemp("gpu_check") / "cpu.json"

    def broken(*_: Any) -> None:
        raise ValueError("deliberate\nsecond line")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "denoising_diffusion_pytorch", None)  # importing it fails
        patch.setattr(gpu.loops, "network_alone", broken)
        assert gpu.gpu_check.main([*SMALL, "--out", str(path)]) == 0
    return path


@pytest.mark.slow
def test_schema(gpu: SimpleNamespace, finished: Path) -> None:
    content = read(finished)
    assert content["schema"] == gpu.results.SCHEMA
    assert content["device"]["kind"] == "cpu"
    assert content["small"] is True
    assert content["source"] == SOURCE
    assert content["commit"] == "abc"
    assert {name: section["status"] for name, section in content["sections"].items()} == {
        "machine": "done",
        "tests": "done",
        "ops": "done",
        "cifar10": "done",
        "celeba256": "done",
        "profile": "skipped",
        "tune": "done" if gpu.tune.tuned_ops(torch.device("cpu")) else "skipped",
    }
    assert "GPU only" in content["sections"]["profile"]["reason"]
    machine = content["sections"]["machine"]
    assert machine["copy_gb_s"] > 0
    assert all(value > 0 for value in machine["matmul_tflops"].values())
    assert torch.__version__.startswith(machine["versions"]["torch"].split("+")[0])
    for section in content["sections"].values():
        for record in section["records"]:
            assert record["status"] in gpu.results.STATUSES
            if record["status"] == "ok" and "us_per_step" in record:
                spread = record["us_per_step"]
                assert 0 < spread["min"] <= spread["p20"] <= spread["median"] <= spread["p80"]
                assert spread["samples"] >= 1
                assert record["steps"] >= 1
                if record["what"] in ("loop", "compiled"):
                    expected = record["batch"] / (1000 * spread["median"] / 1e6)
                    assert record["images_per_s_1000"] == pytest.approx(expected)
            elif record["status"] != "ok":
                assert record.get("error") or record.get("reason")


@pytest.mark.slow
def test_a_missing_peer_and_a_failing_arm_stop_nobody(finished: Path) -> None:
    records = read(finished)["sections"]["cifar10"]["records"]
    loop = {r["arm"]: r for r in records if r["group"] == "loop batch 1"}
    peer = loop.pop("denoising_diffusion_pytorch")
    assert peer["status"] == "missing"
    assert "not installed" in peer["reason"]
    assert {"fastddpm fp16", "fastddpm fp16 plain", "fastddpm fp32", "DDPMPipeline", "eager fp32"} <= loop.keys()
    assert {r["status"] for r in loop.values()} == {"ok"}
    network = {r["arm"]: r for r in records if r["group"] == "network batch 2"}
    for name in ("fastddpm fp16", "fastddpm fp32"):
        assert network[name]["status"] == "failed"
        assert network[name]["error"] == "ValueError: deliberate\nsecond line"
    assert network["eager fp32"]["status"] == "ok"


@pytest.mark.slow
def test_images_were_compared(finished: Path) -> None:
    images = [r for r in read(finished)["sections"]["cifar10"]["records"] if r["group"] == "images"]
    assert {r["arm"] for r in images} == {"fastddpm fp16", "fastddpm fp16 plain", "fastddpm fp32"}
    for record in images:
        assert record["errors"]["ok"], record
        assert 0 < record["errors"]["rms"] <= record["errors"]["bound_rms"] < 1e-2


@pytest.mark.slow
def test_resume_repeats_nothing(
    gpu: SimpleNamespace, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "again.json"
    path.write_text(finished.read_text(encoding="utf-8"), encoding="utf-8")
    arguments = [*SMALL, "--resume", "--out", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.gpu_check, "run_section", lambda *_: pytest.fail("a section was repeated"))
        assert gpu.gpu_check.main(arguments) == 0
    assert "none left to run" in capsys.readouterr().out
    before, after = read(finished), read(path)
    assert after.pop("written") >= before.pop("written")
    assert after == before

    # A section that ran out of time is finished, without what it had.
    changed = copy.deepcopy(before)
    section = changed["sections"]["cifar10"]
    section["status"], section["groups"]["network batch 1"] = "partial", "partial"
    path.write_text(json.dumps(changed), encoding="utf-8")
    assert gpu.gpu_check.main(arguments) == 0
    after = read(path)
    assert after["sections"]["ops"] == before["sections"]["ops"]
    assert after["sections"]["cifar10"]["status"] == "done"

    def of(content: dict[str, Any], group: str) -> list[dict[str, Any]]:
        return [r for r in content["sections"]["cifar10"]["records"] if r["group"] == group]

    assert of(after, "loop batch 1") == of(before, "loop batch 1")
    assert {r["status"] for r in of(before, "network batch 1")} == {"ok", "failed"}  # of the broken arms
    assert {r["status"] for r in of(after, "network batch 1")} == {"ok"}


def test_another_source_is_not_kept(gpu: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    identity = {"device": {"kind": "cpu"}, "source": "a"}
    first = gpu.results.Results(path, identity)
    gpu.results.Section(first, "machine", 10).close()
    assert gpu.results.Results(path, identity, resume=True).finished("machine")
    assert not gpu.results.Results(path, identity).finished("machine")
    other = gpu.results.Results(path, identity | {"source": "b"}, resume=True)
    assert other.sections == {}
    assert other.dropped == "source was 'a', is 'b'"
    again = gpu.results.Results(path, identity, resume=True, header={"commit": "later"})
    assert again.finished("machine")  # the sources are what counts
    assert again.content["commit"] == "later"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device is cpu without --small"),
        (["--device", "cpu", "--small", "--out", "x", "--budget", "0"], "--budget is 0.0, must be positive"),
        (["--device", "cpu", "--small"], "--out is missing"),
        (["--section", "speed"], "invalid choice: 'speed'"),
        (["--skip", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_bad_arguments(
    gpu: SimpleNamespace, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        gpu.gpu_check.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_ops_on_a_gpu(gpu: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    arguments = ["--device", "cuda", "--small", "--section", "machine", "ops", "--out", str(path), "--commit", "abc"]
    assert gpu.gpu_check.main(arguments) == 0
    sections = read(path)["sections"]
    assert sections["machine"]["latency"]["graph_node_us"] > 0
    triton = [r for r in sections["ops"]["records"] if r["arm"] == "triton"]
    assert len(triton) == 8
    assert {r["status"] for r in triton} == {"ok"}, triton
