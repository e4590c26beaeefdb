"""Give a text-conditional U-Net the embeddings of prompts, so that class labels choose among them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.networks.network import prediction_of


def text_width(unet: Any) -> int | None:
    """Return the width of the text embeddings that a network reads; None if it reads none or its config is silent."""
    config = getattr(unet, "config", None)
    if getattr(config, "encoder_hid_dim_type", None) is not None:
        return getattr(config, "encoder_hid_dim", None)
    width = getattr(config, "cross_attention_dim", None)
    return width if isinstance(width, int) else None


class PromptedUNet(nn.Module):
    """A text-conditional U-Net with the embeddings of P prompts: label p stands for prompt p, label P for no text.

    To a `Sampler` it is a class-conditional network, so guidance, batches and shards need to know nothing of text.

        Sampler(PromptedUNet(unet, encoder(["a red car"])), schedule, guidance_scale=3.0).sample(1, class_labels=0)

    Args:
        unet: called as unet(x, t, encoder_hidden_states=...), such as diffusers' `UNet2DConditionModel`.
        embeddings: float [P, L, D], zeros after the end of a prompt.
        negative: float [L, D], what the unconditional half of guidance is told; None for zeros, no text.

    Raises:
        ValueError: the embeddings have another shape, or another width than the U-Net reads.
    """

    def __init__(self, unet: nn.Module, embeddings: Tensor, negative: Tensor | None = None) -> None:
        super().__init__()
        if embeddings.ndim != 3 or not embeddings.is_floating_point():
            raise ValueError(
                f"embeddings is {embeddings.dtype} {list(embeddings.shape)}, must be floating-point [P, L, D]"
            )
        if (width := text_width(unet)) not in (None, embeddings.shape[2]):
            raise ValueError(f"embeddings has width {embeddings.shape[2]}, must have {width}, which the U-Net reads")
        if negative is None:
            negative = torch.zeros_like(embeddings[0])
        elif negative.shape != embeddings.shape[1:]:
            raise ValueError(f"negative has shape {list(negative.shape)}, must have {list(embeddings.shape[1:])}")
        self.unet = unet
        self.register_buffer("embeddings", torch.cat([embeddings, negative[None].to(embeddings)]))
        self.embeddings: Tensor
        prompts, config = len(embeddings), getattr(unet, "config", None)
        sizes = {name: getattr(config, name, None) for name in ("sample_size", "in_channels", "out_channels")}
        self.config = SimpleNamespace(**sizes, num_class_embeds=prompts + 1, null_class=prompts)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        """Return the prediction for x [N, C, ...] at t [N], told the prompts of `class_labels`, int64 [N]."""
        told = self.embeddings.index_select(0, class_labels).to(x.dtype)
        return prediction_of(self.unet(x, t, encoder_hidden_states=told))
