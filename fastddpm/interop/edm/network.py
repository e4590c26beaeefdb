"""The U-Net inside a preconditioner, as `Sampler` calls it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.interop.edm.preconditioning import REGRESSIONS, kind_of
from fastddpm.networks.frozen import blueprint_of
from fastddpm.networks.frozen.kinds.edm.blueprint import EDMBlueprint
from fastddpm.networks.frozen.kinds.edm.parts import positions
from fastddpm.networks.network import UNetWrapper


class EDMNetwork(UNetWrapper):
    """The network F of a preconditioner: [state, condition, positions] and c_noise in, its first channels out.

    Attributes:
        config: what `Sampler` reads of a model.
        condition_channels: how many channels of a condition it reads beside the state, without the positions.
        has_positions: whether it reads positional embeddings, which fix the size of its samples.
        factor: heights and widths must be multiples of it; None if it is not known.
        doubled: whether its output has a second half of channels, which is not used.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.model: Any = net.model
        blueprint = blueprint_of(self.model)
        self._blueprint = EDMBlueprint(self.model) if blueprint is EDMBlueprint else None
        labels = 0 if kind_of(net) in REGRESSIONS else int(getattr(net, "label_dim", 0) or 0)
        self.factor = self._blueprint.factor if self._blueprint else None
        self.doubled = kind_of(net) == "iDDPMPrecond"
        channels = channels_of(net)
        reads = self._blueprint.in_channels if self._blueprint else getattr(net, "img_in_channels", 0) + channels
        found = [getattr(self.model, name, None) for name in ("pos_embd", "lt_embd")] if self._blueprint else []
        self.has_positions = any(part is not None for part in found)
        self.condition_channels = reads - channels - sum(part.shape[-3] for part in found if part is not None)
        self.config = SimpleNamespace(
            in_channels=reads, num_class_embeds=None, class_embed_type="identity" if labels else None,
            embedding_channels=labels,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Return F for the whole input x [N, C, H, W], c_noise [N] and labels [N, L]."""
        if self._blueprint is not None:
            return self._blueprint.call(x, t, class_labels)
        out: Tensor = self.model(x, t.to(x.dtype), class_labels=class_labels)
        return out

    def to_freeze(self) -> nn.Module | None:
        model: nn.Module = self.model
        return model


def channels_of(net: Any) -> int:
    """Return the number of channels of a preconditioner's samples."""
    for name in ("img_out_channels", "img_channels"):
        if (found := getattr(net, name, None)) is not None:
            return int(found)
    blueprint = blueprint_of(net.model)
    if blueprint is EDMBlueprint:
        return EDMBlueprint(net.model).out_channels
    raise ValueError(f"net is a {type(net).__name__} of a {type(net.model).__name__}, must tell img_out_channels")


def with_positions(net: Any, condition: Tensor | None, shape: tuple[int, ...], lead_time_label: Tensor | None) -> Any:
    """Return the channels that the network reads beside the state [N, C, H, W], or None.

    Raises:
        ValueError: the positions are of another size, or a lead time is missing or not taken.
    """
    known = blueprint_of(net.model) is EDMBlueprint
    found = positions(net.model, lead_time_label) if known else None
    if found is None:
        return condition
    if found.shape[2:] != shape[2:]:
        raise ValueError(
            f"latents are {shape[2]}x{shape[3]} but the network's positional embeddings are "
            f"{found.shape[2]}x{found.shape[3]}, must be equal"
        )
    found = found.to(torch.float32).expand(shape[0], -1, -1, -1)
    return found if condition is None else torch.cat([condition, found.to(condition)], dim=1)
