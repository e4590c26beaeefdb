"""Training on texts: captions of a folder and embeddings of a Dataset give one run, which says what it was told."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from text_objects import CAPTIONS, captioned, save_encoder, text_diffusion, text_unet
from torch import Tensor
from training_objects import small, trainer, weights

from fastddpm import load_pretrained
from fastddpm.interop.text_encoder import TextEncoder, told
from fastddpm.training import ComponentDistance
from fastddpm.training.captions import CaptionedFolder, list_captioned
from fastddpm.training.config import RunConfig, read_tables
from fastddpm.training.data import open_data
from fastddpm.training.order import Pick
from fastddpm.training.state import describe

pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder(str(save_encoder(tmp_path_factory.mktemp("encoder"))), tokens=8)


class Embedded(torch.utils.data.Dataset[Any]):
    """The pictures of a captioned folder with embeddings, as a user's Dataset has them."""

    def __init__(self, source: CaptionedFolder) -> None:
        self.images, self.texts = source.read([Pick(index, 0) for index in range(len(source))])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        pair = {"image": self.images[index], "prompt_embeds": self.texts[index]}
        return pair if index % 2 else (self.images[index], self.texts[index].numpy())


# -- captions --------------------------------------------------------------------------------------------------------


def test_every_picture_comes_with_its_caption(tmp_path: Path, encoder: TextEncoder) -> None:
    folder = captioned(tmp_path / "d")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[0]["text"] = [" a  red\tsquare ", "dark red square", ""]
    (folder / "metadata.jsonl").write_text("﻿" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "3.png").write_bytes(b"broken")
    (folder / "notes.md").write_text("")
    listing, captions = list_captioned(folder)
    assert captions[0] == ("a red square", "dark red square")
    assert captions[1:] == [(caption,) for caption in CAPTIONS[1:]]
    assert listing.passed_over == ("notes.md",)  # files of captions are read
    for cache_bytes in (0, 1 << 20):
        source = open_data(folder, (3, 8, 8), cache_bytes=cache_bytes, text_encoder=encoder)
        assert isinstance(source, CaptionedFolder)
        assert "a blue circle" not in source.captions  # that of the broken picture
        _, texts = source.read([Pick(3, 0), Pick(0, 4), Pick(0, 5)])
        torch.testing.assert_close(texts, encoder(["darker square, red", "a red square", "dark red square"]))
    assert open_data(folder, (3, 8, 8), cache_bytes=0, text_encoder=encoder.name).encoder.tokens == 8  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"file_name": "0.png", "text": "a"}'], r"has 4 pictures without a caption \(1.png, 2.png, 3.png, 4.png\)"),
        (['{"file_name": "0.png", "text": " "}'], r"has 5 pictures without a caption \(0.png, 1.png"),
        (["{"], r"metadata.jsonl, line 1, must be a JSON object with file_name and text"),
        (['{"text": "a"}'], r"metadata.jsonl, line 1, must be a JSON object with file_name and text"),
        (['{"file_name": "0.png", "caption": "a"}'], r"line 1, has file_name, caption, must have text"),
        (["", '{"file_name": "0.png", "text": 3}'], r"line 2: text must be a string or a list of strings"),
    ],
)
def test_captions_that_cannot_be_read(tmp_path: Path, lines: list[str], message: str) -> None:
    folder = captioned(tmp_path / "d")
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        list_captioned(folder)


# -- the objective ---------------------------------------------------------------------------------------------------


def test_a_dropped_text_is_zeros() -> None:
    x0, texts = torch.rand(6, 3, 8, 8) * 2 - 1, torch.randn(6, 8, 16)
    unet = text_unet()
    kept, dropped, some = (text_diffusion(unet, label_dropout=share) for share in (0.0, 1.0, 0.5))
    assert dropped(x0, texts, step=5) == kept(x0, torch.zeros_like(texts), step=5)
    lost = some._draws(6, 0, 5).dropped(0.5)
    assert 0 < int(lost.sum()) < 6
    assert some(x0, texts, step=5) == kept(x0, texts * ~lost[:, None, None], step=5)
    assert some(x0, texts, step=5) != kept(x0, texts, step=5)


# -- the run ---------------------------------------------------------------------------------------------------------


def test_a_folder_with_captions_and_a_dataset_of_embeddings_are_one_run(tmp_path: Path, encoder: TextEncoder) -> None:
    """And an interrupted run is one that was not."""
    folder, constant = captioned(tmp_path / "d"), {"lr_scheduler": "constant", "lr_warmup_steps": 0}

    def run_of(name: str, data: Any, **settings: Any) -> Any:
        run = trainer(tmp_path / name, text_diffusion(label_dropout=0.3), data, **constant, **settings)
        run.train()
        return run

    run = run_of("a", folder, text_encoder=encoder, guidance_scale=2.0)
    of_dataset = run_of("b", Embedded(run.source))
    assert torch.equal(weights(of_dataset.diffusion), weights(run.diffusion))
    assert (tmp_path / "a" / "samples" / "step-0000006.png").is_file()
    run_of("c", folder, text_encoder=encoder, train_num_steps=3)
    resumed = run_of("c", folder, text_encoder=encoder, resume=True)
    assert torch.equal(weights(resumed.diffusion), weights(run.diffusion))
    assert ComponentDistance(run.source, num_samples=4)(run)["frechet"] >= 0
    drawn = run.sampler().sample(2, **run.prompted(["a red square", "person"]))
    assert drawn.isfinite().all()
    with pytest.raises(ValueError, match="prompts is given, but the data have no text encoder"):
        of_dataset.prompted(["person"])


def test_a_run_comes_back_from_its_config(tmp_path: Path, encoder: TextEncoder) -> None:
    run = trainer(tmp_path / "r", text_diffusion(), captioned(tmp_path / "d"), text_encoder=encoder)
    run.train()
    config = RunConfig.from_tables(read_tables(tmp_path / "r" / "config.toml"))
    again = config.encoder()
    assert isinstance(again, TextEncoder)
    assert (again.name, again.tokens) == (encoder.name, 8)
    assert describe(config.build(), config.trainer, "no", again) == describe(
        run.diffusion, run.settings, "no", run.text_encoder
    )
    assert config.to_tables()["model"] == read_tables(tmp_path / "r" / "config.toml")["model"]


def test_another_encoder_or_network_ends_a_resume(
    tmp_path: Path, encoder: TextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    folder, other = captioned(tmp_path / "d"), TextEncoder(str(save_encoder(tmp_path / "e", seed=1)), tokens=8)
    moved = TextEncoder(str(save_encoder(tmp_path / "moved")), tokens=6)
    trainer(tmp_path / "r", text_diffusion(), folder, text_encoder=encoder, train_num_steps=2).train()
    with pytest.raises(ValueError, match="text_encoder is '.*', but .* has been trained with '.*', must be the same"):
        trainer(tmp_path / "r", text_diffusion(), folder, text_encoder=other, resume=True)
    with pytest.raises(ValueError, match="network is {'norm_eps': 0.001}, but .* trained with {'norm_eps': 1e-05}"):
        trainer(tmp_path / "r", text_diffusion(text_unet(norm_eps=1e-3)), folder, text_encoder=encoder, resume=True)
    with caplog.at_level(logging.WARNING):  # the same encoder elsewhere
        trainer(tmp_path / "r", text_diffusion(text_unet(dropout=0.1)), folder, text_encoder=moved, resume=True)
    changes = [message.partition(" was ")[0] for message in caplog.messages if "the training is another" in message]
    assert sorted(changes) == ["dropout", "text_tokens", "train_num_steps"]


class Bare(torch.nn.Module):
    """A network without a config, which takes texts."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.scale * x * encoder_hidden_states.mean()


def test_data_and_networks_that_do_not_fit(tmp_path: Path, encoder: TextEncoder) -> None:
    folder = captioned(tmp_path / "d")
    embedded = Embedded(open_data(folder, (3, 8, 8), cache_bytes=0, text_encoder=encoder))  # type: ignore[arg-type]
    pixels, texts = embedded.images, embedded.texts
    ragged = [(pixels[0], texts[0]), (pixels[1], texts[1, :4])]
    cases: tuple[tuple[Any, Any, dict[str, Any], str], ...] = (
        (None, folder, {}, "data has no embeddings of texts, which the network takes: name a text_encoder"),
        (None, [(image, 3) for image in pixels], {}, "data has labels, not embeddings of texts"),
        (text_unet(width=12), embedded, {}, "data has embeddings of width 16, but the network reads 12"),
        (None, ragged, {}, r"data has embeddings of \[4, 16\] and of \[8, 16\], must have one shape"),
        (None, embedded, {"text_encoder": encoder}, "text_encoder is given, but data is a Embedded, must be a folder"),
    )
    for unet, data, options, message in cases:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path / "r", text_diffusion(unet), data, **options)
    with pytest.raises(ValueError, match="text_encoder is given, but the network is a UNet, which takes no text"):
        trainer(tmp_path / "r", small(), folder, text_encoder=encoder)
    with pytest.raises(ValueError, match=r"data has embeddings of texts, but the network is a UNet"):
        trainer(tmp_path / "r", small(), [(image[:1], text) for image, text in zip(pixels, texts, strict=True)])
    bare = text_diffusion(Bare(), variance_type="fixed_small", loss="mse")
    trainer(tmp_path / "bare", bare, embedded).train()
    assert (tmp_path / "bare" / "model" / "model.safetensors").is_file()


# -- the model -------------------------------------------------------------------------------------------------------


def test_the_model_is_a_pipeline_of_if(tmp_path: Path, encoder: TextEncoder) -> None:
    """Guided, with a learned variance: diffusers' IFPipeline draws what `fastddpm` draws of the same noise."""
    run = trainer(tmp_path / "r", text_diffusion(), captioned(tmp_path / "d"), text_encoder=encoder)
    run.train()
    model = load_pretrained(tmp_path / "r")
    of_checkpoint = load_pretrained(tmp_path / "r" / "checkpoints" / "step-0000006")
    prompts = ["a red square", "person"]
    arguments: dict[str, Any] = {"guidance_scale": 3.0, **model.prompted(prompts, "dark")}
    steps, shape = 4, (2, 3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(shape, generator=generator)
    noise = torch.stack([torch.randn(shape, generator=generator) for _ in range(steps)])
    sampler = model.sampler(num_inference_steps=steps)
    drawn = sampler.sample(2, x_T=x_T, noise=noise, **arguments)
    again = of_checkpoint.sampler(num_inference_steps=steps).sample(2, x_T=x_T, noise=noise, **arguments)
    assert torch.equal(again, drawn)
    pipe = diffusers.IFPipeline.from_pretrained(tmp_path / "r" / "model", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    texts, negative = encoder(prompts), encoder(["dark"]).expand(2, -1, -1)
    expected = pipe(
        prompt_embeds=texts, negative_prompt_embeds=negative, guidance_scale=3.0, num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0), output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(drawn, expected.float(), rtol=1e-4, atol=1e-4)
    plain = sampler.sample(2, x_T=x_T, noise=noise, **told(texts))
    assert not torch.allclose(plain, drawn, atol=1e-3)
    other = save_encoder(tmp_path / "e", seed=1)
    with pytest.raises(ValueError, match="text_encoder is .*, whose weights or words are not those of"):
        model.prompted(prompts, text_encoder=str(other))
