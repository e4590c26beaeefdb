"""Find the shapes that a model runs: those that ops look up in an evaluation, a step of a sampler or of training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
from fastddpm_kernels import tuned
from fastddpm_kernels.tuned import Key
from torch import nn

from fastddpm.networks.frozen import cuda_instructions
from fastddpm.networks.network import Network
from fastddpm.perf.profiling.layers import Evaluation, evaluation
from fastddpm.training.objective import GaussianDiffusion

Bound = TypeVar("Bound")
WHOLE = ("fused_conv", "attention_block", "layer_norm_linear")
LOOK_UPS = {"fused_conv": 2}  # of a call, when its launches and its workspace are counted
_WHEN_BOUND = ("conv", "upsample_conv")  # look up a choice once, to prepare weights for it; the others at every run


def network_keys(
    network: Network, shape: Sequence[int], ops: Collection[str], precision: str | None = None
) -> dict[Key, int]:
    """Count how often one evaluation of a network runs each shape of `ops`.

    Args:
        network: a sampler's.
        shape: [N, C, ...] of the batch.
        ops: names of `tuned.OPS`.
        precision: the network's, by name; it says how float32 products are rounded.
    """
    frozen = network.frozen
    labels = None if frozen is None else frozen.blueprint.some_labels(shape[0], network.device)

    def run(ready: Evaluation) -> None:
        with ready.running():
            ready()

    found = recorded(lambda: evaluation(network, shape, torch.tensor([0]), labels, precision), run, ops)
    if frozen is not None and frozen.fusion == "auto" and frozen.blueprint.dims == 2:
        found |= whole_keys(frozen.unet, (int(shape[0]), *shape[-2:]), network.dtype, ops, tf32=frozen.allow_tf32)
    return found


def whole_keys(
    unet: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, ops: Collection[str], *, tf32: bool = False
) -> dict[Key, int]:
    """Count how often a step runs each shape of `ops` if all its layers are whole (`freeze(fusion="full")`).

    Args:
        unet: of a kind that can be frozen.
        shape: [N, H, W] of the batch.
        dtype: of the computation.
        ops: names of `tuned.OPS`.
        tf32: whether float32 products may be rounded.
    """
    with tuned.recording() as seen:
        cuda_instructions(unet, shape[0], (shape[1], shape[2]), dtype, fusion="full", allow_tf32=tf32)
    calls: dict[Key, int] = {}
    for key, count in seen.items():
        if key.op in ops and key.op in WHOLE:
            calls[key] = max(count // LOOK_UPS.get(key.op, 1), 1)
    return calls


def sampler_keys(sampler: Any, batch: int, ops: Collection[str], precision: str | None = None) -> dict[Key, int]:
    """Count how often one step of a sampler runs each shape of `ops`, in its network and in the step itself.

    Args:
        sampler: a `Sampler`; it has no type here because its package stands above this one. If its reverse step has
            choices, it draws samples, so it should have few steps.
        batch: the batch size that the network sees: twice the samples under guidance.
        ops, precision: as in `network_keys`.
    """
    network = sampler.network
    shape = network.sample_shape(sampler.settings.learned_variance)
    keys = network_keys(network, (batch, *shape), ops, precision)
    samples, more = divmod(batch, 1 if sampler.guidance_scale is None else 2)
    if "reverse_step" in ops and samples and not more:
        labels = None if network.frozen is None else network.frozen.blueprint.some_labels(samples, network.device)
        with tuned.recording() as seen:
            sampler.sample(samples, class_labels=labels, conditions=network.some_conditions(samples))
        keys |= {key: 1 for key in seen if key.op == "reverse_step"}
    return keys


def training_keys(
    diffusion: GaussianDiffusion, shape: Sequence[int], labels: torch.Tensor | None, device: torch.device,
    ops: Collection[str], dtype: torch.dtype = torch.float32,
) -> dict[Key, int]:  # fmt: skip
    """Count how often one step of training, forward and backward, runs each shape of `ops`.

    Args:
        diffusion: the model to train; a copy of it runs, as a `Trainer` would run it.
        shape: [N, C, H, W] of a batch.
        labels: int64 [N], if the network has classes.
        device: of the training.
        ops: names of `tuned.OPS`.
        dtype: float16 or bfloat16 runs under autocast to it.
    """
    half = dtype != torch.float32
    diffusion = copy.deepcopy(diffusion).to(device, torch.float32).train().requires_grad_()
    x0 = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).clamp(-1, 1).to(device)
    if x0.ndim == 4 and (half or device.type == "cpu"):
        x0 = x0.contiguous(memory_format=torch.channels_last)
        diffusion.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def step(diffusion: nn.Module) -> None:
        with torch.enable_grad():
            with torch.autocast(device.type, dtype, enabled=half):
                loss = diffusion(x0, labels)
            loss.backward()

    return recorded(lambda: diffusion, step, ops)


def recorded(bind: Callable[[], Bound], run: Callable[[Bound], object], ops: Collection[str]) -> dict[Key, int]:
    """Count how often `run`, called with what `bind` returns, runs each shape of `ops`.

    It counts the first run after binding, because a frozen network binds its ops in it.
    """
    with tuned.recording() as when_bound:
        bound = bind()
    with tuned.recording() as when_run:
        run(bound)
    found = {key: count for key, count in when_bound.items() if key.op in _WHEN_BOUND}
    for key, count in when_run.items():
        found[key] = found.get(key, 0) + count
    return {key: count for key, count in found.items() if key.op in ops}
