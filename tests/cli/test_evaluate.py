"""`fastddpm evaluate` as a user meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastddpm import NoiseSchedule, UNet, save_pretrained
from fastddpm.cli import main
from fastddpm.interop.pretrained import BUNDLED

FAST = ["--steps", "2", "-n", "4"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder() -> str:
    """A model without classes."""
    unet = UNet(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    save_pretrained("model", unet, NoiseSchedule.linear())
    return "model"


def figures(path: str = "a.json") -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def test_bundled_model_in_both_halves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--precision", *FAST, "--json", "deep/a.json", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for part in ("bfloat16", "Frechet to float32", "largest activation: ", "device cpu", "wrote deep/a.json"):
        assert part in out
    assert [path.name for path in Path("deep").iterdir()] == ["a.json"]
    content = figures("deep/a.json")
    assert content["model"] == "bundled digits"
    content = content["precision"]
    assert (content["num_samples"], content["steps"], content["seed"]) == (4, 2, 0)
    float32, float16, bfloat16 = content["results"]
    assert [row["precision"] for row in content["results"]] == ["float32", "float16", "bfloat16"]
    assert 0 < float16["worst_prediction_error"] < bfloat16["worst_prediction_error"] < 0.2
    assert 0 < float16["image_rms"] < bfloat16["image_rms"] < 0.05
    assert float16["pixels_differ_by_more"] <= float16["pixels_differ"] < 0.1
    assert content["float16_headroom"] > 100
    assert float32["frechet_to_float32"] == pytest.approx(0, abs=1e-9)
    assert float16["frechet_to_float32"] < 0.01 * float16["frechet_to_real"]
    assert content["frechet_of_real"] > 0
    assert content["no_distribution_because"] is None


def test_another_model_has_no_real_images(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", folder, "--precision", "bfloat16", *FAST, "--seed", "3", "--json", "a.json"]) == 0
    assert "Frechet distance: not measured, only for the bundled model" in capsys.readouterr().out
    content = figures()
    assert content["model"] == folder
    assert [row["precision"] for row in content["precision"]["results"]] == ["float32", "bfloat16"]
    assert content["precision"]["seed"] == 3
    assert content["precision"]["results"][1]["frechet_to_real"] is None
    assert "only for the bundled model" in content["precision"]["no_distribution_because"]


def test_options_reach_the_samplers(folder: str) -> None:
    options = ["--method", "ddim", "--timesteps", "900,500,20", "--batch-size", "3", "--backend", "eager", "-n", "4"]
    assert main(["evaluate", folder, "--precision", "bfloat16", "--json", "a.json", *options]) == 0
    content = figures()["precision"]
    assert (content["method"], content["steps"]) == ("ddim", 3)
    assert content["results"][1]["prediction_error"].keys() == {"900", "500", "20"}


def test_the_bundled_model_by_its_folder_is_judged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["evaluate", str(BUNDLED), "--precision", "bfloat16", *FAST, "--json", "a.json"]) == 0
    assert figures()["precision"]["results"][1]["recognised"] is not None


def test_says_that_scikit_learn_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sklearn", "sklearn.datasets", "sklearn.svm"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["evaluate", "--precision", "bfloat16", *FAST, "--json", "a.json"]) == 0
    assert "Frechet distance: not measured, scikit-learn is missing" in capsys.readouterr().out
    assert "scikit-learn is missing" in figures()["precision"]["no_distribution_because"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp8"], "--precision is 'fp8', must be one of float32, tf32, float16, bfloat16"),
        (["--precision", "float16,"], "--precision is '', must be one of"),
        (["--precision", "tf32", "--device", "cpu"], "--precision is 'tf32', which cpu cannot run: it needs CUDA"),
        (["--precision", "--dtype", "float16"], "--dtype is float16, but --precision compares several"),
        (["--precision", "--device", "gpu"], "--device is 'gpu', which cannot be used"),
        (["--precision", "--device", "meta"], "--device is 'meta', which cannot be used"),
        (["--precision", "--json", "a.txt"], "--json is a.txt, its suffix must be .json"),
        (["--precision", "--json", "/proc/none/a.json"], "--json is /proc/none/a.json, which cannot be written"),
        (["nowhere", "--precision"], "nowhere is not a folder"),
        (["--precision", "--steps", "2000"], "--steps is 2000"),
        (["--precision", "-n", "1"], "'1' must be an integer of at least 2"),
        (["--precision", "--guidance-scale", "nan"], "--guidance-scale is nan"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(["evaluate", *arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("fastddpm evaluate: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(Path().iterdir()) == []


def test_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    out = capsys.readouterr().out
    out = " ".join(out.split())
    for part in ("MODEL", "REAL", "--precision", "--num-samples", "--json", "--seed", "64 for --precision", "50 steps"):
        assert part in out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "evaluate" in capsys.readouterr().out
