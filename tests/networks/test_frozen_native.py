"""The frozen U-Net on the native backend: as near to float64 as its algorithms allow, and what changes under it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fastddpm_kernels import native as _native
from fastddpm_kernels.conv import error_factor
from fastddpm_kernels.conv.packing import why_not_stored
from torch import Tensor
from unets import randomize

from fastddpm.networks.frozen import FrozenUNet, freeze
from fastddpm.networks.unet.model import UNet
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling.sampler import Sampler

TIMESTEPS = torch.tensor([999, 500, 3])
SMALL: dict[str, Any] = {
    "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 4,
    "block_out_channels": (16, 24), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_head": {"attention_head_dim": None, "downsample_padding": 0},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift", "layers_per_block": 2},
    "classes": {"num_class_embeds": 5},
    "channels": {"in_channels": 1, "out_channels": 2, "block_out_channels": (20, 36)},
}


pytestmark = pytest.mark.usefixtures("native")


@torch.no_grad()
def make_unet(fields: dict[str, Any] | None = None) -> UNet:
    """In float64, with random parameters of a scale that keeps activations near 1."""
    unet = UNet(**SMALL | (fields or {})).double().eval()
    randomize(unet)
    return unet


def run(frozen: FrozenUNet, x: Tensor, row: int, labels: Tensor | None = None) -> Tensor:
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    program, step = frozen.bind(inputs, labels=labels), torch.tensor([row])
    first = program(step).clone()
    assert torch.equal(first, program(step)), "a run changed what the next one reads"
    return first


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_loses_no_more_than_its_algorithms_must(option: str, batch: int) -> None:
    unet = make_unet(OPTIONS[option])
    x = torch.randn(batch, unet.config.in_channels, 16, 8, dtype=torch.float64)
    labels = torch.arange(batch) if unet.config.has_classes else None
    frozen = freeze(unet, TIMESTEPS, torch.float32)
    assert (frozen.backend, frozen.fused, frozen.static) == ("native", True, True)
    expected = unet(x, TIMESTEPS[1], labels)
    plain = copy.deepcopy(unet).float()(x.float(), TIMESTEPS[1], labels)
    lost, plain_lost = (rms(out.double() - expected) for out in (run(frozen, x, 1, labels), plain))
    assert lost <= 1.5 * error_factor("winograd4") * plain_lost
    assert lost < 1e-5 * rms(expected)


@torch.no_grad()
def test_weights_in_float16_are_read_and_refilled() -> None:
    """A result is that of weights rounded to float16, before and after they change; others must be in float32."""
    if reason := why_not_stored(torch.float16, torch.float32):
        pytest.skip(reason)
    unet = make_unet({}).float()
    frozen = freeze(unet, TIMESTEPS, weight_dtype=torch.float16)
    x = torch.randn(2, unet.config.in_channels, 16, 8)
    for _ in range(2):
        expected = copy.deepcopy(unet).double()(x.double(), TIMESTEPS[1])
        lost = rms(run(frozen, x, 1).double() - expected) / rms(expected)
        assert 1e-5 < lost < 4e-3
        with torch.no_grad():
            unet.conv_in.weight.mul_(1.5)
    assert any(t.dtype == torch.float16 for t in frozen.constants.tensors.values())
    with pytest.raises(ValueError, match="weight_dtype is torch.float16, must be None here: .*eager"):
        freeze(unet, TIMESTEPS, backend="eager", weight_dtype=torch.float16)
    schedule = NoiseSchedule.linear()
    with pytest.raises(ValueError, match="weight_dtype is 'int8', must be 'float16' or None"):
        Sampler(unet, schedule, weight_dtype="int8")
    sampler = Sampler(unet, schedule, num_inference_steps=2, weight_dtype="float16")
    assert sampler.network.frozen is not None
    assert sampler.network.frozen.weight_dtype == torch.float16


@torch.no_grad()
def test_new_weights_reach_every_algorithm() -> None:
    unet = make_unet({"block_out_channels": (64, 64)}).float()
    frozen = freeze(unet, TIMESTEPS)
    step, programs = torch.tensor([0]), []
    for batch, size in ((1, 2), (16, 32)):  # of which one wants direct convolutions or small tiles, by the caches
        inputs = frozen.new_input((batch, 3, size, size)).normal_()
        programs.append((inputs, frozen.bind(inputs)))
        programs[-1][1](step)
    kinds = {name.rsplit(".", 1)[1] for name in frozen.constants.tensors if "conv1.weight." in name}
    assert {"winograd4"} < kinds
    places = {name: tensor.data_ptr() for name, tensor in frozen.constants.tensors.items()}
    for parameter in unet.parameters():
        parameter.mul_(1.25)
    for inputs, program in programs:
        program.load()
        expected = unet.double()(inputs.double(), TIMESTEPS[0])
        unet.float()
        assert rms(program(step).double() - expected) < 1e-5 * rms(expected)
    assert places == {name: tensor.data_ptr() for name, tensor in frozen.constants.tensors.items()}


@torch.no_grad()
def test_activations_are_in_one_block_of_memory() -> None:
    frozen = freeze(make_unet().float(), TIMESTEPS)
    program = frozen.bind(frozen.new_input((2, 3, 16, 16)).normal_())
    step = torch.tensor([0])
    assert program(step).data_ptr() == program(step).data_ptr()
    lowest, highest = program.arena.data_ptr(), program.arena.data_ptr() + program.arena.numel()
    assert lowest <= program(step).data_ptr() < highest


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
@pytest.mark.usefixtures("native_bfloat16")
def test_in_bfloat16_it_loses_no_more_than_its_algorithms_must(option: str, batch: int) -> None:
    unet = make_unet(OPTIONS[option])
    x = torch.randn(batch, unet.config.in_channels, 16, 8).bfloat16().double()
    labels = torch.arange(batch) if unet.config.has_classes else None
    frozen = freeze(unet, TIMESTEPS, torch.bfloat16, backend="native")
    assert (frozen.backend, frozen.fused, frozen.static, frozen.in_channels) == ("native", True, True, 8)
    expected = unet(x, TIMESTEPS[1], labels)
    plain = copy.deepcopy(unet).bfloat16()(x.bfloat16(), TIMESTEPS[1], labels)
    lost, plain_lost = (rms(out.double() - expected) for out in (run(frozen, x, 1, labels), plain))
    assert lost <= error_factor("winograd2") * plain_lost


@torch.no_grad()
@pytest.mark.usefixtures("native_bfloat16")
def test_in_bfloat16_new_weights_are_taken_over() -> None:
    unet = make_unet().float()
    frozen = freeze(unet, TIMESTEPS, torch.bfloat16, backend="native")
    inputs = frozen.new_input((2, 3, 16, 16)).normal_()
    program, step = frozen.bind(inputs), torch.tensor([0])
    program(step)
    for parameter in unet.parameters():
        parameter.mul_(1.25)
    program.load()
    expected = unet(inputs.float(), TIMESTEPS[0])
    assert rms(program(step).double() - expected) < 0.03 * rms(expected)


@torch.no_grad()
@pytest.mark.usefixtures("native_bfloat16")
def test_in_bfloat16_odd_widths_run_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native.get(), "bfloat16", 1)
    assert freeze(make_unet(), TIMESTEPS, torch.bfloat16).backend == "native"
    odd = make_unet({"block_out_channels": (15, 24), "norm_num_groups": 3})
    assert freeze(odd, TIMESTEPS, torch.bfloat16).backend == "eager"
    monkeypatch.setattr(_native.get(), "bfloat16", 2)  # torch has faster products
    assert freeze(make_unet(), TIMESTEPS, torch.bfloat16).backend == "eager"


def test_float64_runs_torch() -> None:
    frozen = freeze(make_unet(), TIMESTEPS, torch.float64)
    assert (frozen.backend, frozen.fused, frozen.static) == ("eager", False, False)
