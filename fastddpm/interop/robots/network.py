"""A policy's network as a model of `Sampler`: samples [N, C, L], and conditions that stay the same in every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastddpm.networks.frozen import FrozenUNet
from fastddpm.networks.network import BoundNetwork, UNetWrapper


class PolicyNetwork(UNetWrapper):
    """A network called as unet(x [N, L, C], t, **conditions), for samples [N, C, L].

    Attributes:
        unet: the network.
        conditions: of the call that runs, by name; `give` fills them.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.conditions: dict[str, Tensor] = {}
        self._known: dict[Any, Tensor] = {}

    def give(self, conditions: Mapping[str, Tensor | None], like: Tensor) -> None:
        """Copy the conditions [N, ...] of a call into memory that stays, in the dtype and on the device of `like`."""
        self.conditions = {}
        for name, value in conditions.items():
            if value is None:
                continue
            key = (name, tuple(value.shape), like.dtype, like.device)
            if key not in self._known:
                self._known[key] = like.new_empty(value.shape)
            self.conditions[name] = self._known[key].copy_(value)

    def to_freeze(self) -> nn.Module:
        return self.unet

    def bind_frozen(self, frozen: FrozenUNet, inputs: Tensor, timesteps: Tensor, labels: Tensor | None) -> BoundNetwork:
        return frozen.bind(inputs, timesteps, labels, self.conditions)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the prediction [N, C, L] for x [N, C, L] at t int64 [N]."""
        result: Tensor = self.unet(x.transpose(1, 2), t, **self.conditions)
        return result.transpose(1, 2)
