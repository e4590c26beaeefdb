"""EDM's and PhysicsNeMo's U-Nets as freezing sees them (Karras et al. 2022, arXiv:2206.00364, appendix C).

They are recognised by the names of their classes and modules, so neither library is imported. EDM's pickles bring the
source of their classes along, in modules that they name themselves.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.networks.comparing import why_not_layers
from fastddpm.networks.frozen.blueprint import Blueprint, Embeddings
from fastddpm.networks.frozen.folding import side_by_side
from fastddpm.networks.frozen.kinds.edm.lowering import Lowering
from fastddpm.networks.frozen.kinds.edm.parts import SONG, is_dhariwal, is_of_edm, with_probabilities

_LAYERS = {*SONG, "DhariwalUNet", "UNetBlock", "UNetAttention", "Attention", "Conv2d", "GroupNorm", "Linear"}
_LAYERS |= {"PositionalEmbedding", "FourierEmbedding"}


class EDMEmbeddings(Embeddings):
    """See `Embeddings`. Noise levels and labels are embedded in the dtype of the U-Net, at least float32.

    `SongUNet` adds the label before two layers, which belong to `activate`; `DhariwalUNet` adds it after them.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self._song = not is_dhariwal(unet)
        noise, width = unet.map_noise, unet.map_layer1.out_features
        self._dtype = torch.promote_types(unet.map_layer0.weight.dtype, torch.float32)
        self.register_buffer("frequencies", _frequencies(noise).to(self._dtype))
        self.layer0, self.layer1 = _linear(unet.map_layer0), _linear(unet.map_layer1)
        self.label = None if unet.map_label is None else _linear(unet.map_label)
        self._padding = (0, max(width - unet.map_layer0.in_features, 0)) if self._song else (0, 0)

    frequencies: Tensor

    def of_time(self, t: Tensor) -> Tensor:
        """Return the embeddings [S, E] of noise levels as the U-Net takes them [S]."""
        angles = torch.outer(t.to(self._dtype), self.frequencies).double()
        if self._song:
            return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), self._padding)
        embedding: Tensor = self.layer1(F.silu(self.layer0(torch.cat([angles.cos(), angles.sin()], dim=1))))
        return embedding

    def of_labels(self, labels: Tensor) -> Tensor:
        """Return the embeddings [N, E] of labels [N, L], one-hot as a rule."""
        assert self.label is not None
        labels = labels.double()
        if not self._song:
            return self.label(labels)
        return F.pad(self.label(labels * math.sqrt(self.label.in_features)), self._padding)

    def activate(self, emb: Tensor) -> Tensor:
        """See `Embeddings.activate`; in float64."""
        if not self._song:
            return F.silu(emb)
        own = emb[..., : self.layer0.in_features].double()
        return F.silu(self.layer1(F.silu(self.layer0(own)))).to(emb.dtype)


class NoEmbeddings(Embeddings):
    """The embeddings of a U-Net that reads no noise level, such as CorrDiff's regression: zeros."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(1, unet.emb_channels, dtype=torch.float64))

    zeros: Tensor

    def of_time(self, t: Tensor) -> Tensor:
        """Return zeros [S, E]."""
        return self.zeros.expand(len(t), -1)


class EDMBlueprint(Blueprint):
    """A `SongUNet` or `DhariwalUNet` of EDM or PhysicsNeMo.

    Those with positional embeddings read them as the last channels of their input, see `parts.positions`.
    """

    unet: Any
    name = "a SongUNet or DhariwalUNet of EDM or PhysicsNeMo"
    builder = Lowering
    foreign = True

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        blocks = [*unet.enc.values(), *unet.dec.values()]
        self.in_channels = blocks[0].in_channels
        last = unet.out_conv if is_dhariwal(unet) else blocks[-1]
        self.out_channels = last.out_channels
        self.factor = 2 ** sum(hasattr(block, "conv0") and block.conv0.down for block in blocks)
        self.has_labels = getattr(unet, "map_label", None) is not None
        first = next(iter(unet.enc)).partition("x")[0]
        own = getattr(unet, "img_shape_y", int(first)), getattr(unet, "img_shape_x", int(first))
        self.sample_size = own

    @staticmethod
    def takes(model: object) -> bool:
        return type(model).__name__ in (*SONG, "DhariwalUNet") and is_of_edm(type(model))

    @staticmethod
    def why_not(model: Any) -> str | None:
        def known(kind: type) -> bool:
            return kind is nn.ModuleDict or (kind.__name__ in _LAYERS and is_of_edm(kind))

        if reason := why_not_layers(model, known):
            return reason
        for name, module in model.named_modules():
            wrong = _unusual(module)
            if wrong is not None:
                return f"its {'layer ' + name if name else 'forward'} {wrong}"
        return None

    def embeddings(self) -> Embeddings:
        return EDMEmbeddings(self.unet) if hasattr(self.unet, "map_noise") else NoEmbeddings(self.unet)

    def time_projections(self) -> tuple[Tensor, Tensor, dict[str, slice]]:
        """See `Blueprint.time_projections`.

        Where a block adds its projection to its first convolution, the bias includes the convolution's.
        """
        layers = []
        for name, block in self.unet.named_modules():
            if type(block).__name__ != "UNetBlock":
                continue
            weight, bias = block.affine.weight, block.affine.bias.double()
            if not block.adaptive_scale and block.conv0.bias is not None:
                bias = bias + block.conv0.bias.double()
            layers.append((name, weight, bias))
        return side_by_side(layers)

    def call(self, x: Tensor, t: Tensor, labels: Tensor | None, **more: Tensor) -> Tensor:
        """Call the U-Net itself with x and its positional embeddings, noise levels [N] and labels [N, L] or None."""
        unet = self.unet
        kind = next(kind for kind in type(unet).__mro__ if kind.__name__ in ("SongUNet", "DhariwalUNet"))
        out = kind.forward(unet, x, t.to(x.dtype), labels)  # type: ignore[attr-defined]
        return with_probabilities(unet, out)

    def check_labels(self, labels: Tensor, batch: int) -> None:
        shape = (batch, self.unet.map_label.in_features)
        if tuple(labels.shape) != shape or not labels.is_floating_point():
            raise ValueError(f"class_labels are {labels.dtype} {tuple(labels.shape)}, must be floating-point {shape}")

    def some_labels(self, batch: int, device: torch.device | str) -> Tensor | None:
        if not self.has_labels:
            return None
        width = self.unet.map_label.in_features
        first = next(self.unet.parameters())
        return torch.arange(1, width + 1, device=device, dtype=first.dtype).div(width).expand(batch, width)


def _unusual(module: Any) -> str | None:
    """Return which setting of a layer would be ignored, or None."""
    name = type(module).__name__
    if getattr(module, "amp_mode", False):
        return "has amp_mode True, must have False: fastddpm computes in the dtype of the sampler"
    if getattr(module, "additive_pos_embed", False):
        return "has additive_pos_embed True, must have False"
    if name == "GroupNorm" and getattr(module, "act", None) not in (None, "silu"):
        return f"has act {module.act!r}, must have 'silu'"
    if name == "Conv2d" and module.weight is not None:
        kernel = module.weight.shape[-1]
        if kernel not in (1, 3) or (module.fused_resample and (module.up or not module.down or kernel != 3)):
            return f"has kernel {kernel}, up {module.up}, down {module.down} and fused_resample {module.fused_resample}"
    if name == "PositionalEmbedding" and (
        getattr(module, "learnable", False) or getattr(module, "embed_fn", "cos_sin") != "cos_sin"
    ):
        return "is learnable, or is not of the cosine and the sine"
    return None


def _frequencies(noise: Any) -> Tensor:
    if type(noise).__name__ == "FourierEmbedding":
        frequencies: Tensor = 2 * math.pi * noise.freqs.detach()
        return frequencies
    if hasattr(noise, "freqs"):
        return noise.freqs.detach().clone()
    half = noise.num_channels // 2
    powers = torch.arange(half, dtype=torch.float32) / (half - (1 if noise.endpoint else 0))
    return (1 / noise.max_positions) ** powers


def _linear(layer: Any) -> nn.Linear:
    """Return a copy of a linear layer in float64."""
    copied = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    copied.weight = nn.Parameter(layer.weight.detach().double(), requires_grad=False)
    if layer.bias is not None:
        copied.bias = nn.Parameter(layer.bias.detach().double(), requires_grad=False)
    return copied
