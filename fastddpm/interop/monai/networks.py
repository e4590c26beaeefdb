"""MONAI's networks as fastddpm runs them: frozen in two dimensions, with fused layers in three."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.interop.fusing import Fused, fuse
from fastddpm.networks.comparing import difference, evaluating, some_noise
from fastddpm.networks.frozen import FrozenUNet
from fastddpm.networks.frozen.kinds.monai.blueprint import MonaiBlueprint
from fastddpm.networks.network import Network
from fastddpm.process.tables import StepTable
from fastddpm.sampling.memory import free_memory
from fastddpm.sampling.sampler import Sampler

_log = logging.getLogger(__name__)

_ATTENTIONS = ("SABlock", "CrossAttentionBlock")


@dataclass(frozen=True)
class Options:
    """How networks are run; see `accelerate`."""

    allow_general: bool = True
    noise: str = "torch"
    dtype: torch.dtype | str | None = None
    device: torch.device | str | None = None
    backend: str = "auto"
    cuda_graph: str | bool = "auto"
    fuse: bool = True


class Prepared:
    """A network as it runs: prepared for sampling, or a copy with fused layers that shares its parameters.

    Attributes:
        network: what runs in MONAI's own loops.
    """

    def __init__(self, model: Any, options: Options) -> None:
        self._model, self._options, self._made_of = model, options, _identity(model)
        self._fused: Any = None
        self._samplers: dict[float | None, Sampler] = {}
        self._runs = model
        if MonaiBlueprint.why_not(model) is not None or options.backend == "reference":
            self._runs = self.fused
        dtype = options.dtype if isinstance(options.dtype, torch.dtype) or options.dtype is None else None
        self.network = Network(self._runs, options.device, dtype, options.backend, freeze=True)

    def fits(self, model: Any) -> bool:
        """Return whether a network is still what this was made from."""
        frozen = self.network.frozen is not None
        return _identity(model) == self._made_of and not (frozen and MonaiBlueprint.why_not(model))

    @property
    def fused(self) -> Any:
        """The network with fused layers, or itself if `fuse` is False."""
        if not self._options.fuse:
            return self._model
        if self._fused is None:
            self._fused, what = with_fused_layers(self._model, self._options.backend)
            _log.info("the network, a %s, runs as it is: %s", type(self._model).__name__, what)
        return self._fused

    def sampler(self, table: StepTable, clip: float | None) -> Sampler:
        """Return the sampler that clips x0 to [-clip, clip], or does not."""
        if clip not in self._samplers:
            options = self._options
            self._samplers[clip] = Sampler(
                self._runs, table, clip_sample=clip is not None, clip_sample_range=1.0 if clip is None else clip,
                dtype=options.dtype, device=options.device, backend=options.backend, cuda_graph=options.cuda_graph,
            )  # fmt: skip
        return self._samplers[clip]


def _identity(model: Any) -> tuple[object, ...]:
    tensors = itertools.chain(model.parameters(), model.buffers())
    return (id(model), *((id(tensor), tensor.dtype, tensor.device) for tensor in tensors))


def _takes_sdpa(layer: Any) -> bool:
    """Return whether an attention computes the same by torch's function, which would apply a dropout always."""
    plain = layer.dropout_rate == 0 and layer.attention_dtype is None and not layer.save_attn
    return plain and layer.rel_positional_embedding is None and not layer.causal


def with_fused_layers(model: Any, backend: str = "auto") -> tuple[Any, str]:
    """Return a copy of a network that shares its parameters, and what has been fused in it.

    A norm and its SiLU become one kernel, and attention is computed without its matrix of weights, by torch's
    `scaled_dot_product_attention`, where MONAI would do that with `use_flash_attention`.

    Raises:
        ValueError: the copy computes something else than the network.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    copied = copy.deepcopy(model, shared)
    attentions = [layer for layer in copied.modules() if type(layer).__name__ in _ATTENTIONS and _takes_sdpa(layer)]
    for layer in attentions:
        layer.use_flash_attention = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is nothing to fuse
        fused: Fused = fuse(copied, backend=backend, inplace=True)
    first, sizes = next(model.parameters()), [2 * factor_of(model)] * dims_of(model)
    x, t = some_noise((model.in_channels, *sizes), first), torch.tensor([500.0], device=first.device)
    named = some_arguments(model, first)
    with evaluating(model), evaluating(copied):
        found = difference(model(x, t, **named), copied(x, t, **named), first.dtype)
    if found is not None:
        raise ValueError(f"diffusion_model with fused layers {found}, must equal the network; fuse=False leaves them")
    norms = sum(norm.fused for norm in fused.norms)
    return copied, f"{norms} of {len(fused.norms)} norms and {len(attentions)} attentions are fused"


def some_arguments(model: Any, first: Tensor) -> dict[str, Tensor]:
    """Return a context and labels that a network takes, for one sample."""
    named: dict[str, Tensor] = {}
    for layer in model.modules():
        if type(layer).__name__ == "CrossAttentionBlock":
            named["context"] = some_noise((2, layer.to_k.in_features), first)
    if model.num_class_embeds is not None:
        named["class_labels"] = torch.zeros(1, dtype=torch.int64, device=first.device)
    return named


def dims_of(model: Any) -> int:
    """Return the number of spatial dimensions of a network's samples."""
    return int(model.conv_in.spatial_dims)


def factor_of(model: Any) -> int:
    """Return what the sizes of a network's samples must be multiples of."""
    return int(2 ** (len(model.block_out_channels) - 1))


def check_sizes(model: Any, shape: tuple[int, ...], guided: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Raise an error unless samples of a shape suit a network, and what a step must keep fits into memory.

    That is at least the results of its encoder, which wait for the decoder.

    Raises:
        ValueError: the sizes are not multiples of the network's factor.
        torch.OutOfMemoryError: there is not enough memory; the message has the sizes and the bytes.
    """
    dims, factor = dims_of(model), factor_of(model)
    sizes = "x".join(map(str, shape[2:]))
    if len(shape) != 2 + dims or any(size % factor or size < factor for size in shape[2:]):
        where = f"[N, C, {', '.join('HWD'[:dims])}] of positive multiples of {factor}"
        raise ValueError(f"input_noise has shape {tuple(shape)}, must be {where}")
    voxels, kept = 1, model.block_out_channels[0]
    for size in shape[2:]:
        voxels *= size
    needed = kept * voxels
    for level, (channels, blocks) in enumerate(zip(model.block_out_channels, model.num_res_blocks, strict=True)):
        last = level == len(model.block_out_channels) - 1
        needed += channels * blocks * voxels // 2 ** (dims * level)
        needed += 0 if last else channels * voxels // 2 ** (dims * (level + 1))
    needed *= shape[0] * (2 if guided else 1) * dtype.itemsize
    free = free_memory(device)
    if needed > free:
        raise torch.OutOfMemoryError(
            f"input_noise is {shape[0]} of {sizes}, whose skip connections alone need {needed / 2**30:.1f} GiB: "
            f"{free / 2**30:.1f} GiB are free on {device}, must be fewer or smaller samples"
        )


class Forward(nn.Module):
    """Stand in for a network in one call of a loop of MONAI's.

    A frozen network takes one of the loop's timesteps for all samples. The original computes all other calls, among
    them those with a ControlNet's residuals.

    Args:
        model: the original.
        network: what runs in its place.
        timesteps: that the loop visits.
    """

    def __init__(self, model: Any, network: Network, timesteps: Tensor) -> None:
        super().__init__()
        self.original, self._network = model, network
        self._rows = {float(t): row for row, t in enumerate(timesteps.tolist())}
        self._timesteps = timesteps.to(network.device, torch.float32)
        self._bound: dict[tuple[tuple[int, ...], ...], tuple[Tensor, Tensor | None, Any]] = {}

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, class_labels: Tensor | None = None,
        down_block_additional_residuals: Any = None, mid_block_additional_residual: Any = None,
    ) -> Tensor:  # fmt: skip
        """Return what the original returns."""
        residuals = (down_block_additional_residuals, mid_block_additional_residual)
        plain = all(value is None for value in residuals)
        row = self._rows.get(float(timesteps[0])) if len(timesteps) == 1 else None
        frozen = self._network.frozen
        if not plain or (frozen is not None and (row is None or class_labels is not None)):
            out: Tensor = self.original(x, timesteps, context, class_labels, *residuals)
            return out
        if frozen is None:
            network: Any = self._network
            own = [None if value is None else value.to(network.device, network.dtype) for value in (x, context)]
            with network.evaluating():
                return network.model(own[0], timesteps.to(network.device), own[1], class_labels).to(x)
        inputs, given, program = self._program(frozen, x, context)
        inputs.copy_(x)
        if given is not None and context is not None and not torch.equal(given, context.to(given)):
            given.copy_(context)
            program.load()
        out = program(torch.tensor([row], device=inputs.device))
        return out.to(x).clone(memory_format=torch.contiguous_format)

    def _program(self, frozen: FrozenUNet, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None, Any]:
        key = (tuple(x.shape), () if context is None else tuple(context.shape))
        if key not in self._bound:
            inputs = frozen.new_input(x.shape)
            given = None if context is None else context.to(frozen.device, copy=True)
            program = frozen.bind(inputs, self._timesteps, None, {} if given is None else {"context": given})
            program.load()
            self._bound[key] = inputs, given, program
        return self._bound[key]
