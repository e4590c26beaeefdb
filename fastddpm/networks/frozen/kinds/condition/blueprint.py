"""diffusers' `UNet2DConditionModel` as freezing sees it; its classes are recognised by name and never imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.networks.comparing import why_not_layers
from fastddpm.networks.frozen.blueprint import Blueprint, Condition, Embeddings
from fastddpm.networks.frozen.kinds.condition.embeddings import ADDED, ConditionEmbeddings
from fastddpm.networks.frozen.kinds.condition.lowering import ACTIVATIONS, Lowering, residuals_of

_BLOCKS = {"DownBlock2D", "ResnetDownsampleBlock2D", "CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"}
_BLOCKS |= {"UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"}
_BLOCKS |= {"UpBlock2D", "ResnetUpsampleBlock2D", "CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D"}
_LAYERS = {"ResnetBlock2D", "Downsample2D", "Upsample2D", "Transformer2DModel", "BasicTransformerBlock", "Attention"}
_LAYERS |= {"FeedForward", "GEGLU", "TimestepEmbedding", "Timesteps", "GaussianFourierProjection", "AttentionPooling"}
_LAYERS |= {"TextTimeEmbedding", "TextImageTimeEmbedding", "ImageTimeEmbedding", "TextImageProjection"}
_LAYERS |= {"ImageProjection"}
_OF_DIFFUSERS = {"UNet2DConditionModel", *_BLOCKS, *_LAYERS}
_OF_TORCH = {nn.AvgPool2d, nn.Conv2d, nn.Dropout, nn.Embedding, nn.GroupNorm, nn.Identity, nn.LayerNorm, nn.Linear}
_OF_TORCH |= {nn.ModuleList, *ACTIVATIONS}
# They compute the same attention, to rounding, in one piece or in slices, by one library or another.
_PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"}
_ADDED_PROCESSORS = {"AttnAddedKVProcessor", "AttnAddedKVProcessor2_0", "SlicedAttnAddedKVProcessor"}
_ADDED_PROCESSORS |= {"XFormersAttnAddedKVProcessor"}


class ConditionBlueprint(Blueprint):
    """`diffusers.UNet2DConditionModel`.

    Conditions have the names of its arguments and of the entries of `added_cond_kwargs`. Those that may differ between
    steps (a ControlNet's residuals) are read at every step; an entry of a list has its index after a dot.
    """

    unet: Any
    name = "a UNet2DConditionModel of diffusers"
    builder = Lowering
    foreign = True
    releases = True

    def __init__(self, unet: Any) -> None:
        config = unet.config
        self.unet = unet
        self.in_channels, self.out_channels = unet.conv_in.in_channels, unet.conv_out.out_channels
        self.factor = 2**unet.num_upsamplers
        simple = any(isinstance(block, nn.Module) and _name(block) in _RESAMPLED for block in unet.modules())
        self.any_size = not simple
        self.has_labels = unet.class_embedding is not None
        size = config.sample_size or 32
        self.sample_size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.conditions = _conditions(unet)

    @staticmethod
    def takes(model: object) -> bool:
        return _name(model) == "UNet2DConditionModel" and _is_of_diffusers(type(model))

    @staticmethod
    def why_not(model: Any) -> str | None:
        def known(kind: type) -> bool:
            return kind in _OF_TORCH or (kind.__name__ in _OF_DIFFUSERS and _is_of_diffusers(kind))

        if reason := why_not_layers(model, known):
            return reason
        config = model.config
        if config.addition_embed_type == "image_hint":
            return "it has addition_embed_type 'image_hint', whose hint is part of its input"
        if config.class_embeddings_concat and config.addition_embed_type is not None:
            return "it has class_embeddings_concat and addition_embed_type, must have one of them"
        if model.conv_norm_out is None:
            return "it has no norms"
        activations = set()
        for name, layer in model.named_modules():
            if wrong := _unusual(layer):
                return f"its layer {name} {wrong}"
            if _name(layer) == "ResnetBlock2D":
                activations.add(type(layer.nonlinearity))
        if len(activations | {type(model.conv_act)}) > 1:
            return "its layers have several activations"
        return None

    def embeddings(self) -> Embeddings:
        blocks = residuals_of(self.unet).values()
        raw = {bool(block.skip_time_act) for block in blocks}
        return ConditionEmbeddings(self.unet, False in raw, True in raw)

    def time_projections(self) -> tuple[Tensor, Tensor, dict[str, slice]]:
        """See `Blueprint.time_projections`. The weight stays in the U-Net's dtype.

        A block adds its projection to its first convolution, so its bias includes the convolution's, unless it scales
        and shifts. If some blocks read the embedding activated and others raw, each has zeros for the other.
        """
        blocks = residuals_of(self.unet)
        both = len({bool(block.skip_time_act) for block in blocks.values()}) == 2
        weights, biases, columns, start = [], [], {}, 0
        for name, block in blocks.items():
            weight, bias = block.time_emb_proj.weight.detach(), block.time_emb_proj.bias.detach().double()
            if both:
                width = weight.shape[1]
                weight = F.pad(weight, (width, 0) if block.skip_time_act else (0, width))
            if block.time_embedding_norm == "default" and block.conv1.bias is not None:
                bias = bias + block.conv1.bias.detach().double()
            weights.append(weight)
            biases.append(bias)
            columns[name] = slice(start, start + len(bias))
            start += len(bias)
        return torch.cat(weights), torch.cat(biases), columns

    def call(self, x: Tensor, t: Tensor, labels: Tensor | None, **more: Tensor) -> Tensor:
        """Call the U-Net itself; `more` holds the conditions by name."""
        added = {name: more.pop(name) for name in ADDED if name in more}
        down = [more.pop(name) for name in sorted(more, key=_index) if name.startswith("down_block_additional")]
        own: dict[str, Any] = {"encoder_hidden_states": None, **more, "added_cond_kwargs": added}
        if down:
            own["down_block_additional_residuals"] = tuple(down)
        out: Tensor = self.unet(x, t, class_labels=labels, return_dict=False, **own)[0]
        return out

    def check_labels(self, labels: Tensor, batch: int) -> None:
        embedding, kind = self.unet.class_embedding, self.unet.config.class_embed_type
        if isinstance(embedding, nn.Embedding):
            super().check_labels(labels, batch)
            return
        width = {"timestep": None, "identity": self.unet.time_embedding.linear_2.out_features}
        if kind not in width:
            width[kind] = (embedding.linear_1 if kind == "projection" else embedding).in_features
        shape = (batch,) if width[kind] is None else (batch, width[kind])
        if tuple(labels.shape) != shape:
            raise ValueError(f"class_labels have shape {tuple(labels.shape)}, must have {shape}")

    def some_labels(self, batch: int, device: torch.device | str) -> Tensor | None:
        embedding, kind = self.unet.class_embedding, self.unet.config.class_embed_type
        if embedding is None or isinstance(embedding, nn.Embedding) or kind == "timestep":
            return super().some_labels(batch, device)
        width = self.unet.time_embedding.linear_2.out_features
        if kind != "identity":
            width = (embedding.linear_1 if kind == "projection" else embedding).in_features
        own = next(self.unet.parameters())
        return torch.linspace(-1, 1, width, device=device, dtype=own.dtype).expand(batch, width).contiguous()

    def some_conditions(
        self, batch: int, device: torch.device | str, dtype: torch.dtype = torch.float32, *, optional: bool = False
    ) -> dict[str, Tensor]:
        some = super().some_conditions(batch, device, dtype, optional=optional)
        if "time_ids" in some:
            wanted, each = self.unet.add_embedding.linear_1.in_features, self.unet.add_time_proj.num_channels
            ids = min(6, (wanted - 1) // each)
            some["time_ids"] = torch.arange(ids, device=device).expand(batch, ids).to(dtype)
            pooled = torch.arange(wanted - ids * each, device=device).to(dtype).sin()
            some["text_embeds"] = pooled.expand(batch, -1).contiguous()
        return {name: given for name, given in some.items() if not self.conditions[name].each_step}

    def check_conditions(self, conditions: Mapping[str, Tensor], batch: int) -> None:
        super().check_conditions(conditions, batch)
        text = conditions.get("encoder_hidden_states")
        for name in ("encoder_attention_mask", "attention_mask"):
            mask = conditions.get(name)
            if mask is not None and text is not None and mask.shape[1] != text.shape[1]:
                raise ValueError(f"{name} has {mask.shape[1]} tokens, must have encoder_hidden_states' {text.shape[1]}")
        if "time_ids" in conditions:
            wanted = self.unet.add_embedding.linear_1.in_features
            ids, pooled = conditions["time_ids"], conditions["text_embeds"]
            given = pooled.shape[1] + ids.shape[1] * self.unet.add_time_proj.num_channels
            if given != wanted:
                raise ValueError(
                    f"text_embeds has {pooled.shape[1]} and time_ids {ids.shape[1]} columns, {given} embedded, must "
                    f"have {wanted}"
                )
        down = [name for name in conditions if name.startswith("down_block_additional_residuals.")]
        count = sum(name.startswith("down_block_additional_residuals.") for name in self.conditions)
        mid = "mid_block_additional_residual" in conditions
        if (down or mid) and (len(down) < count or not mid):
            raise ValueError(
                f"down_block_additional_residuals has {len(down)} entries, must have {count}, with "
                "mid_block_additional_residual"
            )


# Blocks that resample by residual blocks, which keep no size that a factor of two does not divide.
_RESAMPLED = {"ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", "SimpleCrossAttnDownBlock2D"}
_RESAMPLED |= {"SimpleCrossAttnUpBlock2D"}


def _conditions(unet: Any) -> dict[str, Condition]:
    config, found = unet.config, {}
    attentions = [layer for layer in unet.modules() if _name(layer) == "Attention"]
    texts = {
        (layer.add_k_proj if layer.added_kv_proj_dim is not None else layer.to_k).in_features
        for layer in attentions
        if layer.added_kv_proj_dim is not None or layer.is_cross_attention
    }
    projected = {"text_proj": config.encoder_hid_dim, "text_image_proj": config.encoder_hid_dim}
    needs_text = (texts and config.encoder_hid_dim_type != "image_proj") or config.addition_embed_type == "text"
    if needs_text:
        width = projected.get(config.encoder_hid_dim_type) or (
            texts.pop() if len(texts) == 1 else config.encoder_hid_dim
        )
        found["encoder_hidden_states"] = Condition((None, width))
    if texts or needs_text:
        found["encoder_attention_mask"] = Condition((None,), optional=True, integers=None)
        if any(layer.added_kv_proj_dim is not None for layer in attentions):
            found["attention_mask"] = Condition((None,), optional=True, integers=None)
    if config.addition_embed_type == "text_time":
        found["text_embeds"] = Condition((None,))
        found["time_ids"] = Condition((None,), integers=None)
    if config.addition_embed_type == "text_image":
        found["text_embeds"] = Condition((None,), optional=True)
    images = config.addition_embed_type in ("image", "text_image")
    if images or config.encoder_hid_dim_type in ("image_proj", "text_image_proj"):
        both = config.addition_embed_type == "text_image" or config.encoder_hid_dim_type == "text_image_proj"
        found["image_embeds"] = Condition((config.cross_attention_dim if both else config.encoder_hid_dim,))
    if unet.time_embedding.cond_proj is not None:
        found["timestep_cond"] = Condition((unet.time_embedding.cond_proj.in_features,), optional=True)
    widths = {f"down_block_additional_residuals.{i}": width for i, width in enumerate(_skip_channels(unet))}
    widths["mid_block_additional_residual"] = config.block_out_channels[-1]
    for name, width in widths.items():
        found[name] = Condition((width, None, None), optional=True, each_step=True)
    return found


def _skip_channels(unet: Any) -> list[int]:
    channels = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        channels += [resnet.out_channels for resnet in block.resnets]
        if block.downsamplers is not None:
            channels.append(block.resnets[-1].out_channels)
    return channels


def _index(name: str) -> int:
    last = name.rpartition(".")[2]
    return int(last) if last.isdigit() else -1


def _name(layer: object) -> str:
    return type(layer).__name__


def _is_of_diffusers(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "diffusers"


def _unusual(layer: Any) -> str | None:
    """Return which setting of a layer cannot be frozen, or None."""
    name = _name(layer)
    if isinstance(layer, nn.Conv2d):
        own = (layer.groups, layer.dilation, layer.padding_mode)
        return None if own == (1, (1, 1), "zeros") else f"has groups, dilation and padding_mode {own}"
    if name in ("CrossAttnUpBlock2D", "UpBlock2D"):
        free = [getattr(layer, key, None) for key in ("s1", "s2", "b1", "b2")]
        return "has FreeU enabled" if all(free) else None
    if name == "ResnetBlock2D":
        if layer.time_emb_proj is None or layer.time_embedding_norm not in ("default", "scale_shift"):
            return f"has time_embedding_norm {layer.time_embedding_norm}"
        return None if type(layer.nonlinearity) in ACTIVATIONS else f"has activation {_name(layer.nonlinearity)}"
    if name in ("Downsample2D", "Upsample2D"):
        if layer.norm is not None or getattr(layer, "use_conv_transpose", False):
            return "has a norm or a transposed convolution"
        return None if getattr(layer, "interpolate", True) else "does not interpolate"
    if name == "Transformer2DModel":
        return None if layer.is_input_continuous else "has discrete or patched input"
    if name == "BasicTransformerBlock":
        usual = layer.norm_type == "layer_norm" and layer.pos_embed is None
        return None if usual else f"has norm_type {layer.norm_type!r} or positional embeddings"
    if name == "FeedForward":
        return None if len(layer.net) == 3 else "has a dropout at its end"
    return _unusual_attention(layer) if name == "Attention" else None


def _unusual_attention(layer: Any) -> str | None:
    added = layer.added_kv_proj_dim is not None
    processor = layer.processor
    if _name(processor) not in (_ADDED_PROCESSORS if added else _PROCESSORS) or not _is_of_diffusers(type(processor)):
        return f"has the attention processor {_name(processor)}"
    if layer.spatial_norm is not None or layer.norm_q is not None or layer.norm_k is not None:
        return "has a norm of queries, keys or positions"
    if layer.fused_projections:
        return "has fused projections"
    if not layer.scale_qk or layer.is_causal or layer.inner_kv_dim != layer.inner_dim:
        return "has unscaled or causal attention, or fewer heads of keys"
    if not added and (layer.rescale_output_factor != 1 or layer.residual_connection or layer.group_norm is not None):
        return "has its own residual, norm or scale"
    return None
