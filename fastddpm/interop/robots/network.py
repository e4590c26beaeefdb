"""A policy's network as a model of `Sampler`: it takes samples [N, C, L] in place of [N, L, C]."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fastddpm.networks.frozen import FrozenUNet
from fastddpm.networks.network import BoundNetwork, UNetWrapper


class PolicyNetwork(UNetWrapper):
    """A network called as unet(x [N, L, C], t, **conditions)."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def to_freeze(self) -> nn.Module:
        return self.unet

    def bind_frozen(
        self,
        frozen: FrozenUNet,
        inputs: Tensor,
        timesteps: Tensor,
        labels: Tensor | None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> BoundNetwork:
        return frozen.bind(inputs, timesteps, labels, conditions)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """Return the prediction [N, C, L] for x [N, C, L] at t int64 [N]."""
        result: Tensor = self.unet(x.transpose(1, 2), t, **conditions)
        return result.transpose(1, 2)
