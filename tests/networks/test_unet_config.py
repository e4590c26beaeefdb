"""The fields of a U-Net, against diffusers' UNet2DModel."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DModel
from unets import SMALL

from fastddpm.networks.unet.config import UNetConfig
from fastddpm.networks.unet.model import UNet


def test_config_has_the_fields_and_defaults_of_diffusers() -> None:
    parameters = inspect.signature(UNet2DModel.__init__).parameters
    theirs = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    ours = vars(UNetConfig()).copy()
    own = {name: ours.pop(name) for name in ("null_class", "timestep_channels", "timestep_scale")}
    assert own == {"null_class": None, "timestep_channels": None, "timestep_scale": 1.0}
    assert ours == theirs


def test_config_round_trip() -> None:
    config = UNetConfig(**SMALL | {"num_class_embeds": 3, "null_class": 2, "sample_size": [8, 16]})
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["_class_name"] == "UNet2DModel"
    assert stored["_null_class"] == 2
    assert "null_class" not in stored
    assert UNetConfig.from_dict(stored | {"_diffusers_version": "0.0.4"}) == config
    assert hash(config) == hash(UNetConfig.from_dict(stored))
    assert "_null_class" not in UNetConfig().to_dict()
    oldest = stored | {"down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]}
    assert UNetConfig.from_dict(oldest).down_block_types == SMALL["down_block_types"]


BAD_CONFIG: dict[str, Any] = {
    "time_embedding_type": "sinusoidal",
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "downsample_type": "nearest",
    "upsample_type": "pool",
    "timestep_channels": 0,
    "timestep_scale": 0.0,
    "act_fn": "tanh",
    "resnet_time_scale_shift": "spatial",
    "class_embed_type": "projection",
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D",),
    "block_out_channels": (16, 20),
    "in_channels": 0,
    "layers_per_block": (1, 2),
    "norm_num_groups": None,
    "attn_norm_num_groups": 7,
    "attention_head_dim": 25,
    "downsample_padding": 2,
    "dropout": 1.0,
    "norm_eps": 0,
    "mid_block_scale_factor": 0,
    "freq_shift": 8,
    "center_input_sample": "yes",
    "sample_size": (8, 8, 8),
    "null_class": 0,
    "num_class_embeds": True,
    "num_heads": 8,
}


@pytest.mark.parametrize("field", BAD_CONFIG)
def test_bad_config(field: str) -> None:
    value = BAD_CONFIG[field]
    with pytest.raises(ValueError) as raised:
        UNet(UNetConfig(**SMALL), **{field: value})
    assert str(raised.value).startswith(field)
    assert repr(value) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_all_that_is_wrong_with_a_file_is_named_at_once(tmp_path: Path) -> None:
    wrong = {"act_fn": "tanh", "dropout": 2, "layers_per_block": 0, "num_heads": 8, "depth": 3}
    (tmp_path / "config.json").write_text(json.dumps(UNetConfig(**SMALL).to_dict() | wrong))
    with pytest.raises(ValueError) as raised:
        UNetConfig.from_file(tmp_path / "config.json")
    first, *others = str(raised.value).split("; ")
    assert first.endswith("config.json: act_fn is 'tanh', must be one of 'silu', 'swish', 'mish', 'gelu', 'relu'")
    assert [text.split(",")[0] for text in others] == ["layers_per_block is 0", "dropout is 2", "num_heads (8)"]
    assert "depth (3) are no fields of a U-Net, which are: sample_size, " in others[-1]
    with pytest.raises(ValueError, match="down_block_types is .*norm_num_groups, 7; freq_shift is 8, must be"):
        UNetConfig(**SMALL | {"norm_num_groups": 7, "down_block_types": ("DownBlock2D",), "freq_shift": 8})


def test_config_of_another_model() -> None:
    with pytest.raises(ValueError, match="_class_name is 'UNet2DConditionModel', must be 'UNet2DModel'"):
        UNetConfig.from_dict({"_class_name": "UNet2DConditionModel"})


def test_fields_of_our_own() -> None:
    heads = (4, 8, 8, 8, 4)
    config = UNetConfig(**SMALL | {"timestep_scale": 0.25, "timestep_channels": 6, "attention_head_dim": list(heads)})
    stored = json.loads(json.dumps(config.to_dict()))
    assert (stored["timestep_scale"], stored["timestep_channels"]) == (0.25, 6)
    assert UNetConfig.from_dict(stored) == config
    assert config.not_in_diffusers == ["timestep_channels", "timestep_scale", "attention_head_dim"]
    assert "timestep_scale" not in UNetConfig().to_dict()
    assert config.head_dims == heads
    assert UNetConfig(**SMALL).head_dims == (8,) * 5
    with pytest.raises(ValueError, match=r"upsample_type is 'nearest', which diffusers' UNet2DModel does not have"):
        UNet(**SMALL, upsample_type="nearest").to_diffusers()


BAD_HEADS = {
    "a positive integer, None, or 5 positive integers, of the down, mid and up blocks": [(8, 8), (8, 8, 8, 8, 0)],
    "None or at most 24, a width with attention": [(16, 25, 8, 8, 8), (99, 8, 8, 25, 99)],
}


@pytest.mark.parametrize("message", BAD_HEADS)
def test_bad_heads_of_blocks(message: str) -> None:
    for heads in BAD_HEADS[message]:
        with pytest.raises(ValueError) as raised:
            UNetConfig(**SMALL, attention_head_dim=heads)
        assert str(raised.value) == f"attention_head_dim is {heads}, must be {message}"


def test_timesteps_of_labels_are_not_scaled() -> None:
    with pytest.raises(ValueError, match=r"timestep_scale is 2.0, must be 1 where class_embed_type is 'timestep'"):
        UNetConfig(**SMALL, class_embed_type="timestep", timestep_scale=2.0)
