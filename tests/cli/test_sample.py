"""`fastddpm sample` and `fastddpm info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastddpm_kernels import backend as _backend
from PIL import Image

from fastddpm import NoiseSchedule, UNet, save_pretrained
from fastddpm.cli import main
from fastddpm.cli import options as options_of_the_command
from fastddpm.interop.pretrained import load_pretrained

FAST = ["--steps", "2"]


def test_sample_writes_a_labelled_grid_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", *FAST]) == 0
    out = capsys.readouterr().out
    for part in ("100 images, 2 steps", "images/s", "ms per image and step", "device ", "backend ", "wrote samples"):
        assert part in out
    with Image.open("samples.png") as picture:
        assert min(picture.size) >= 500
    assert [path.name for path in Path().iterdir()] == ["samples.png"]


def test_npz_and_folders_hold_images_and_labels() -> None:
    assert main(["sample", *FAST, "--class-labels", "3,1,4", "--num-samples", "5", "-o", "a.npz"]) == 0
    with np.load("a.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 16, 16, 1)
        assert arrays["arr_1"].tolist() == [3, 1, 4, 3, 1]
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
    assert main(["sample", *FAST, "-n", "2", "--device", "cpu"]) == 0
    frozen = load_pretrained().sampler(device="cpu").network.frozen
    assert frozen is not None
    assert f"backend {frozen.backend}\n" in capsys.readouterr().out  # of the network; a step has no native kernel
    assert ("auto", *_backend.BACKENDS) == options_of_the_command.BACKENDS


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--method", "dpmsolver++", "--steps", "7"], 7),
        (["--method", "euler_a", "--steps", "5"], 5),
        (["--method", "euler_a", "--steps", "5", "--eta", "0.5"], 5),
        (["--method", "lcm", "--steps", "4"], 4),
        (["--method", "heun", "--steps", "3"], 5),  # two evaluations to a step, one to the last
        (["--timesteps", "900,500,20"], 3),
        (["--spacing", "trailing", "--steps", "4"], 4),
        (["--spacing", "guided_diffusion", "--steps", "ddim25"], 25),
        (["--spacing", "guided_diffusion", "--steps", "3,2,1"], 6),
        (["--thresholding", "--steps", "3"], 3),
    ],
)
def test_samplers_and_their_steps(options: list[str], steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "-n", "2", *options]) == 0
    assert f"2 images, {steps} steps" in capsys.readouterr().out


def test_trajectory_is_a_strip_of_the_same_samples(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["sample", "-n", "3", "--steps", "12", "--batch-size", "2"]
    assert main([*options, "-o", "a.npz", "--trajectory", "strip.png"]) == 0
    assert "wrote strip.png" in capsys.readouterr().out
    assert main([*options, "-o", "b.npz"]) == 0
    a, b = (np.load(f"{name}.npz")["arr_0"] for name in "ab")
    assert np.array_equal(a, b)
    with Image.open("strip.png") as picture:
        pixels = np.asarray(picture)
    # Six rows, x and x0 of each sample; the last cell of the first is the sample, at three pixels to one.
    assert pixels.shape[0] == 16 + 6 * 52 + 4
    assert np.array_equal(pixels[20 : 20 + 48 : 3, -52:-4:3, :1], a[0])


def test_triton_without_a_gpu_says_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["sample", *FAST, "--device", "cpu", "--backend", "triton"]) == 2
    assert "backend 'triton' cannot run here: triton kernels need a GPU" in capsys.readouterr().err


def test_info_names_versions_devices_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for part in ("torch", "triton", "cpu", "q_sample", "reverse_step", "group_norm_silu", "eager"):
        assert part in out


def test_shards_have_the_labels_that_occur(tiny: dict[str, Any]) -> None:
    """As without shards: of a model that has seen some of its classes, those."""
    names = {1: "cat", 3: "dog"}
    save_pretrained("model", UNet(**tiny | {"num_class_embeds": 5}), NoiseSchedule.linear(), label_names=names)
    assert main(["sample", "model", *FAST, "-n", "4", "--shard-size", "4", "-o", "shards"]) == 0
    assert main(["sample", "model", *FAST, "-n", "4", "-o", "one.npz"]) == 0
    for path in (*Path("shards").glob("*.npz"), Path("one.npz")):
        with np.load(path) as file:
            assert file["arr_1"].tolist() == [1, 1, 3, 3]
