"""Wrap networks of denoising_diffusion_pytorch so that `Sampler` can call them."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from fastddpm_kernels.group_norm_silu import rms_norm_silu
from torch import Tensor, nn
from torch.nn import functional

from fastddpm.networks.comparing import difference, evaluating, some_noise
from fastddpm.networks.frozen import FrozenUNet
from fastddpm.networks.frozen.kinds.lucidrains.blueprint import LIBRARY
from fastddpm.networks.network import BoundNetwork, UNetWrapper


class Predictor(nn.Module):
    """Call `model(x, t, x_self_cond)` as the diffusions do.

    Args:
        model: any network of the library, or one that stands in for it.
        by_name: pass x_self_cond by name, and only if it is given, as the one-dimensional diffusion does.
        named: further keyword arguments of the model.
    """

    starts_without = True  # x_self_cond is None at the first step

    def __init__(self, model: nn.Module, *, by_name: bool = False, named: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.model, self.by_name, self.named = model, by_name, dict(named or {})

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        """Return the prediction [N, ...] for x [N, ...], t int64 [N] and x_self_cond like x."""
        if not self.by_name:
            return self.model(x, t, x_self_cond)
        named = self.named if x_self_cond is None else {**self.named, "x_self_cond": x_self_cond}
        return self.model(x, t, **named)


class GuidedPredictor(UNetWrapper):
    """Compute `forward_with_cond_scale` of the class-conditional U-Net: halves in one batch, scales in device memory.

    The result is cond + (cond_scale - 1) * (cond - null without its part parallel to cond). A share `rescaled_phi` of
    it is rescaled to the standard deviation of cond (Lin et al. 2024, section 3.4).

    Args:
        model: the U-Net.
        guided: whether the unconditional half is computed.
        rescaled: whether the standard deviation is restored.
        device: where it runs.
        freeze: whether the U-Net may be frozen.
    """

    def __init__(
        self, model: nn.Module, *, guided: bool, rescaled: bool, device: torch.device, freeze: bool = False
    ) -> None:
        super().__init__()
        self.model, self.guided, self.rescaled, self.freeze = model, guided, rescaled, freeze
        self._masks = "cond_keep_mask" in inspect.signature(model.forward).parameters
        # Not a buffer, so that it stays float32 when the network is cast.
        self._scales = torch.zeros(3, dtype=torch.float32, device=device)

    def set_scales(self, cond_scale: float, rescaled_phi: float) -> None:
        """Set the scales in place: a captured graph reads them."""
        self._scales.copy_(torch.tensor([cond_scale - 1.0, rescaled_phi, 1.0 - rescaled_phi]))

    def forward(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        """Return the guided prediction [N, C, H, W] for x [N, C, H, W], t and classes int64 [N]."""
        if not self.guided:
            return self.model(x, t, classes, cond_drop_prob=0.0)
        return self.combine(*self.halves(x, t, classes))

    def halves(self, x: Tensor, t: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predictions with classes and without, float32 [N, C, H, W]."""
        n = len(x)
        if self._masks:
            keep = torch.arange(2 * n, device=x.device) < n
            both = self.model(x.repeat(2, 1, 1, 1), t.repeat(2), classes.repeat(2), cond_keep_mask=keep)
            cond, null = both.float().split(n)
            return cond, null
        cond = self.model(x, t, classes, cond_drop_prob=0.0).float()
        return cond, self.model(x, t, classes, cond_drop_prob=1.0).float()

    def combine(self, cond: Tensor, null: Tensor) -> Tensor:
        """Return the guided prediction of both halves, float32 [N, C, H, W]."""
        further, phi, rest = self._scales.unbind()
        out = cond + _orthogonal(cond - null, cond) * further
        if not self.rescaled:
            return out
        return out * (_std(cond) / _std(out)) * phi + out * rest

    def to_freeze(self) -> nn.Module | None:
        return self.model if self.freeze else None

    def bind_frozen(
        self,
        frozen: FrozenUNet,
        inputs: Tensor,
        timesteps: Tensor,
        labels: Tensor | None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> BoundNetwork:
        if labels is None or not self.guided:
            return frozen.bind(inputs, timesteps, labels)
        return GuidedProgram(self, frozen, inputs, timesteps, labels)


class GuidedProgram:
    """A `GuidedPredictor` with a frozen U-Net, bound to its buffers."""

    def __init__(
        self, predictor: GuidedPredictor, frozen: FrozenUNet, inputs: Tensor, timesteps: Tensor, labels: Tensor
    ) -> None:
        self._combine, self._inputs, self._labels = predictor.combine, inputs, labels
        self._both = frozen.new_input((2 * len(inputs), *inputs.shape[1:]))
        none = frozen.embeddings.num_labels
        assert none is not None
        self._both_labels = torch.full((2 * len(labels),), none - 1, device=labels.device)
        self._program = frozen.bind(self._both, timesteps, self._both_labels)

    def load(self) -> None:
        self._both_labels[: len(self._labels)].copy_(self._labels)
        self._program.load()

    def __call__(self, step: Tensor) -> Tensor:
        return self._combine(*self.halves(step))

    def halves(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predictions with classes and without, float32 [N, C, H, W]."""
        for half in self._both.split(len(self._inputs)):
            half.copy_(self._inputs)
        cond, null = self._program(step).float().split(len(self._inputs))
        return cond, null


class Mixture(UNetWrapper):
    """Mix x0 as `WeightedObjectiveGaussianDiffusion` does, from predicted noise, predicted x0 and their weights.

    Args:
        model: predicts [noise, x0, two weights] as channels.
        diffusion: holds the buffers that turn noise into x0; `refresh` copies their current values.
        device: where it runs.
        freeze: whether the model is a U-Net that may be frozen.
    """

    def __init__(self, model: nn.Module, diffusion: Any, device: torch.device, *, freeze: bool) -> None:
        super().__init__()
        self.model, self._freeze = model, freeze and not isinstance(model, Predictor)
        # Not a submodule, and not copied with this one.
        self._now = lambda: torch.stack([diffusion.sqrt_recip_alphas_cumprod, diffusion.sqrt_recipm1_alphas_cumprod])
        # Not a buffer, so that it stays float32 when the network is cast.
        self._scales = torch.empty(2, len(diffusion.betas), dtype=torch.float32, device=device)
        self.refresh()

    def refresh(self) -> None:
        """Copy the diffusion's buffers, in place."""
        self._scales.copy_(self._now())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return x0, float32, for x [N, C, H, W] and t int64 [N]."""
        return self.mix(x, t, self.model(x, t))

    def mix(self, x: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """Return x0, float32 [N, C, H, W], from the model's output [N, 2 C + 2, H, W]."""
        channels = x.shape[1]
        noise, x0, weights = out.float().split((channels, channels, 2), dim=1)
        recip, recipm1 = self._scales.index_select(1, t).view(2, -1, 1, 1, 1)
        first, second = weights.softmax(dim=1).split(1, dim=1)
        return first * (recip * x.float() - recipm1 * noise) + second * x0

    def to_freeze(self) -> nn.Module | None:
        return self.model if self._freeze else None

    def bind_frozen(
        self,
        frozen: FrozenUNet,
        inputs: Tensor,
        timesteps: Tensor,
        labels: Tensor | None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> BoundNetwork:
        return _MixtureProgram(self, frozen, inputs, timesteps)


class _MixtureProgram:
    """A `Mixture` with a frozen U-Net, bound to its buffers."""

    def __init__(self, mixture: Mixture, frozen: FrozenUNet, inputs: Tensor, timesteps: Tensor) -> None:
        self._mix, self._inputs, self._timesteps = mixture.mix, inputs, timesteps
        self._program = frozen.bind(inputs, timesteps)

    def load(self) -> None:
        self._program.load()

    def __call__(self, step: Tensor) -> Tensor:
        return self._mix(self._inputs, self._timesteps.index_select(0, step), self._program(step))


def _orthogonal(update: Tensor, to: Tensor) -> Tensor:
    """Return `update` without its part parallel to `to`, per sample; computed in float64, as in the library."""
    wide, unit = update.double().flatten(1), functional.normalize(to.double().flatten(1), dim=-1)
    return (wide - (wide * unit).sum(dim=-1, keepdim=True) * unit).view_as(update).to(update.dtype)


def _std(x: Tensor) -> Tensor:
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)


class FusedRMSNorm(nn.Module):
    """`RMSNorm` as one kernel."""

    def __init__(self, norm: Any, backend: str) -> None:
        super().__init__()
        self.g: Tensor = norm.g
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm_silu(x, self.g.flatten(), activation=None, backend=self.backend)


class FusedBlock(nn.Module):
    """`Block` with norm, scale and shift, and SiLU as one kernel. Its parameters keep the original's names."""

    def __init__(self, block: Any, backend: str) -> None:
        super().__init__()
        self.proj, self.norm, self.backend = block.proj, block.norm, backend
        self.dropout = getattr(block, "dropout", None)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        scale, shift = (None, None) if scale_shift is None else (value.flatten(1) for value in scale_shift)
        x = rms_norm_silu(self.proj(x), self.norm.g.flatten(), scale=scale, shift=shift, backend=self.backend)
        return x if self.dropout is None else self.dropout(x)


class CastEmbedding(nn.Module):
    """A time embedding cast to the dtype of the network; the library computes it in float32."""

    like: Tensor

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        return self.embedding(t).to(self.like.dtype)


def fuse_norms(model: nn.Module, backend: str = "auto") -> tuple[nn.Module, int]:
    """Return a copy of a network that shares its parameters, with one kernel per library `Block` and `RMSNorm`.

    Returns:
        The copy and the number of its modules that were replaced. The network itself is not changed.
    """

    def fused(child: nn.Module, parent: nn.Module) -> nn.Module | None:
        if _is(child, "Block"):
            return FusedBlock(child, backend)
        return FusedRMSNorm(child, backend) if _is(child, "RMSNorm") and not _is(parent, "Block") else None

    return _replaced(model, fused)


def cast_embeddings(model: nn.Module) -> nn.Module:
    """Return a copy of a network that shares its parameters and can run in another dtype once it is moved to it.

    The library itself runs in lower precision only under autocast.
    """
    kinds = ("SinusoidalPosEmb", "RandomOrLearnedSinusoidalPosEmb")
    return _replaced(model, lambda child, _: CastEmbedding(child) if any(map(partial(_is, child), kinds)) else None)[0]


def _replaced(
    model: nn.Module, replacement: Callable[[nn.Module, nn.Module], nn.Module | None]
) -> tuple[nn.Module, int]:
    """Copy the modules, not their tensors, with `replacement(child, parent)` for some; return also their number."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    result, count = copy.deepcopy(model, shared), 0
    for parent in list(result.modules()):
        for name, child in list(parent.named_children()):
            if (new := replacement(child, parent)) is not None:
                setattr(parent, name, new)
                count += 1
    return result, count


def verify_fused(model: nn.Module, fused: nn.Module, shape: tuple[int, ...], *more: Tensor) -> None:
    """Compare both networks on one sample [1, ...] of `shape`.

    Args:
        model, fused: the network and its copy, both in a `Predictor` or a `GuidedPredictor`.
        shape: of a sample.
        more: further arguments of both, after x and t.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    parameter = next(model.parameters())
    x, t = some_noise(shape, parameter), torch.tensor([500], device=parameter.device)
    with evaluating(model), evaluating(fused):
        apart = difference(model(x, t, *more), fused(x, t, *more), parameter.dtype)
    if apart is not None:
        raise RuntimeError(
            f"the network with fused norms {apart}, must equal the network; fuse_norms=False samples with that as it is"
        )


def _is(module: nn.Module, name: str) -> bool:
    """Return whether a module is the library's class of that name, without hooks."""
    kind = type(module)
    listened = bool(module._forward_hooks or module._forward_pre_hooks)
    return kind.__name__ == name and kind.__module__.split(".")[0] == LIBRARY and not listened
