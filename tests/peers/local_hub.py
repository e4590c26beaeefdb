"""A cache of the Hugging Face hub with the tokenizers and configs that diffusers' tests load, made here, not loaded.

Tokens are bytes, so prompts become other numbers than on the hub, which only tests with stored pixels notice.
"""

from __future__ import annotations

from pathlib import Path

REVISION = "0" * 40


def make(cache: Path) -> None:
    """Fill the folder of HF_HUB_CACHE."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPTokenizer, T5Config, T5Tokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<pad>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    folder = _folder(cache, "tiny-random-clip")
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder)
    CLIPConfig().save_pretrained(folder)
    folder = _folder(cache, "tiny-random-t5")
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((chr(code), -3.0) for code in range(33, 127)),
    ]
    T5Tokenizer(vocab=pieces, extra_ids=100, model_max_length=512).save_pretrained(folder)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4, "vocab_size": 1103}
    T5Config(**sizes, relative_attention_num_buckets=8).save_pretrained(folder)


def _folder(cache: Path, name: str) -> Path:
    repository = cache / f"models--hf-internal-testing--{name}"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return snapshot
