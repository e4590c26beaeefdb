"""denoising_diffusion_pytorch's `Unet1D` frozen, and other copies of its `Unet`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("denoising_diffusion_pytorch", reason="needs denoising_diffusion_pytorch")

from denoising_diffusion_pytorch import Unet1D, repaint

from fastddpm.networks.frozen import FrozenUNet, freeze, why_not

TIMESTEPS = torch.tensor([999, 500, 3])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one level": {"dim_mults": (1,)},
    "three levels": {"dim_mults": (1, 2, 3), "init_dim": 12},
    "self_condition": {"self_condition": True},
    "learned": {"learned_sinusoidal_cond": True, "learned_variance": True, "channels": 1, "dropout": 0.5},
    "heads": {"attn_heads": 3, "attn_dim_head": 5, "random_fourier_features": True},
}


@pytest.fixture
def wide() -> Iterator[None]:
    """The library computes its sinusoids in torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@torch.no_grad()
def make(option: str) -> Any:
    torch.manual_seed(0)
    unet = Unet1D(**{"dim": 8, "dim_mults": (1, 2), "channels": 3, **OPTIONS[option]}).eval()
    for parameter in unet.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return unet


def evaluated(unet: Any, x: Tensor, t: int) -> Tensor:
    channels, times = unet.channels, torch.full((len(x),), t)
    if x.shape[1] == channels:
        return unet(x, times)
    return unet(x[:, channels:], times, x_self_cond=x[:, :channels])


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_equal_in_float64(option: str, fused: bool) -> None:
    """Also with what may be left out of the input, and after the weights have changed."""
    unet = make(option)
    frozen = FrozenUNet(unet, torch.float64, fused=fused)
    whole = unet.init_conv.in_channels
    for channels in {whole, unet.channels}:
        x = torch.randn(2, channels, 24)
        inputs = frozen.new_input(x.shape)
        inputs.copy_(x)
        program = frozen.bind(inputs, TIMESTEPS)
        for row, t in enumerate(TIMESTEPS.tolist()):
            expected = evaluated(unet, x, t)
            assert float((program(torch.tensor([row])) - expected).abs().max()) < 1e-12 * float(expected.abs().max())
    assert frozen.differs() is None
    unet.final_conv.weight.mul_(2)
    program.load()
    expected = evaluated(unet, x, 3)
    assert float((program(torch.tensor([2])) - expected).abs().max()) < 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_lower_precision(dtype: torch.dtype) -> None:
    unet = make("three levels")
    frozen = freeze(unet, TIMESTEPS, dtype)
    x = torch.randn(2, 3, 24)
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    expected = evaluated(unet, x, 500)
    error = frozen.bind(inputs)(torch.tensor([1])).float() - expected
    assert float(error.square().mean().sqrt()) < 8 * torch.finfo(dtype).eps * float(expected.square().mean().sqrt())


def test_what_does_not_fit_is_named() -> None:
    frozen = freeze(make("plain"), TIMESTEPS)
    for shape, message in (((2, 3, 7), "inputs are 7 long, which must be a positive multiple of 2"),
                           ((2, 4, 8), r"inputs have shape \(2, 4, 8\), must have shape \[N, 3, L\]")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            frozen.bind(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 8, 8\), must have shape \[N, 3, L\]"):
        frozen.new_input((2, 3, 8, 8))
    unet = make("plain")
    unet.init_conv = nn.Conv1d(3, 8, 7, padding=3, padding_mode="circular")
    assert "init_conv has groups, dilation and padding_mode (1, (1,), 'circular')" in str(why_not(unet))


def test_repaint_unet() -> None:
    assert FrozenUNet(repaint.Unet(8, dim_mults=(1, 2), self_condition=True)).differs() is None
