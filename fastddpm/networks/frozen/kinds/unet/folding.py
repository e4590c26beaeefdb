"""Exact algebra on the weights of fastddpm's U-Net: layers that become one, and its embeddings, in float64."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from fastddpm.networks.frozen.blueprint import Embeddings
from fastddpm.networks.frozen.folding import side_by_side
from fastddpm.networks.unet.layers import Attention, ResnetBlock
from fastddpm.networks.unet.model import UNet, sinusoids

# What a row of a 4x4 transposed convolution of stride 2 holds of the rows of a 3x3 convolution of the upsampled image:
# output row 2i sees input rows i - 1 (weight row 0) and i (rows 1 and 2), output row 2i + 1 sees i (0 and 1) and i + 1.
_TAPS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


def upsample_conv(weight: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by two and a 3x3 convolution as one transposed convolution of stride 2, padding 1.

    16 multiplications per input pixel and pair of channels in place of 36.

    Args:
        weight: [O, I, 3, 3], of the convolution.

    Returns:
        [I, O, 4, 4], as `conv_transpose2d` takes it.
    """
    taps = torch.tensor(_TAPS, dtype=torch.float64, device=weight.device)
    return torch.einsum("ak,bl,oikl->ioab", taps, taps, weight.double())


def folds_output(attention: Attention) -> bool:
    """Return whether the output projection can be folded into the values, which then have the output's width.

    With one head, softmax(..) (V Wv) Wo is softmax(..) (V (Wv Wo)).
    """
    return attention.heads == 1


def attention_projections(attention: Attention) -> tuple[Tensor, Tensor]:
    """Return queries, keys and values as one linear layer: (weight [., C], bias [.]).

    Where `folds_output`, the values carry the output projection too. They also carry its bias, since the attention's
    weights add up to one.
    """
    q, k, v, out = attention.to_q, attention.to_k, attention.to_v, cast(nn.Linear, attention.to_out[0])
    weights = [layer.weight.double() for layer in (q, k, v)]
    biases = [layer.bias.double() for layer in (q, k, v)]
    if folds_output(attention):
        to_out = out.weight.double()
        biases[2] = to_out @ biases[2] + out.bias.double()
        weights[2] = to_out @ weights[2]
    return torch.cat(weights), torch.cat(biases)


def time_projections(unet: UNet) -> tuple[Tensor, Tensor, dict[str, slice]]:
    """See `Blueprint.time_projections`.

    The bias of a block's first convolution, to whose output the projection is added, is in the projection's. A block
    with scale and shift keeps the two apart: its projection is applied after the norm.
    """

    def projection(block: ResnetBlock) -> tuple[Tensor, Tensor]:
        weight, bias = block.time_emb_proj.weight, block.time_emb_proj.bias.double()
        if not block.scale_shift and block.conv1.bias is not None:
            bias = bias + block.conv1.bias.double()
        return weight, bias

    blocks = ((name, module) for name, module in unet.named_modules() if isinstance(module, ResnetBlock))
    return side_by_side((name, *projection(block)) for name, block in blocks)


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
