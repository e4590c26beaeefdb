"""The description that freezing needs of one kind of U-Net: a `Blueprint` for each, listed in `frozen.kinds`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastddpm.networks.frozen.builder import Builder


@dataclass(frozen=True)
class Condition:
    """One of the tensors that a call gives besides x, timesteps and labels, as a rule the same at every step.

    Attributes:
        shape: after the number of samples; None for a size that the call chooses.
        optional: whether a call may leave it out.
        integers: whether its values are integers or truth values; else floating-point numbers. None: they may be both.
        each_step: whether only steps read it, so that its values may change without a `load`.
    """

    shape: tuple[int | None, ...]
    optional: bool = False
    integers: bool | None = False
    each_step: bool = False


class Embeddings(nn.Module, ABC):
    """A U-Net's embeddings of time, labels and conditions in float64, separate and before their activation.

    The projections of all blocks read `activate(time + label + conditions)`.

    Attributes:
        num_labels: labels are integers below this; None if they are not integers, or if there are no labels.
        reads_raw: whether projections read the embedding itself, appended to its activation.
        conditions: the names of the conditions that are embedded; of those that a call gives, `of_conditions` gets all.
        width: E, where it is not what the projections read.
        separates: whether time fills other columns than labels and conditions, so that activations of the two add up.
            Then only a sum is left for a step; else all that is inside the activation is computed per step and sample.
    """

    num_labels: int | None = None
    reads_raw: bool = False
    conditions: tuple[str, ...] = ()
    width: int | None = None
    separates: bool = False

    @abstractmethod
    def of_time(self, t: Tensor) -> Tensor:
        """Return the embeddings [S, E] of timesteps int64 [S]."""

    def of_labels(self, labels: Tensor) -> Tensor:
        """Return the embeddings [N, E] of labels as the U-Net takes them, [N] or [N, E]."""
        raise NotImplementedError

    def of_conditions(self, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the embeddings [N, E] of the named conditions [N, ...], which are all or some of `conditions`."""
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
        factor: heights and widths must be multiples of it, unless `any_size`.
        any_size: whether the U-Net takes sizes that the factor does not divide.
        smallest_size: their minimum; None for `factor`.
        has_labels: whether it takes labels.
        conditions: what a call takes besides x, timesteps and labels, by the names of the U-Net's own arguments.
        sample_size: (height, width) of the images it is for.
        alone: whether a call of the U-Net with x, timesteps and labels computes what the frozen one does.
        pairs: whether native kernels in bfloat16 take only even numbers of channels.
        releases: whether its builder calls `Builder.done`, so that weights can be released.
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
    any_size: bool = False
    smallest_size: int | None = None
    has_labels: bool
    conditions: Mapping[str, Condition] = MappingProxyType({})
    sample_size: tuple[int, int] = (32, 32)
    alone: bool = True
    pairs: bool = True
    releases: bool = False
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
        """Call the U-Net itself with x [N, C, H, W], t int64 [N], labels, conditions and further inputs by name."""
        return self.unet(x, t, **more) if labels is None else self.unet(x, t, labels, **more)

    def check_labels(self, labels: Tensor, batch: int) -> None:
        """Raise ValueError unless labels have the shape and dtype that the U-Net takes."""
        if tuple(labels.shape) != (batch,):
            raise ValueError(f"class_labels have shape {tuple(labels.shape)}, must have {(batch,)}")
        if labels.dtype != torch.int64:
            raise ValueError(f"class_labels have dtype {labels.dtype}, must have torch.int64")

    def check_conditions(self, conditions: Mapping[str, Tensor], batch: int) -> None:
        """Raise ValueError unless conditions are those that the U-Net takes, for `batch` samples."""
        for name in conditions:
            if name not in self.conditions:
                takes = ", ".join(self.conditions) or "none"
                raise ValueError(f"{name} is given, but this U-Net does not take it; it takes {takes}")
        for name, known in self.conditions.items():
            given = conditions.get(name)
            if given is None:
                if not known.optional:
                    raise ValueError(f"{name} is missing, but this U-Net takes it")
                continue
            sizes = (batch, *known.shape)
            fits = given.ndim == len(sizes) and all(
                size in (None, own) for size, own in zip(sizes, given.shape, strict=True)
            )
            if not fits:
                wanted = ", ".join("any" if size is None else str(size) for size in sizes)
                raise ValueError(f"{name} has shape {tuple(given.shape)}, must have ({wanted})")
            if known.integers is not None and given.is_floating_point() == known.integers:
                kind = "integers" if known.integers else "floating-point numbers"
                raise ValueError(f"{name} has dtype {given.dtype}, must hold {kind}")

    def some_conditions(
        self, batch: int, device: torch.device | str, dtype: torch.dtype = torch.float32, *, optional: bool = False
    ) -> dict[str, Tensor]:
        """Return conditions that the U-Net takes, with three entries where a size is free; `optional` ones if asked."""
        some: dict[str, Tensor] = {}
        for name, known in self.conditions.items():
            if optional or not known.optional:
                shape = (batch, *(3 if size is None else size for size in known.shape))
                values = torch.arange(math.prod(shape), device=device).view(shape)
                some[name] = values % 2 if known.integers is not False else values.to(dtype).sin()
        return some

    def some_labels(self, batch: int, device: torch.device | str) -> Tensor | None:
        """Return labels that the U-Net takes, or None if it takes none."""
        return torch.zeros(batch, dtype=torch.int64, device=device) if self.has_labels else None
