"""`fastddpm sample PIPELINE --prompt`, `info`, `profile` and `tune` of a text-to-image pipeline, on a tiny one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conditional_objects import SD, pipeline, unet
from PIL import Image

from fastddpm.cli import main
from fastddpm.interop.pretrained import load_pretrained
from fastddpm.perf.profiling.layers import evaluation

WORDS = ("<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>", "r", "e", "d", "d</w>")
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Stable Diffusion pipeline with a text encoder of random weights and a vocabulary of letters."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("pipeline")
    (path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(WORDS)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        vocab=str(path / "vocab.json"), merges=str(path / "merges.txt"), model_max_length=7
    )
    torch.manual_seed(0)
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=8,
            intermediate_size=8,
            num_attention_heads=2,
            num_hidden_layers=1,
            vocab_size=len(WORDS),
            max_position_embeddings=7,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()
    pipe = pipeline(unet=unet(**{**SD, "sample_size": 8}), text_encoder=encoder, tokenizer=tokenizer)
    pipe.save_pretrained(path / "saved")
    return str(path / "saved")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_prompts_are_drawn(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text("a b\n\nred\n")
    few = ["--steps", "2", "--device", "cpu"]
    own = ["--negative-prompt", "b", "--guidance-scale", "4", "--height", "24", "--method", "dpmsolver++"]
    assert main(["sample", folder, "--prompt-file", "prompts.txt", "-n", "3", *few, *own, "-o", "grid.png"]) == 0
    assert "6 images of 2 prompts" in capsys.readouterr().out
    with Image.open("grid.png") as picture:
        assert picture.width > picture.height
    for name, size, prompts in (("all", "4", ["a b", "red"]), ("one", "1", ["red"])):
        arguments = ["-n", "2", "--seed", "5", "--batch-size", size, "-o", f"{name}.npz"]
        assert main(["sample", folder, "--prompt", *prompts, *few, *arguments]) == 0
    every, red = (np.load(f"{name}.npz")["arr_0"].astype(int) for name in ("all", "one"))
    assert every.shape == (4, 16, 16, 3)
    assert np.abs(every[2:] - red).max() <= 1  # of one seed, whatever is drawn with it
    assert np.abs(every[0] - every[1]).max() > 10


def test_what_pipelines_do_not_take(folder: str, refused: Refused) -> None:
    for arguments, words in (
        (["--prompt", "a", "--class-labels", "1"], ("--class-labels",)),
        (["--prompt", "a", "--prompt-file", "x.txt"], ("--prompt-file",)),
        (["--prompt", " "], ("--prompt", "empty")),
        (["--prompt", "a", "-o", "a.gif"], ("--output",)),
        (["--prompt", "a", "--method", "edm"], ("--method", "edm")),
        (["--prompt", "a", "--steps", "ddim3"], ("--steps", "ddim3")),
        (["--height", "16"], ("--height", "--prompt")),
        ([], ("--prompt", "text")),
    ):
        message = refused("sample", folder, *arguments)
        assert all(word in message for word in words)
    assert "--prompt" in refused("sample", "--prompt", "a")
    assert "nowhere" in refused("sample", "nowhere", "--prompt", "a")
    assert "pipeline" in refused("sample", str(Path(folder) / "unet"), "--prompt", "a")


def test_info_counts_kernels(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", folder, "--batch-size", "2"]) == 0
    out = capsys.readouterr().out
    assert "attention" in out
    assert "One step of" in out


def test_profile_and_tune_know_the_shapes(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    sampler = load_pretrained(folder).sampler(num_inference_steps=2, device="cpu")
    ready = evaluation(sampler.network, (2, 4, 8, 8), torch.tensor([0]))
    with ready.running():
        assert ready().shape == (2, 4, 8, 8)
    assert any("attn2" in instruction.name for instruction in ready.instructions)
    assert main(["tune", folder, "--batch", "2", "--dry-run", "--device", "cpu", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "Shapes" in out or "nothing to tune" in out
