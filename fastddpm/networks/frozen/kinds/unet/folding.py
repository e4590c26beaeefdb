"""Exact algebra on a U-Net's weights, done once before sampling: what several layers compute, as one.

Every function works in float64 and returns float64, so that a fold costs no precision beyond the final rounding.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from fastddpm_kernels.conv.upsampling import transposed_weight as upsample_conv  # noqa: F401
from torch import Tensor, nn

from fastddpm.networks.frozen.blueprint import Embeddings
from fastddpm.networks.unet.layers import Attention, ResnetBlock
from fastddpm.networks.unet.model import UNet, sinusoids


def folds_output(attention: Attention) -> bool:
    """Whether the output projection can be folded into the values: with one head, softmax(..) (V Wv) Wo is
    softmax(..) (V (Wv Wo)); the values then have the output's width."""
    return attention.heads == 1


def attention_projections(attention: Attention) -> tuple[Tensor, Tensor]:
    """Queries, keys and values as one linear layer: (weight [., C], bias [.]).

    Where `folds_output`, the values are those times the output projection, and its bias is in theirs, since the
    attention's weights add up to one.
    """
    q, k, v, out = attention.to_q, attention.to_k, attention.to_v, cast(nn.Linear, attention.to_out[0])
    weights = [layer.weight.double() for layer in (q, k, v)]
    biases = [layer.bias.double() for layer in (q, k, v)]
    if folds_output(attention):
        to_out = out.weight.double()
        biases[2] = to_out @ biases[2] + out.bias.double()
        weights[2] = to_out @ weights[2]
    return torch.cat(weights), torch.cat(biases)


def resnet_blocks(unet: UNet) -> list[tuple[str, ResnetBlock]]:
    """Every residual block with its name, in the order in which its columns stand in the time table."""
    return [(name, module) for name, module in unet.named_modules() if isinstance(module, ResnetBlock)]


def time_projections(unet: UNet) -> tuple[Tensor, Tensor, dict[str, slice]]:
    """The time projections of all residual blocks as one linear layer of the embedding's SiLU.

    The bias of each block's first convolution, to whose output the projection is added, is in its bias; not so for
    blocks with scale and shift, whose projection is applied after the norm.

    Returns:
        weight [sum C, E], bias [sum C], and the columns of every block by its name.
    """
    weights, biases, columns, start = [], [], {}, 0
    for name, block in resnet_blocks(unet):
        bias = block.time_emb_proj.bias.double()
        if not block.scale_shift and block.conv1.bias is not None:
            bias = bias + block.conv1.bias.double()
        weights.append(block.time_emb_proj.weight.double())
        biases.append(bias)
        columns[name] = slice(start, start + len(bias))
        start += len(bias)
    return torch.cat(weights), torch.cat(biases), columns


class UNetEmbeddings(Embeddings):
    """See `Embeddings`. The sinusoids are not rounded to the dtype that the U-Net happens to be in."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.time = copy.deepcopy(unet.time_embedding).double()
        self.classes = None if unet.class_embedding is None else copy.deepcopy(unet.class_embedding).double()
        self._config = unet.config
        if isinstance(self.classes, nn.Embedding):
            self.num_labels = self.classes.num_embeddings

    def of_time(self, t: Tensor) -> Tensor:
        """[S] timesteps -> [S, E]."""
        return self.time(sinusoids(self._config, t).double())

    def of_labels(self, labels: Tensor) -> Tensor:
        """Class labels, of the kind that the U-Net takes, [N] or [N, E] -> [N, E]."""
        if self._config.class_embed_type == "timestep":
            labels = sinusoids(self._config, labels).double()
        return labels.double() if self.classes is None else self.classes(labels)
