"""The command line as a user meets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastddpm.cli import main

FAST = ["--steps", "2"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_sample_writes_a_labelled_grid_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", *FAST]) == 0
    out = capsys.readouterr().out
    for part in ("100 images, 2 steps", "images/s", "ms/step", "device ", "backend ", "wrote samples.png"):
        assert part in out
    with Image.open("samples.png") as picture:
        assert min(picture.size) >= 500
    assert [path.name for path in Path().iterdir()] == ["samples.png"]


def test_npz_holds_images_and_labels() -> None:
    assert main(["sample", *FAST, "--class-labels", "3,1,4", "--num-samples", "5", "-o", "a.npz"]) == 0
    with np.load("a.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 16, 16, 1)
        assert arrays["arr_1"].tolist() == [3, 1, 4, 3, 1]


def test_one_image_per_label_given() -> None:
    assert main(["sample", *FAST, "--class-labels", "7,7", "--output", "deep/folder"]) == 0
    assert sorted(path.name for path in Path("deep/folder").iterdir()) == ["00000-class7.png", "00001-class7.png"]


def test_gif_shows_the_denoising() -> None:
    assert main(["sample", "--steps", "60", "-n", "4", "--batch-size", "3", "-o", "a.gif"]) == 0
    with Image.open("a.gif") as movie:
        assert movie.n_frames > 20
        assert movie.size[0] > 100


def test_seed_and_batch_size() -> None:
    for name, extra in (("a", []), ("b", ["--batch-size", "2"]), ("c", ["--seed", "1"])):
        assert main(["sample", *FAST, "-n", "5", "-o", f"{name}.npz", *extra]) == 0
    a, b, c = (np.load(f"{name}.npz")["arr_0"].astype(int) for name in "abc")
    assert np.abs(a - b).max() <= 1  # the network rounds otherwise for another batch
    assert np.abs(a - c).max() > 50


def test_options_reach_the_sampler(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "ddim", "--eta", "0.5", "--guidance-scale", "2", "--dtype", "bfloat16", "--backend", "eager"]
    assert main(["sample", *FAST, "-n", "2", "--device", "cpu", *options]) == 0
    out = capsys.readouterr().out
    assert "network bfloat16" in out
    assert "backend eager" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: '0' must be an integer of at least 1"),
        (["--steps", "2.5"], "argument --steps: '2.5' must be an integer"),
        (["--steps", "1001"], "--steps is 1001, must be an integer from 1 to 1000"),
        (["--num-samples", "-3"], "argument -n/--num-samples: '-3' must be an integer"),
        (["--class-labels", "11"], "--class-labels has 11, every label must be from 0 to 9"),
        (["--class-labels", "10"], "--class-labels has 10, every label must be from 0 to 9"),
        (["--class-labels", "a,b"], "argument --class-labels: 'a,b' must be integers separated by commas"),
        (["--seed", "-1"], "argument --seed: '-1' must be"),
        (["--seed", str(2**64)], "seed"),
        (["--batch-size", "0"], "argument --batch-size"),
        (["--device", "quantum"], "--device is 'quantum', which cannot be used"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--backend", "fast"], "argument --backend: invalid choice: 'fast'"),
        (["--eta", "1"], "--eta is 1.0 but method is 'ddpm'"),
        (["--output", "a.jpg"], "--output is a.jpg, its suffix must be"),
        (["--output", "/proc/none/a.png"], "--output is /proc/none/a.png, which cannot be written"),
        (["missing-folder"], "missing-folder is not a folder"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["sample", *arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(Path().iterdir())


def test_triton_without_a_gpu_says_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["sample", *FAST, "--device", "cpu", "--backend", "triton"]) == 2
    assert "backend 'triton' cannot run here: triton kernels need a GPU" in capsys.readouterr().err


def test_output_of_another_kind_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder.png").mkdir()
    Path("file").write_text("precious")
    assert main(["sample", "-o", "folder.png"]) == 2
    assert main(["sample", "-o", "file"]) == 2
    assert Path("file").read_text() == "precious"
    assert capsys.readouterr().err.count("\n") == 2


def test_info_names_versions_devices_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for part in ("torch", "triton", "cpu", "q_sample", "reverse_step", "group_norm_silu", "eager"):
        assert part in out


def test_the_installed_command_runs() -> None:
    run = subprocess.run([sys.executable, "-m", "fastddpm", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("fastddpm 0.")
    bad = subprocess.run([sys.executable, "-m", "fastddpm", "sample", "nowhere"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr
