"""A policy's network as a model of `Sampler`: it takes samples [N, C, L] in place of [N, L, C]."""

from __future__ import annotations

from torch import Tensor, nn

from fastddpm.networks.network import UNetWrapper


class PolicyNetwork(UNetWrapper):
    """A network called as unet(x [N, L, C], t, **conditions)."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def to_freeze(self) -> nn.Module:
        return self.unet

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """Return the prediction [N, C, L] for x [N, C, L] at t int64 [N]."""
        result: Tensor = self.unet(x.transpose(1, 2), t, **conditions)
        return result.transpose(1, 2)
