"""diffusers' UNet2DConditionModel, frozen: exactly itself in float64, to rounding natively, for every type of block."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from fastddpm_kernels.testing import errors
from torch import Tensor

from fastddpm.networks.frozen import FrozenUNet, why_not

pytest.importorskip("diffusers", reason="diffusers is not installed")
logging.getLogger("diffusers").setLevel(logging.ERROR)

TIMESTEPS = torch.tensor([981, 500, 21, 1])
SD: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "cross_attention_dim": 12, "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SDXL = SD | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 4), "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 6, "projection_class_embeddings_input_dim": 31,
}  # fmt: skip
IF = {
    "sample_size": 8, "in_channels": 3, "out_channels": 6, "block_out_channels": (8, 16), "layers_per_block": 1,
    "norm_num_groups": 4, "cross_attention_dim": 64, "attention_head_dim": 4, "act_fn": "gelu",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "resnet_time_scale_shift": "scale_shift",
    "cross_attention_norm": "group_norm", "encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text", "addition_embed_type_num_heads": 2, "time_embedding_act_fn": "gelu",
    "resnet_skip_time_act": True, "resnet_out_scale_factor": 1.0, "flip_sin_to_cos": True, "freq_shift": 0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "sd15": SD | {"layers_per_block": 2},
    "sd21": SD | {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True},
    "sdxl": SDXL,
    "sdxl_refiner": SDXL | {
        "block_out_channels": (8, 16, 16), "attention_head_dim": (1, 4, 4), "transformer_layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "if_1": IF,
    "if_2": IF | {
        "in_channels": 6, "class_embed_type": "timestep", "only_cross_attention": True, "layers_per_block": (1, 2),
        "resnet_out_scale_factor": 0.7071, "resnet_skip_time_act": False,
        "mid_block_scale_factor": 1.4142, "timestep_post_act": "silu",
    },
    "if_3": IF | {
        "in_channels": 6, "class_embed_type": "timestep", "time_embedding_act_fn": None,
        "only_cross_attention": (False, True), "mid_block_only_cross_attention": False, "cross_attention_norm": None,
    },
    "karlo": IF | {
        "act_fn": "silu", "class_embed_type": "identity", "encoder_hid_dim": None, "encoder_hid_dim_type": None,
        "addition_embed_type": None, "time_embedding_act_fn": None, "resnet_skip_time_act": False,
        "cross_attention_norm": None, "layers_per_block": 3,
    },
    "inpainting": SD | {"in_channels": 9},
    "lcm": SD | {"time_cond_proj_dim": 10},
    "upscaler": SD | {
        "in_channels": 7, "num_class_embeds": 50, "only_cross_attention": (True, False),
        "downsample_padding": 0,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "options": SD | {
        "center_input_sample": True, "mid_block_type": None, "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 5, "class_embeddings_concat": True, "time_embedding_dim": 20,
        "conv_in_kernel": 1, "conv_out_kernel": 1, "act_fn": "mish",
    },
    "mixed": SD | {  # some blocks read the embedding activated, others not
        "mid_block_type": "UNetMidBlock2D", "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 5, "time_embedding_type": "fourier", "resnet_skip_time_act": True,
        "down_block_types": ("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    },
    "kandinsky": SD | {
        "encoder_hid_dim": 14, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image",
    },
}  # fmt: skip


@torch.no_grad()
def make_unet(case: str | dict[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**(CASES[case] if isinstance(case, str) else case)).to(dtype).eval()
    for name, weight in unet.named_parameters():
        if weight.ndim == 1:  # neither zeros nor ones
            weight.copy_(torch.randn_like(weight) * 0.2 + ("norm" in name and name.endswith("weight")))
    return unet


class Arguments:
    """Random arguments of a call."""

    def __init__(self, frozen: FrozenUNet, batch: int, size: tuple[int, int], optional: tuple[str, ...] = ()) -> None:
        blueprint = frozen.blueprint
        first = next(frozen.unet.parameters())
        self.x = torch.randn(batch, blueprint.in_channels, *size, dtype=first.dtype)
        self.labels = blueprint.some_labels(batch, "cpu")
        if self.labels is not None:
            values = torch.rand(self.labels.shape, dtype=torch.float64) * 9
            self.labels = values.to(self.labels.dtype)
        self.conditions: dict[str, Tensor] = {}
        for name, known in blueprint.conditions.items():
            if known.optional and name not in optional:
                continue
            shape = [5 if entry is None else entry for entry in known.shape]
            if name == "text_embeds":
                shape = [13]
            if name == "time_ids":
                shape = [3]
            self.conditions[name] = torch.randn(batch, *shape, dtype=first.dtype)
            if name.endswith("mask"):
                self.conditions[name] = torch.arange(batch)[:, None] % 2 + torch.arange(5) < 4

    def theirs(self, frozen: FrozenUNet, t: Tensor) -> Tensor:
        with torch.no_grad():
            return frozen.blueprint.call(self.x, t.expand(len(self.x)), self.labels, **self.conditions)

    def ours(self, frozen: FrozenUNet, row: int) -> Tensor:
        inputs = frozen.new_input(self.x.shape)
        inputs.copy_(self.x)
        program = frozen.bind(inputs, TIMESTEPS, self.labels, self.conditions)
        first = program(torch.tensor([row])).clone()
        assert torch.equal(first, program(torch.tensor([row]))), "a run changed what the next one reads"
        return first


OPTIONAL = {"sd15": ("encoder_attention_mask",), "karlo": ("attention_mask",), "lcm": ("timestep_cond",)}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_module_in_float64(case: str) -> None:
    """In plain torch and by the fused plan, with and without what may be left out, in every size that diffusers takes."""
    unet = make_unet(case)
    assert why_not(unet) is None
    for fused in (False, True):
        frozen = FrozenUNet(unet, backend="eager", fused=fused)
        assert frozen.differs() is None
        runs = [(1, (8, 8), ()), (3, (4, 12), OPTIONAL.get(case, ()))]
        if frozen.blueprint.any_size:
            runs.append((2, (9, 6), ()))
        for batch, size, optional in runs:
            given = Arguments(frozen, batch, size, optional)
            expected = given.theirs(frozen, TIMESTEPS[1])
            error = errors(given.ours(frozen, 1), expected)
            assert max(error) < 1e-12, (fused, batch, size, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["sd15", "sdxl", "if_1", "if_2", "karlo", "lcm"])
def test_native_loses_no_more_than_eager(case: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("native" if dtype == torch.float32 else "native_bfloat16")
    wide = make_unet(case)
    unet = make_unet(case, torch.float32)
    for own, known in zip(unet.parameters(), wide.parameters(), strict=True):
        known.data.copy_(own.data.to(dtype).double())
        own.data.copy_(own.data.to(dtype))
    truth = FrozenUNet(wide, backend="eager")
    frozen = FrozenUNet(unet, dtype, backend="native")
    given = Arguments(truth, 2, (8, 8), OPTIONAL.get(case, ()))
    given.x = given.x.to(dtype).double()
    given.conditions = {k: v.to(dtype).double() if v.is_floating_point() else v for k, v in given.conditions.items()}
    expected = given.theirs(truth, TIMESTEPS[2])
    unet = unet.to(dtype)
    plain = FrozenUNet(unet, backend="eager", fused=False)
    given.x = given.x.to(dtype)
    given.conditions = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.conditions.items()}
    if given.labels is not None and given.labels.is_floating_point():
        given.labels = given.labels.to(dtype)
    eager = errors(given.theirs(plain, TIMESTEPS[2]), expected)
    found = errors(given.ours(frozen, 2), expected)
    assert found[1] <= 2 * eager[1] + 1e-6, (found, eager)
