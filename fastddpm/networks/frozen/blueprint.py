"""What freezing has to know of one kind of U-Net: a `Blueprint` for each.

`frozen.BLUEPRINTS` lists them. All else in this package knows nothing but this interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastddpm.networks.frozen.builder import Builder
    from fastddpm.networks.frozen.frozen_unet import FrozenUNet
    from fastddpm.networks.frozen.instructions import Machine

_METHODS: dict[type, frozenset[str]] = {}


class Embeddings(nn.Module, ABC):
    """A U-Net's time and label embeddings in float64, apart from each other and before their activation.

    What the projections of all blocks read is the SiLU of the sum of both.

    Attributes:
        num_labels: labels are integers below this; None where they are not, or where there are none.
    """

    num_labels: int | None = None

    @abstractmethod
    def of_time(self, t: Tensor) -> Tensor:
        """Timesteps int64 [S] -> [S, E]."""

    def of_labels(self, labels: Tensor) -> Tensor:
        """Labels, of the kind that the U-Net takes, [N] or [N, E] -> [N, E]."""
        raise NotImplementedError


class Blueprint(ABC):
    """A U-Net of a kind that can be frozen.

    Attributes:
        unet: the module.
        in_channels, out_channels: of its input and of its output.
        optional_channels: the first channels of its input that may be left out, and are then zero.
        factor: heights and widths must be multiples of it.
        has_labels: whether it takes labels.
        sample_size: (height, width) that it is said to be for.
        alone: whether a call of the U-Net with x, timesteps and labels is what the frozen one computes.
        foreign: whether the forward of the U-Net is another package's, so that it may be another one than was lowered.
    """

    unet: nn.Module
    in_channels: int
    out_channels: int
    optional_channels: int = 0
    factor: int
    has_labels: bool
    sample_size: tuple[int, int] = (32, 32)
    alone: bool = True
    foreign: bool = False

    @staticmethod
    @abstractmethod
    def takes(model: object) -> bool:
        """Whether a model is of this kind, by its class alone."""

    @staticmethod
    @abstractmethod
    def why_not(model: Any) -> str | None:
        """Why a model that this kind `takes` cannot be frozen, or None."""

    @abstractmethod
    def __init__(self, unet: Any) -> None:
        """Of a model that this kind `takes`, and for which `why_not` has no reason."""

    @abstractmethod
    def embeddings(self) -> Embeddings:
        """Copies of the U-Net's embeddings, with the weights that it has now."""

    @abstractmethod
    def time_projections(self) -> tuple[Tensor, Tensor, dict[str, slice]]:
        """The projections of all blocks as one linear layer of the embedding's SiLU, in float64.

        Returns:
            weight [sum C, E], bias [sum C], and the columns of every block by its name.
        """

    @abstractmethod
    def lower(
        self, frozen: FrozenUNet, machine: Machine, row: Tensor, batch: int, size: tuple[int, int], in_channels: int
    ) -> tuple[Builder, int]:
        """The instructions of the whole U-Net (see `Builder` for the arguments), and the slot of its output."""

    def call(self, x: Tensor, t: Tensor, labels: Tensor | None, **more: Tensor) -> Tensor:
        """What the U-Net itself gives for x [N, C, H, W], t int64 [N], labels and what it takes by name."""
        return self.unet(x, t, **more) if labels is None else self.unet(x, t, labels, **more)

    def check_labels(self, labels: Tensor, batch: int) -> None:
        """Raises ValueError unless labels of this shape and dtype are what the U-Net takes."""
        if tuple(labels.shape) != (batch,):
            raise ValueError(f"class_labels have shape {tuple(labels.shape)}, must have {(batch,)}")
        if labels.dtype != torch.int64:
            raise ValueError(f"class_labels have dtype {labels.dtype}, must have torch.int64")

    def some_labels(self, batch: int, device: torch.device | str) -> Tensor | None:
        """Labels of the kind that the U-Net takes, if it does."""
        return torch.zeros(batch, dtype=torch.int64, device=device) if self.has_labels else None


def why_not_layers(model: nn.Module, known: Callable[[type], bool]) -> str | None:
    """The first layer of a model that is not `known`, or whose calls are not those of its class; or None."""
    for name, module in model.named_modules():
        if not known(type(module)):
            return f"its layer {name} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"its layer {name or 'forward'} has hooks"
        if replaced := vars(module).keys() & _methods(type(module)):
            return f"its {'.'.join(filter(None, (name, min(replaced))))} has been replaced"
    return None


def _methods(kind: type) -> frozenset[str]:
    if kind not in _METHODS:
        _METHODS[kind] = frozenset(name for name in dir(kind) if callable(getattr(kind, name)))
    return _METHODS[kind]
