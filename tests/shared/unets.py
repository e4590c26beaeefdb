"""U-Nets that several files of tests build, and weights for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# The published google/ddpm-* models.
GOOGLE: dict[str, Any] = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
CIFAR10 = GOOGLE | {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
CELEBA_HQ = GOOGLE | {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
# Two levels, attention in the lower one.
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 24),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
# For grey pictures, of two levels, that costs nothing.
TINY: dict[str, Any] = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4,
}  # fmt: skip
# What may differ from SMALL; each file has further ones of its own.
OPTIONS: dict[str, dict[str, Any]] = {
    "heads_of_8": {},
    "one_head": {"attention_head_dim": None},
    "head_dim_not_a_divisor": {"attention_head_dim": 7},
    "padding_0": {"downsample_padding": 0},
    "classes": {"num_class_embeds": 5},
    "class_timestep": {"class_embed_type": "timestep"},
    "class_identity": {"class_embed_type": "identity"},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "attn_groups": {"attn_norm_num_groups": 2, "norm_eps": 1e-2},
    "mid_scale": {"mid_block_scale_factor": 1.7},
    "no_mid_attention": {"add_attention": False, "attn_norm_num_groups": 7},
    "no_mid_block": {"mid_block_type": None},
    "centred": {"center_input_sample": True, "act_fn": "swish"},
    "channels": {"in_channels": 1, "out_channels": 6, "layers_per_block": 2},
    "one_level": {
        "block_out_channels": (16,), "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",),
    },
    "three_levels": {
        "block_out_channels": (8, 24, 16), "layers_per_block": 2,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
}  # fmt: skip


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Random parameters, none of them 0 or 1 throughout, of about the scale that keeps activations near 1."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                norm = isinstance(module, nn.GroupNorm) and name == "weight"
                parameter.normal_(mean=1.0 if norm else 0.0, std=0.3)
