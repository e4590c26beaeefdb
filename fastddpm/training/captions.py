"""Serve pictures with the embeddings of their captions.

Captions stand in a folder as Hugging Face's `imagefolder` has them, in `metadata.jsonl` with a line for each picture,

    {"file_name": "a/0001.png", "text": "a red car"}

or in a text file beside each picture, `a/0001.txt`. Several captions of a picture are a list in `text`, or lines of its
text file: one of them is drawn for every visit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastddpm.common.images import Listing, list_pictures
from fastddpm.common.images.folders import few
from fastddpm.common.progress import progress_bar
from fastddpm.interop.text_encoder import TextEncoder
from fastddpm.training.folder import PictureFolder
from fastddpm.training.order import Pick

METADATA = "metadata.jsonl"
COLUMN = "text"
MAX_BYTES = 8 << 30  # of embeddings in memory

Captions = tuple[str, ...]


def list_captioned(folder: str | os.PathLike[str]) -> tuple[Listing, list[Captions]]:
    """Find the pictures below a folder, and the captions of each.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no picture, a picture has no caption, or a file of captions has another form; the message
            names the first.
    """
    listing = list_pictures(folder, classed=False)
    table = listing.root / METADATA
    captions = _of_table(table) if table.is_file() else {}
    found = [captions.get(path.replace(os.sep, "/")) or _of_text_file(listing.root / path) for path in listing.paths]
    if missing := [path for path, each in zip(listing.paths, found, strict=True) if not each]:
        raise ValueError(
            f"{listing.root} has {len(missing)} pictures without a caption ({few(missing)}), each must have a line in "
            f"{METADATA} with file_name and {COLUMN}, or a .txt of the same name"
        )
    read = {METADATA, *(f"{os.path.splitext(path)[0]}.txt" for path in listing.paths)}
    return replace(listing, passed_over=tuple(path for path in listing.passed_over if path not in read)), found


def _of_table(path: Path) -> dict[str, Captions]:
    captions: dict[str, Captions] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, Mapping) or not isinstance(row.get("file_name"), str):
            raise ValueError(f"{path}, line {number}, must be a JSON object with file_name and {COLUMN}")
        if COLUMN not in row:
            raise ValueError(f"{path}, line {number}, has {', '.join(row)}, must have {COLUMN}")
        given = row[COLUMN]
        several = given if isinstance(given, list) else [given]
        if not all(isinstance(caption, str) for caption in several):
            raise ValueError(f"{path}, line {number}: {COLUMN} must be a string or a list of strings")
        captions[os.path.normpath(row["file_name"]).replace(os.sep, "/")] = _stripped(several)
    return captions


def _of_text_file(picture: Path) -> Captions:
    path = picture.with_suffix(".txt")
    return _stripped(_text(path).splitlines()) if path.is_file() else ()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except ValueError:
        raise ValueError(f"{path} is not text in UTF-8") from None


def _stripped(captions: Sequence[str]) -> Captions:
    return tuple(caption for each in captions if (caption := " ".join(each.split())))


class CaptionedFolder:
    """Serve the pictures of a folder with the embedding of a caption each, drawn by the pick's seed if there are more.

    All captions are encoded once, at the start, and kept in memory in the encoder's precision or, from a gigabyte on,
    in float16.

    Args:
        pictures: the pictures.
        captions: of each picture in its listing, from `list_captioned`.
        encoder: of the captions, or its name: then L is that of the longest caption, rounded up to a multiple of 8.
        progress: draw a bar while captions are encoded.

    Raises:
        ValueError: the embeddings need more than 8 GB.
    """

    classes: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    def __init__(
        self,
        pictures: PictureFolder,
        captions: Sequence[Captions],
        encoder: TextEncoder | str,
        *,
        progress: bool = False,
    ) -> None:
        self.pictures, self._captions = pictures, captions
        readable = [captions[place] for place in pictures.good]
        self.captions: Captions = tuple(dict.fromkeys(caption for each in readable for caption in each))
        if isinstance(encoder, str):
            encoder = TextEncoder(encoder)
            longest = max(encoder.lengths(self.captions))
            encoder.tokens = min(-(-longest // 8) * 8, encoder.tokens)
        self.encoder = encoder
        size = 2 * len(self.captions) * encoder.tokens * encoder.width
        if size > MAX_BYTES:
            raise ValueError(
                f"{len(self.captions)} captions of {encoder.tokens} tokens and width {encoder.width} need "
                f"{size / 1e9:.0f} GB of embeddings, must need at most {MAX_BYTES / 1e9:.0f} GB: use a Dataset that "
                "encodes them on the way"
            )
        with progress_bar(len(self.captions), "reading captions", enabled=progress) as bar:
            embeddings = encoder(self.captions, advance=bar)
        self.embeddings = embeddings.half() if 2 * size > 1 << 30 else embeddings
        number = {caption: place for place, caption in enumerate(self.captions)}
        # By the place in the listing: a picture that can no longer be read is replaced by another, with its caption.
        self._numbers = [[number[caption] for caption in each if caption in number] for each in captions]

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def in_memory(self) -> bool:
        """Return whether the pictures are in memory, so that reading is free."""
        return self.pictures.in_memory

    def captions_of(self, picture: int) -> Captions:
        """Return the captions of a picture by its number."""
        return self._captions[self.pictures.good[picture]]

    def read(self, picks: Sequence[Pick]) -> tuple[Tensor, Tensor]:
        """Return pixels uint8 [N, C, H, W] and embeddings float32 [N, L, D]."""
        images, places = self.pictures.read_places(picks)
        several = [self._numbers[place] for place in places.tolist()]
        chosen = [each[pick.seed % len(each)] for pick, each in zip(picks, several, strict=True)]
        return images, self.embeddings[torch.tensor(chosen)].float()
