"""The child process of `test_fake_cuda`: sampling runs on a CUDA device that is not there, a line of JSON each."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

os.environ |= {"FASTDDPM_TUNED": "0", "FASTDDPM_VERIFY": "0"}
if "FAKE_CUDA_COMPILES" not in os.environ:  # `fake_cuda_compile` imports this file
    os.environ["TRITON_INTERPRET"] = "1"

import fake_cuda
import torch
from torch import nn

from fastddpm import NoiseSchedule, Sampler, UNet
from fastddpm.networks.frozen import program

torch.set_num_threads(1)
MOST_ELEMENTS = program.MOST_ELEMENTS
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": None,
    "downsample_padding": 0,
}


def unet(**changes: Any) -> nn.Module:
    """Return a small U-Net with seeded weights."""
    torch.manual_seed(0)
    return UNet(**{**SMALL, **changes})


def lucidrains() -> nn.Module:
    """Return a small U-Net of denoising_diffusion_pytorch."""
    from denoising_diffusion_pytorch import Unet

    torch.manual_seed(0)
    return Unet(dim=16, dim_mults=(1, 2))


class Own(nn.Module):
    """A network that nothing is known of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


CLASSES = {"num_class_embeds": 3, "null_class": 2}
IMAGE = {"shape": (3, 8, 8)}
LABELS = {"class_labels": [0, 1]}
HOST_NOISE = {"noise": torch.zeros(5, 2, 3, 8, 8), "x_T": torch.zeros(2, 3, 8, 8)}
# The network, the settings of the sampler, the arguments of `sample`.
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "plain": (unet, {"cuda_graph": False}, {}),
    "float32": (unet, {"cuda_graph": False, "dtype": "float32"}, {}),
    "full": (unet, {"cuda_graph": False, "fusion": "full"}, {}),
    "full_step": (unet, {"fusion": "full"}, {}),
    "tf32": (unet, {"cuda_graph": False, "dtype": "tf32"}, {}),
    "auto": (unet, {"dtype": "auto"}, {}),
    "step": (unet, {}, {}),
    "unrolled": (unet, {"cuda_graph": "unrolled", "num_inference_steps": 11}, {}),
    "while": (unet, {"cuda_graph": "while"}, {}),
    "batch_auto": (unet, {"num_inference_steps": 4}, {"num_samples": 6, "batch_size": "auto"}),
    "progress": (unet, {}, {"progress": lambda done, total: None}),
    "trajectory": (unet, {}, {"return_trajectory": 1}),
    "callback": (unet, {}, {"callback": lambda row, timestep, x: None}),
    "host_noise": (unet, {"num_inference_steps": 5}, HOST_NOISE),
    "too_many_elements": (unet, {}, {"num_samples": 6, "batch_size": "auto"}),
    "inpainting": (unet, {}, {"known": torch.zeros(1, 3, 8, 8), "known_mask": torch.ones(1, 1, 8, 8)}),
    "multistep": (unet, {"method": "dpmsolver++"}, {}),
    "threshold": (unet, {"clip_sample": False, "thresholding": True}, {}),
    "classes": (lambda: unet(**CLASSES), {}, LABELS),
    "guidance": (lambda: unet(**CLASSES), {}, {**LABELS, "guidance_scale": [2.0, 3.0]}),
    "guidance_interval": (
        lambda: unet(**CLASSES),
        {"guidance_interval": (0, 400), "guidance_rescale": 0.5, "guidance_scale": 2.0},
        LABELS,
    ),
    "learned_variance": (lambda: unet(out_channels=6), {"variance_type": "learned_range"}, {}),
    "film": (lambda: unet(resnet_time_scale_shift="scale_shift"), {}, {}),
    "heads": (lambda: unet(attention_head_dim=8), {}, {}),
    "self_condition": (lambda: unet(in_channels=6), {"self_condition": True}, {}),
    "condition": (lambda: unet(in_channels=5), {}, {"condition": torch.zeros(2, 2, 8, 8)}),
    "lucidrains": (lucidrains, {}, IMAGE),
    "own": (Own, {}, IMAGE),
}
COMPUTED = (
    "plain",
    "full",
    "while",
    "lucidrains",
)  # compared with the CPU; a foreign network is compared with itself, too


def main(names: list[str]) -> None:
    """Run the cases: first on the CPU, eagerly in float32, then on the device."""
    prepared: dict[str, Any] = {}
    for name in names:
        make, settings, arguments = CASES[name]
        model = make().eval().requires_grad_(False)
        prepared[name] = model, None
        if name in COMPUTED:
            of_cpu = {k: v for k, v in settings.items() if k not in ("cuda_graph", "dtype", "fusion")}
            prepared[name] = model, sample(model, {**of_cpu, "backend": "eager"}, arguments)
    fake_cuda.install()
    for name in names:
        model, expected = prepared[name]
        _, settings, arguments = CASES[name]
        fake_cuda.computes = name in COMPUTED
        program.MOST_ELEMENTS = 3 * 64 * 64 if name == "too_many_elements" else MOST_ELEMENTS
        fake_cuda.waits.clear()
        fake_cuda.launches.clear()
        report: dict[str, Any] = {"name": name}
        try:
            settings = {"cuda_graph": "step", "dtype": "float16", **settings, "device": "cuda:0"}
            with fake_cuda.in_the_loop() as waits:
                sampler = sampler_of(model.to("cuda:0"), settings)
                actual = drawn(sampler, arguments)
            report["error"] = float((actual.inner - expected).abs().max()) if fake_cuda.computes else None
            report["fused"] = sampler.network.frozen is not None and sampler.network.frozen.static
            report["kernels"] = len(set(fake_cuda.launches))
            report["mode"] = sampler.graph_report()["mode"]
            report["waits"] = waits
        except Exception:
            report["raised"] = traceback.format_exc()[-2000:]
        print("REPORT", json.dumps(report), flush=True)


def sampler_of(model: nn.Module, settings: dict[str, Any]) -> Sampler:
    """Return a sampler of DDPM in two steps, unless settings say otherwise."""
    return Sampler(model, NoiseSchedule.linear(1000), **{"num_inference_steps": 2, **settings})


def sample(model: nn.Module, settings: dict[str, Any], arguments: dict[str, Any]) -> torch.Tensor:
    """Return two samples, or as many as the arguments say."""
    return drawn(sampler_of(model, settings), arguments)


def drawn(sampler: Sampler, arguments: dict[str, Any]) -> Any:
    """Return what a sampler draws."""
    given = {"num_samples": 2, "seed": 3, "progress": False, **arguments}
    result = sampler.sample(**given)
    return result if isinstance(result, torch.Tensor) else result.x[-1]


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
