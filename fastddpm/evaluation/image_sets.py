"""Hold sets of 8-bit images, read or drawn a few at a time, as uint8."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.common import checks
from fastddpm.common.images import CHANNELS, pixels_of_array, to_uint8
from fastddpm.common.progress import progress_bar
from fastddpm.sampling.sampler import Sampler

DRAWN_AT_ONCE = 256 << 20  # bytes of float32 samples


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one shape.

    Attributes:
        name: where they come from.
        count: how many there are; of a folder, how many files.
        shape: (C, H, W).
        pieces: yields all images in order, uint8 [n, C, H, W] of any n.
        labels: int64 [N], if there are labels.
        notes: remarks for readers of the figures; complete once all pieces have been read.
        drawn: whether reading the images draws them, which takes most of the time.
    """

    name: str
    count: int
    shape: tuple[int, int, int]
    pieces: Callable[[], Iterator[Tensor]]
    labels: Tensor | None = None
    notes: list[str] = field(default_factory=list)
    drawn: bool = False

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield all images in order, uint8 [n, C, H, W] with n at most `size`."""
        waiting: list[Tensor] = []
        for piece in self.pieces():
            for part in piece.split(size):
                waiting.append(part)
                if sum(map(len, waiting)) >= size:
                    whole = torch.cat(waiting)
                    yield whole[:size]
                    waiting = [whole[size:]] if len(whole) > size else []
        if waiting:
            yield torch.cat(waiting)

    def in_colour(self) -> ImageSet:
        """Return grey images with their values in three channels; coloured ones as they are."""
        if self.shape[0] != 1:
            return self

        def pieces() -> Iterator[Tensor]:
            for piece in self.pieces():
                yield piece.expand(-1, 3, -1, -1)

        return replace(self, shape=(3, *self.shape[1:]), pieces=pieces)


def of_array(images: np.ndarray | Tensor, name: str, labels: Tensor | None = None) -> ImageSet:
    """Return images uint8 [N, H, W, C] of 1, 3 or 4 channels, or [N, H, W]; three equal channels count as one.

    Raises:
        ValueError: another shape or dtype.
    """
    pixels = pixels_of_array(images, name)
    if pixels.shape[3] == 3 and (pixels[..., :1] == pixels[..., 1:]).all():
        pixels = pixels[..., :1]
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    n, channels, height, width = tensor.shape
    return ImageSet(name, n, (channels, height, width), lambda: iter((tensor,)), labels)


def of_sampler(
    sampler: Sampler,
    num_samples: int,
    *,
    seed: int = 0,
    class_labels: int | Sequence[int] | Tensor | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    keep: list[Tensor] | None = None,
    name: str = "samples",
    progress: bool = False,
    **arguments: Any,
) -> ImageSet:
    """Return the images of a sampler, drawn when they are read; they are never all held as floats.

    They are those of `sampler.sample(num_samples, seed=seed, ...)`, drawn a few hundred megabytes at a time.

    Args:
        sampler, num_samples, seed, class_labels: as for `Sampler.sample`.
        decode: makes images float [n, C, H, W] in [-1, 1] of samples, such as `Pretrained.decode`; None for samples
            that are images.
        keep: is given the uint8 pieces.
        name: for reports.
        progress: draw a bar for all of them.
        arguments: further arguments of `Sampler.sample`, the same for all images.

    Raises:
        ValueError, TypeError: as `Sampler.sample`; samples are not images, or not finite.
    """
    count = checks.positive(num_samples, "num_samples")
    drawn_shape = tuple(arguments.get("shape") or sampler.network.sample_shape(sampler.settings.learned_variance))
    shape = drawn_shape
    if decode is not None:
        shape = tuple(decode(torch.zeros(1, *drawn_shape, device=sampler.device)).shape[1:])
    if len(shape) != 3 or shape[0] not in CHANNELS:
        raise ValueError(f"samples have shape {list(shape)}, must be images [C, H, W] with 1, 3 or 4 channels")
    labels = None if class_labels is None else checks.labels(class_labels, count, None)
    step = max(1, DRAWN_AT_ONCE // (4 * max(math.prod(shape), math.prod(drawn_shape))))

    def pieces() -> Iterator[Tensor]:
        with images_bar(count, "sampling", enabled=progress) as advance:
            for start in range(0, count, step):
                rows = slice(start, min(start + step, count))
                images: Any = sampler.sample(
                    rows.stop - start,
                    seed=seed,
                    first_sample=start,
                    class_labels=None if labels is None else labels[rows],
                    progress=lambda done, total, rows=rows: advance(  # type: ignore[misc]  # a default is no argument
                        rows.start + (rows.stop - rows.start) * done // max(total, 1)
                    ),
                    **arguments,
                )
                images = images if decode is None else decode(images)
                if not bool(images.isfinite().all()):
                    raise ValueError(f"{name} draws images that are not finite, must not; try another dtype")
                piece = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)
                if keep is not None:
                    keep.append(piece)
                yield piece

    return ImageSet(name, count, (shape[0], shape[1], shape[2]), pieces, labels, drawn=True)


@contextmanager
def images_bar(count: int, description: str, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Draw a bar of `count` images; yield a function that is told how many are done."""
    start = time.perf_counter()
    with progress_bar(count, description, enabled=enabled) as bar:

        def advance(done: int) -> None:
            if done > bar.done:
                bar.text = f"{done / (time.perf_counter() - start):.1f} images/s"
                bar(done - bar.done)

        yield advance


def in_one_colour_space(a: ImageSet, b: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return two sets of equally many channels: grey images become coloured where the others are.

    Raises:
        ValueError: one has an opacity and the other has not.
    """
    if {a.shape[0], b.shape[0]} == {1, 3}:
        return a.in_colour(), b.in_colour()
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"{a.name} has {a.shape[0]} channels and {b.name} {b.shape[0]}, must have as many")
    return a, b
