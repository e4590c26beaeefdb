"""Hold the arguments of a job in a form that can be sent to another process, and make its manifest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastddpm.common.images import MODES
from fastddpm.common.shards import KIND, SCHEMA, layout_of
from fastddpm.sampling.sampler import Sampler
from fastddpm.scale.drawing import Decode, Drawer, Source, drawn_shape, open_source, samples_at_once
from fastddpm.scale.identity import labels_identity, model_identity, sampler_identity, versions
from fastddpm.scale.places import Place
from fastddpm.scale.worker import Worker, labels_from


@dataclass(eq=False)
class Recipe:
    """The arguments of `sample_shards` about samples and shards.

    Attributes:
        source: of the sampler.
        num_samples, shard_size, format, seed, class_labels, shape, batch_size: see `sample_shards`.
    """

    source: Source
    num_samples: int
    shard_size: int
    format: str
    seed: int
    class_labels: Any
    shape: tuple[int, ...] | None
    batch_size: int | str | None
    _opened: tuple[Sampler, Decode | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the loaded model: every process loads its own."""
        return {**vars(self), "_opened": None}

    def open(self) -> tuple[Sampler, Decode | None]:
        """Return the sampler and the decoder of its samples, loaded once."""
        if self._opened is None:
            self._opened = open_source(self.source)
        return self._opened

    def labels(self) -> np.ndarray | None:
        """Return the label of every sample, int64 [num_samples]."""
        return labels_from(self.class_labels, self.num_samples)

    def manifest(self) -> dict[str, Any]:
        """Return the manifest: everything that decides the bytes of the shards.

        Raises:
            ValueError, TypeError: the format cannot hold such samples; or as `open_source` and `model_identity`.
        """
        sampler, decode = self.open()
        shape = drawn_shape(sampler, decode, self.shape)
        pixels = len(shape) == 3 and shape[0] in MODES
        if not pixels and self.format != "npz":
            raise ValueError(f"format is {self.format!r} but samples have shape {list(shape)}, must be 'npz'")
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "model": model_identity(sampler.model, sampler.config),
            "seed": self.seed,
            "num_samples": self.num_samples,
            "shard_size": self.shard_size,
            "ranges": -(-self.num_samples // self.shard_size),
            "format": self.format,
            "class_labels": labels_identity(self.labels()),
            "sample": {
                "shape": [*shape[1:], shape[0]] if pixels else list(shape),
                "dtype": "uint8" if pixels else "float32",
            },
            "sampler": sampler_identity(sampler),
            "batch_size": samples_at_once(self.batch_size, sampler.device),
            "versions": versions(),
        }

    def worker(self, place: Place, content: bytes, present: set[str]) -> Worker:
        """Return a worker that settles ranges; `content` is the manifest of the place, `present` the names in it."""
        manifest = json.loads(content)
        sampler, decode = self.open()
        drawer = Drawer(
            sampler, decode, self.seed, self.labels(), manifest["batch_size"],
            manifest["sample"]["dtype"] == "uint8", self.shape,
        )  # fmt: skip
        return Worker(place, layout_of(manifest, content), drawer, present)


def to_bytes(manifest: dict[str, Any]) -> bytes:
    """Return a manifest as the bytes of its file."""
    return (json.dumps(manifest, indent=2) + "\n").encode()
