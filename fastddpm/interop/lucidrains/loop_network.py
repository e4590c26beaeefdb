"""Let a diffusion's own loop call the network of a sampler."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastddpm.interop.lucidrains.models import GuidedProgram
from fastddpm.networks.comparing import evaluating
from fastddpm.networks.frozen import FrozenUNet, Program
from fastddpm.networks.network import Network
from fastddpm.sampling.sampler import Sampler


class LoopNetwork(nn.Module):
    """Stand in for `diffusion.model` in one call of a loop of the library, or of a class derived from it.

    A frozen network takes one timestep for all samples, as these loops pass it. The original computes all other calls.

    Args:
        model: the original, which provides the other attributes.
        sampler: holds the network that runs instead.
        num_timesteps: all timesteps are less than this.
    """

    def __init__(self, model: nn.Module, sampler: Sampler, num_timesteps: int) -> None:
        super().__init__()
        self.original, self._sampler = model, sampler
        self._timesteps = torch.arange(num_timesteps, device=sampler.device)
        self._bound: dict[tuple[int, ...], tuple[Tensor, Tensor | None, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    def forward(self, x: Tensor, time: Tensor, *more: Any, **named: Any) -> Tensor:
        """Return the prediction of the original network."""
        network, condition = self._sampler.network, more[0] if more else named.get("x_self_cond")
        known = len(more) + len(named) <= 1 and named.keys() <= {"x_self_cond"} and self._at_one_time(time)
        if network.frozen is None or not known or network.frozen.blueprint.has_labels:
            model = self.original if network.frozen is not None else self._sampler.model.model  # type: ignore[attr-defined]
            given, by_name = tree_map(partial(_moved, network), ((x, time, *more), named))
            with evaluating(model):
                return _like(x, model(*given, **by_name))
        inputs, _, program = self._program(network.frozen, x)
        if inputs.shape[1] != x.shape[1]:
            first, last = inputs.split([inputs.shape[1] - x.shape[1], x.shape[1]], dim=1)
            first.zero_() if condition is None else first.copy_(condition)
            last.copy_(x)
        else:
            inputs.copy_(x)
        return _like(x, program(time[:1].to(inputs.device)))

    def forward_with_cond_scale(
        self, x: Tensor, time: Tensor, classes: Tensor, *, cond_scale: float = 1.0, rescaled_phi: float = 0.0,
        **named: Any,
    ) -> Any:  # fmt: skip
        """Return the guided and the unconditional prediction, like the original of classifier-free guidance."""
        predictor: Any = self._sampler.model
        if named or cond_scale == 1 or not self._at_one_time(time):
            arguments = {"cond_scale": cond_scale, "rescaled_phi": rescaled_phi, **named}
            with evaluating(self.original):
                return self.original.forward_with_cond_scale(x, time, classes, **arguments)  # type: ignore[operator]
        predictor.set_scales(cond_scale, rescaled_phi)
        network = self._sampler.network
        if network.frozen is None:
            device, dtype = network.device, network.dtype
            with network.evaluating():
                halves = predictor.halves(x.to(device, dtype), time.to(device), classes.to(device))
        else:
            inputs, labels, program = self._program(network.frozen, x, classes)
            inputs.copy_(x)
            if labels is not None and not torch.equal(labels, classes.to(labels)):
                labels.copy_(classes)
                program.load()
            halves = program.halves(time[:1].to(inputs.device))
        return _like(x, predictor.combine(*halves)), _like(x, halves[1])

    def _at_one_time(self, time: Tensor) -> bool:
        """Return whether all samples are at one timestep of the diffusion."""
        if not isinstance(time, Tensor) or time.dtype != torch.int64 or time.ndim != 1 or not len(time):
            return False
        first = int(time[0])
        return 0 <= first < len(self._timesteps) and bool((time == first).all())

    def _program(self, frozen: FrozenUNet, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Any, Any]:
        """Return the buffers for inputs of x's shape, and the program that runs on them."""
        shape = tuple(x.shape)
        if shape not in self._bound:
            inputs, labels = frozen.new_input((len(x), frozen.blueprint.in_channels, *shape[2:])), None
            program: Program | GuidedProgram
            if classes is None:
                program = frozen.bind(inputs, self._timesteps)
            else:
                labels = classes.to(frozen.device, copy=True)
                predictor: Any = self._sampler.model
                program = GuidedProgram(predictor, frozen, inputs, self._timesteps, labels)
            program.load()
            self._bound[shape] = inputs, labels, program
        return self._bound[shape]


def _like(x: Tensor, out: Tensor) -> Tensor:
    """Return a copy in x's dtype on its device; contiguous, since `randn_like` fills memory in the order of strides."""
    return out.to(x).clone(memory_format=torch.contiguous_format)


def _moved(network: Network, value: Any) -> Any:
    """Move a tensor to the device and dtype of a network that is not frozen; return other values unchanged."""
    if not isinstance(value, Tensor) or network.frozen is not None:
        return value
    return value.to(network.device, network.dtype if value.is_floating_point() else None)
