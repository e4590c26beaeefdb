"""`fastddpm.UNet` as freezing sees it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from fastddpm.networks.comparing import Settings, changed, settings_of, why_not_layers
from fastddpm.networks.frozen.blueprint import Blueprint
from fastddpm.networks.frozen.kinds.unet import folding
from fastddpm.networks.frozen.kinds.unet.lowering import Lowering
from fastddpm.networks.unet import layers
from fastddpm.networks.unet.config import UNetConfig
from fastddpm.networks.unet.model import UNet

_LAYERS = (
    UNet,
    layers.Conv3x3,
    layers.Sinusoids,
    layers.FourierProjection,
    layers.EmbeddingMLP,
    layers.ResnetBlock,
    layers.AdaGroupNorm,
    layers.AdaResnetBlock,
    layers.Attention,
    layers.Downsample,
    layers.Upsample,
    layers.DownBlock,
    layers.SkipDownBlock,
    layers.KDownBlock,
    layers.MidBlock,
    layers.UpBlock,
    layers.SkipUpBlock,
    layers.KUpBlock,
    nn.Conv2d,
    nn.Dropout,
    nn.Embedding,
    nn.GroupNorm,
    nn.Linear,
    nn.ModuleList,
)


class UNetBlueprint(Blueprint):
    """A `fastddpm.UNet` that contains only fastddpm's layers."""

    unet: UNet
    name = "a fastddpm.UNet"
    builder = Lowering

    def __init__(self, unet: UNet) -> None:
        config = unet.config
        self.unet = unet
        self.in_channels, self.out_channels = config.in_channels, config.out_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.smallest_size = config.smallest_size
        self.has_labels = config.has_classes
        size = config.sample_size or 32
        self.sample_size = (size, size) if isinstance(size, int) else (size[0], size[1])

    @staticmethod
    def takes(model: object) -> bool:
        return type(model) is UNet

    @staticmethod
    def why_not(model: UNet) -> str | None:
        return why_not_layers(model, _LAYERS.__contains__)

    @staticmethod
    def edited(model: UNet) -> str | None:
        joined = [name for name, layer in _attentions(model) if layer.to_qkv is not None]
        return changed(_settings(model.config, frozenset(joined)), settings_of(model), of_another=True)

    def embeddings(self) -> folding.UNetEmbeddings:
        return folding.UNetEmbeddings(self.unet)

    def time_projections(self) -> tuple[Tensor, Tensor, dict[str, slice]]:
        return folding.time_projections(self.unet)

    def check_labels(self, labels: Tensor, batch: int) -> None:
        config = self.unet.config
        shape = (batch, config.embedding_channels) if config.class_embed_type == "identity" else (batch,)
        if tuple(labels.shape) != shape:
            raise ValueError(f"class_labels have shape {tuple(labels.shape)}, must have {shape}")
        if config.class_embed_type is None and labels.dtype != torch.int64:
            raise ValueError(f"class_labels have dtype {labels.dtype}, must have torch.int64")

    def some_labels(self, batch: int, device: torch.device | str) -> Tensor | None:
        if self.unet.config.class_embed_type == "identity":
            return torch.zeros(batch, self.unet.config.embedding_channels, device=device)
        return super().some_labels(batch, device)


def _attentions(unet: UNet) -> list[tuple[str, layers.Attention]]:
    return [(name, layer) for name, layer in unet.named_modules() if isinstance(layer, layers.Attention)]


@functools.lru_cache(maxsize=16)
def _settings(config: UNetConfig, joined: frozenset[str]) -> Settings:
    """Return the layer settings of a newly made U-Net, with some layers' projections joined."""
    with torch.device("meta"):
        unet = UNet(config)
        for name, layer in _attentions(unet):
            layer.fuse(name in joined)
        return settings_of(unet)
