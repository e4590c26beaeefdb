"""Every option of diffusers' UNet2DModel, plain and frozen, against diffusers' module in float64; and files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from fastddpm_kernels.testing import errors
from sampled import few
from torch import Tensor
from unets import SMALL, randomize

from fastddpm.networks.frozen import FrozenUNet
from fastddpm.networks.unet import files
from fastddpm.networks.unet.model import UNet

NCSNPP: dict[str, Any] = {
    "time_embedding_type": "fourier",
    "norm_num_groups": None,
    "block_out_channels": (32, 32),
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "attention_head_dim": None,
    "mid_block_scale_factor": 1.41421356237,
}
K: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("KDownBlock2D",) * 2,
    "up_block_types": ("KUpBlock2D",) * 2,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ncsnpp": NCSNPP,
    "ncsnpp_three_levels": NCSNPP
    | {
        "block_out_channels": (32, 64, 32),
        "down_block_types": ("AttnSkipDownBlock2D", "SkipDownBlock2D", "SkipDownBlock2D"),
        "up_block_types": ("SkipUpBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D"),
        "layers_per_block": 2,
        "act_fn": "mish",
    },
    "ncsnpp_centred_scale_shift": NCSNPP | {"center_input_sample": True, "resnet_time_scale_shift": "scale_shift"},
    "skip_down_alone": {"down_block_types": ("SkipDownBlock2D", "DownBlock2D")},
    "skip_up_after_another": {
        "block_out_channels": (16, 24, 32),
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D", "SkipUpBlock2D", "SkipUpBlock2D"),
    },
    "skip_up_last": {"up_block_types": ("UpBlock2D", "SkipUpBlock2D"), "out_channels": 5},
    "skip_of_one_level": {
        "block_out_channels": (16,),
        "down_block_types": ("SkipDownBlock2D",),
        "up_block_types": ("SkipUpBlock2D",),
        "in_channels": 1,
        "out_channels": 2,
    },
    "learned": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "learned_class_timestep": {
        "time_embedding_type": "learned", "num_train_timesteps": 1000, "class_embed_type": "timestep",
    },
    "fourier_class_timestep": {"time_embedding_type": "fourier", "class_embed_type": "timestep"},
    "fourier_classes": {"time_embedding_type": "fourier", "num_class_embeds": 5},
    "mish": {"act_fn": "mish"},
    "gelu": {"act_fn": "GELU", "class_embed_type": "identity"},
    "relu": {"act_fn": "relu", "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 5},
    "relu_resnets": {
        "act_fn": "relu", "downsample_type": "resnet", "upsample_type": "resnet",
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "k": K,
    "k_of_one_layer": K | {"block_out_channels": (64, 32), "act_fn": "silu"},
    "k_gelu_classes": K | {"act_fn": "gelu", "num_class_embeds": 5, "layers_per_block": 2},
    "k_class_timestep": K | {"class_embed_type": "timestep", "mid_block_type": None, "norm_num_groups": None},
    "k_last": {
        "block_out_channels": (32, 64, 32),
        "down_block_types": ("KDownBlock2D",) * 3,
        "up_block_types": ("KUpBlock2D",) * 3,
        "layers_per_block": 2,
    },
}  # fmt: skip
# Values that a random walk draws from.
CHOICES: dict[str, list[Any]] = {
    "time_embedding_type": ["positional", "fourier", "learned"],
    "act_fn": ["silu", "mish", "gelu", "relu", "swish"],
    "mid_block_type": ["UNetMidBlock2D", None],
    "mid_block_scale_factor": [1, 0.7],
    "downsample_padding": [0, 1],
    "downsample_type": ["conv", "resnet"],
    "upsample_type": ["conv", "resnet"],
    "attention_head_dim": [None, 8, 32],
    "attn_norm_num_groups": [None, 4],
    "resnet_time_scale_shift": ["default", "scale_shift"],
    "add_attention": [True, False],
    "class_embed_type": [None, "timestep", "identity"],
    "num_class_embeds": [None, 5],
    "center_input_sample": [True, False],
    "flip_sin_to_cos": [True, False],
    "freq_shift": [0, 1],
    "layers_per_block": [1, 2],
    "time_embedding_dim": [None, 24],
    "norm_num_groups": [8, None],
    "block_out_channels": [(32, 32), (32, 64), (64, 32), (32,), (32, 64, 32)],
}
DOWN = ["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D"]
UP = ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D"]


def theirs_of(fields: dict[str, Any]) -> UNet2DModel:
    """diffusers' model in float64, which leaves labels of `class_embed_type` "timestep" in float32."""
    model = UNet2DModel(**SMALL | fields).eval()
    randomize(model)
    if model.config.class_embed_type == "timestep":
        model.class_embedding.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    return model.double()


def inputs_of(model: Any, batch: int = 2, size: int = 8) -> tuple[Tensor, Tensor, Tensor | None]:
    c = model.config
    x = torch.randn(batch, c.in_channels, size, size, dtype=torch.float64)
    labels = None
    if c.class_embed_type == "identity":
        channels = c.time_embedding_dim or 4 * c.block_out_channels[0]
        labels = torch.randn(batch, channels, dtype=torch.float64)
    elif c.class_embed_type == "timestep":
        labels = torch.tensor([3, 800])[:batch]
    elif c.num_class_embeds is not None:
        labels = torch.tensor([4, 0])[:batch]
    return x, torch.tensor([999, 7])[:batch], labels


def check(fields: dict[str, Any]) -> None:
    """Plain, and frozen by plain torch and by the plan of the fused kernels."""
    theirs = theirs_of(fields)
    ours = UNet.from_diffusers(theirs)
    x, t, labels = inputs_of(theirs)
    expected = theirs(x, t, labels).sample
    assert errors(ours(x, t, labels), expected)[1] < 1e-12
    expected = theirs(x, 7, labels).sample
    for fused in (False, True):
        frozen = FrozenUNet(ours, torch.float64, fused=fused)
        inputs = frozen.new_input(x.shape).copy_(x)
        program = frozen.bind(inputs, torch.tensor([500, 7]), labels)
        assert errors(program(torch.tensor([1])), expected)[1] < 1e-12, fused


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_options(option: str) -> None:
    torch.manual_seed(0)
    check(OPTIONS[option])


@pytest.mark.parametrize("seed", few(6, range(24)))
@torch.no_grad()
def test_a_walk_over_options(seed: int) -> None:
    """Combinations that diffusers cannot run either are drawn again; whatever it runs must be equal."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    checked = 0
    while checked < 2:
        fields = {name: draw.choice(values) for name, values in CHOICES.items()}
        levels = len(fields["block_out_channels"])
        if draw.random() < 0.2:
            fields |= {"down_block_types": ("KDownBlock2D",) * levels, "up_block_types": ("KUpBlock2D",) * levels}
        else:
            fields["down_block_types"] = tuple(draw.choices(DOWN, k=levels))
            fields["up_block_types"] = tuple(draw.choices(UP, k=levels))
        fields["num_train_timesteps"] = 1000
        try:
            theirs = theirs_of(fields)
            theirs(*inputs_of(theirs))
        except (ValueError, RuntimeError, TypeError, IndexError):
            with pytest.raises(ValueError):
                UNet(**SMALL | fields)
            continue
        check(fields)
        checked += 1


@pytest.mark.parametrize("option", ["ncsnpp", "k", "mish"])
def test_gradients(option: str) -> None:
    """With and without checkpoints."""
    torch.manual_seed(0)
    theirs = theirs_of(OPTIONS[option])
    ours = UNet.from_diffusers(theirs).train()
    x, t, labels = inputs_of(theirs)
    weights = [p for p in theirs.parameters() if p.requires_grad]
    expected = torch.autograd.grad(theirs(x, t, labels).sample.square().sum(), weights)
    names = [name for name, p in theirs.named_parameters() if p.requires_grad]
    assert names
    assert not ours.is_gradient_checkpointing
    for way in (ours.enable_gradient_checkpointing, ours.disable_gradient_checkpointing):
        way()
        own = dict(ours.named_parameters())
        actual = torch.autograd.grad(ours(x, t, labels).square().sum(), [own[name] for name in names])
        for name, a, b in zip(names, actual, expected, strict=True):
            assert float((a - b).abs().max()) < 1e-11 * max(float(b.abs().max()), 1e-2), name
        if way == ours.enable_gradient_checkpointing:
            assert ours.is_gradient_checkpointing
    assert not ours.is_gradient_checkpointing


def test_checkpoints_compute_residual_blocks_twice() -> None:
    ours = UNet(**SMALL).train()
    calls: list[int] = []
    ours.down_blocks[0].get_submodule("resnets.0.conv1").register_forward_hook(lambda *_: calls.append(1))
    for enabled, expected in ((False, 1), (True, 2)):
        calls.clear()
        if enabled:
            ours.enable_gradient_checkpointing()
        ours(torch.randn(1, 3, 8, 8), 5).sum().backward()
        assert len(calls) == expected


@torch.no_grad()
def test_weights_that_change_are_taken_over_by_every_layer() -> None:
    for option in ("ncsnpp", "k", "gelu"):
        theirs = theirs_of(OPTIONS[option])
        ours = UNet.from_diffusers(theirs)
        x, _, labels = inputs_of(theirs)
        frozen = FrozenUNet(ours, torch.float64)
        program = frozen.bind(frozen.new_input(x.shape).copy_(x), torch.tensor([7]), labels)
        program(torch.tensor([0]))
        for parameter in ours.parameters():
            parameter.mul_(1.01)
        program.load()
        assert errors(program(torch.tensor([0])), ours(x, 7, labels))[1] < 1e-12


@torch.no_grad()
def test_fused_projections() -> None:
    theirs = theirs_of({})
    ours = UNet.from_diffusers(theirs)
    x, t, _ = inputs_of(theirs)
    expected = ours(x, t)
    ours.fuse_qkv_projections()
    assert "mid_block.attentions.0.to_qkv.weight" in ours.state_dict()
    assert errors(ours(x, t), expected)[1] < 1e-12
    frozen = FrozenUNet(ours, torch.float64)
    program = frozen.bind(frozen.new_input(x.shape).copy_(x), torch.tensor([7]))
    assert errors(program(torch.tensor([0])), ours(x, 7))[1] < 1e-12
    assert errors(ours.to_diffusers()(x, t).sample, expected)[1] < 1e-12
    ours.unfuse_qkv_projections()
    assert torch.equal(ours(x, t), expected)

    for layer in theirs.modules():
        if isinstance(layer, Attention):
            layer.fuse_projections()
            layer.set_processor(FusedAttnProcessor2_0())
            layer.to_qkv.weight.mul_(1.1)
    copied = UNet.from_diffusers(theirs)
    assert errors(copied(x, t), theirs(x, t).sample)[1] < 1e-12
    assert errors(expected, theirs(x, t).sample)[1] > 1e-3


@torch.no_grad()
def test_a_timestep_of_one_element_at_any_batch() -> None:
    ours = UNet(**SMALL).eval()
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(ours(x, torch.tensor([7])), ours(x, 7))
    with pytest.raises(ValueError, match=r"t has shape \(2,\), must be one number or have \(3,\)"):
        ours(x, torch.tensor([7, 8]))


@pytest.mark.parametrize(
    ("option", "way"),
    [("ncsnpp", {}), ("k", {"variant": "fp16"}), ("learned", {"max_shard_size": "20KB"}),
     ("ncsnpp", {"max_shard_size": "20KB", "variant": "ema"}), ("mish", {"safe_serialization": False}),
     ("k", {"safe_serialization": False, "max_shard_size": "20KB"})],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_files_both_ways(option: str, way: dict[str, Any], tmp_path: Path) -> None:
    """The same names and values as diffusers writes, and each reads the other's."""
    theirs = UNet2DModel(**SMALL | OPTIONS[option]).eval()
    ours = UNet.from_diffusers(theirs)
    ours.save_pretrained(tmp_path / "ours", **way)
    theirs.save_pretrained(tmp_path / "theirs", **way)
    names = [{p.name for p in (tmp_path / who).iterdir()} for who in ("ours", "theirs")]
    sharded = "max_shard_size" in way
    if sharded:  # how weights are distributed is not the same
        names = [{name for name in of if "-of-" not in name} for of in names]
    assert names[0] == names[1]
    variant = way.get("variant")
    for who in ("ours", "theirs"):
        read = UNet.from_pretrained(tmp_path / who, variant=variant)
        safe = way.get("safe_serialization", True)
        back = UNet2DModel.from_pretrained(tmp_path / who, variant=variant, use_safetensors=safe)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(read.state_dict()[name], tensor)
            assert torch.equal(back.state_dict()[name], tensor)


@torch.no_grad()
def test_what_an_earlier_save_left_is_not_read(tmp_path: Path) -> None:
    first, second = UNet(**SMALL), UNet(**SMALL)
    first.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*-of-*"))) > 1
    first.save_pretrained(tmp_path, variant="ema")
    second.save_pretrained(tmp_path)
    files_now = {p.name for p in tmp_path.iterdir()}
    assert files_now == {"config.json", files.WEIGHTS_FILE, "diffusion_pytorch_model.ema.safetensors"}
    first.save_pretrained(tmp_path, max_shard_size="20KB")
    assert torch.equal(UNet.from_pretrained(tmp_path).conv_in.weight, first.conv_in.weight)


def test_loading_as_diffusers_names_it(tmp_path: Path) -> None:
    UNet(**SMALL).half().save_pretrained(tmp_path)
    assert UNet.from_pretrained(tmp_path, torch_dtype="auto", low_cpu_mem_usage=False).dtype == torch.float16
    assert UNet.from_pretrained(tmp_path, torch_dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match=r"torch_dtype is 'half', must be a torch.dtype or 'auto'"):
        UNet.from_pretrained(tmp_path, torch_dtype="half")
    with pytest.raises(ValueError, match=r"torch_dtype is torch.float16 but dtype is torch.float32, must be None"):
        UNet.from_pretrained(tmp_path, torch_dtype=torch.float16, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"max_shard_size is 'much', must be a positive number of bytes"):
        UNet(**SMALL).save_pretrained(tmp_path, max_shard_size="much")


def test_bad_shards(tmp_path: Path) -> None:
    UNet(**SMALL).save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / files.index_files()[0]
    lost = files.shards(index)[0]
    (tmp_path / lost).unlink()
    with pytest.raises(FileNotFoundError, match=f"{lost} is missing, which .*{index.name} lists"):
        UNet.from_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="weight_map must name, for each tensor, a file beside it"):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(("size", "expected"), [(7, 7), ("10GB", 10**10), ("1.5 MiB", 3 * 2**19), ("20kb", 20_000)])
def test_sizes(size: int | str, expected: int) -> None:
    assert files.bytes_of(size) == expected


def test_filters_are_those_of_diffusers() -> None:
    from diffusers.models.downsampling import KDownsample2D, downsample_2d
    from diffusers.models.upsampling import KUpsample2D, upsample_2d

    from fastddpm.networks.unet import layers

    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    pairs = [
        (layers.fir_halve(x), downsample_2d(x, kernel=(1, 3, 3, 1))),
        (layers.fir_double(x), upsample_2d(x, kernel=(1, 3, 3, 1))),
        (layers.mirrored_halve(x), KDownsample2D()(x)),
        (layers.mirrored_double(x), KUpsample2D()(x)),
    ]
    for ours, theirs in pairs:
        assert errors(ours, theirs)[1] < 1e-14


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "skip_in_channels": ({"in_channels": 1, "out_channels": 1} | {"down_block_types": ("SkipDownBlock2D",) * 2},
                         "in_channels is 1, must be 3 with Skip blocks"),
    "skip_out_channels": ({"out_channels": 6, "up_block_types": ("SkipUpBlock2D",) * 2},
                          "out_channels is 6, must be 3 with Skip blocks"),
    "skip_then_plain": ({"up_block_types": ("SkipUpBlock2D", "UpBlock2D")},
                        "up_block_types is .*, must be such that no other block follows a Skip one"),
    "k_down_only": (K | {"up_block_types": ("UpBlock2D",) * 2}, "up_block_types is .*, must be such that number 0"),
    "k_narrow": (K | {"block_out_channels": (16, 32)}, "block_out_channels is .*, must be such that groups of 32"),
    "no_groups": ({"norm_num_groups": None}, "norm_num_groups is None, must be a positive integer"),
    "learned": ({"time_embedding_type": "learned"}, "num_train_timesteps is None, must be given where"),
    "padding": ({"downsample_padding": 2}, "downsample_padding is 2, must be 0 or 1"),
    "attention_groups": (NCSNPP | {"block_out_channels": (32, 48)},
                         "block_out_channels is .*, must be such that 32 equal groups divide the 48 channels in Attn"),
    "scaled": ({"time_embedding_type": "fourier", "timestep_scale": 2.0}, "timestep_scale is 2.0, must be 1 where"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_fields(case: str) -> None:
    fields, message = BAD[case]
    with pytest.raises(ValueError, match=f"^{message}|; {message}") as caught:
        UNet(**SMALL | fields)
    assert "\n" not in str(caught.value)


def test_an_image_too_small_to_be_mirrored() -> None:
    ours = UNet(**SMALL | K).eval()
    with pytest.raises(ValueError, match="x is 2x2 pixels, both must be positive multiples of 2, at least 4"):
        ours(torch.randn(1, 3, 2, 2), 5)
    frozen = FrozenUNet(ours)
    with pytest.raises(ValueError, match="inputs are 2x2 pixels, both must be positive multiples of 2, at least 4"):
        frozen.bind(frozen.new_input((1, 3, 2, 2)), torch.tensor([5]))


def test_a_downsampler_that_diffusers_does_not_look_at() -> None:
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    theirs = UNet2DModel(**SMALL | plain | {"downsample_type": "pool", "upsample_type": "nearest"})
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert errors(UNet.from_diffusers(theirs)(x, 5), theirs(x, 5).sample)[1] < 1e-5
    attends = UNet2DModel(**SMALL | {"down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "downsample_type": "pool"})
    with pytest.raises(ValueError, match="^downsample_type is 'pool', must be 'conv' or 'resnet'"):
        UNet.from_diffusers(attends)
