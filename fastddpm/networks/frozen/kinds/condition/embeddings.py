"""The embeddings of a `UNet2DConditionModel`: of time in float64, of labels and conditions by its own layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.networks.frozen.blueprint import Embeddings

# What diffusers takes in `added_cond_kwargs`.
ADDED = ("text_embeds", "time_ids", "image_embeds")
# By addition_embed_type, the conditions that are embedded.
_EMBEDDED: dict[str | None, tuple[str, ...]] = {
    "text": ("encoder_hidden_states",),
    "text_time": ("text_embeds", "time_ids"),
    "image": ("image_embeds",),
    "text_image": ("encoder_hidden_states", "text_embeds", "image_embeds"),
}


def arguments_of(unet: nn.Module, conditions: Mapping[str, Tensor]) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Return encoder_hidden_states and added_cond_kwargs in the dtype and on the device of the U-Net."""
    own = next(unet.parameters())

    def moved(name: str) -> Tensor | None:
        given = conditions.get(name)
        if given is None:
            return None
        return given.to(own.device) if name == "time_ids" else given.to(own)

    added = {name: value for name in ADDED if (value := moved(name)) is not None}
    return moved("encoder_hidden_states"), added


class ConditionEmbeddings(Embeddings):
    """See `Embeddings`. The sinusoids are not rounded to the dtype of the U-Net.

    A condition of the time itself (`timestep_cond`) is added before its two layers. Then the first columns of an
    embedding are what the first layer makes of either, and `activate` computes the rest.
    """

    def __init__(self, unet: Any, active: bool, raw: bool) -> None:
        """Describe the embeddings of a U-Net whose projections read them activated, raw, or both."""
        super().__init__()
        config = unet.config
        self.time_proj = copy.deepcopy(unet.time_proj)
        self.time = copy.deepcopy(unet.time_embedding).double()
        self._unet = (unet,)  # not a submodule: `to` must not move it
        self._active, self._raw = active, raw
        self.reads_raw = active and raw
        self._width = self.time.linear_2.out_features
        self._class_width = self._width if config.class_embeddings_concat else 0
        self._early = self.time.linear_1.out_features if self.time.cond_proj is not None else 0
        self.width = self._early + self._width + self._class_width
        if isinstance(unet.class_embedding, nn.Embedding):
            self.num_labels = unet.class_embedding.num_embeddings
        self._added = _EMBEDDED.get(config.addition_embed_type, ())
        self.conditions = (*self._added, *(("timestep_cond",) if self._early else ()))

    def of_time(self, t: Tensor) -> Tensor:
        """Return the embeddings [S, E] of timesteps [S]."""
        sinusoids = self.time_proj(t).double()
        if self._early:
            return F.pad(self.time.linear_1(sinusoids), (0, self._width + self._class_width))
        return F.pad(self.time(sinusoids), (0, self._class_width))

    def of_labels(self, labels: Tensor) -> Tensor:
        """Return the embeddings [N, E] of labels as the U-Net takes them."""
        unet: Any = self._unet[0]
        own = next(unet.parameters())
        given = labels.to(own.device)
        if given.is_floating_point() and unet.config.class_embed_type != "timestep":
            given = given.to(own.dtype)
        emb = unet.get_class_embed(sample=own.new_empty(0), class_labels=given).to(labels.device).double()
        if self._class_width:
            return F.pad(emb, (self._early + self._width, 0))
        return F.pad(emb, (self._early, 0))

    def of_conditions(self, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the embeddings [N, E] of what is added to the time's, and of `timestep_cond`."""
        unet: Any = self._unet[0]
        first = next(iter(conditions.values()))
        emb = torch.zeros(len(first), self.width or 0, dtype=torch.float64, device=first.device)
        if self._added:
            own = next(unet.parameters())
            text, added = arguments_of(unet, conditions)
            aug = unet.get_aug_embed(emb=own.new_empty(0), encoder_hidden_states=text, added_cond_kwargs=added)
            emb[:, self._early : self._early + self._width] += aug.to(first.device).double()
        if (early := conditions.get("timestep_cond")) is not None:
            emb[:, : self._early] += self.time.cond_proj(early.double()) @ self.time.linear_1.weight.T
        return emb

    def activate(self, emb: Tensor) -> Tensor:
        """See `Embeddings.activate`."""
        unet: Any = self._unet[0]
        dtype = emb.dtype
        if self._early:
            early, emb = emb[..., : self._early], emb[..., self._early :]
            first = early.double() if self.time.act is None else self.time.act(early.double())
            first = self.time.linear_2(first)
            first = first if self.time.post_act is None else self.time.post_act(first)
            emb = (emb + F.pad(first, (0, self._class_width))).to(dtype)
        if unet.time_embed_act is not None:
            emb = unet.time_embed_act(emb)
        if not self._active:
            return emb
        active = activation_of(unet)(emb)
        return torch.cat([active, emb], dim=-1) if self._raw else active


def activation_of(unet: nn.Module) -> nn.Module:
    """Return the activation of the residual blocks."""
    found: Any = next(layer for layer in unet.modules() if type(layer).__name__ == "ResnetBlock2D")
    activation: nn.Module = found.nonlinearity
    return activation
