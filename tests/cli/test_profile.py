"""`fastddpm profile` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastddpm import NoiseSchedule, Sampler, UNet
from fastddpm.cli import main
from fastddpm.interop.pretrained import load_pretrained, save_pretrained
from fastddpm.perf.profiling import ceilings, compare, kernels, model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    unet = UNet(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, num_class_embeds=3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    save_pretrained(path, unet, NoiseSchedule.linear(5))
    return path


@pytest.fixture(scope="module")
def small_ceilings() -> Any:
    """Ceilings from small products and copies: what they are worth is of no interest here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ceilings.MATMUL_SIZES, "cpu", (64, 128))
        patch.setitem(ceilings.LARGE_COPY, "cpu", 2**22)
        yield


@pytest.fixture(scope="module")
def written(folder: Path, small_ceilings: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one profile wrote: p.json, p.png and t.json."""
    out = tmp_path_factory.mktemp("out")
    files = ["--json", str(out / "p.json"), "--plot", str(out / "p.png"), "--trace", str(out / "t.json")]
    quick = ["--quick", "--budget", "300", "--device", "cpu", "--batch", "2", "1"]
    assert main(["profile", str(folder), *quick, *files]) == 0
    return out


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_prediction_measures_nothing(folder: Path, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = written / "predicted.json"
    words = ["profile", str(folder), "--predict", "h200", "--batch", "1", "4", "--json", str(out)]
    assert main([*words, "--compare", str(written / "p.json")]) == 0
    shown = capsys.readouterr().out
    assert "predicted for NVIDIA H200, fp16; nothing of it is measured" in shown
    assert "measured on" in shown
    content = read(out)
    assert content["schema"] == "fastddpm.prediction/1"
    one, four = content["batches"]
    assert 0 < one["us_per_step"] <= four["us_per_step"]
    assert {row["bound"] for row in one["rows"]} == {"latency"}


def test_a_profile_says_all_that_it_should(written: Path) -> None:
    content = read(written / "p.json")
    assert content["schema"] == model.SCHEMA
    assert (content["precision"], content["steps"]) == ("float32", 5)
    assert content["network"]["frozen"] is True
    assert content["device"]["kind"] == "cpu"
    assert content["ceilings"]["matmul_tflops"]["fp32"]["best"] > 0
    assert any("hardware counters" in entry["counter"] for entry in content["unreadable"])
    assert [record["batch"] for record in content["batches"]] == [1, 2]
    for record in content["batches"]:
        assert record["status"] == "ok", record
        us = record["us_per_step"]
        assert 0 < us["min"] <= us["p20"] <= us["median"] <= us["p80"]
        assert record["images_per_s"] == pytest.approx(record["batch"] / (us["median"] / 1e6 * 5))
        assert record["prepare_s"] > 0
        assert record["first_run_s"] > 0
        layers, floor = record["layers"], record["floor"]
        assert len(layers) > 20
        assert {"conv", "norm", "attention", "time"} <= {layer["kind"] for layer in layers}
        assert floor["layers_us"] == pytest.approx(sum(layer["floor_us"] for layer in layers))
        assert floor["share_of_layers"] == pytest.approx(floor["layers_us"] / us["median"])
        assert len(record["causes"]) >= 3
        costs = [cause["us"] for cause in record["causes"]]
        assert costs == sorted(costs, reverse=True)
        assert "idle_share" not in record["kernels"]  # there is no GPU to be idle
        assert record["kernels"]["top"]
    first, second = ({layer["name"]: layer for layer in r["layers"]} for r in content["batches"])
    assert first.keys() == second.keys()
    convs = [name for name in first if first[name]["kind"] == "conv"]
    assert all(second[name]["flops"] == 2 * first[name]["flops"] for name in convs)


def test_pictures_and_traces(written: Path) -> None:
    assert (written / "p.png").read_bytes().startswith(b"\x89PNG")
    names = {event.get("name") for event in read(written / "t.json")["traceEvents"]}
    assert any(str(name).startswith("layer 0: time") for name in names)


def test_two_profiles_are_compared(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = read(written / "p.json")
    other = written / "faster.json"
    for record in content["batches"]:
        record["us_per_step"] = {k: v / 10 if k != "samples" else 9 for k, v in record["us_per_step"].items()}
    other.write_text(json.dumps(content))
    assert main(["profile", "--compare", str(written / "p.json"), str(other)]) == 0
    out = capsys.readouterr().out
    assert "| batch 1: step |" in out
    assert "| batch 2: conv layers |" in out
    assert len(compare.figures(content)) == out.count("\n| ") - 1  # the head


@pytest.mark.usefixtures("small_ceilings")
def test_what_does_not_fit_the_budget_is_not_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model.Plan, "left", lambda plan: 0.5)
    for _ in range(2):
        assert main(["profile", str(folder), "--quick", "--device", "cpu", "--batch", "1"]) == 0
    out = capsys.readouterr().out
    assert "batch 1: not run: out of time (0 s left, needs about 1)" in out
    files = sorted(path.name for path in Path().iterdir())
    assert len(files) == 2  # the second did not replace the first
    assert all(name.startswith("profile-cpu") for name in files)
    assert read(Path(files[0]))["batches"][0]["status"] == "not run"


def test_a_batch_size_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def measure(plan: model.Plan, batch: int, seconds: float) -> dict[str, Any]:
        measured.append(batch)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "_measure", measure)
    plan = model.Plan(make=lambda graph: None, shape=(1, 8, 8), precision="float32", batches=[1, 8])  # type: ignore
    records = [model._guarded(plan, batch, 1, []) for batch in plan.batches]
    assert measured == [1, 8]
    assert {record["status"] for record in records} == {"failed"}
    assert "out of memory" in records[0]["error"]


def test_on_a_gpu_layers_get_the_times_of_their_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a trace of a GPU would be read: kernels by who launched them, and gaps from a traced loop."""
    pretrained = load_pretrained(folder)
    plan = model.Plan(
        make=lambda graph: pretrained.sampler(backend="eager"), shape=(1, 8, 8), precision="float32", batches=[2],
        labels=lambda count: [0] * count,
    )  # fmt: skip
    instructions = model.ready_for(plan, plan.make(None), 2).instructions
    layers = [{"name": i.name, "kind": i.kind} for i in instructions]
    record: dict[str, Any] = {"batch": 2, "layers": layers, "steps_per_run": 4, "us_per_step": {"median": 100.0}}
    events: list[dict[str, Any]] = []
    for k in range(len(instructions)):
        events += [
            {"cat": "user_annotation", "name": f"layer {k}: conv name", "ts": 10 * k, "dur": 9},
            {"cat": "cuda_runtime", "name": "launch", "ts": 10 * k + 1, "args": {"correlation": k}},
            {"cat": "kernel", "name": "k", "ts": 500, "dur": k + 1.0, "args": {"correlation": k}},
        ]
    for event in events:
        event |= {"ph": "X", "tid": 1}
    steps = [("conv", 9 * i, 5) for i in range(4)] + [("_reverse_step", 9 * i + 8, 1) for i in range(4)]
    loop = [{"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur} for name, ts, dur in steps]
    monkeypatch.setattr(kernels, "record", lambda *_, host, **__: {"traceEvents": events if host else loop})
    found = model._trace(plan, record, torch.device("cuda"), None)
    assert [layer["traced_us"] for layer in layers] == [k + 1.0 for k in range(len(layers))]
    assert layers[0]["kernel_names"] == ["k"]
    assert found["traced"] == "step"
    assert found["idle_share"] == pytest.approx(1 / 3)  # of 9 us 6 are busy
    assert found["busy_share_untraced"] == pytest.approx(0.06)
    del events[2]  # a layer without kernels: the trace is not whole
    record["layers"] = [{"name": i.name} for i in instructions]
    model._trace(plan, record, torch.device("cuda"), None)
    assert not any("traced_us" in layer for layer in record["layers"])


def test_self_conditioning_is_part_of_the_network() -> None:
    torch.manual_seed(0)
    unet = UNet(
        sample_size=8, in_channels=2, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    sampler = Sampler(unet.eval(), NoiseSchedule.linear(4), self_condition=True)
    plan = model.Plan(make=lambda graph: sampler, shape=(1, 8, 8), precision="float32", batches=[3])
    ready = model.ready_for(plan, sampler, 3)
    with ready.running():
        assert ready().shape == (3, 1, 8, 8)
    assert ready.inputs.shape[1] == 2
