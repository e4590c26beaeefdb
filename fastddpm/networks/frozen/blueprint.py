"""The description that freezing needs of one kind of U-Net: a `Blueprint` for each, listed in `frozen.kinds`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastddpm.networks.frozen.builder import Builder


class Embeddings(nn.Module, ABC):
    """A U-Net's time and label embeddings in float64, separate and before their activation.

    The projections of all blocks read `activate(time + label)`.

    Attributes:
        num_labels: labels are integers below this; None if they are not integers, or if there are no labels.
        reads_raw: whether projections read the embedding itself, appended to its activation.
    """

    num_labels: int | None = None
    reads_raw: bool = False

    @abstractmethod
    def of_time(self, t: Tensor) -> Tensor:
        """Return the embeddings [S, E] of timesteps int64 [S]."""

    def of_labels(self, labels: Tensor) -> Tensor:
        """Return the embeddings [N, E] of labels as the U-Net takes them, [N] or [N, E]."""
        raise NotImplementedError

    def activate(self, emb: Tensor) -> Tensor:
        """Return the input of the projections for embeddings [.., E]: their SiLU."""
        return F.silu(emb)


class Blueprint(ABC):
    """A U-Net of a kind that can be frozen.

    Attributes:
        name: the name of the kind in messages.
        builder: the class that turns the U-Net into instructions.
        unet: the module.
        in_channels, out_channels: of its input and of its output.
        optional_channels: how many of the first input channels may be left out, and are then zero.
        dims: 2, or 1 for sequences [N, C, L], which are computed as images of height 1.
        factor: heights and widths must be multiples of it.
        smallest_size: their minimum; None for `factor`.
        has_labels: whether it takes labels.
        sample_size: (height, width) of the images it is for.
        alone: whether a call of the U-Net with x, timesteps and labels computes what the frozen one does.
        foreign: whether its forward is from another package: the frozen one is then compared with it before use.
    """

    name: ClassVar[str]
    builder: ClassVar[type[Builder]]
    unet: nn.Module
    in_channels: int
    out_channels: int
    optional_channels: int = 0
    dims: int = 2
    factor: int
    smallest_size: int | None = None
    has_labels: bool
    sample_size: tuple[int, int] = (32, 32)
    alone: bool = True
    foreign: bool = False

    @abstractmethod
    def __init__(self, unet: Any) -> None:
        """Describe a U-Net that this kind `takes` and for which `why_not` returns None."""

    @staticmethod
    @abstractmethod
    def takes(model: object) -> bool:
        """Return whether a model is of this kind, by its class alone."""

    @staticmethod
    @abstractmethod
    def why_not(model: Any) -> str | None:
        """Return why a model that this kind `takes` cannot be frozen, or None. It runs before every call: be quick."""

    @staticmethod
    def edited(model: Any) -> str | None:
        """Return which setting of a layer differs from the model's config, or None. It runs once per model."""
        return None

    @abstractmethod
    def embeddings(self) -> Embeddings:
        """Return copies of the U-Net's embeddings, with the weights that it has now."""

    @abstractmethod
    def time_projections(self) -> tuple[Tensor, Tensor, dict[str, slice]]:
        """Join the projections of all blocks into one linear layer of the activated embedding, in float64.

        Returns:
            The weight [sum C, E], or [sum C, 2E] if `Embeddings.reads_raw`; the bias [sum C]; and the columns of every
            block by its name.
        """

    def call(self, x: Tensor, t: Tensor, labels: Tensor | None, **more: Tensor) -> Tensor:
        """Call the U-Net itself with x [N, C, H, W], t int64 [N], labels, and further inputs by name."""
        return self.unet(x, t, **more) if labels is None else self.unet(x, t, labels, **more)

    def check_labels(self, labels: Tensor, batch: int) -> None:
        """Raise ValueError unless labels have the shape and dtype that the U-Net takes."""
        if tuple(labels.shape) != (batch,):
            raise ValueError(f"class_labels have shape {tuple(labels.shape)}, must have {(batch,)}")
        if labels.dtype != torch.int64:
            raise ValueError(f"class_labels have dtype {labels.dtype}, must have torch.int64")

    def some_labels(self, batch: int, device: torch.device | str) -> Tensor | None:
        """Return labels that the U-Net takes, or None if it takes none."""
        return torch.zeros(batch, dtype=torch.int64, device=device) if self.has_labels else None
