"""Serve training images: from a folder of pictures, an .npz, or any torch Dataset."""

from __future__ import annotations

import logging
import operator
import os
import random
import signal
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fastddpm.common.files import read_json, write_json
from fastddpm.common.images import (
    MOST_LABELS,
    check_ids,
    check_shape,
    check_size,
    fit_pixels,
    is_archive,
    pixels_of_array,
    read_npz,
)
from fastddpm.common.progress import progress_bar
from fastddpm.common.text import printable
from fastddpm.interop.text_encoder import TextEncoder
from fastddpm.training.captions import CaptionedFolder, list_captioned
from fastddpm.training.folder import PictureFolder, list_pictures
from fastddpm.training.order import Batches, Pick
from fastddpm.training.randomness import randomness_kept

_log = logging.getLogger(__name__)

IMAGE_KEYS = ("image", "images", "pixel_values", "x")
LABEL_KEYS = ("label", "labels", "class_label", "class_labels", "y")
TEXT_KEYS = ("encoder_hidden_states", "prompt_embeds", "embedding", "embeddings")


class Source(Protocol):
    """Images by their numbers.

    Attributes:
        classes: names of the classes by label, as far as they are known; empty if there are none.
        labels: the labels that occur, rising; empty if there are none or they are not known.
        in_memory: whether the images are in memory, so that reading is free.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> tuple[int, ...]: ...

    @property
    def in_memory(self) -> bool: ...

    def __len__(self) -> int: ...

    def read(self, picks: Sequence[Pick]) -> tuple[Tensor, Tensor | None]:
        """Return images [N, C, ...], uint8 or float32 in [-1, 1], and what the network is told of them.

        That is labels int64 [N], or embeddings of text float [N, L, D], or None.
        """
        ...


class ArraySource:
    """Serve the arrays of an `.npz`, in the format of `fastddpm sample -o images.npz` and ADM's evaluator, or a `.npy`.

    `arr_0` is uint8 [N, H, W, C] or [N, H, W], and `arr_1`, if it is there, integer labels [N].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read or has another format.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        arrays = read_npz(path)
        if "arr_0" not in arrays:
            raise ValueError(f"{path} has {', '.join(arrays) or 'no arrays'}, must have arr_0, uint8 [N, H, W, C]")
        images = pixels_of_array(arrays["arr_0"], f"{path}: arr_0", channels=None)
        labels = arrays.get("arr_1")
        self._images = torch.from_numpy(images).permute(0, 3, 1, 2)
        self._labels = None if labels is None else check_ids(labels, len(images), f"{path}: arr_1")
        self.labels: tuple[int, ...] = () if self._labels is None else tuple(self._labels.unique().tolist())
        self.classes = tuple(str(label) for label in range(self.labels[-1] + 1)) if self.labels else ()
        self.shape: tuple[int, int, int] = tuple(self._images.shape[1:])  # type: ignore[assignment]
        self.in_memory = True

    def __len__(self) -> int:
        return len(self._images)

    def read(self, picks: Sequence[Pick]) -> tuple[Tensor, Tensor | None]:
        places = torch.tensor([pick.image for pick in picks])
        return self._images[places].contiguous(), None if self._labels is None else self._labels[places]


class DatasetSource:
    """Serve any map-style Dataset whose items are an image, (image, label), or a mapping with keys `image`, `label`.

    In place of a label there may be the embedding of a text, floating-point [L, D], with the key `prompt_embeds`.

    An image is a tensor [C, ...], uint8 or floating-point in [-1, 1]; an array uint8 [H, W, C] or [H, W]; or a PIL
    image, which is cropped and resized to `shape`. The random generators of Python, numpy and torch are seeded before
    each item, so a Dataset's random numbers depend only on the position of the item in the run.

    Raises:
        TypeError: it is an IterableDataset, or has no length.
    """

    classes: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    in_memory = False

    def __init__(self, dataset: Any, shape: tuple[int, ...] | None) -> None:
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        ):
            raise TypeError(
                f"data is a {type(dataset).__name__}, must be a folder, an .npz, or a Dataset with a length, whose "
                "items can be read in any order"
            )
        self._dataset, self._shape = dataset, shape

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, picks: Sequence[Pick]) -> tuple[Tensor, Tensor | None]:
        images: list[Tensor] = []
        labels: list[int | Tensor] = []
        with randomness_kept():
            for pick in picks:
                random.seed(pick.seed)
                np.random.seed(pick.seed & 0xFFFFFFFF)  # noqa: NPY002, the generator that a Dataset may use
                torch.default_generator.manual_seed(pick.seed)
                image, label = self._unpack(self._dataset[pick.image], f"data[{pick.image}]")
                images.append(image)
                if label is not None:
                    labels.append(label)
        if labels and len(labels) != len(images):
            raise ValueError("data has items with a label and items without, must have one kind")
        texts = [label for label in labels if isinstance(label, Tensor)]
        if texts and (len(texts) != len(labels) or len({text.shape for text in texts}) > 1):
            kinds = sorted({str(list(label.shape)) if isinstance(label, Tensor) else "a label" for label in labels})
            raise ValueError(f"data has embeddings of {' and of '.join(kinds)}, must have one shape [L, D]")
        if len({(image.shape, image.dtype) for image in images}) > 1:
            kinds = sorted({f"{image.dtype} {list(image.shape)}" for image in images})
            raise ValueError(f"data has items of {' and of '.join(kinds)}, must have one kind")
        if texts:
            return torch.stack(images), torch.stack(texts)
        return torch.stack(images), torch.tensor(labels) if labels else None

    def _unpack(self, item: Any, name: str) -> tuple[Tensor, int | Tensor | None]:
        label: Any = None
        if isinstance(item, Mapping):
            names = [name for name in IMAGE_KEYS if name in item]
            if not names:
                raise TypeError(f"data has items with keys {sorted(item)}, must have one of {', '.join(IMAGE_KEYS)}")
            image = item[names[0]]
            label = next((item[name] for name in (*TEXT_KEYS, *LABEL_KEYS) if name in item), None)
        elif isinstance(item, tuple | list) and item:
            image, label = item[0], item[1] if len(item) > 1 else None
        else:
            image = item
        return self._pixels(image, name), None if label is None else _label(label)

    def _pixels(self, image: Any, name: str) -> Tensor:
        if isinstance(image, Tensor):
            if image.dtype != torch.uint8 and not image.dtype.is_floating_point:
                raise TypeError(f"data has images of {image.dtype}, must be uint8, or floating-point in [-1, 1]")
            check_size(image.numel(), image.untyped_storage().nbytes(), name)
            return image if image.dtype == torch.uint8 else image.float()
        if isinstance(image, np.ndarray):
            return torch.from_numpy(pixels_of_array(image[None], name, channels=None)[0].transpose(2, 0, 1).copy())
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"data has images of {type(image).__name__}, must be tensors [C, H, W], arrays uint8 [H, W, C] or PIL "
                "images"
            )
        if self._shape is None or len(self._shape) != 3:
            raise ValueError("data has PIL images, but the network does not say what size they must be resized to")
        try:
            return torch.from_numpy(fit_pixels(image, self._shape))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None


def open_data(
    data: Any,
    shape: tuple[int, ...] | None,
    *,
    cache_bytes: int,
    record: Path | None = None,
    main: bool = True,
    progress: bool = False,
    text_encoder: TextEncoder | str | None = None,
) -> Source:
    """Return the source that `data` names.

    Args:
        data: a folder, an `.npz` or `.npy`, a Dataset, or a source.
        shape: (C, H, W) of the model's data, if known.
        cache_bytes: see `PictureFolder`.
        record: a JSON file that lists the content of a folder, including broken pictures; read if it exists.
        main: whether this process writes `record` and reports broken pictures.
        progress: draw a bar while pictures are read.
        text_encoder: for a folder with captions, see `fastddpm.training.captions`: of these, or its name.

    Raises:
        FileNotFoundError, TypeError, ValueError: the data cannot be used; the message says why.
    """
    if text_encoder is not None and (not isinstance(data, (str, os.PathLike)) or is_archive(Path(data))):
        what = str(data) if isinstance(data, (str, os.PathLike)) else f"a {type(data).__name__}"
        raise ValueError(f"text_encoder is given, but data is {what}, must be a folder of pictures with captions")
    if isinstance(data, (ArraySource, PictureFolder, DatasetSource, CaptionedFolder)):
        return data
    if not isinstance(data, (str, os.PathLike)):
        return DatasetSource(data, shape)
    path = Path(data)
    if is_archive(path):
        return ArraySource(path)
    captions = None
    if text_encoder is None:
        listing = list_pictures(path)
    else:
        listing, captions = list_captioned(path)
    if shape is None or len(shape) != 3:
        raise ValueError(
            f"data is {str(path)!r}, a folder, but the network does not say what size pictures must be resized to: it "
            "has no config with sample_size and out_channels"
        )
    check_shape(shape, "the model's data have")  # type: ignore[arg-type]
    known = None
    if record is not None and record.is_file():
        try:
            known = read_json(record)
        except ValueError:
            known = None  # the record only saves time
    with progress_bar(len(listing.paths), "reading pictures", enabled=progress) as bar:
        source = PictureFolder(listing, shape, cache_bytes=cache_bytes, known=known, advance=bar)  # type: ignore[arg-type]
    for note in listing.notes() if main else ():
        _log.warning("%s", note)
    if main and source.broken:
        _log.warning("%d of the pictures cannot be read, %d can; left out are", len(source.broken), len(source))
        for entry in source.broken:
            _log.warning("  %s: %s", printable(entry.path), entry.reason)
    if main and record is not None and source.verdict() != known:
        write_json(record, source.verdict())
    if captions is not None and text_encoder is not None:
        return CaptionedFolder(source, captions, text_encoder, progress=progress)
    return source


def _label(label: Any) -> int | Tensor:
    if isinstance(label, np.ndarray) and label.ndim == 2:
        label = torch.from_numpy(label)
    if isinstance(label, Tensor) and label.ndim == 2 and label.is_floating_point():
        return label.float()
    try:
        value = operator.index(label)
    except (TypeError, ValueError):
        shown = repr(label)
        shown = shown if len(shown) < 60 and "\n" not in shown else f"a {type(label).__name__}"
        raise TypeError(
            f"data has the label {shown}, must be an integer, or the embedding of a text, floating-point [L, D]"
        ) from None
    if not 0 <= value < MOST_LABELS:
        raise ValueError(f"data has the label {value}, every label must be from 0 to {MOST_LABELS - 1}")
    return value


class _Reader:
    """The dataset of a DataLoader in its workers; an index is the list of picks of a batch."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, picks: list[Pick]) -> tuple[Tensor, Tensor | None]:
        return self._source.read(picks)


def _as_it_is(batch: Any) -> Any:
    return batch


def _outlive_signals(_worker: int) -> None:
    """Let a worker ignore signals that stop a whole run: the main process ends it after the current step."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(signal.Signals[name], signal.SIG_IGN)


def _cores() -> int:
    """Return the number of cores this process may use: a batch system may grant only part of a machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(
    source: Source, batches: Batches, start: int, stop: int, *, num_workers: int | str, pin_memory: bool
) -> Generator[tuple[Tensor, Tensor | None], None, None]:
    """Yield the batches of steps `start` to `stop` - 1, one per forward pass: images [N, C, ...] and labels.

    Close the generator or exhaust it: remaining workers would keep the process from ending.

    Args:
        source: of the images.
        batches: maps steps to images.
        num_workers: processes that read; "auto" for none if the source is in memory, else one per usable core, up to 8.
        pin_memory: page-lock the batches, so that copies to CUDA do not wait.
    """
    if num_workers == "auto":
        num_workers = 0 if source.in_memory else min(8, max(1, _cores() // batches.processes))
    loader: DataLoader[Any] = DataLoader(
        _Reader(source),  # type: ignore[arg-type]
        batch_size=None,
        sampler=batches.picks(start, stop),  # type: ignore[arg-type]
        num_workers=int(num_workers),
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        # An exception's traceback would keep the iterator alive, and with it the workers, so end them here.
        if workers := getattr(iterator, "_workers", ()):
            iterator._shutdown_workers()  # type: ignore[attr-defined]
            for worker in workers:
                worker.kill()
