"""`fastddpm evaluate`: samples against real images, and lower precision against float32."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastddpm import load_pretrained
from fastddpm.cli import main
from fastddpm.common.images import to_uint8
from fastddpm.interop.pretrained import BUNDLED

PRECISION = ["--precision", "bfloat16", "--steps", "2", "-n", "4", "--json", "a.json"]
FAST = ["--steps", "3", "--method", "dpmsolver++", "-n", "30", "--device", "cpu"]


def figures(path: str = "a.json") -> dict[str, Any]:
    return json.loads(Path(path).read_text())


# -- lower precision --------------------------------------------------------------------------------------------------


def test_precisions_of_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "2", "-n", "4", "--json", "deep/a.json", "--device", "cpu"]
    assert main(["evaluate", str(BUNDLED), "--precision", *options]) == 0
    out = capsys.readouterr().out
    for part in ("bfloat16", "Frechet to float32", "largest activation: ", "device cpu", "wrote deep/a.json"):
        assert part in out
    assert [path.name for path in Path("deep").iterdir()] == ["a.json"]
    content = figures("deep/a.json")["precision"]
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
    assert bfloat16["recognised"] is not None
    assert content["no_distribution_because"] is None


def test_precisions_of_another_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "ddim", "--timesteps", "900,500,20", "--batch-size", "3", "--backend", "eager", "-n", "4"]
    command = ["evaluate", model, "--precision", "bfloat16", "--json", "a.json", "--seed", "3", *options]
    assert main(command) == 0
    assert "Frechet distance: not measured, only the bundled model comes with real" in capsys.readouterr().out
    assert figures()["model"] == model
    content = figures()["precision"]
    assert (content["method"], content["steps"], content["seed"]) == ("ddim", 3, 3)
    assert [row["precision"] for row in content["results"]] == ["float32", "bfloat16"]
    assert content["results"][1]["prediction_error"].keys() == {"900", "500", "20"}
    assert content["results"][1]["frechet_to_real"] is None
    assert "only the bundled model" in content["no_distribution_because"]


def test_says_that_scikit_learn_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sklearn", "sklearn.datasets", "sklearn.svm"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["evaluate", *PRECISION]) == 0
    assert "Frechet distance: not measured, scikit-learn is missing" in capsys.readouterr().out
    assert "scikit-learn is missing" in figures()["precision"]["no_distribution_because"]


# -- real images ------------------------------------------------------------------------------------------------------


def test_bundled_model_then_its_saved_samples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *FAST, "--json", "deep/a.json", "--save-samples", "deep/s.npz"]) == 0
    out = capsys.readouterr().out
    for part in ("30 samples against 1,797 real images", "recall", "recognised", "wrote deep/s.npz", "device cpu"):
        assert part in out
    drawn = figures("deep/a.json")["fidelity"]
    assert (drawn["num_samples"], drawn["num_real"], drawn["steps"], drawn["seed"]) == (30, 1797, 3, 0)
    assert drawn["recognised"] > 0.5
    assert drawn["fid"] > 0
    assert "isc" in drawn["not_measured"]
    assert "an FID of 30 images is biased upwards" in drawn["notes"][0]
    assert "warning: an FID of 30 images" in out
    assert sorted(path.name for path in Path("deep").iterdir()) == ["a.json", "s.npz"]

    # They are the samples of `fastddpm sample`, in the ADM evaluator's layout.
    labels = [i % 10 for i in range(30)]
    sampler = load_pretrained().sampler(method="dpmsolver++", num_inference_steps=3)
    expected = to_uint8(sampler.sample(30, seed=0, class_labels=labels))
    with np.load("deep/s.npz") as file:
        assert set(file) == {"arr_0", "arr_1"}
        assert file["arr_1"].tolist() == labels
        assert np.array_equal(file["arr_0"], np.broadcast_to(expected, (30, 16, 16, 3)))
    assert main(["evaluate", "deep/s.npz", "digits", "--json", "b.json"]) == 0
    again = figures("b.json")["fidelity"]
    for name in ("fid", "kid", "precision", "recall", "recognised", "fid_of_real"):
        assert again[name] == pytest.approx(drawn[name], rel=1e-9), name


def test_a_model_against_a_folder_in_a_network_s_features(model: str, network: str) -> None:
    from fastddpm.evaluation import evaluate

    Path("real").mkdir()
    for k in range(12):
        pixels = np.random.default_rng(k).integers(0, 256, (8, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"real/{k}.png")
    options = ["--feature-network", network, "--metrics", "prc,fid", "--batch-size", "7"]
    for seed in ("0", "1"):
        assert main(["evaluate", model, "real", *FAST, *options, "--seed", seed, "--json", f"{seed}.json"]) == 0
    content = figures("0.json")["fidelity"]
    assert (content["num_samples"], content["num_real"]) == (30, 12)
    assert content["kid"] is content["inception_score"] is None
    assert content["not_measured"] == {}
    assert any("12 of 12 images were cut to the middle and resized to 8 x 8" in note for note in content["notes"])
    assert content["features"].startswith("net.pt (")
    assert figures("1.json")["fidelity"]["fid"] != content["fid"]
    drawn = load_pretrained(model).sampler(method="dpmsolver++", num_inference_steps=3).sample(30)
    assert content["fid"] == pytest.approx(evaluate(drawn, "real", features=network).fid, rel=1e-6)


def test_samples_outlive_figures_that_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> float:
        raise ValueError("no figures")

    monkeypatch.setattr("fastddpm.evaluation.fidelity.frechet_distance", fail)
    assert main(["evaluate", *FAST, "--save-samples", "s.npz"]) == 2
    assert "error: no figures" in capsys.readouterr().err
    with np.load("s.npz") as file:
        assert file["arr_0"].shape == (30, 16, 16, 3)


def test_precision_and_fidelity_in_one_call() -> None:
    assert main(["evaluate", str(BUNDLED), *PRECISION, "--metrics", "fid"]) == 0
    content = figures()
    assert content["precision"]["num_samples"] == content["fidelity"]["num_samples"] == 4
    assert content["fidelity"]["real"] == "scikit-learn's digits"


def test_without_torch_fidelity(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    np.savez("real.npz", np.zeros((20, 8, 8, 1), np.uint8))
    error = refused("evaluate", model, "real.npz", *FAST)
    assert "torch-fidelity is missing: " in error
    assert "--feature-network" in error
    assert main(["evaluate", *FAST]) == 0
    assert "kid: not measured, torch-fidelity is missing; pip install fastddpm[evaluate]" in capsys.readouterr().out
