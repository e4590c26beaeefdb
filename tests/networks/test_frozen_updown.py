"""Frozen U-Nets that change the resolution by residual blocks, pooling or plain upsampling, and with heads by block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastddpm.networks.frozen import FrozenUNet, cuda_instructions, freeze, instructions
from fastddpm.networks.unet.model import UNet

SMALL: dict[str, Any] = {
    "block_out_channels": (16, 24, 8),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "resnets": {},
    "guided_diffusion": {
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
        "num_class_embeds": 5,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "layers_per_block": 2,
        "out_channels": 6,
    },
    "classes": {"num_class_embeds": 5},
    "pool_and_nearest": {
        "downsample_type": "pool",
        "upsample_type": "nearest",
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "pool_up_by_resnet": {"downsample_type": "pool", "num_class_embeds": 5},
    "heads_by_block": {"attention_head_dim": (16, 6, 8, 4, 8, 12, 16)},
    "timesteps_scaled": {"timestep_scale": 0.25, "timestep_channels": 24, "time_embedding_dim": 40},
    "all_by_resnet_centred": {"center_input_sample": True, "mid_block_scale_factor": 1.3, "layers_per_block": 2},
}
TIMESTEPS = torch.tensor([999, 500, 3])


def make_unet(option: str) -> UNet:
    unet = UNet(**SMALL | OPTIONS[option]).double().eval()
    randomize(unet)
    return unet


@torch.no_grad()
def randomize(unet: UNet) -> None:
    """Random parameters, none of them 0 or 1 throughout, of about the scale that keeps activations near 1."""
    for module in unet.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                norm = isinstance(module, nn.GroupNorm) and name == "weight"
                parameter.normal_(mean=1.0 if norm else 0.0, std=0.3)


def make_inputs(unet: UNet) -> tuple[Tensor, Tensor | None]:
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    return x, torch.tensor([3, 0]) if unet.config.has_classes else None


def run(frozen: FrozenUNet, x: Tensor, row: int, labels: Tensor | None) -> Tensor:
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    program = frozen.bind(inputs, labels=labels)
    first = program(torch.tensor([row])).clone()
    assert torch.equal(program(torch.tensor([row])), first), "a run changed what the next one reads"
    return first


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "fused"])
@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_equals_the_unet_in_float64(option: str, fused: bool) -> None:
    unet = make_unet(option)
    x, labels = make_inputs(unet)
    frozen = FrozenUNet(unet, backend="eager", fused=fused)
    frozen.timesteps = TIMESTEPS
    for row, t in enumerate(TIMESTEPS):
        expected = unet(x, t, labels)
        assert rms(run(frozen, x, row, labels) - expected) <= 1e-10 * rms(expected)


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_activations_in_one_block_of_memory(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, but for the library that convolves: every result in its place, which others use before and after."""

    def conv(x: Tensor, w: Tensor, stride: int, padding: int, allow_tf32: bool, out: Tensor) -> None:
        out.copy_(F.conv2d(x, w, None, stride, padding))

    def conv_transpose(x: Tensor, w: Tensor, allow_tf32: bool) -> Tensor:
        return F.conv_transpose2d(x, w, None, stride=2, padding=1).contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(instructions, "cudnn_conv", conv)
    monkeypatch.setattr(instructions, "cudnn_conv_transpose", conv_transpose)
    unet = make_unet(option)
    x, labels = make_inputs(unet)
    frozen = FrozenUNet(unet, backend="eager", fused=True)
    frozen.static, frozen.timesteps = True, TIMESTEPS
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    program = frozen.bind(inputs, labels=labels)
    program.arena.fill_(255)  # NaN, were it read before it is written
    expected = unet(x, TIMESTEPS[1], labels)
    assert rms(program(torch.tensor([1])) - expected) <= 1e-10 * rms(expected)


@pytest.mark.parametrize("option", ["resnets", "guided_diffusion", "pool_and_nearest"])
@torch.no_grad()
def test_rounding_is_bounded_by_the_unets_own(option: str) -> None:
    unet = make_unet(option)
    x, labels = make_inputs(unet)
    expected = unet(x, TIMESTEPS[1], labels)
    for dtype in (torch.float32, torch.bfloat16):
        plain = copy.deepcopy(unet).to(dtype)(x.to(dtype), TIMESTEPS[1], labels)
        frozen = freeze(unet, TIMESTEPS, dtype, backend="eager")
        lost = rms(run(frozen, x, 1, labels).double() - expected)
        assert lost <= 1.5 * rms(plain.double() - expected)


@torch.no_grad()
def test_takes_over_weights_that_change() -> None:
    unet = make_unet("guided_diffusion")
    x, labels = make_inputs(unet)
    frozen = freeze(unet, TIMESTEPS)
    run(frozen, x, 0, labels)
    randomize(unet)
    expected = unet(x, TIMESTEPS[0], labels)
    assert rms(run(frozen, x, 0, labels) - expected) <= 1e-10 * rms(expected)


def test_kernels_of_guided_diffusion_at_64_pixels() -> None:
    """The published ImageNet model: 64 pixels, 192 channels, 3 residual blocks a level, up and down by such blocks."""
    with torch.device("meta"):
        unet = UNet(
            sample_size=64,
            out_channels=6,
            block_out_channels=(192, 384, 576, 768),
            down_block_types=("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3),
            up_block_types=(*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
            downsample_type="resnet",
            upsample_type="resnet",
            layers_per_block=3,
            attention_head_dim=64,
            attn_norm_num_groups=32,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=1000,
        )
    assert sum(parameter.numel() for parameter in unet.parameters()) == 295_904_454  # 296M in the paper
    found = cuda_instructions(unet, 8)
    resampling = [i for i in found if i.name.endswith((".halve", ".double"))]
    assert len(resampling) == 3 * 2 + 3  # both paths on the way down; on the way up the convolution upsamples
    assert sum(i.kernels for i in found) + 2 == 292  # with the reverse step and the counter
