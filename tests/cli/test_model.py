"""How commands are told which model to run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from ema_pytorch import EMA
from PIL import Image

from fastddpm import NoiseSchedule, UNet, save_pretrained
from fastddpm.cli import main
from fastddpm.interop.pretrained import load_pretrained

FAST = ["--steps", "2"]
CONFIG = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trainer_file() -> str:
    diffusion = GaussianDiffusion(Unet(8, dim_mults=(1, 2), channels=1), image_size=8, timesteps=20)
    average = EMA(diffusion)
    with torch.no_grad():
        average.ema_model.model.final_conv.bias += 1
    torch.save({"step": 1, "model": diffusion.state_dict(), "ema": average.state_dict()}, "model-3.pt")
    return "model-3.pt"


def drawn(*arguments: str) -> np.ndarray:
    assert main([*arguments, *FAST, "-o", "drawn.npz"]) == 0
    with np.load("drawn.npz") as arrays:
        return arrays["arr_0"]


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    try:
        code = main([*arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_trainers_file(trainer_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [trainer_file, "--image-size", "8"]
    images = drawn("sample", *given, "-n", "3")
    assert images.shape == (3, 8, 8, 1)
    expected = load_pretrained(trainer_file, image_size=8).sampler(num_inference_steps=2).sample(3)
    assert np.abs(images[..., 0] - ((expected[:, 0].numpy() + 1) * 127.5)).max() <= 1
    assert np.abs(images.astype(int) - drawn("sample", *given, "-n", "3", "--no-ema")).max() > 10
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("black.png")
    assert drawn("edit", "black.png", "--model", *given, "--strength", "1").shape == (1, 8, 8, 1)
    assert main(["info", "--model", *given]) == 0
    assert "One step of model-3.pt on CUDA" in capsys.readouterr().out


def test_what_a_trainers_file_leaves_open(trainer_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: --image-size is missing, must be given" in failure(capsys, "sample", trainer_file)
    torch.save({"time_embed.0.weight": torch.zeros(8, 2)}, "bare.pt")
    assert "error: --flags are missing, must be given: bare.pt does not say" in failure(capsys, "sample", "bare.pt")
    assert "error: seed is no flag of guided_diffusion" in failure(capsys, "sample", "bare.pt", "--flags=--seed 1")
    twice = ["sample", trainer_file, "--image-size", "8", "--flags", "--image_size 16"]
    assert "error: --image-size is 8 but --flags has it too; it must be in one of them" in failure(capsys, *twice)
    small = ["sample", trainer_file, "--image-size", "7"]
    assert "--image-size is '7', must be one or two multiples of 2" in failure(capsys, *small)
    wrong = ["sample", trainer_file, "--flags", "--objective pred_noise --image_size 8"]
    assert "--flags: objective is 'pred_noise' but model-3.pt was trained with 'pred_v'" in failure(capsys, *wrong)
    for text in ("image_size 8", "--image_size", "'"):
        assert "must be names and values, such as" in failure(capsys, "sample", trainer_file, f"--flags={text}")
    given = "--flags=--image-size=8 --objective pred_v"
    assert drawn("sample", trainer_file, "-n", "1", given).shape == (1, 8, 8, 1)


def test_folders_and_the_hub(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained("folder", UNet(**CONFIG), NoiseSchedule.linear(20))
    asked: list[str | None] = []

    def snapshot(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(revision)
        return "folder"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert np.array_equal(drawn("sample", "owner/name@v1", "-n", "2"), drawn("sample", "folder", "-n", "2"))
    assert set(asked) == {"v1"}
    message = failure(capsys, "sample", "folder", "--image-size", "8")
    assert "--image-size is given but folder is no file, must be left out" in message
    assert "has neither diffusion_pytorch_model.fp16" in failure(capsys, "sample", "folder", "--variant", "fp16")
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = failure(capsys, "info", "--model", "owner/no-such-model")
    assert "owner/no-such-model is no local file or folder, and HF_HUB_OFFLINE is set" in message


def test_latents_are_drawn_as_images(capsys: pytest.CaptureFixture[str]) -> None:
    decoder = VQModel(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=1,
        norm_num_groups=4,
        num_vq_embeddings=4,
    )
    LDMPipeline(decoder, UNet2DModel(**CONFIG), DDIMScheduler(clip_sample=False)).save_pretrained("latent")
    assert drawn("sample", "latent", "-n", "2").shape == (2, 16, 16, 3)
    message = failure(capsys, "sample", "latent", "-o", "a.gif")
    assert "--output is a.gif, which shows states, but those of MODEL are latents" in message
    message = failure(capsys, "edit", "a.png", "--model", "latent")
    assert "MODEL is latent, which draws latents; sample takes such a model, this command does not" in message
