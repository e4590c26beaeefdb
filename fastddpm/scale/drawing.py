"""Draw the samples of a range, so that sample k depends on the model, the seed and k alone."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.common.images import to_uint8
from fastddpm.common.shards import Samples
from fastddpm.interop.pretrained import Pretrained, load_pretrained
from fastddpm.sampling.memory import is_out_of_memory, release_memory
from fastddpm.sampling.sampler import Sampler

Decode = Callable[[Tensor], Tensor]
Source = Sampler | Pretrained | str | os.PathLike[str] | Callable[[], Any]
AT_ONCE = {"cuda": 64}  # below 64 a GPU is idle
AT_ONCE_ELSEWHERE = 16
_STEP = re.compile(r"since (step \d+ of \d+ \(timestep -?\d+\))")
_log = logging.getLogger(__name__)


class NotFinite(Exception):
    """Some samples of a range are not finite.

    Attributes:
        samples: their indices.
        step: the step at which the first one ceased to be finite, in words, or None.
    """

    def __init__(self, samples: list[int], step: str | None) -> None:
        few = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
        since = f", sample {samples[0]} since {step}" if step else ""
        super().__init__(f"{len(samples)} samples are not finite ({few}){since}")
        self.samples, self.step = samples, step


def open_source(source: Source) -> tuple[Sampler, Decode | None]:
    """Return the sampler that `source` is, has or makes, and the decoder of its samples, or None.

    Raises:
        TypeError: it is none of these.
        others: as `load_pretrained`, or as the function that is called.
    """
    made: Any = source
    if isinstance(made, str | os.PathLike):
        made = load_pretrained(made)
    elif not isinstance(made, Sampler | Pretrained | torch.nn.Module) and callable(made):
        made = made()
    if isinstance(made, Pretrained):
        return made.sampler(), made.decode if made.decoder is not None else None
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Sampler):
        return made
    if isinstance(made, Sampler):
        return made, None
    raise TypeError(
        f"model is a {type(made).__name__}, must be a Sampler, a Pretrained, the path of a model, or a function that "
        "returns one of them"
    )


def samples_at_once(asked: int | str | None, device: torch.device) -> int:
    """Return the number of samples per pass through the network; "auto" and None let the device decide."""
    return asked if isinstance(asked, int) else AT_ONCE.get(device.type, AT_ONCE_ELSEWHERE)


@dataclass(eq=False)
class Drawer:
    """Draws samples by their indices.

    Every pass through the network has the same number of samples; the last pass of a range is padded with samples that
    are dropped. Libraries choose an algorithm, and so the rounding, by the batch.

    Attributes:
        sampler, decode: draws samples, and makes images if samples are latents.
        seed: of all samples.
        labels: int64 [num_samples], or None.
        at_once: samples of a pass; halved when memory runs out.
        pixels: whether samples are stored as 8-bit images, else as float32.
        shape: of a sample, if the model does not state it.
    """

    sampler: Sampler
    decode: Decode | None
    seed: int
    labels: np.ndarray | None
    at_once: int
    pixels: bool
    shape: tuple[int, ...] | None = None

    def draw(self, first: int, end: int) -> Samples:
        """Return the samples from `first` up to, not including, `end`.

        Raises:
            NotFinite: some of them are not finite.
            torch.OutOfMemoryError: not even one sample fits.
        """
        parts: list[np.ndarray] = []
        bad: list[int] = []
        step: str | None = None
        done = first
        while done < end:
            try:
                values, found = self._pass(done)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.at_once == 1:
                    first_line = (str(error) or type(error).__name__).splitlines()[0]
                    raise torch.OutOfMemoryError(f"not enough memory for one sample at a time: {first_line}") from None
            else:
                values = values[: end - done]
                wrong = (~values.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
                if wrong and not bad:
                    step = found
                bad += [done + place for place in wrong]
                if not bad:
                    parts.append(to_uint8(values) if self.pixels else values.float().cpu().numpy())
                done += len(values)
                continue
            release_memory()
            self.at_once //= 2
            _log.warning("memory ran out: %d samples at once from here on, whose last digits may differ", self.at_once)
        if bad:
            raise NotFinite(bad, step)
        return Samples(np.concatenate(parts), None if self.labels is None else self.labels[first:end])

    def _pass(self, first: int) -> tuple[Tensor, str | None]:
        """Return `at_once` samples from `first` on, and the step at which the first wrong one became so."""
        labels = None
        if self.labels is not None:
            places = np.minimum(np.arange(first, first + self.at_once), len(self.labels) - 1)
            labels = torch.from_numpy(self.labels[places])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values = self.sampler.sample(
                self.at_once, seed=self.seed, first_sample=first, class_labels=labels, batch_size=self.at_once,
                shape=self.shape,
            )  # fmt: skip
        step = None
        for each in caught:
            if match := _STEP.search(str(each.message)):
                step = match[1]
            elif "not finite" not in str(each.message):
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        return values if self.decode is None else self.decode(values), step


def drawn_shape(sampler: Sampler, decode: Decode | None, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the shape of a decoded sample; `shape` is that before decoding, if the model does not state it."""
    drawn = shape or tuple(sampler.network.sample_shape(sampler.settings.learned_variance))
    if decode is None:
        return drawn
    return tuple(decode(torch.zeros(1, *drawn, device=sampler.device)).shape[1:])
