"""`fastddpm tune` on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastddpm_kernels import backend as _backend
from fastddpm_kernels import tuned as _tuned
from fastddpm_kernels.tuned import Key

from fastddpm import GaussianDiffusion, NoiseSchedule, UNet
from fastddpm.cli import main
from fastddpm.interop.pretrained import save_pretrained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    unet = UNet(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False, num_class_embeds=3,
        null_class=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    save_pretrained(path, unet, NoiseSchedule.linear(5))
    return str(path)


@pytest.fixture(autouse=True)
def table(native: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The place of the user's table, which does not exist. The native library is loaded before, not built there."""
    monkeypatch.setenv("FASTDDPM_TUNED", "1")
    monkeypatch.setenv("FASTDDPM_CACHE_DIR", str(tmp_path / "cache"))
    _tuned.forget()
    yield _tuned.user_path(CPU)
    _tuned.forget()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["tune", *arguments, "--device", "cpu"]) == 0
    return capsys.readouterr().out


def test_it_searches_writes_shows_and_clears(folder: str, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no tuned table for cpu" in run(capsys, "--show")
    assert f"There is no {table}" in run(capsys, "--clear")
    out = run(capsys, folder, "--batch", "2", "1", "--dry-run")
    assert out.count("conv float32 batch=") >= 4
    assert "algorithm=" in out
    assert not table.parent.exists()

    out = run(capsys, folder, "--batch", "1", "--budget", "120")
    assert f"wrote {table}" in out
    content = json.loads(table.read_text())
    assert content["schema"] == _tuned.SCHEMA
    assert content["device"] == _tuned.device_name(CPU)
    assert {entry["shape"]["batch"] for entry in content["entries"]} == {1}
    assert all(0 < entry["tuned_us"] <= entry["heuristic_us"] for entry in content["entries"])
    count = len(content["entries"])
    assert f"{count} of {count} shapes measured" in out
    assert _tuned.known(CPU) == set(_tuned.read(table, CPU).entries)
    assert f"{table}: {count} shapes" in run(capsys, "--show")
    assert f"deleted {table}" in run(capsys, "--clear")
    assert not table.exists()
    assert _tuned.known(CPU) == set()


def test_the_shapes_of_training(
    folder: str, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Any, ...]] = []

    def keys(diffusion: GaussianDiffusion, shape: Any, labels: Any, device: Any, ops: Any, dtype: Any) -> Any:
        asked.append((diffusion.prediction_type, tuple(shape), labels.tolist(), str(device), ops, dtype))
        return {Key("conv", torch.float32, (shape[0], 4, 4, 8, 8, 0, torch.get_num_threads())): 2}

    monkeypatch.setattr("fastddpm.perf.tuning.shapes.training_keys", keys)
    assert run(capsys, folder, "--batch", "2", "1", "--training", "--dry-run").count("conv float32 batch=") == 2
    assert asked == [("epsilon", (n, 1, 4, 4), [0] * n, "cpu", ("conv",), torch.float32) for n in (2, 1)]
    run(capsys, folder, "--training", "--dtype", "bfloat16", "--dry-run")
    assert asked[-1][1:] == ((16, 1, 4, 4), [0] * 16, "cpu", ("conv",), torch.bfloat16)


def test_the_step_of_a_sampler_can_be_named(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[Any] = []
    monkeypatch.setattr("fastddpm.perf.tuning.shapes.sampler_keys", lambda *given: found.append(given) or {})
    run(capsys, folder, "--batch", "2", "1", "--method", "dpmsolver++", "--guidance-scale", "2", "--dry-run")
    sampler, *given = found[0]
    assert (sampler.method, sampler.guidance_scale, len(sampler.table)) == ("dpmsolver++", 2.0, 3)
    assert given == [2, ("conv",), "float32"]


def test_info_says_what_is_tuned(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "Tuned choices on cpu: none: heuristics choose" in capsys.readouterr().out
    table.parent.mkdir(parents=True)
    table.write_text(json.dumps({**_tuned.header(CPU), "native": "of before", "created": "now", "entries": []}))
    assert main(["info"]) == 0
    assert f"{table}: ignored, it was measured with other kernels" in capsys.readouterr().out


def test_nothing_to_tune_is_said(
    folder: str, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastddpm_kernels.native.why_not", lambda: "there is no C++ compiler")
    reason = "the native backend cannot run, there is no C++ compiler\n"
    assert run(capsys, folder) == f"There is nothing to tune on cpu: {reason}"
    assert _backend.why_not("native", "cpu") == "there is no C++ compiler"
    assert not table.exists()
