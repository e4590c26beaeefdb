"""guided-diffusion's upsamplers, and its networks of images with other channels, against a restatement in float64."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm.cli import main
from fastddpm.interop.guided_diffusion import load_sampler, load_unet, shapes
from fastddpm.interop.guided_diffusion.flags import UPSAMPLER_FLAGS
from fastddpm.networks.frozen import freeze

FLAGS: dict[str, Any] = {
    "large_size": 16, "small_size": 4, "channel_mult": "1,2", "num_channels": 32, "num_res_blocks": 1, "num_heads": 2,
    "attention_resolutions": "8", "class_cond": True, "learn_sigma": True, "resblock_updown": True,
}  # fmt: skip
RESTATED: dict[str, Any] = {
    "channels": 32, "layers": 1, "mult": (1, 2), "reductions": (2,), "heads": 2, "updown": True, "out": 6, "classes": 10
}  # fmt: skip
PUBLISHED = {
    # As in guided-diffusion's README.
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --large_size 256 --small_size 64 "
    "--learn_sigma True --noise_schedule linear --num_channels 192 --num_heads 4 --num_res_blocks 2 --resblock_updown "
    "True --use_fp16 True --use_scale_shift_norm True": {"reductions": (8, 16, 32), "heads": 4},
    "--attention_resolutions 32,16 --class_cond True --diffusion_steps 1000 --large_size 512 --small_size 128 "
    "--learn_sigma True --noise_schedule linear --num_channels 192 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 True --use_scale_shift_norm True":
        {"reductions": (16, 32), "head_channels": 64},
}  # fmt: skip


def checkpoint(openai: ModuleType, channels: int = 3) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, Tensor]:
    """A network's weights, a small image, inputs, and labels."""
    w = openai.Weights()
    x, low = torch.randn(2, channels, 16, 16).double(), torch.rand(2, channels, 4, 4).double() * 2 - 1
    t, y = torch.tensor([999, 3]), torch.tensor([5, 9])
    openai.super_res_model(w, x, t, low, y, **RESTATED | {"out": 2 * channels})
    return w, x, low, t, y


@pytest.mark.parametrize("channels", [3, 1])
@torch.no_grad()
def test_networks_are_equal(openai: ModuleType, channels: int) -> None:
    """Plain and frozen."""
    w, x, low, t, y = checkpoint(openai, channels)
    expected = openai.super_res_model(w, x, t, low, y, **RESTATED | {"out": 2 * channels})
    unet = load_unet(w, in_channels=channels, **FLAGS)
    assert (unet.config.in_channels, unet.config.out_channels) == (2 * channels, 2 * channels)
    larger = torch.nn.functional.interpolate(low, (16, 16), mode="bilinear")
    both, limit = torch.cat([x, larger], 1), 1e-12 * float(expected.abs().max())
    assert float((unet(both, t, y) - expected).abs().max()) < limit
    frozen = freeze(unet, t)
    inputs = frozen.new_input(both[:1].shape)
    inputs.copy_(both[:1])
    result = frozen.bind(inputs, labels=y[:1])(torch.tensor([0]))
    assert float((result - expected[:1]).abs().max()) < 1e2 * limit


@pytest.mark.parametrize("respacing", ["5", "ddim4"])
def test_samples_are_those_of_the_library(openai: ModuleType, respacing: str) -> None:
    """Within 8 times what float32 costs the library itself, as `test_guided_diffusion_sampling` says."""
    w, _, low, _, y = checkpoint(openai)
    sampler = load_sampler(w, respacing, **FLAGS)
    noise = torch.randn(len(sampler.timesteps) + 1, 2, 3, 16, 16).double()
    given = {"x_T": noise[0].float(), "noise": noise[1:].float(), "class_labels": y}
    images = sampler.sample(2, low_res=low.float(), **given)
    diffusion = openai.Diffusion(
        sampler.schedule.betas.numpy(), sampler.timesteps.flip(0).tolist(), variance="learned_range"
    )
    loop = diffusion.ddim_sample_loop if respacing.startswith("ddim") else diffusion.p_sample_loop

    def restated(dtype: torch.dtype) -> Tensor:
        weights = w.to(dtype)

        def model(x: Tensor, t: Tensor) -> Tensor:
            return openai.super_res_model(weights, x, t, low.to(dtype), y, **RESTATED)

        return loop(model, noise[0].to(dtype), noise[1:].to(dtype)).double()

    expected = restated(torch.float64)
    lost = float((restated(torch.float32) - expected).square().mean())
    assert lost < 1e-10, "the case is too sensitive to tell anything"
    assert float((images - expected).square().mean()) < 64 * lost
    one = sampler.sample(2, low_res=low[:1].float(), **given)
    torch.testing.assert_close(one[:1], images[:1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("line", PUBLISHED, ids=lambda line: re.search(r"large_size (\d+)", line)[1])
def test_published_flags(openai: ModuleType, line: str) -> None:
    """Every name and shape, without values."""
    flags = dict(part.split(" ") for part in line.removeprefix("--").split(" --"))
    w, size = openai.Weights("meta", torch.float32), int(flags["large_size"])
    x, label = torch.empty(1, 3, size, size, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    small = int(flags["small_size"])
    openai.super_res_model(
        w, x, label, torch.empty(1, 3, small, small, device="meta"), label, channels=192, mult=(1, 1, 2, 2, 4, 4),
        layers=2, updown=True, out=6, **PUBLISHED[line],
    )  # fmt: skip
    assert shapes(**flags) == {name: tuple(tensor.shape) for name, tensor in w.items()}
    unet = load_unet(w, device="meta", **flags)
    assert (unet.config.sample_size, unet.config.in_channels) == (size, 6)


def test_flags_and_defaults() -> None:
    """Those of `sr_model_and_diffusion_defaults()`, and arguments of `UNetModel`."""
    expected = {
        "large_size": 256, "small_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4,
        "num_heads_upsample": -1, "num_head_channels": -1, "attention_resolutions": "16,8", "dropout": 0.0,
        "class_cond": False, "use_checkpoint": False, "use_scale_shift_norm": True, "resblock_updown": False,
        "use_fp16": False, "learn_sigma": False, "diffusion_steps": 1000, "noise_schedule": "linear",
        "timestep_respacing": "", "use_kl": False, "predict_xstart": False, "rescale_timesteps": False,
        "rescale_learned_sigmas": False,
    }  # fmt: skip
    assert expected | {"channel_mult": "", "conv_resample": True, "in_channels": 3, "dims": 2} == UPSAMPLER_FLAGS


BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "image_size is no flag of an upsampler of guided_diffusion, which has large_size": (TypeError, {"image_size": 16}),
    "large_size is 128, must be one of 512, 256, 64 where channel_mult is not given": (
        ValueError, {"large_size": 128, "channel_mult": ""}),
    "dims is 1 but large_size is given, must be 2": (ValueError, {"dims": 1}),
    "the weights are those of in_channels=3 (not 1)": (ValueError, {"in_channels": 1}),
    "large_size, small_size are no flags of improved_diffusion": (TypeError, {"library": "improved_diffusion"}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_wrong_flags_are_named(openai: ModuleType, message: str) -> None:
    error, flags = BAD[message]
    given = FLAGS | flags
    if flags.get("library"):
        given = {name: given[name] for name in ("large_size", "small_size", "library")}
    with pytest.raises(error, match=re.escape(message)) as raised:
        load_unet(checkpoint(openai)[0], **given)
    assert "\n" not in str(raised.value)


def test_arguments_are_checked(openai: ModuleType) -> None:
    w, _, low, _, _ = checkpoint(openai)
    sampler, low = load_sampler(w, "2", **FLAGS), low.float()
    for given, message in (
        ({}, "low_res is None, must be given"),
        ({"low_res": low}, "low_res has 2 images, must have num_samples, 3, or 1"),
        ({"low_res": low[:1, :1]}, "low has 1 channels but the model reads 6 and draws 3"),
        ({"low_res": low[:1], "shape": (3, 16, 16)}, "shape is given along with low_res"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            sampler.sample(3, class_labels=1, **given)


def test_command(openai: ModuleType, tmp_path: Any) -> None:
    """`fastddpm upscale` enlarges as the library does."""
    from PIL import Image

    w, *_ = checkpoint(openai)
    torch.save({name: tensor.float() for name, tensor in w.items()}, tmp_path / "up.pt")
    pixels = torch.randint(256, (4, 4, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "small.png")
    line = " ".join(f"--{name} {value}" for name, value in FLAGS.items())
    command = [
        "upscale", str(tmp_path / "small.png"), "--model", str(tmp_path / "up.pt"), "--flags", line, "--steps", "3",
        "--class-label", "4", "-n", "2", "--seed", "3", "--output", str(tmp_path / "out.npz"),
    ]  # fmt: skip
    assert main(command) in (None, 0)
    import numpy as np

    with np.load(tmp_path / "out.npz") as file:
        drawn, labels = file["arr_0"], file["arr_1"]
    assert drawn.shape == (2, 16, 16, 3)
    assert labels.tolist() == [4, 4]
    sampler = load_sampler(w, "3", **FLAGS)
    low = (pixels.permute(2, 0, 1).float() / 127.5 - 1)[None]
    expected = ((sampler.sample(2, low_res=low, class_labels=4, seed=3) + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert int(np.abs(drawn.astype(int) - expected.int().numpy()).max()) <= 1
