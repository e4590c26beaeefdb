"""`fastddpm train`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from text_objects import captioned, save_encoder

from fastddpm import UNet, load_pretrained
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
def pictures() -> str:
    """Ten grey pictures of 10 to 13 pixels in two classes, and a broken one."""
    for index in range(10):
        folder = Path("pictures", "round" if index % 2 else "flat")
        folder.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(index).integers(0, 256, (10 + index % 4, 12), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{index}.png")
    Path("pictures/flat/broken.png").write_bytes(b"")
    return "pictures"


def test_from_pictures_to_samples(
    pictures: str, network: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["train", pictures, "--steps", "3", "--metric", "frechet", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "10 images of 1 x 8 x 8, 2 classes; a network of " in out
    assert "3 steps done, loss " in out
    assert "draw samples with: fastddpm sample results/model" in out
    assert "flat/broken.png: is not a picture" in caplog.text
    assert sorted(entry.name for entry in Path().iterdir()) == ["net.pt", "pictures", "results"]
    assert main(["sample", "results/model", "-n", "3", "--steps", "2", "-o", "drawn.npz"]) == 0
    with np.load("drawn.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 8, 8, 1)
    config = load_pretrained("results/model").unet.config
    assert (config.num_class_embeds, config.null_class) == (3, 2)
    for model in ("results", "results/checkpoints/step-0000003"):
        assert main(["sample", model, "-n", "3", "--steps", "2", "-o", "again.npz"]) == 0
        with np.load("again.npz") as arrays, np.load("drawn.npz") as before:
            assert np.array_equal(arrays["arr_0"], before["arr_0"])
    command = ["evaluate", "results", pictures, "--steps", "2", "-n", "4", "--metrics", "fid", "--json", "a.json"]
    assert main([*command, "--feature-network", network]) == 0
    assert json.loads(Path("a.json").read_text())["fidelity"]["samples"] == "results"  # not its previews
    for command in (["train", "results"], ["evaluate", "drawn.npz", "results", "--feature-network", network]):
        assert main(command) == 2
        assert "results is a training run, whose pictures are sheets of samples" in capsys.readouterr().err
    assert "frechet" in read_log("results/log.jsonl")[-1]
    assert read_tables("results/config.toml")["trainer"]["metric"] == "frechet"

    capsys.readouterr()
    assert main(["train", pictures, *SMALL]) == 2  # there is a run
    assert "where a run has come to step 3: resume it, or choose another" in capsys.readouterr().err
    assert main(["train", "--resume", "--steps", "5"]) == 0  # everything else is in results/config.toml
    last = read_log("results/log.jsonl")[-1]
    assert last["step"] == 5
    assert "frechet" in last


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["train", "--print-config", *arguments]) == 0
    text = capsys.readouterr().out
    Path("run.toml").write_text(text)
    return text


def test_the_settings_printed_are_the_settings_used(pictures: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, pictures, "--seed", "5", "--learning-rate", "3e-4", *SMALL)
    assert sorted(entry.name for entry in Path().iterdir()) == ["pictures", "run.toml"]
    assert printed(capsys, "--config", "run.toml") == text
    config = RunConfig.from_tables(read_tables("run.toml"))
    assert (config.trainer.seed, config.diffusion["seed"], config.trainer.train_lr) == (5, 5, 3e-4)
    assert config.model.block_out_channels == (8, 8)
    assert config.folder == pictures
    keys = read_tables("run.toml")["diffusion"]  # all of them
    assert keys["loss"] == "mse"
    assert keys["num_train_timesteps"] == 1000


def test_set_overrules_other_options(pictures: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And the channels of a learned variance are told from those of the data."""
    arguments = ["--width", "16", "--image-size", "8", "--set", "model.sample_size=16", "--set", "model.dropout=0.3"]
    arguments += ["--set", "model.block_out_channels=[24, 24, 48]", "--set", "model.norm_num_groups=8"]
    learned = ["--set", "diffusion.variance_type=learned_range", "--set", "model.out_channels=6"]
    printed(capsys, pictures, *arguments, *learned)
    model = read_tables("run.toml")["model"]
    assert (model["sample_size"], model["block_out_channels"], model["norm_num_groups"]) == (16, [24, 24, 48], 8)
    assert (model["in_channels"], model["out_channels"], model["dropout"]) == (3, 6, 0.3)


def test_betas_are_printed_as_they_can_be_read(pictures: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, pictures, "--set", "diffusion.trained_betas=[0.1, 0.2]", *SMALL)
    assert RunConfig.from_tables(read_tables("run.toml")).build().schedule.betas.tolist() == [0.1, 0.2]


def test_sigterm_saves_and_exits_0(pictures: str) -> None:
    command = [sys.executable, "-m", "fastddpm", "train", pictures, "--steps", "100000", *SMALL]
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


def test_toml_round_trip() -> None:
    tables = {
        "data": {"folder": 'a "quoted" \\ päth\n'},
        "model": {"block_out_channels": (8, 16), "attention_head_dim": None, "norm_eps": 1e-05, "add_attention": True},
        "trainer": {"train_lr": np.float64(1e-4), "train_batch_size": np.int64(8)},
    }
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):  # the others as Windows' shells write them
        Path("x.toml").write_text(to_toml(tables, "a comment"), encoding=encoding, newline="\r\n")
        assert read_tables("x.toml") == {**tables, "model": {**tables["model"], "block_out_channels": [8, 16]}}
    for text, words in (("[trainer]\ntrain_lr = 1e-\n", "y.toml is not valid TOML"),
                        ("train_lr = 1e-4\n", "train_lr stands outside of a section")):  # fmt: skip
        Path("y.toml").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_tables("y.toml")
    assert parse_assignment("trainer.device=cpu") == ("trainer", "device", "cpu")
    assert parse_assignment("trainer.ema_decay=[0.9, 0.99]") == ("trainer", "ema_decay", [0.9, 0.99])
    assert parse_assignment("trainer.max_grad_norm=none") == ("trainer", "max_grad_norm", None)


@pytest.mark.parametrize(
    ("side", "size", "mode"), [(300, 128, "L"), (100, 64, "RGB"), (64, 64, "L"), (28, 16, "L"), (5, 8, "RGB")]
)
def test_models_for_data(side: int, size: int, mode: str) -> None:
    for index in range(3):
        Image.new(mode, (side + 5 * index, side)).save(f"{index}.png")
    look = look_at(".")
    assert (look.images, look.size, look.channels, look.classes) == (3, size, 1 if mode == "L" else 3, 0)
    config = UNet(**default_model(look)).config  # a valid one
    assert 4 <= size // 2 ** (len(config.block_out_channels) - 1) <= 8
    assert config.num_class_embeds is None


def test_from_captions_to_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    """And the pictures of the command line are those of Python."""
    pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    captioned(Path("d"))
    save_encoder(Path("encoder"))
    small = ["--width", "8", "--set", "model.layers_per_block=1", "--set", "model.norm_num_groups=4", "--device", "cpu"]
    small += ["--set", "trainer.num_inference_steps=2", "--set", "trainer.tensorboard=false", "--batch-size", "4"]
    assert main(["train", "d", "--captions", "encoder", "--steps", "2", *small]) == 0
    out = capsys.readouterr().out
    assert "6 images of 3 x 8 x 8, 6 captions of up to 8 tokens in encoder; a network of " in out
    assert "draw samples with: fastddpm sample results/model --prompt 'red square'" in out
    assert main(["train", "--resume", "--steps", "3"]) == 0
    assert read_tables("results/config.toml")["data"] == {"folder": "d", "text_encoder": "encoder", "text_tokens": 8}
    prompts = ["a red square", "person"]
    options = ["--steps", "2", "--guidance-scale", "3", "--device", "cpu"]
    assert main(["sample", "results", "--prompt", *prompts, "-n", "2", *options, "-o", "drawn.npz"]) == 0
    model = load_pretrained("results")
    told = model.prompted([prompt for prompt in prompts for _ in range(2)])
    expected = model.sampler(num_inference_steps=2).sample(4, guidance_scale=3.0, **told)
    with np.load("drawn.npz") as arrays:
        assert arrays["arr_1"].tolist() == [0, 0, 1, 1]  # numbers of prompts
        assert np.abs(arrays["arr_0"].transpose(0, 3, 1, 2) - (expected.numpy() + 1) * 127.5).max() <= 1
    assert main(["sample", "results", "--prompt", *prompts, *options, "-o", "drawn.png"]) == 0

    save_encoder(Path("other"), seed=1)
    capsys.readouterr()
    for arguments, message in (
        (["sample", "results"], "--prompt is not given, must be: MODEL is results, which draws what a text says"),
        (["sample", "results", "--prompt", "a", "--class-labels", "1"], "--class-labels is given, but results does"),
        (["sample", "results", "--prompt", "a", "--shard-size", "4"], "--prompt is given, but shards do not take it"),
        (["sample", "results", "--prompt", "a", "--text-encoder", "other"], "--text-encoder is other, whose weights"),
        (["train", "d", "--captions", "nowhere", "-o", "r"], "nowhere is no text encoder: must be a folder"),
        (["train", "d", "--captions", "encoder", "--set", "model.add_attention=false", "-o", "r"],
         "[model] has add_attention, which a UNet2DConditionModel does not have"),
    ):  # fmt: skip
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
