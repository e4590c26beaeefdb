"""The networks that are measured: published architectures with seeded random weights, ours and in other libraries."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from fastddpm_kernels import philox
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastddpm.common.files import read_json
from fastddpm.interop.pretrained import BUNDLED, load_pretrained
from fastddpm.networks.unet.model import UNet, UNetConfig
from fastddpm.process.schedule import NoiseSchedule

_GOOGLE: dict[str, Any] = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def _bundled() -> dict[str, Any]:
    config = read_json(BUNDLED / "unet" / "config.json")
    return {name: value for name, value in config.items() if not name.startswith("_")}


# google/ddpm-cifar10-32 and google/ddpm-celebahq-256, one small enough for a CPU's test, and the bundled digits, which
# have classes.
CONFIGS: dict[str, dict[str, Any]] = {
    "cifar10": _GOOGLE
    | {
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "celeba256": _GOOGLE
    | {
        "sample_size": 256,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    },
    "small": _GOOGLE
    | {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    "digits": _bundled(),
}


@dataclass
class Problem:
    """What one section samples from.

    Attributes:
        name: of its configuration.
        unet: ours, float32, on the device, with seeded random weights; the norms' weights too differ from 1 and 0. Of
            the digits the trained weights.
        schedule: 1000 steps, linear but for the digits, as these models were trained.
        device: where.
        shape: (C, H, W).
        flops: floating-point operations of one image and step, counted from the network as it is written.
    """

    name: str
    unet: UNet
    schedule: NoiseSchedule
    device: torch.device

    def __post_init__(self) -> None:
        config = self.unet.config
        assert isinstance(config.sample_size, int)
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        self.flops = count_flops(config)
        self.parameters = sum(p.numel() for p in self.unet.parameters())

    def labels(self, batch: int) -> Tensor | None:
        """Return the classes of a batch, int64 [N], the digits in turn; None for a network without classes."""
        return torch.arange(batch, device=self.device) % 10 if self.unet.config.num_class_embeds else None

    def describe(self) -> dict[str, Any]:
        """Return what a reader wants to know of the network."""
        return {
            "architecture": self.name,
            "weights": "trained" if self.name == "digits" else "random, seed 0",
            "parameters": self.parameters,
            "flops_per_image_and_step": self.flops,
            "image": list(self.shape),
        }


def make_problem(name: str, device: torch.device) -> Problem:
    """Return the named configuration with weights of seed 0, on `device`; the bundled digits as they are."""
    if name == "digits":
        digits = load_pretrained()
        return Problem(name, digits.unet.requires_grad_(False).to(device), digits.schedule, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet(**CONFIGS[name])
        with torch.no_grad():
            for module in unet.modules():
                if isinstance(module, nn.GroupNorm):
                    module.weight.add_(0.1 * torch.randn_like(module.weight))
                    module.bias.add_(0.1 * torch.randn_like(module.bias))
    return Problem(name, unet.eval().requires_grad_(False).to(device), NoiseSchedule.linear(1000), device)


def count_flops(config: UNetConfig) -> int:
    """Return the operations (two to a multiplication and addition) of one image and step, without running it."""
    with torch.device("meta"):
        unet = UNet(config)
        unet.backend = "eager"
        size = config.sample_size if isinstance(config.sample_size, int) else 32
        x, t = torch.empty(1, config.in_channels, size, size), torch.empty(1, dtype=torch.int64)
        labels = torch.zeros(1, dtype=torch.int64) if config.num_class_embeds else None
    return flops_of(unet, x, t, labels)


def flops_of(model: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None = None) -> int:
    """Return the operations of `model(x, t)` as torch counts them: matrix products and convolutions."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predict(model, x, t, labels)
    return int(counter.get_total_flops())


def plain_unet(problem: Problem, dtype: torch.dtype, channels_last: bool, *, fused: bool = False) -> nn.Module:
    """Return diffusers' UNet2DModel with the problem's weights; ours on torch's own ops where that is not installed.

    `fused`: q, k and v of diffusers' attention as one product.
    """
    try:
        from diffusers import UNet2DModel
    except ImportError:
        unet: Any = deepcopy(problem.unet)
        unet.backend = "eager"
    else:
        unet = UNet2DModel(**CONFIGS[problem.name])
        unet.load_state_dict(problem.unet.state_dict())
        if fused:
            fuse_attention(unet)
    # Not diffusers' own `to`, which warns of parts to be kept in float32 where there are none.
    unet = nn.Module.to(unet.eval().requires_grad_(False), problem.device, dtype)
    return unet.to(memory_format=torch.channels_last) if channels_last else unet


def fuse_attention(unet: nn.Module) -> None:
    """Join the projections of diffusers' attention blocks, as its pipelines' `fuse_qkv_projections` does."""
    from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, Attention):
                module.fuse_projections(fuse=True)
                module.set_processor(FusedAttnProcessor2_0())


def unet_name(unet: nn.Module) -> str:
    """Return whose U-Net it is."""
    return "diffusers UNet2DModel" if type(unet).__module__.startswith("diffusers") else "fastddpm UNet, eager ops"


def predict(unet: Any, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the network's output, whether it returns a tensor or an object that has it."""
    out = unet(x, t) if labels is None else unet(x, t, class_labels=labels)
    return out if isinstance(out, Tensor) else out.sample


class AsLucidrains(nn.Module):
    """A U-Net with the attributes that denoising_diffusion_pytorch asks for."""

    channels, out_dim, self_condition, random_or_learned_sinusoidal_cond = 3, 3, False, False

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return predict(self.unet, x, t)


def philox_noise(problem: Problem, batch: int) -> Any:
    """Return the noise that fastddpm draws for seed 0: of row i of the table, for -1 the state it starts from."""
    keys = philox.sample_keys([0] * batch, range(batch), problem.device)

    def noise(index: int) -> Tensor:
        step, stream = (0, philox.STREAM_INITIAL) if index < 0 else (index, philox.STREAM_STEP)
        return philox.normal(keys, problem.shape, step=step, stream=stream, backend="eager")

    return noise
