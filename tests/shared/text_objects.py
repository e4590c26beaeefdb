"""Shared by tests of text: a tiny text encoder, a text-conditional U-Net, and pictures with captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm import GaussianDiffusion, NoiseSchedule

WORDS = ("red", "blue", "square", "circle", "a", "dark", "##er", ",", "person")
CAPTIONS = ("red square", "blue square", "a red circle", "a blue circle", "darker square, red", "person")


def save_encoder(folder: Path, *, seed: int = 0, words: tuple[str, ...] = WORDS, width: int = 16) -> Path:
    """Write a BERT of one layer and its tokenizer as transformers does."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=32)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=width, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def text_unet(width: int = 16, **fields: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "sample_size": 8, "in_channels": 3, "out_channels": 6, "block_out_channels": (8, 8), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 4, "attention_head_dim": 2,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "encoder_hid_dim_type": "text_proj",
        "encoder_hid_dim": width, "cross_attention_dim": 8,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**settings, **fields})


def text_diffusion(unet: Any = None, **settings: Any) -> GaussianDiffusion:
    told: dict[str, Any] = {"variance_type": "learned_range", "loss": "hybrid", **settings}
    return GaussianDiffusion(unet or text_unet(), NoiseSchedule.cosine(50), **told)


def captioned(folder: Path) -> Path:
    """Write pictures with a caption each, in `metadata.jsonl`; the last has a text file."""
    folder.mkdir(parents=True)
    lines = []
    for index, caption in enumerate(CAPTIONS):
        values = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    (folder / f"{len(CAPTIONS) - 1}.txt").write_text(CAPTIONS[-1] + "\n")
    return folder
