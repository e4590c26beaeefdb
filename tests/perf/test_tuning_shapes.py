"""Which shapes there are to tune, of sampling and of training; and upsampling convolutions as a table has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels import tuned
from fastddpm_kernels.tuned import Key
from fastddpm_kernels.tuning import make_task
from torch import Tensor

from fastddpm import GaussianDiffusion, NoiseSchedule, Sampler, UNet
from fastddpm.networks.frozen import instructions
from fastddpm.networks.frozen.frozen_unet import FrozenUNet
from fastddpm.networks.network import Network
from fastddpm.perf.tuning.shapes import network_keys, sampler_keys, training_keys

CPU = torch.device("cpu")
ALL = tuple(tuned.OPS)


ONE_LEVEL = {
    "sample_size": 4,
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


def small_unet(**options: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(
        **{
            "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1,
            "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "DownBlock2D"), "add_attention": False,
            "up_block_types": ("UpBlock2D", "UpBlock2D"), **options,
        }
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "batch", "reverse_step"),  # batch, channels, noise, guided, learned, multistep, x0
    [
        ({}, 3, (3, 1, 2, 0, 0, 0, 0)),
        ({"method": "dpmsolver++"}, 3, (3, 1, 2, 0, 0, 1, 1)),
        ({"guidance_scale": 2.0, "null_class": 2}, 4, (2, 1, 2, 1, 0, 0, 0)),
        ({"guidance_scale": 2.0, "null_class": 2}, 3, None),
        ({"variance_type": "learned_range"}, 2, (2, 1, 2, 0, 1, 0, 0)),
    ],
)
def test_the_shapes_of_a_sampler(
    settings: dict[str, Any], batch: int, reverse_step: tuple[int, ...] | None, device: torch.device
) -> None:
    pytest.importorskip("triton")
    unet = small_unet(
        num_class_embeds=3 if "null_class" in settings else None, out_channels=2 if "variance_type" in settings else 1,
        **(ONE_LEVEL if settings else {}),
    ).to(device)  # fmt: skip
    steps = 3 if "method" in settings else 1
    sampler = Sampler(unet, NoiseSchedule.linear(10), num_inference_steps=steps, backend="triton", **settings)
    keys = sampler_keys(sampler, batch, ALL)
    own = [key for key in keys if key.op == "reverse_step"]
    if reverse_step is None:  # so many rows are no doubled batch
        assert own == []
    else:
        (key,) = own
        named = key.named()
        wanted = ("batch", "channels", "noise", "guided", "learned", "multistep", "x0")
        assert tuple(named[name] for name in wanted) == reverse_step
        assert (named["pixels"], named["net_in"], keys[key]) == (unet.config.sample_size**2, 1, 1)
    others = {key: count for key, count in keys.items() if key.op != "reverse_step"}
    assert others == network_keys(sampler.network, (batch, 1, unet.config.sample_size, unet.config.sample_size), ALL)
    assert settings or others[Key("residual_add", torch.float32, (batch, 8, 8, 8, 1, 0, 1, 1, 0))] == 1
    assert settings or sampler_keys(sampler, batch, ["pointwise_conv"]).keys() < others.keys()


def test_the_shapes_of_training(device: torch.device) -> None:
    pytest.importorskip("triton")
    unet = small_unet(num_class_embeds=3).to(device)
    diffusion = GaussianDiffusion(unet, NoiseSchedule.linear(10), backend="triton", prediction_type="v_prediction")
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    keys = training_keys(diffusion, (3, 1, 8, 8), labels, device, ALL)
    assert keys[Key("q_sample", torch.float32, (3, 1, 64, 0, 2, 2))] == 1
    forward = {key.shape: count for key, count in keys.items() if key.op == "group_norm_silu"}
    backward = {key.shape: count for key, count in keys.items() if key.op == "group_norm_silu_backward"}
    assert forward == backward
    assert sum(forward.values()) == sum(isinstance(m, torch.nn.GroupNorm) for m in unet.modules())
    assert {key.op for key in keys} == {"q_sample", "group_norm_silu", "group_norm_silu_backward"}
    assert not unet.training
    assert all(parameter.grad is None for parameter in unet.parameters())


# Upsampling and a convolution.


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library that convolves has a stand-in."""

    def conv(x: Tensor, w: Tensor, stride: int, padding: int, allow_tf32: bool, out: Tensor) -> None:
        out.copy_(F.conv2d(x, w, None, stride, padding))

    def conv_transpose(x: Tensor, w: Tensor, allow_tf32: bool) -> Tensor:
        return F.conv_transpose2d(x, w, None, stride=2, padding=1).contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(instructions, "cudnn_conv", conv)
    monkeypatch.setattr(instructions, "cudnn_conv_transpose", conv_transpose)


def doubling(batch: int, dtype: torch.dtype = torch.float64) -> Key:
    return Key("upsample_conv", dtype, (batch, 4, 4, 16, 16, 0))


PLAIN, TRANSPOSED = {"implementation": "plain"}, {"implementation": "transposed"}


@torch.no_grad()
def test_a_frozen_unet_upsamples_as_its_table_says(as_on_cuda: None) -> None:
    unet = small_unet().double()
    frozen = FrozenUNet(unet, backend="eager", fused=True)
    frozen.static, frozen.timesteps = True, torch.tensor([7, 3])
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)

    def bound(rows: int) -> Any:
        inputs = frozen.new_input((rows, 1, 8, 8))
        inputs.copy_(x[:rows])
        return frozen.bind(inputs)

    usual = bound(2)
    with tuned.using(CPU, {doubling(2): PLAIN, doubling(3): TRANSPOSED}), tuned.recording() as seen:
        programs = {3: bound(3), 2: bound(2)}
    assert {key: count for key, count in seen.items() if key.op == "upsample_conv"} == {doubling(3): 1, doubling(2): 1}
    names = [[step.name for step in program.instructions] for program in (usual, programs[3], programs[2])]
    assert names[0] == names[1]
    (double,) = set(names[2]) - set(names[0])
    assert double == "up_blocks.0.upsamplers.0.conv.double"
    flops = [sum(step.flops for step in program.instructions) for program in (usual, programs[2])]
    assert flops[1] - flops[0] == 2 * 2 * 16 * (36 - 16) * 16 * 16

    for _ in range(2):
        for rows, program in programs.items():
            program.arena.fill_(255)  # NaN, were it read before it is written
            expected = unet(x[:rows], torch.tensor(3))
            torch.testing.assert_close(program(torch.tensor([1])), expected, rtol=0, atol=1e-11)
        for parameter in unet.parameters():  # other weights, which both ways take over
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
        for program in programs.values():
            program.load()


def test_without_a_table_nothing_is_looked_up_in_vain() -> None:
    """Where plain torch or native kernels convolve there is no such choice."""
    with tuned.recording() as seen:
        network_keys(Network(small_unet(), backend="eager", freeze=True), (2, 1, 8, 8), ALL)
    assert not [key for key in seen if key.op == "upsample_conv"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_ways_of_upsampling_are_tried_and_held_against_float64(dtype: torch.dtype) -> None:
    from fastddpm.perf.tuning.search import why_wrong

    task = make_task(doubling(2, dtype), CPU)
    assert task.candidates() == [TRANSPOSED, PLAIN]
    operands = task.operands(0)
    truth = task.truth(operands, task.samples())
    for choice in task.candidates():
        assert why_wrong(task, choice, operands, truth) is None
        assert why_wrong(task, choice, task.another(operands), truth) is None
    operands["plain"] = operands["plain"] * 1.02
    assert "rms error" in str(why_wrong(task, PLAIN, operands, truth))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 8, 3, 5), torch.float64), ((1, 3, 4, 4), torch.float32), ((2, 6, 1, 2), torch.float16)]
)
def test_doubling_in_one_copy(shape: Sequence[int], dtype: torch.dtype) -> None:
    n, channels, height, width = shape
    x = torch.randn(n, height, width, channels).to(dtype).movedim(-1, 1)
    y = torch.full((n, 2 * height, 2 * width, channels), float("nan"), dtype=dtype).movedim(-1, 1)
    instructions.double(instructions.Machine(True, True, "eager", slots=[x, y]), 0, 1)()
    assert torch.equal(y, F.interpolate(x.float(), scale_factor=2).to(dtype))
