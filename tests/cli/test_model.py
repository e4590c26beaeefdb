"""How commands are told which model to run."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.cli import main
from fastddpm.interop.pretrained import load_pretrained

Refused = Callable[..., str]


@pytest.fixture
def trainer_file() -> str:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    diffusion = GaussianDiffusion(Unet(8, dim_mults=(1, 2), channels=1), image_size=8, timesteps=20)
    average = EMA(diffusion)
    with torch.no_grad():
        average.ema_model.model.final_conv.bias += 1
    torch.save({"step": 1, "model": diffusion.state_dict(), "ema": average.state_dict()}, "model-3.pt")
    return "model-3.pt"


def drawn(*arguments: str) -> np.ndarray:
    assert main([*arguments, "--steps", "2", "-o", "drawn.npz"]) == 0
    with np.load("drawn.npz") as arrays:
        return arrays["arr_0"]


def test_a_trainers_file(trainer_file: str, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    given = [trainer_file, "--image-size", "8"]
    images = drawn("sample", *given, "-n", "3")
    assert images.shape == (3, 8, 8, 1)
    expected = load_pretrained(trainer_file, image_size=8).sampler(num_inference_steps=2).sample(3)
    assert np.abs(images[..., 0] - ((expected[:, 0].numpy() + 1) * 127.5)).max() <= 1
    other = drawn("sample", trainer_file, "-n", "3", "--no-ema", "--flags=--image-size=8 --objective pred_v")
    assert np.abs(images.astype(int) - other).max() > 10
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("black.png")
    assert drawn("edit", "black.png", "--model", *given, "--strength", "1").shape == (1, 8, 8, 1)
    capsys.readouterr()
    assert main(["info", "--model", *given]) == 0
    assert "One step of model-3.pt on CUDA" in capsys.readouterr().out
    assert main(["info", "--json", "--fusion", "parts", "--model", *given]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["launches_per_step"] == counts["launches_per_step_by_fusion"]["parts"]
    assert counts["launches_per_step"] == sum(counts["launches_by_kind"].values()) > 20
    for options, words in (
        ([], "error: --image-size is missing, must be given"),
        (["--image-size", "7"], "--image-size is '7', must be one or two multiples of 2"),
        (["--flags", "--objective pred_noise --image_size 8"],
         "--flags: objective is 'pred_noise' but model-3.pt was trained with 'pred_v'"),
    ):  # fmt: skip
        assert words in refused("sample", trainer_file, *options)


def test_models_of_the_hub(model: str, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def snapshot(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(revision)
        return model

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", snapshot)
        assert np.array_equal(drawn("sample", "owner/name@v1", "-n", "2"), drawn("sample", model, "-n", "2"))
    assert set(asked) == {"v1"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused("info", "--model", "owner/no-such-model")
    assert "owner/no-such-model is no local file or folder, and HF_HUB_OFFLINE is set" in message


def test_latents_are_drawn_as_images(tiny: dict[str, Any], refused: Refused) -> None:
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

    decoder = VQModel(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=1, num_vq_embeddings=4,
    )  # fmt: skip
    LDMPipeline(decoder, UNet2DModel(**tiny), DDIMScheduler(clip_sample=False)).save_pretrained("latent")
    assert drawn("sample", "latent", "-n", "2").shape == (2, 16, 16, 3)
    message = refused("sample", "latent", "-o", "a.gif")
    assert "--output is a.gif, which shows states, but those of MODEL are latents" in message
    message = refused("edit", "a.png", "--model", "latent")
    assert "MODEL is latent, which draws latents; sample takes such a model, this command does not" in message
