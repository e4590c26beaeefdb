"""Pipelines of diffusers whose U-Net is offloaded or cast layer by layer, subclasses, and U-Nets of every kind."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers_objects import CLOSE, draw, quiet, unet

from fastddpm.interop import accelerate
from fastddpm.networks.unet.model import UNet


def offload(model: Any) -> None:
    apply_group_offloading(
        model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )


def cast(model: Any) -> None:
    apply_layerwise_casting(model, storage_dtype=torch.float16, compute_dtype=torch.float32)


@pytest.mark.parametrize("manage", [offload, cast])
def test_a_managed_unet_runs_as_it_is(manage: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = quiet(DDPMPipeline(unet(), DDPMScheduler()))
    manage(pipeline.unet)
    expected = draw(pipeline)
    with caplog.at_level(logging.WARNING):
        fast = accelerate(pipeline, allow_general=True)
        assert torch.equal(draw(fast), expected)
        draw(fast)
    assert caplog.text.count("unet has diffusers' hook") == 1
    with pytest.raises(ValueError, match="unet has diffusers' hook .*, and runs as it is"):
        accelerate(pipeline, allow_general=False)


class Named(DDPMPipeline):
    """A subclass with more methods, called as its base."""

    def answer(self) -> int:
        """Return a number."""
        return 42


class Own(DDPMPipeline):
    """A subclass with a loop of its own."""

    def __call__(self, batch_size: int = 1) -> int:
        return batch_size


def test_subclasses() -> None:
    pipeline = quiet(Named(unet(), DDPMScheduler()))
    expected = draw(pipeline)
    fast = accelerate(pipeline)
    assert isinstance(fast, Named)
    assert fast.answer() == 42
    assert type(fast).__name__ == "Named"
    assert float((draw(fast) - expected).abs().max()) < CLOSE
    assert fast.__dict__["_engine"]._sampler is not None
    assert type(accelerate(fast)) is type(fast)
    with pytest.raises(TypeError, match=r"obj is a .*Own.*, must be a DDPMPipeline"):
        accelerate(Own(unet(), DDPMScheduler()))


@pytest.mark.parametrize(
    "fields",
    [
        {"act_fn": "gelu"},
        {"time_embedding_type": "learned", "num_train_timesteps": 1000},
        {"down_block_types": ("KDownBlock2D",) * 2, "up_block_types": ("KUpBlock2D",) * 2,
         "block_out_channels": (32, 32)},
        {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2},
    ],
    ids=["gelu", "learned", "k", "skip"],
)  # fmt: skip
def test_every_kind_of_unet(fields: dict[str, Any]) -> None:
    pipeline = quiet(DDIMPipeline(unet(**fields), DDIMScheduler()))
    fast = accelerate(pipeline)
    assert isinstance(fast._plan().model, UNet)
    assert float((draw(fast) - draw(pipeline)).abs().max()) < CLOSE


def test_joined_projections() -> None:
    model = unet()
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.fuse_projections()
            layer.set_processor(FusedAttnProcessor2_0())
            layer.to_qkv.weight.data.mul_(1.5)
    pipeline = quiet(DDPMPipeline(model, DDPMScheduler()))
    fast = accelerate(pipeline)
    ours = fast._plan().model
    assert isinstance(ours, UNet)
    assert ours.mid_block is not None
    assert ours.mid_block.get_submodule("attentions.0").to_qkv.weight is model.mid_block.attentions[0].to_qkv.weight
    assert float((draw(fast) - draw(pipeline)).abs().max()) < CLOSE
