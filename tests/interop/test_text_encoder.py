"""Text encoders: what an embedding is, where they are found, and what cannot be one."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from text_objects import CAPTIONS, save_encoder

from fastddpm.interop import text_encoder
from fastddpm.interop.text_encoder import TextEncoder, encoder_width

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def test_an_embedding_is_the_last_hidden_state_and_zeros_after_it(folder: Path) -> None:
    encoder = TextEncoder(str(folder), tokens=8)
    drawn = encoder([*CAPTIONS, ""], batch_size=2)
    assert drawn.shape == (len(CAPTIONS) + 1, 8, 16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    for embedding, caption, length in zip(drawn, CAPTIONS, encoder.lengths(CAPTIONS), strict=False):
        alone = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        assert len(alone) == length
        torch.testing.assert_close(embedding[:length], alone.detach(), rtol=1e-5, atol=1e-6)
        assert not embedding[length:].any()
    assert not drawn[-1].any()  # no text at all, though the tokenizer would mark its beginning and end
    cut = TextEncoder(str(folder), tokens=3)(["red square"])
    kept = model(**tokenizer("red", return_tensors="pt")).last_hidden_state  # [CLS] red [SEP]
    torch.testing.assert_close(cut, kept.detach(), rtol=1e-5, atol=1e-6)


def test_a_fingerprint_tells_encoders_apart(folder: Path, tmp_path: Path) -> None:
    own = TextEncoder(str(folder), tokens=4)
    again = TextEncoder(str(save_encoder(tmp_path / "again")))
    assert (own.fingerprint, own.width, again.tokens) == (again.fingerprint, 16, 32)
    assert TextEncoder(str(save_encoder(tmp_path / "weights", seed=1))).fingerprint != own.fingerprint
    words = ("blue", "red", "square", "circle", "a", "dark", "##er", ",", "person")
    assert TextEncoder(str(save_encoder(tmp_path / "words", words=words))).fingerprint != own.fingerprint


def test_encoders_in_pipelines_and_packages(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tmp_path / "pipeline"
    save_encoder(pipeline / "text_encoder")
    save_encoder(pipeline / "tokenizer")
    assert TextEncoder(str(pipeline)).fingerprint == TextEncoder(str(folder)).fingerprint
    (tmp_path / "carrier-1.0.dist-info").mkdir()
    (tmp_path / "carrier-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
    save_encoder(tmp_path / "carrier" / "model")
    files = sorted(path.relative_to(tmp_path) for path in (tmp_path / "carrier").rglob("*") if path.is_file())
    (tmp_path / "carrier-1.0.dist-info" / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.metadata.version("carrier") == "1.0"
    assert TextEncoder("carrier").fingerprint == TextEncoder(str(folder)).fingerprint
    assert encoder_width("carrier") == 16


def test_clip_and_t5_without_their_other_halves(tmp_path: Path) -> None:
    """AutoModel would load CLIP's image encoder and T5's decoder, which need further inputs."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPConfig(text_config={**text, "vocab_size": 14}, vision_config={**text, "image_size": 8})
    t5 = transformers.T5Config(vocab_size=14, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    for name, model in (("clip", transformers.CLIPModel(clip)), ("t5", transformers.T5ForConditionalGeneration(t5))):
        folder = save_encoder(tmp_path / name)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder)
        assert TextEncoder(str(folder), tokens=4)(["red square"]).shape == (1, 4, 16)
        assert encoder_width(str(folder)) == 16


def test_what_is_no_text_encoder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    for name, tokens, error, message in (
        ("nowhere", None, FileNotFoundError, "nowhere is no text encoder: must be a folder, an installed package"),
        (str(tmp_path / "empty"), None, ValueError, "empty has no config.json, must be the folder of a text encoder"),
        (str(tmp_path / "broken"), None, ValueError, "broken cannot be loaded as a text encoder: "),
        ("pytest", None, FileNotFoundError, "pytest is no text encoder"),
        (str(folder), 33, ValueError, "tokens is 33, must be from 1 to 32"),
        (str(folder), 0, ValueError, "tokens is 0, must be from 1 to 32"),
    ):
        with pytest.raises(error, match=message) as caught:
            TextEncoder(name, tokens=tokens)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'fastddpm\\[text\\]'"):
        text_encoder.TextEncoder(str(folder))
