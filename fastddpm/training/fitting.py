"""Check that data and network match before training."""

from __future__ import annotations

import inspect
import logging
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from fastddpm.common.images import check_range
from fastddpm.interop.text_encoder import TEXT_ARGUMENT, text_width
from fastddpm.networks.network import is_text
from fastddpm.networks.unet.model import UNet
from fastddpm.training.data import Source
from fastddpm.training.objective import GaussianDiffusion
from fastddpm.training.order import Pick

_log = logging.getLogger(__name__)

LOOKED_AT = 64  # images without a value below 0 after which a warning says so
FAR = 2.0  # values beyond this have another range and do not merely overshoot [-1, 1]


def data_shape(diffusion: GaussianDiffusion) -> tuple[int, int, int] | None:
    """Return (C, H, W) of the data from the network's config; None if it does not say."""
    config = getattr(diffusion.unet, "config", None)
    size, channels = (getattr(config, name, None) for name in ("sample_size", "out_channels"))
    if size is None or channels is None:
        return None
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return channels // (2 if diffusion.variance_type == "learned_range" else 1), height, width


def takes_labels(unet: nn.Module) -> bool:
    """Return whether a network is class-conditional: by its config or, if it has none, by its parameters.

    guided-diffusion's networks always have the parameter `y`, and `num_classes` None where it must not be given.
    """
    config = getattr(unet, "config", None)
    if config is not None:
        return any(getattr(config, name, None) is not None for name in ("num_class_embeds", "class_embed_type"))
    if getattr(unet, "num_classes", 1) is None:
        return False
    return not {"class_labels", "classes", "y"}.isdisjoint(inspect.signature(unet.forward).parameters)


def takes_text(unet: nn.Module) -> bool:
    """Return whether a network takes embeddings of texts, as `encoder_hidden_states`."""
    return TEXT_ARGUMENT in inspect.signature(unet.forward).parameters


def check_network(diffusion: GaussianDiffusion) -> None:
    """Raise ValueError if a U-Net cannot run at the size that its config states."""
    unet, shape = diffusion.unet, data_shape(diffusion)
    if not isinstance(unet, UNet) or shape is None:
        return
    halvings = len(unet.config.block_out_channels) - 1
    for side in shape[1:]:
        if side % 2**halvings:
            raise ValueError(
                f"sample_size is {unet.config.sample_size}, must be divisible by {2**halvings}: the U-Net halves it "
                f"{halvings} times"
            )


def check_places(results: Path, data: str | None) -> None:
    """Raise ValueError if the results folder lies inside the training data."""
    if data is not None and results.resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(
            f"results_folder is {str(results)!r}, which is inside {data!r}, whose pictures are trained on: it must be "
            "elsewhere, so that samples do not come among them"
        )


def check_processes(train_batch_size: int, processes: int) -> None:
    """Raise ValueError if a batch cannot be split over the processes of a run."""
    if train_batch_size % processes:
        raise ValueError(
            f"train_batch_size is {train_batch_size}, must be divisible by the number of processes, {processes}"
        )


def check_guidance(diffusion: GaussianDiffusion, guidance_scale: float | None) -> None:
    """Raise ValueError if guidance is asked of a network without a null class, and without texts."""
    if guidance_scale is not None and diffusion.null_class is None and not takes_text(diffusion.unet):
        raise ValueError(f"guidance_scale is {guidance_scale}, must be None: the network has no null_class")


def check_source(source: Source, diffusion: GaussianDiffusion) -> tuple[int, ...]:
    """Return the shape of an image; check that the network fits the first images and all known labels.

    `BatchCheck` checks the later images.

    Raises:
        ValueError: there are fewer than two images, or they, their labels or their values do not fit.
    """
    if len(source) < 2:
        raise ValueError(f"data holds {len(source)} image{'' if len(source) == 1 else 's'}, must hold at least 2")
    images, labels = source.read([Pick(0, 0), Pick(1, 1)])
    shape = data_shape(diffusion)
    if shape is not None and tuple(images.shape[1:]) != shape:
        raise ValueError(f"data has images of {list(images.shape[1:])}, but the network is for {list(shape)}")
    if images.is_floating_point():
        check_range(images, "data")
    if takes_text(diffusion.unet):
        check_texts(labels, diffusion.unet)
    elif labels is not None and is_text(labels):
        raise ValueError(f"data has embeddings of texts, but the network is a {type(diffusion.unet).__name__}")
    elif takes_labels(diffusion.unet):
        check_labels(labels, diffusion.unet)
        check_labels(torch.tensor(source.labels, dtype=torch.int64), diffusion.unet)
    return tuple(images.shape[1:])


class BatchCheck:
    """Check that every batch of a run is like the first images.

    Attributes:
        labels: those that have been seen.
    """

    def __init__(self, shape: tuple[int, ...], images: int) -> None:
        self.labels: set[int] = set()
        self._shape, self._left, self._low = shape, min(images, LOOKED_AT), math.inf

    def __call__(self, images: Tensor, labels: Tensor | None) -> None:
        """Raise ValueError for another shape or range of values; the training step handles NaN."""
        if tuple(images.shape[1:]) != self._shape:
            raise ValueError(f"data has images of {list(self._shape)} and of {list(images.shape[1:])}, must have one")
        if labels is not None and not is_text(labels):
            self.labels.update(labels.tolist())
        if not images.is_floating_point():
            return
        low, high = (float(value) for value in torch.aminmax(images))
        if low < -FAR or high > FAR:
            raise ValueError(f"data has images with values from {low:g} to {high:g}, must be in [-1, 1], or uint8")
        if self._left > 0:
            self._left, self._low = self._left - len(images), min(self._low, low)
            if self._left <= 0 and self._low >= 0:
                _log.warning("data has images with no value below 0; they should cover [-1, 1], not [0, 1]")


def check_texts(texts: Tensor | None, unet: nn.Module) -> None:
    """Raise ValueError unless there are embeddings float [N, L, D] of the width that the network reads."""
    if texts is None or not is_text(texts):
        raise ValueError(
            f"data has {'no' if texts is None else 'labels, not'} embeddings of texts, which the network takes: name a "
            "text_encoder for a folder with captions, or use a Dataset of (image, embedding [L, D])"
        )
    if (width := text_width(unet)) not in (None, texts.shape[2]):
        raise ValueError(f"data has embeddings of width {texts.shape[2]}, but the network reads {width}")


def check_labels(labels: Tensor | None, unet: nn.Module) -> None:
    """Raise ValueError unless there are labels int64 [N] (on the CPU) that a class-conditional network knows."""
    if labels is None:
        raise ValueError(
            "data has no labels, but the network has classes: put pictures into a folder per class, or use a Dataset "
            "of (image, label)"
        )
    count = getattr(getattr(unet, "config", None), "num_class_embeds", None)
    if count is not None and len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= count):
        wrong = int(labels[(labels < 0) | (labels >= count)][0])
        raise ValueError(f"data has the label {wrong}, but the network knows 0 to {count - 1}")
