"""Exact algebra on the weights of fastddpm's U-Net in float64: merged layers, and its embeddings."""

from __future__ import annotations

import copy
from typing import cast

import torch
import torch.nn.functional as F
from fastddpm_kernels.attention_block import fold
from torch import Tensor, nn

from fastddpm.networks.frozen.blueprint import Embeddings
from fastddpm.networks.frozen.folding import side_by_side
from fastddpm.networks.unet.layers import ACTIVATIONS, AdaGroupNorm, Attention, ResnetBlock
from fastddpm.networks.unet.model import UNet


def folds_output(attention: Attention) -> bool:
    """Return whether the output projection can be folded into the values, which then have the output's width.

    With one head, softmax(..) (V Wv) Wo is softmax(..) (V (Wv Wo)).
    """
    return attention.heads == 1


def attention_projections(attention: Attention) -> tuple[Tensor, Tensor]:
    """Return queries, keys and values as one linear layer: (weight [., C], bias [.]).

    If `folds_output`, the values include the output projection. They also include its bias, since the attention
    weights sum to one.
    """
    weight, bias = attention.qkv()
    weights, biases = list(weight.double().chunk(3)), list(bias.double().chunk(3))
    out = cast(nn.Linear, attention.to_out[0])
    if folds_output(attention):
        to_out = out.weight.double()
        biases[2] = to_out @ biases[2] + out.bias.double()
        weights[2] = to_out @ weights[2]
    return torch.cat(weights), torch.cat(biases)


def attention_matrices(attention: Attention) -> tuple[Tensor, ...]:
    """Return the matrices and biases of `attention_block_` for a layer of one head."""
    weight, bias = attention.qkv()
    out = cast(nn.Linear, attention.to_out[0])
    own = torch.zeros(len(out.weight)) if out.bias is None else out.bias
    return fold(weight.double(), bias.double(), out.weight, own, attention.head_dim)


def time_projections(unet: UNet) -> tuple[Tensor, Tensor, dict[str, slice]]:
    """See `Blueprint.time_projections`.

    A block's projection is added to the output of its first convolution, so its bias includes the convolution's. A
    block with scale and shift keeps the two biases apart, since its projection is applied after the norm. Norms of K
    blocks read the embedding itself, the others its activation. If a U-Net has both, each projection has zero weights
    for the one it does not read.
    """
    raw = unet.config.reads_raw_embedding

    def projection(block: ResnetBlock) -> tuple[Tensor, Tensor]:
        weight, bias = block.time_emb_proj.weight, block.time_emb_proj.bias.double()
        if not block.scale_shift and block.conv1.bias is not None:
            bias = bias + block.conv1.bias.double()
        return F.pad(weight, (0, weight.shape[1])) if raw else weight, bias

    def of_norm(norm: AdaGroupNorm) -> tuple[Tensor, Tensor]:
        return F.pad(norm.linear.weight, (norm.linear.in_features, 0)), norm.linear.bias

    layers = []
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock):
            layers.append((name, *projection(module)))
        elif isinstance(module, AdaGroupNorm):
            layers.append((name, *of_norm(module)))
    return side_by_side(layers)


class UNetEmbeddings(Embeddings):
    """See `Embeddings`. The sinusoids are not rounded to the dtype of the U-Net."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.time_proj = copy.deepcopy(unet.time_proj).double()
        self.time = copy.deepcopy(unet.time_embedding).double()
        self.classes = None if unet.class_embedding is None else copy.deepcopy(unet.class_embedding).double()
        self._config, self.reads_raw = unet.config, unet.config.reads_raw_embedding
        if isinstance(self.classes, nn.Embedding):
            self.num_labels = self.classes.num_embeddings

    def of_time(self, t: Tensor) -> Tensor:
        """Return the embeddings [S, E] of timesteps [S]."""
        return self.time(self.time_proj(t).double())

    def of_labels(self, labels: Tensor) -> Tensor:
        """Return the embeddings [N, E] of class labels as the U-Net takes them, [N] or [N, E]."""
        if self._config.class_embed_type == "timestep":
            labels = self.time_proj(labels).double()
        return labels.double() if self.classes is None else self.classes(labels)

    def activate(self, emb: Tensor) -> Tensor:
        """See `Embeddings.activate`."""
        active = ACTIVATIONS[self._config.activation](emb)
        return torch.cat([active, emb], dim=-1) if self.reads_raw else active
