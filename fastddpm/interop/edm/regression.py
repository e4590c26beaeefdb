"""CorrDiff's regression, called as before, with its U-Net prepared for sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm.interop.edm.accelerated import Accelerated, Options
from fastddpm.interop.edm.network import EDMNetwork, with_positions
from fastddpm.networks.network import Network


class AcceleratedRegression(Accelerated):
    """CorrDiff's regression: a function of (x, img_lr), with the U-Net prepared."""

    methods = ("forward",)

    def __init__(self, net: Any, options: Options) -> None:
        super().__init__(net, options)
        self._network: Network | None = None
        self._made_of: tuple[object, ...] = ()
        self._bound: dict[tuple[int, ...], tuple[Tensor, Any]] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        return self.forward(*arguments, **named)

    @torch.no_grad()
    def forward(
        self, x: Tensor, img_lr: Tensor | None = None, force_fp32: bool = False, lead_time_label: Tensor | None = None
    ) -> Tensor:
        """Return the regression, float32 [N, C, H, W].

        Args:
            x: [N, C, H, W], zeros as a rule.
            img_lr: [N, C', H, W].
            force_fp32: kept for the library's signature; the precision is that of `accelerate`.
            lead_time_label: integers [N], for networks with lead times.

        Raises:
            ValueError: an argument is of the wrong shape.
        """
        wide = x if img_lr is None else torch.cat([x.float(), img_lr.float()], dim=1)
        whole: Tensor = with_positions(self.net, wide, tuple(x.shape), lead_time_label)
        with self._lock:
            network = self._prepared()
            reads = EDMNetwork(self.net).config.in_channels
            if whole.ndim != 4 or whole.shape[1] != reads:
                raise ValueError(f"x and img_lr have {whole.shape[1]} channels with positions, must have {reads}")
            shape = tuple(whole.shape)
            if shape not in self._bound:
                inputs = network.new_input(shape)
                program = network.bind(inputs, torch.zeros(1, device=network.device), None)
                self._bound = {shape: (inputs, program)}
            inputs, program = self._bound[shape]
            inputs.copy_(whole)
            with network.evaluating():
                program.load()
                out: Tensor = program(torch.zeros(1, dtype=torch.int64, device=network.device))
            return out.to(x.device, torch.float32, copy=True).contiguous()

    def _prepared(self) -> Network:
        now = self._identity()
        if self._network is None or now != self._made_of:
            self._bound = {}
            dtype = self._dtype()
            self._network = Network(
                EDMNetwork(self.net), self._device, dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype),
                self.options.backend, freeze=True,
            )  # fmt: skip
            self._tell(self._network)
            self._made_of = now
        return self._network

    def check(self) -> None:
        """Prepare the network."""
        self._prepared()
