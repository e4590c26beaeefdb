"""`fastddpm evaluate MODEL REAL` as a user meets it."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastddpm import NoiseSchedule, Sampler, UNet, load_pretrained, save_pretrained
from fastddpm.cli import main
from fastddpm.common.images import to_uint8
from fastddpm.interop.pretrained import BUNDLED

FAST = ["--steps", "3", "--method", "dpmsolver++", "-n", "30", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def figures(path: str = "a.json") -> dict[str, Any]:
    return json.loads(Path(path).read_text())["fidelity"]


class Pooled(nn.Module):
    """Features of grey images of any size: 2 x 2 means."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x.float(), (2, 2)).flatten(1)


@pytest.fixture
def network() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # scripting is deprecated; the files are there
        torch.jit.save(torch.jit.script(Pooled()), "net.pt")
    return "net.pt"


@pytest.fixture
def folder() -> str:
    """A model of 8x8 images without classes."""
    torch.manual_seed(0)
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


def test_bundled_model_then_its_saved_samples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *FAST, "--json", "deep/a.json", "--save-samples", "deep/s.npz"]) == 0
    out = capsys.readouterr().out
    for part in ("30 samples against 1,797 real images", "recall", "recognised", "wrote deep/s.npz", "device cpu"):
        assert part in out
    drawn = figures("deep/a.json")
    assert (drawn["num_samples"], drawn["num_real"], drawn["steps"], drawn["seed"]) == (30, 1797, 3, 0)
    assert drawn["recognised"] > 0.5
    assert drawn["fid"] > 0
    assert "isc" in drawn["not_measured"]
    assert "an FID of 30 images is biased upwards" in drawn["notes"][0]
    assert "warning: an FID of 30 images" in out
    assert sorted(path.name for path in Path("deep").iterdir()) == ["a.json", "s.npz"]

    # They are the samples of `fastddpm sample`, as the ADM evaluator reads them.
    labels = [i % 10 for i in range(30)]
    sampler = load_pretrained().sampler(method="dpmsolver++", num_inference_steps=3)
    expected = to_uint8(sampler.sample(30, seed=0, class_labels=labels))
    with np.load("deep/s.npz") as file:
        assert set(file) == {"arr_0", "arr_1"}
        assert file["arr_1"].tolist() == labels
        assert np.array_equal(file["arr_0"], np.broadcast_to(expected, (30, 16, 16, 3)))
    assert main(["evaluate", "deep/s.npz", "digits", "--json", "b.json"]) == 0
    again = figures("b.json")
    for name in ("fid", "kid", "precision", "recall", "recognised", "fid_of_real"):
        assert again[name] == pytest.approx(drawn[name], rel=1e-9), name


def test_a_model_against_a_folder_in_a_network_s_features(folder: str, network: str) -> None:
    Path("real").mkdir()
    for k in range(12):
        pixels = np.random.default_rng(k).integers(0, 256, (8, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"real/{k}.png")
    options = ["--feature-network", network, "--metrics", "prc,fid", "--json", "a.json", "--batch-size", "7"]
    for seed in ("0", "1", "0"):
        assert main(["evaluate", folder, "real", *FAST, *options, "--seed", seed]) == 0
        Path("a.json").rename(f"{seed}.json")
    content = figures("0.json")
    assert (content["num_samples"], content["num_real"]) == (30, 12)
    assert content["kid"] is content["inception_score"] is None
    assert content["not_measured"] == {}
    assert any("12 of 12 images were cut to the middle and resized to 8 x 8" in note for note in content["notes"])
    assert content["features"].startswith("net.pt (")
    assert figures("1.json")["fid"] != content["fid"]
    # Against what the library says.
    from fastddpm.evaluation import evaluate

    model = load_pretrained(folder)
    sampler = model.sampler(method="dpmsolver++", num_inference_steps=3)
    assert isinstance(sampler, Sampler)
    assert content["fid"] == pytest.approx(evaluate(sampler.sample(30), "real", features=network).fid, rel=1e-6)


def test_samples_outlive_figures_that_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> float:
        raise ValueError("no figures")

    monkeypatch.setattr("fastddpm.evaluation.fidelity.frechet_distance", fail)
    assert main(["evaluate", *FAST, "--save-samples", "s.npz"]) == 2
    assert "error: no figures" in capsys.readouterr().err
    with np.load("s.npz") as file:
        assert file["arr_0"].shape == (30, 16, 16, 3)


def test_precision_and_fidelity_in_one_call() -> None:
    options = ["--precision", "bfloat16", "--metrics", "fid", "--steps", "2", "-n", "4", "--json", "a.json"]
    assert main(["evaluate", str(BUNDLED), *options]) == 0
    content = json.loads(Path("a.json").read_text())
    assert content["precision"]["num_samples"] == content["fidelity"]["num_samples"] == 4
    assert content["fidelity"]["real"] == "scikit-learn's digits"


def test_without_torch_fidelity(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    np.savez("real.npz", np.zeros((20, 8, 8, 1), np.uint8))
    assert main(["evaluate", folder, "real.npz", *FAST]) == 2
    error = capsys.readouterr().err
    assert "torch-fidelity is missing: " in error
    assert "--feature-network" in error
    assert error.count("\n") == 1
    assert main(["evaluate", *FAST]) == 0
    assert "kid: not measured, torch-fidelity is missing; pip install fastddpm[evaluate]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model"], "REAL is missing, what to compare with: a folder of pictures, a .npz or 'digits'"),
        (["model", "none.npz", "--feature-network", "net.pt"], "none.npz is missing; it must be a .npz, a folder"),
        (["model", "digits"], "scikit-learn's digits has images of 16 x 16 but the samples are of 8 x 8"),
        (
            ["b.npz", "b.npz", "--feature-network", "digits"],
            "the features 'digits' are of images [1, 16, 16], these are",
        ),
        (["model", "b.npz", "--feature-network", "net.pt"], "b.npz has images of 4 x 4 but the samples are of 8 x 8"),
        (["model", "b.npz", "--feature-network", "no.pt"], "no.pt is missing; it must be a TorchScript or ONNX file"),
        (["model", "b.npz", "--inception-weights", "no.pth"], "no.pth is missing; it must be a file of Inception"),
        (["model", "b.npz", "--inception-weights", "b.npz"], "b.npz is not a file of weights that can be read"),
        (["--metrics", "fid,ppl"], "--metrics has 'ppl', must be of fid, kid, prc, isc"),
        (["--metrics", "isc"], "--metrics has isc, which cannot be measured: 32 principal components of real digits"),
        (["--save-samples", "a.png"], "--save-samples is a.png, its suffix must be .npz"),
        (["b.npz"], "REAL is missing"),
        (["b.npz", "digits", "-n", "5"], "--num-samples is given, but MODEL is b.npz, images that are there already"),
        (["b.npz", "digits", "--eta", "0"], "--eta is given, but MODEL is b.npz"),
        (["b.npz", "--precision"], "--precision is given, but MODEL is b.npz"),
        (
            ["--inception-weights", "a", "--feature-network", "b"],
            "--inception-weights is given and so is --feature-net",
        ),
        (["--steps", "2000"], "--steps is 2000"),
        (["--device", "gpu"], "--device is 'gpu', which cannot be used"),
        (["--feature-input", "float"], "argument --feature-input: invalid choice"),
    ],
)
def test_bad_input_is_one_line(
    folder: str, network: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("b.npz", np.arange(5 * 16, dtype=np.uint8).reshape(5, 4, 4, 1))
    before = sorted(path.name for path in Path().iterdir())
    try:
        code: object = main(["evaluate", *arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err.splitlines()[-1]  # real images may have been looked at, with a bar
    assert error.startswith("fastddpm evaluate: error: ")
    assert message in error
    assert sorted(path.name for path in Path().iterdir()) == before
