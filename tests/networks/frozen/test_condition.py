"""diffusers' UNet2DConditionModel, frozen: exactly itself in float64, to rounding natively, for every type of block."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from fastddpm_kernels.testing import errors
from torch import Tensor

from fastddpm.networks.frozen import FrozenUNet, cuda_instructions, why_not

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
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
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
    """In plain torch and by both fused plans, with what may be left out or without, in sizes of any factor."""
    unet = make_unet(case)
    assert why_not(unet) is None
    for fused, fusion in ((False, "auto"), (True, "parts"), (True, "full")):
        frozen = FrozenUNet(unet, backend="eager", fused=fused, fusion=fusion)
        assert frozen.differs() is None
        runs = [(1, (8, 8), ()), (3, (4, 12), OPTIONAL.get(case, ()))]
        if frozen.blueprint.any_size:
            runs.append((2, (9, 6), ()))
        for batch, size, optional in runs:
            given = Arguments(frozen, batch, size, optional)
            expected = given.theirs(frozen, TIMESTEPS[1])
            error = errors(given.ours(frozen, 1), expected)
            assert max(error) < 1e-12, (fused, fusion, batch, size, error)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_changed_weights_reach_every_plan(case: str) -> None:
    """A weight that is read in two forms, as parts and in a whole layer, has a name for each."""
    unet = make_unet(case)
    plans = [FrozenUNet(unet, backend="eager", fused=True, fusion=fusion) for fusion in ("auto", "full")]
    given = Arguments(plans[0], 1, (8, 8), ())
    programs = []
    for frozen in plans:
        inputs = frozen.new_input(given.x.shape)
        programs.append(frozen.bind(inputs.copy_(given.x), TIMESTEPS, given.labels, given.conditions))
    for parameter in unet.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    expected = given.theirs(plans[0], TIMESTEPS[1])
    for program in programs:
        program.load()
        assert max(errors(program(torch.tensor([1])), expected)) < 1e-12


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


def test_weights_are_in_memory_once(native: str) -> None:
    """Where they are released: the module computes NaN, and the frozen network what the module did."""
    unet = make_unet("sdxl", torch.float32)
    frozen = FrozenUNet(unet, backend=native)
    given = Arguments(frozen, 2, (8, 8))
    expected = given.theirs(frozen, TIMESTEPS[1])
    frozen.release()
    found = given.ours(frozen, 1)
    assert errors(found, expected)[0] < 1e-5
    kept = sum(weight.untyped_storage().nbytes() for weight in unet.parameters())
    whole = sum(weight.numel() * weight.itemsize for weight in unet.parameters())
    assert kept < 0.2 * whole
    assert given.theirs(frozen, TIMESTEPS[1]).isnan().all()
    assert torch.equal(given.ours(frozen, 1), found)
    with pytest.raises(ValueError, match="before the first bind"):
        frozen.release()


def test_weights_and_conditions_are_followed(native: str) -> None:
    """In place: what was bound once computes with new weights, of sizes that no factor divides too."""
    unet = make_unet("sd15", torch.float32)
    frozen = FrozenUNet(unet, backend=native)
    given = Arguments(frozen, 2, (9, 6), ("encoder_attention_mask",))
    inputs, step = frozen.new_input(given.x.shape), torch.tensor([1])
    inputs.copy_(given.x)
    program = frozen.bind(inputs, TIMESTEPS, None, given.conditions)
    for _ in range(2):
        assert errors(program(step), given.theirs(frozen, TIMESTEPS[1]))[0] < 1e-5
        with torch.no_grad():
            for weight in unet.parameters():
                weight.mul_(1.25)
        given.conditions["encoder_hidden_states"].neg_()
        given.conditions["encoder_attention_mask"].logical_not_()
        program.load()


def test_a_controlnet_adds_at_every_step() -> None:
    unet = make_unet("sd15")
    frozen = FrozenUNet(unet, backend="eager")
    given = Arguments(frozen, 2, (8, 8))
    sizes = [(8, 8)] * 3 + [(4, 4)] * 3
    names = [name for name, known in frozen.blueprint.conditions.items() if known.each_step]
    for name, size in zip(names, [*sizes, (4, 4)], strict=True):
        channels = frozen.blueprint.conditions[name].shape[0] or 0
        given.conditions[name] = torch.randn(2, channels, *size, dtype=torch.float64)
    inputs, step = frozen.new_input(given.x.shape), torch.tensor([1])
    inputs.copy_(given.x)
    program = frozen.bind(inputs, TIMESTEPS, None, given.conditions)
    program.load()
    for _ in range(2):
        assert errors(program(step), given.theirs(frozen, TIMESTEPS[1]))[1] < 1e-12
        given.conditions[names[0]].mul_(2)  # without a load
        given.conditions[names[-1]].mul_(3)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("sd15", {"encoder_hidden_states": None}, "encoder_hidden_states is missing"),
        ("sd15", {"encoder_hidden_states": (1, 5, 13)}, r"encoder_hidden_states has shape \(1, 5, 13\)"),
        ("sd15", {"encoder_attention_mask": (1, 4)}, "encoder_attention_mask has 4 tokens"),
        ("sd15", {"text_embeds": (1, 4)}, "text_embeds is given, but this U-Net does not take it"),
        ("sd15", {"down_block_additional_residuals.0": (1, 8, 8, 8)}, "down_block_additional_residuals has 1 entries"),
        ("sdxl", {"time_ids": None}, "time_ids is missing"),
        ("sdxl", {"time_ids": (1, 4)}, "time_ids 4 columns, 37 embedded, must have 31"),
    ],
)
def test_wrong_conditions_are_named(case: str, change: dict[str, Any], message: str) -> None:
    frozen = FrozenUNet(make_unet(case, torch.float32))
    given = Arguments(frozen, 1, (8, 8))
    for name, shape in change.items():
        given.conditions.pop(name, None)
        if shape is not None:
            given.conditions[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        frozen.bind(frozen.new_input(given.x.shape), TIMESTEPS, given.labels, given.conditions)


def test_what_cannot_be_frozen_is_named() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    def processor(unet: Any) -> None:
        class Own(AttnProcessor):
            pass

        unet.set_attn_processor(Own())

    def layer(unet: Any) -> None:
        class Lora(torch.nn.Linear):
            pass

        unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q = Lora(8, 8)

    for change, reason in (
        (processor, "has the attention processor Own"),
        (layer, "attn1.to_q is a Lora"),
        (lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4), "has FreeU enabled"),
        (lambda unet: unet.fuse_qkv_projections(), "has fused projections|is a Linear|FusedAttn"),
        (lambda unet: unet.register_forward_hook(lambda *_: None), "has hooks"),
    ):
        unet = make_unet("sd15", torch.float32)
        frozen = FrozenUNet(unet)
        change(unet)
        found = why_not(unet)
        assert found is not None
        assert re.search(reason, found), found
        with pytest.raises(ValueError, match="unet has changed since it was frozen"):
            frozen.refresh()


def test_launches_of_stable_diffusion() -> None:
    """Whole layers: two kernels a residual block, nine a transformer."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    parts, full = ([*cuda_instructions(unet, 2, fusion=fusion)] for fusion in ("parts", "full"))
    before, after = (sum(i.kernels for i in found) + 2 for found in (parts, full))
    assert before == 388
    assert after <= 0.55 * before
    block = [i for i in full if i.name.startswith("mid_block.attentions.0.")]
    assert len(block) == 9
