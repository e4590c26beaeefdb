"""`fastddpm train`, as a user meets it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastddpm import load_pretrained
from fastddpm.cli import main
from fastddpm.training import read_log
from fastddpm.training.config import RunConfig, parse_assignment, read_tables, to_toml
from fastddpm.training.defaults import default_model, look_at

# A U-Net that costs nothing.
SMALL = [
    "--set", "model.block_out_channels=[8, 8]", "--set", "model.norm_num_groups=4", "--set", "model.layers_per_block=1",
    "--set", "model.down_block_types=['DownBlock2D', 'DownBlock2D']", "--set", "model.attention_head_dim=8",
    "--set", "model.up_block_types=['UpBlock2D', 'UpBlock2D']", "--set", "trainer.num_inference_steps=2",
    "--set", "trainer.tensorboard=false", "--batch-size", "4", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten grey pictures of 10 to 13 pixels in two classes, and a broken one; and an empty working folder."""
    root = tmp_path / "pictures"
    for index in range(10):
        folder = root / ("round" if index % 2 else "flat")
        folder.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(index).integers(0, 256, (10 + index % 4, 12), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{index}.png")
    (root / "flat" / "broken.png").write_bytes(b"")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return root


def test_from_pictures_to_samples(
    pictures: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["train", str(pictures), "--steps", "3", "--metric", "frechet", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "10 images of 1 x 8 x 8, 2 classes; a network of " in out
    assert "3 steps done, loss " in out
    assert "draw samples with: fastddpm sample results/model" in out
    assert "flat/broken.png: is not a picture" in caplog.text
    assert [entry.name for entry in Path().iterdir()] == ["results"]
    assert main(["sample", "results/model", "-n", "3", "--steps", "2", "-o", "drawn.npz"]) == 0
    with np.load("drawn.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 8, 8, 1)
    config = load_pretrained("results/model").unet.config
    assert (config.num_class_embeds, config.null_class) == (3, 2)
    assert "frechet" in read_log("results/log.jsonl")[-1]
    assert read_tables("results/config.toml")["trainer"]["metric"] == "frechet"

    capsys.readouterr()
    assert main(["train", str(pictures), *SMALL]) == 2  # there is a run
    assert "where a run has come to step 3: resume it, or choose another" in capsys.readouterr().err
    assert main(["train", "--resume", "--steps", "5"]) == 0  # everything else is in results/config.toml
    last = read_log("results/log.jsonl")[-1]
    assert last["step"] == 5
    assert "frechet" in last


def test_the_settings_printed_are_the_settings_used(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(pictures), "--print-config", "--seed", "5", "--learning-rate", "3e-4", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert list(Path().iterdir()) == []
    Path("run.toml").write_text(printed)
    assert main(["train", "--config", "run.toml", "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    config = RunConfig.from_tables(read_tables("run.toml"))
    assert (config.trainer.seed, config.diffusion["seed"], config.trainer.train_lr) == (5, 5, 3e-4)
    assert config.model.block_out_channels == (8, 8)
    assert config.folder == str(pictures)
    keys = read_tables("run.toml")["diffusion"]  # all of them
    assert keys["loss"] == "mse"
    assert keys["num_train_timesteps"] == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "FOLDER is missing"),
        (["nowhere"], "nowhere is not a folder"),
        (["."], "holds no picture, must hold files such as .png or .jpg"),
        (["PICTURES", "--set", "trainer.lr=1"], "--set: [trainer] has no key lr; "),
        (["PICTURES", "--set", "trainer.train_learning_rate=1"], "keys are results_folder"),
        (["PICTURES", "--set", "training.lr=1"], "there is no section [training], only [data], [model]"),
        (["PICTURES", "--set", "trainer.metric=fid"], "metric is 'fid', must be 'none' or 'frechet'"),
        (["PICTURES", "--set", "data.folder=3"], "[data] folder is 3, must be a path in quotes"),
        (["PICTURES", "-o", "../pictures/results", *SMALL], "which is inside "),
        (["PICTURES", "--set", "lr"], "'lr' must be SECTION.KEY=VALUE"),
        (["PICTURES", "--image-size", "9", *SMALL], "sample_size is 9, must be divisible by 2"),
        (["PICTURES", "--learning-rate", "-1"], "train_lr is -1.0, must be a positive number"),
        (["PICTURES", "--steps", "0"], "must be an integer of at least 1"),
        (["PICTURES", "--set", "diffusion.variance_type=learned_range", "--set", "diffusion.loss=hybrid",
          "--set", "model.out_channels=1", *SMALL], "returns 1 channels for data of 1, must return 2"),
        (["PICTURES", "--config", "none.toml"], "none.toml is missing"),
        (["PICTURES", "--set", "diffusion.beta_start=-1", *SMALL],
         "beta_start is -1, which beta_schedule 'squaredcos_cap_v2' does not have: must be left out"),
        (["PICTURES", "--set", "diffusion.beta_end=0.3", "--set", "diffusion.trained_betas=[0.1, 0.2]", *SMALL],
         "beta_end is 0.3, which trained_betas does not have"),
        (["PICTURES", "--set", "diffusion.beta_start=x", "--set", "diffusion.beta_schedule=linear", *SMALL],
         "beta_start is 'x', must be in (0, 1)"),
        (["PICTURES", "--set", "diffusion.trained_betas=[0.1, 2.0]", *SMALL], "trained_betas[1] is 2, every beta must"),
        (["PICTURES", "--set", "diffusion.trained_betas=[0.1]", "--set", "diffusion.num_train_timesteps=9", *SMALL],
         "num_train_timesteps is 9, must be 1, as many as trained_betas"),
        (["PICTURES", "--set", "diffusion.rescale_betas_zero_snr=0", *SMALL], "is 0, must be true or false"),
        (["PICTURES", "--set", "trainer.results_folder=5", *SMALL], "results_folder is 5, must be the path of"),
        (["PICTURES", "--set", "model.sample_size=big", *SMALL], "sample_size is 'big', must be a positive integer"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    pictures: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(pictures) if argument == "PICTURES" else argument for argument in arguments]
    try:
        code = main(["train", *arguments])
    except SystemExit as stop:  # what argparse finds
        code = int(str(stop.code))
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("fastddpm train: error: ")
    assert list(Path().iterdir()) == []


def test_what_set_says_stands(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Above other options, and with channels of a learned variance told from those of the data."""
    arguments = ["--width", "16", "--image-size", "8", "--set", "model.sample_size=16", "--set", "model.dropout=0.3"]
    arguments += ["--set", "model.block_out_channels=[24, 24, 48]", "--set", "model.norm_num_groups=8"]
    learned = ["--set", "diffusion.variance_type=learned_range", "--set", "model.out_channels=6"]
    assert main(["train", str(pictures), "--print-config", *arguments, *learned]) == 0
    Path("run.toml").write_text(capsys.readouterr().out)
    model = read_tables("run.toml")["model"]
    assert (model["sample_size"], model["block_out_channels"], model["norm_num_groups"]) == (16, [24, 24, 48], 8)
    assert (model["in_channels"], model["out_channels"], model["dropout"]) == (3, 6, 0.3)


def test_betas_that_are_given_are_printed_as_they_can_be_read(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(pictures), "--print-config", "--set", "diffusion.trained_betas=[0.1, 0.2]", *SMALL]) == 0
    Path("run.toml").write_text(capsys.readouterr().out)
    schedule = RunConfig.from_tables(read_tables("run.toml")).build().schedule
    assert schedule.betas.tolist() == [0.1, 0.2]


def test_sigterm_saves_and_exits_0(pictures: Path) -> None:
    command = [sys.executable, "-m", "fastddpm", "train", str(pictures), "--steps", "100000", *SMALL]
    command += ["--set", "trainer.log_every=1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 120
    while not Path("results/log.jsonl").is_file() and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, out = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "stopped after step " in out
    assert "go on with: fastddpm train --resume -o results" in out
    assert load_pretrained("results/model").unet.config.sample_size == 8
    (saved,) = Path("results/checkpoints").iterdir()
    assert f"after step {int(saved.name.removeprefix('step-'))}," in out


def test_toml_round_trip(tmp_path: Path) -> None:
    tables = {
        "data": {"folder": 'a "quoted" \\ päth\n'},
        "model": {"block_out_channels": (8, 16), "attention_head_dim": None, "norm_eps": 1e-05, "add_attention": True},
        "trainer": {"train_lr": np.float64(1e-4), "train_batch_size": np.int64(8)},
    }
    (tmp_path / "x.toml").write_text(to_toml(tables, "a comment"), encoding="utf-8")
    assert read_tables(tmp_path / "x.toml") == {**tables, "model": {**tables["model"], "block_out_channels": [8, 16]}}
    (tmp_path / "y.toml").write_text("[trainer]\ntrain_lr = 1e-\n")
    with pytest.raises(ValueError, match="y.toml is not valid TOML"):
        read_tables(tmp_path / "y.toml")
    (tmp_path / "z.toml").write_text("train_lr = 1e-4\n")
    with pytest.raises(ValueError, match="train_lr stands outside of a section"):
        read_tables(tmp_path / "z.toml")
    assert parse_assignment("trainer.device=cpu") == ("trainer", "device", "cpu")
    assert parse_assignment("trainer.ema_decay=[0.9, 0.99]") == ("trainer", "ema_decay", [0.9, 0.99])
    assert parse_assignment("trainer.max_grad_norm=none") == ("trainer", "max_grad_norm", None)


@pytest.mark.parametrize(("side", "size"), [(300, 128), (100, 64), (64, 64), (28, 16), (5, 8)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_models_for_data(tmp_path: Path, side: int, size: int, mode: str) -> None:
    for index in range(3):
        Image.new(mode, (side + 5 * index, side)).save(tmp_path / f"{index}.png")
    look = look_at(tmp_path)
    assert (look.images, look.size, look.channels, look.classes) == (3, size, 1 if mode == "L" else 3, 0)
    from fastddpm import UNet

    config = UNet(**default_model(look)).config  # is one that there can be
    levels = len(config.block_out_channels)
    assert 4 <= size // 2 ** (levels - 1) <= 8
    assert config.num_class_embeds is None
