"""fuse on the U-Nets of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from fastddpm_kernels.testing import assert_close
from fusing_networks import ADD, FILM, PLAIN, done, exactly
from torch import Tensor
from unets import SMALL

from fastddpm.interop.fusing import fuse
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling.sampler import Sampler


def unet(**options: Any) -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(**SMALL, **options).eval()


def conditional_unet() -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 24),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()


def unet_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 8, 8), torch.tensor([3, 700])


RESNETS: dict[str, tuple[dict[str, Any], str]] = {
    "default": ({}, ADD),
    "scale_shift": ({"resnet_time_scale_shift": "scale_shift"}, FILM),
    "resnet_sampling": ({"downsample_type": "resnet", "upsample_type": "resnet"}, ADD),
}


@pytest.mark.parametrize(
    ("case", "backend"),
    [("default", "eager"), ("scale_shift", "triton"), ("resnet_sampling", "eager")],
    indirect=["backend"],
)
def test_unet2d(case: str, backend: str) -> None:
    options, second = RESNETS[case]
    model, (x, t) = unet(**options), unet_inputs()
    fused = fuse(model, (x, t), backend=backend)
    left = [norm.name for norm in fused.norms if not norm.fused]
    assert left
    assert all(name.endswith("group_norm") for name in left)  # of attention: no SiLU
    for name, what in done(fused).items():
        assert what == (second if name.endswith("norm2") else PLAIN)
    assert len(done(fused)) + len(left) == len(fused.norms)
    exact = exactly(model)(x.double(), t).sample
    with torch.no_grad():
        assert_close(fused.model(x, t).sample, exact, eager=model(x, t).sample, factor=4)


def test_unet2d_condition(backend: str) -> None:
    model = conditional_unet()
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": 7, "encoder_hidden_states": torch.randn(2, 5, 8)}
    fused = fuse(model, inputs, backend=backend)
    left = [norm.name for norm in fused.norms if not norm.fused]
    assert len(left) == 4
    assert all("attentions" in name for name in left)
    assert done(fused)["conv_norm_out"] == PLAIN  # beneath a decorator
    assert done(fused)["mid_block.resnets.0.norm2"] == ADD
    assert fused.error is not None
    assert fused.error < 1e-5
    assert fused.model.config == model.config
    exact = exactly(model)
    doubled = {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with torch.no_grad():
        assert_close(fused.model(**inputs).sample, exact(**doubled).sample, eager=model(**inputs).sample, factor=4)


def test_saves_as_before(tmp_path: Path) -> None:
    model, inputs = unet(), unet_inputs()
    fused = fuse(model).model
    fused.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert type(loaded) is diffusers.UNet2DModel
    assert torch.equal(loaded(*inputs).sample, model(*inputs).sample)


def test_sampler_takes_it() -> None:
    model, schedule = unet(), NoiseSchedule.linear(100)
    plain = Sampler(model, schedule, num_inference_steps=3).sample(2, seed=0, shape=(3, 8, 8))
    fused = Sampler(fuse(model).model, schedule, num_inference_steps=3).sample(2, seed=0, shape=(3, 8, 8))
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5)


def test_compiles_diffusers() -> None:
    model, inputs = unet(), unet_inputs()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(fuse(model).model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*inputs).sample, model(*inputs).sample)
