"""MONAI's `DiffusionModelUNet` as freezing sees it; its classes are recognised by name and never imported."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.networks.comparing import why_not_layers
from fastddpm.networks.frozen.blueprint import Blueprint, Condition, Embeddings
from fastddpm.networks.frozen.folding import side_by_side
from fastddpm.networks.frozen.kinds.monai.lowering import Lowering

_LAYERS = {"DiffusionModelUNet", "DownBlock", "AttnDownBlock", "CrossAttnDownBlock", "AttnMidBlock"}
_LAYERS |= {"CrossAttnMidBlock"}
_LAYERS |= {"UpBlock", "AttnUpBlock", "CrossAttnUpBlock", "DiffusionUNetResnetBlock", "DiffusionUnetDownsample"}
_LAYERS |= {"WrappedUpsample", "Convolution", "SpatialAttentionBlock", "SpatialTransformer", "SABlock", "MLPBlock"}
_LAYERS |= {"DiffusionUNetTransformerBlock", "CrossAttentionBlock", "GEGLU"}
_OF_TORCH = {nn.AvgPool2d, nn.Conv2d, nn.Dropout, nn.Embedding, nn.GELU, nn.GroupNorm, nn.Identity, nn.LayerNorm}
_OF_TORCH |= {nn.Linear, nn.ModuleList, nn.Sequential, nn.SiLU, nn.Upsample}


class MonaiEmbeddings(Embeddings):
    """See `Embeddings`. The sinusoids are those of float32, as in the library."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self._width: int = unet.block_out_channels[0]
        self.time = copy.deepcopy(unet.time_embed).double()
        self.classes = copy.deepcopy(unet.class_embedding).double() if unet.num_class_embeds is not None else None
        self.num_labels = unet.num_class_embeds

    def of_time(self, t: Tensor) -> Tensor:
        """Return the embeddings [S, E] of timesteps [S]."""
        half = self._width // 2
        powers = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(powers / half)[None]
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
        embedding: Tensor = self.time(nn.functional.pad(sinusoids, (0, self._width % 2)).double())
        return embedding

    def of_labels(self, labels: Tensor) -> Tensor:
        """Return the embeddings [N, E] of labels int64 [N]."""
        assert self.classes is not None
        embedding: Tensor = self.classes(labels)
        return embedding


class MonaiBlueprint(Blueprint):
    """`monai.networks.nets.DiffusionModelUNet` of `spatial_dims` 2.

    Without a context its cross-attention attends to the image itself.
    """

    unet: Any
    name = "a DiffusionModelUNet of MONAI in two dimensions"
    builder = Lowering
    foreign = True

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.in_channels, self.out_channels = unet.in_channels, unet.out_channels
        self.factor = 2 ** (len(unet.down_blocks) - 1)
        self.has_labels = unet.num_class_embeds is not None
        crosses = [layer for layer in unet.modules() if type(layer).__name__ == "CrossAttentionBlock"]
        if crosses:
            widths = {layer.to_k.in_features for layer in crosses}
            own = all(layer.to_k.in_features == layer.to_q.in_features for layer in crosses)
            self.conditions = {"context": Condition((None, widths.pop()), optional=own)}

    @staticmethod
    def takes(model: object) -> bool:
        return type(model).__name__ == "DiffusionModelUNet" and _is_of_monai(type(model))

    @staticmethod
    def why_not(model: Any) -> str | None:
        if (dims := model.conv_in.spatial_dims) != 2:
            return f"it has spatial_dims {dims}, must have 2"

        def known(kind: type) -> bool:
            of_einops = kind.__name__ == "Rearrange" and kind.__module__.partition(".")[0] == "einops"
            return kind in _OF_TORCH or of_einops or (kind.__name__ in _LAYERS and _is_of_monai(kind))

        if reason := why_not_layers(model, known):
            return reason
        for name, layer in model.named_modules():
            if wrong := _unusual(layer):
                return f"its layer {name} {wrong}"
        return None

    def embeddings(self) -> Embeddings:
        return MonaiEmbeddings(self.unet)

    def time_projections(self) -> tuple[Tensor, Tensor, dict[str, slice]]:
        """See `Blueprint.time_projections`; the bias of a block includes that of its first convolution."""
        layers = []
        for name, block in self.unet.named_modules():
            if type(block).__name__ == "DiffusionUNetResnetBlock":
                weight, bias = block.time_emb_proj.weight, block.time_emb_proj.bias.double()
                layers.append((name, weight, bias + block.conv1.conv.bias.double()))
        return side_by_side(layers)

    def call(self, x: Tensor, t: Tensor, labels: Tensor | None, **more: Tensor) -> Tensor:
        out: Tensor = self.unet(x, t, class_labels=labels, **more)
        return out

    def check_conditions(self, conditions: Mapping[str, Tensor], batch: int) -> None:
        super().check_conditions(conditions, batch)
        if "context" in conditions and conditions["context"].shape[1] == 0:
            raise ValueError("context has no tokens, must have at least one")


def _is_of_monai(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "monai"


def _unusual(layer: Any) -> str | None:
    """Return which setting of a layer cannot be frozen, or None."""
    name = type(layer).__name__
    own: tuple[Any, ...]
    if isinstance(layer, nn.Conv2d):
        own = (layer.groups, layer.dilation, layer.padding_mode)
        return None if own == (1, (1, 1), "zeros") else f"has groups, dilation and padding_mode {own}"
    if isinstance(layer, nn.Upsample):
        own = (layer.mode, layer.scale_factor)
        return None if own == ("nearest", (2.0, 2.0)) else f"has mode {own[0]} and scale_factor {own[1]}"
    if name == "DiffusionUnetDownsample" and layer.use_conv:
        padding = layer.op.conv.padding
        return None if padding == (1, 1) else f"has padding {padding}, must have (1, 1)"
    if name in ("SABlock", "CrossAttentionBlock"):
        own = (layer.causal, layer.rel_positional_embedding is not None, layer.save_attn)
        return f"has causal, relative positions and save_attn {own}, must have none" if any(own) else None
    return None
