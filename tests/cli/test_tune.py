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
from fastddpm_kernels.backend import why_not
from fastddpm_kernels.tuned import Key

from fastddpm import GaussianDiffusion, NoiseSchedule, UNet
from fastddpm.cli import main
from fastddpm.interop.pretrained import save_pretrained

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--batch", "2", "1"]


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
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user's table is to be; there is none. The native library is loaded before, not built there."""
    if why_not("native", "cpu") is not None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setenv("FASTDDPM_TUNED", "1")
    monkeypatch.setenv("FASTDDPM_CACHE_DIR", str(tmp_path / "cache"))
    _tuned.forget()
    yield _tuned.user_path(CPU)
    _tuned.forget()


def test_it_searches_writes_shows_and_clears(
    folder: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", folder, *SMALL, "--budget", "120"]) == 0
    out = capsys.readouterr().out
    assert f"wrote {table}" in out
    content = json.loads(table.read_text())
    assert content["schema"] == _tuned.SCHEMA
    assert content["device"] == _tuned.device_name(CPU)
    batches = {entry["shape"]["batch"] for entry in content["entries"]}
    assert batches == {1, 2}
    assert all(0 < entry["tuned_us"] <= entry["heuristic_us"] for entry in content["entries"])
    count = len(content["entries"])
    assert f"{count} of {count} shapes measured" in out
    assert _tuned.known(CPU) == set(_tuned.read(table, CPU).entries)

    assert main(["tune", "--show", "--device", "cpu"]) == 0
    assert f"{table}: {count} shapes" in capsys.readouterr().out
    assert main(["tune", "--clear", "--device", "cpu"]) == 0
    assert f"deleted {table}" in capsys.readouterr().out
    assert not table.exists()
    assert _tuned.known(CPU) == set()


def test_what_there_is_to_show_and_clear_without_a_table(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--show", "--device", "cpu"]) == 0
    assert "There is no tuned table for cpu" in capsys.readouterr().out
    assert main(["tune", "--clear", "--device", "cpu"]) == 0
    assert f"There is no {table}" in capsys.readouterr().out


def test_a_dry_run_lists_and_writes_nothing(folder: str, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", folder, *SMALL, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("conv float32 batch=") >= 4
    assert "algorithm=" in out
    assert not table.parent.exists()


def test_the_shapes_of_training_are_tuned_when_asked_for(
    folder: str, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Any, ...]] = []

    def keys(diffusion: GaussianDiffusion, shape: Any, labels: Any, device: Any, ops: Any, dtype: Any) -> Any:
        asked.append((diffusion.prediction_type, tuple(shape), labels.tolist(), str(device), ops, dtype))
        return {Key("conv", torch.float32, (shape[0], 4, 4, 8, 8, 0, torch.get_num_threads())): 2}

    monkeypatch.setattr("fastddpm.perf.tuning.shapes.training_keys", keys)
    assert main(["tune", folder, *SMALL, "--training", "--budget", "120"]) == 0
    assert "2 of 2 shapes measured" in capsys.readouterr().out
    assert {key.shape[0] for key in _tuned.read(table, CPU).entries} == {1, 2}
    assert asked == [("epsilon", (n, 1, 4, 4), [0] * n, "cpu", ("conv",), torch.float32) for n in (2, 1)]
    assert main(["tune", folder, "--device", "cpu", "--training", "--dtype", "bfloat16", "--dry-run"]) == 0
    assert asked[-1][1:] == ((16, 1, 4, 4), [0] * 16, "cpu", ("conv",), torch.bfloat16)


def test_the_step_of_a_sampler_can_be_named(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr("fastddpm.perf.tuning.shapes.sampler_keys", lambda *given: found.append(given) or {})
    assert main(["tune", folder, *SMALL, "--method", "dpmsolver++", "--guidance-scale", "2", "--dry-run"]) == 0
    sampler, batch, ops, precision = found[0]
    assert (sampler.method, sampler.guidance_scale, batch, ops, precision) == (
        "dpmsolver++", 2.0, 2, ("conv",), "float32"
    )  # fmt: skip
    assert len(sampler.table) == 3


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
    assert main(["tune", folder, *SMALL]) == 0
    out = capsys.readouterr().out
    assert out == (
        "There is nothing to tune on cpu: the native backend cannot run, there is no C++ compiler\n"
    )
    assert _backend.why_not("native", "cpu") == "there is no C++ compiler"
    assert not table.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "conv4d"], "--ops has 'conv4d', must be of group_norm_silu"),
        (["--ops", "pointwise_conv"], "--ops is pointwise_conv; on cpu there is conv"),
        (["--into-package"], "--into-package is given, but a CPU's table holds for one build"),
        (["--budget", "0"], "'0' must be a positive number of seconds"),
        (["--batch", "0"], "'0' must be an integer of at least 1"),
        (["--show", "--clear"], "not allowed with argument"),
        (["--training", "--method", "ddim"], "--method is given, but --training tunes no step of a sampler"),
        (["--show", "--ops", "conv"], "--ops is given, but --show is of a whole table"),
        (["nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["tune", "--device", "cpu", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
