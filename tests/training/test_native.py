"""A training step of the U-Net on the native backend: when it is taken, and that its gradients are those of float64."""

from __future__ import annotations

import copy

import pytest
import torch
from fastddpm_kernels import native as _native
from fastddpm_kernels.backend import BackendError
from fastddpm_kernels.conv import error_factor
from fastddpm_kernels.testing import errors
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastddpm import GaussianDiffusion, NoiseSchedule, UNet
from fastddpm.networks.unet import layers

NATIVE = ("fastddpm::conv3x3", "fastddpm::group_norm_silu", "fastddpm::attention")


@pytest.fixture(scope="module")
def unet(native: str) -> UNet:
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    return UNet(in_channels=3, out_channels=3, **sizes, **kinds).train()


def step(unet: UNet, backend: str, dtype: torch.dtype = torch.float32, *, autocast: bool = False) -> Tensor:
    """All gradients of the loss of three noised images, and the loss itself, as one vector."""
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, 3, 3, 16, 16, generator=generator).to(dtype)
    unet = copy.deepcopy(unet).to(dtype).to(memory_format=torch.channels_last)
    unet.backend = backend
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = GaussianDiffusion(unet, NoiseSchedule.linear()).losses(x, torch.tensor([3, 400, 990]), noise=noise)
    loss.mean().backward()
    return torch.cat([loss.detach().double(), *(p.grad.double().flatten() for p in unet.parameters())])  # type: ignore[union-attr]


def ops(unet: UNet, *, training: bool, backend: str = "auto", autocast: bool = False) -> set[str]:
    """Which of the native ops run."""
    unet = copy.deepcopy(unet).train(training)
    unet.backend = backend
    with profile(activities=[ProfilerActivity.CPU]) as run, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        unet(torch.zeros(1, 3, 16, 16), 5)
    return {event.key for event in run.key_averages()} & set(NATIVE)


def test_gradients_are_those_of_float64(unet: UNet) -> None:
    exact = step(unet, "eager", torch.float64)
    native, eager = errors(step(unet, "auto"), exact)[0], errors(step(unet, "eager"), exact)[0]
    assert native <= error_factor("winograd4") * eager
    assert native < 2e-5


@pytest.mark.usefixtures("native_bfloat16")
def test_under_autocast_they_lose_no_more_than_torchs(unet: UNet) -> None:
    exact = step(unet, "eager", torch.float64)
    native, eager = (errors(step(unet, name, autocast=True), exact)[0] for name in ("native", "eager"))
    assert native <= error_factor("winograd2") * eager


def test_when_it_is_taken(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops(unet, training=True) == set(NATIVE) - {"fastddpm::group_norm_silu"}  # which has few values
    assert ops(unet, training=False, backend="native") == set(NATIVE)
    assert ops(unet, training=False) == set()
    assert ops(unet, training=True, backend="eager") == set()
    monkeypatch.setattr(layers, "NATIVE_VALUES", 0)
    assert ops(unet, training=True) == set(NATIVE)
    monkeypatch.setattr(layers, "NATIVE_CHANNELS", {torch.float32: 65})
    assert ops(unet, training=True) == set(NATIVE) - {"fastddpm::conv3x3"}


@pytest.mark.usefixtures("native_bfloat16")
def test_when_it_is_taken_under_autocast(unet: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops(unet, training=True, backend="native", autocast=True) == set(NATIVE)
    monkeypatch.setattr(layers, "NATIVE_VALUES", 0)
    monkeypatch.setattr(_native.get(), "bfloat16", 1)
    monkeypatch.setattr(layers, "NATIVE_CHANNELS", {torch.bfloat16: 33})
    assert ops(unet, training=True, autocast=True) == set(NATIVE)
    monkeypatch.setattr(_native.get(), "bfloat16", 2)  # torch has faster products
    assert ops(unet, training=True, autocast=True) == {"fastddpm::group_norm_silu"}


def test_native_by_name_in_a_dtype_that_it_lacks(unet: UNet) -> None:
    unet = copy.deepcopy(unet)
    unet.backend = "native"
    with torch.autocast("cpu", torch.float16), pytest.raises(BackendError, match=r"not torch\.float16"):
        unet(torch.zeros(1, 3, 16, 16), 5)
