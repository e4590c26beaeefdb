"""Accelerated inferers of MONAI draw what MONAI draws, from the same random numbers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("monai")

from monai.inferers import ControlNetDiffusionInferer, DiffusionInferer, LatentDiffusionInferer
from monai.networks.nets import ControlNet, DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, PNDMScheduler, RFlowScheduler

from fastddpm.interop import accelerate
from fastddpm.interop.monai import networks
from fastddpm.interop.monai.networks import with_fused_layers
from fastddpm.networks.frozen import FrozenUNet, why_not

SMALL: dict[str, Any] = {
    "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (8, 16), "num_res_blocks": (1, 2),
    "attention_levels": (False, True), "norm_num_groups": 4, "num_head_channels": 4,
}  # fmt: skip
CROSS: dict[str, Any] = {"with_conditioning": True, "cross_attention_dim": 6, "transformer_num_layers": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "updown_blocks": {"resblock_updown": True},
    "no_projection": {"include_fc": False, "use_combined_linear": True},
    "classes": {"num_class_embeds": 5, "channels": (12, 8, 16), "attention_levels": (True, False, True),
                "num_res_blocks": 1},
    "cross": CROSS,
    "cross_one_width": CROSS | {"cross_attention_dim": 16, "attention_levels": (False, True), "include_fc": False},
}  # fmt: skip
CONTEXT = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def make(option: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """Random weights, also where MONAI begins with zeros."""
    torch.manual_seed(0)
    unet = DiffusionModelUNet(**SMALL | option).to(dtype)
    for name, parameter in unet.named_parameters():
        if "conv2" in name or "proj_out" in name or name.startswith("out."):
            nn.init.normal_(parameter, std=0.1)
        parameter.add_(0.05 * torch.randn_like(parameter))
    return unet.eval()


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = (actual.double() - expected.double()).square().mean().sqrt() / expected.double().square().mean().sqrt()
    assert error <= tolerance, f"differs by {error:.1e} of the rms"


@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_a_frozen_network_equals_it_in_float64(option: str) -> None:
    """In plain torch and by the fused ops, with every context that it takes, also after the weights have changed."""
    unet = make(OPTIONS[option], torch.float64)
    x, t = torch.randn(2, 1, 8, 12, dtype=torch.float64), torch.tensor([37.0])
    labels = torch.tensor([4, 1]) if "num_class_embeds" in OPTIONS[option] else None
    contexts: list[Tensor | None] = [None]
    if "cross_attention_dim" in OPTIONS[option]:
        width = OPTIONS[option]["cross_attention_dim"]
        contexts = [torch.randn(2, tokens, width, dtype=torch.float64) for tokens in (1, 3)]
        contexts += [None] if width == 16 else []
    for fused in (False, True):
        frozen = FrozenUNet(unet, backend="eager", fused=fused)
        assert frozen.differs() is None
        programs = []
        for context in contexts:
            inputs = frozen.new_input(x.shape)
            inputs.copy_(x)
            programs.append(frozen.bind(inputs, t, labels, {} if context is None else {"context": context}))
        for change in (False, True):
            if change:
                for parameter in unet.parameters():
                    parameter.mul_(1.05)
            for program, context in zip(programs, contexts, strict=True):
                program.load()
                close(program(torch.tensor([0])), unet(x, t, context, labels), 1e-12)


def images(unet: Any, inferer: Any, scheduler: Any, **arguments: Any) -> tuple[Any, Tensor]:
    """What an inferer draws for one seed, and the next random number after it."""
    torch.manual_seed(3)
    noise = torch.randn(2, unet.out_channels, *[8] * (unet.conv_in.spatial_dims))
    drawn = inferer.sample(noise, diffusion_model=unet, scheduler=scheduler, verbose=False, **arguments)
    return drawn, torch.randn(3)


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddpm": lambda: DDPMScheduler(6, "scaled_linear_beta", beta_start=1e-3, beta_end=0.3),
    "ddpm_strided": lambda: stepped(DDPMScheduler(40, "cosine", variance_type="fixed_large"), 7),  # t - 1, not t - 5
    "ddpm_v": lambda: DDPMScheduler(5, prediction_type="v_prediction", clip_sample=False),
    "ddim": lambda: stepped(DDIMScheduler(40, "linear_beta", beta_end=0.1, clip_sample_min=-2, clip_sample_max=2), 9),
    "ddim_x0": lambda: stepped(DDIMScheduler(30, prediction_type="sample", set_alpha_to_one=False, steps_offset=1), 4),
    "ddim_v": lambda: stepped(DDIMScheduler(30, "sigmoid_beta", prediction_type="v_prediction"), 4),
}


def stepped(scheduler: Any, steps: int) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_are_those_of_monai(name: str) -> None:
    unet, scheduler = make({}), SCHEDULERS[name]()
    expected, after = images(unet, DiffusionInferer(scheduler), None)
    fast = accelerate((unet, scheduler))
    assert isinstance(fast, DiffusionInferer)
    drawn, then = images(unet, fast, None)
    close(drawn, expected, 3e-5)
    assert torch.equal(after, then), "drew another number of random numbers"


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        (CROSS, {"conditioning": CONTEXT.float()}),
        (CROSS, {"conditioning": CONTEXT.float(), "cfg": 2.5}),
        (CROSS, {"conditioning": CONTEXT.float(), "cfg": 2.5, "save_intermediates": True, "intermediate_steps": 3}),
        ({"in_channels": 3}, {"conditioning": torch.ones(2, 2, 8, 8), "mode": "concat"}),
        ({"in_channels": 3}, {"conditioning": torch.ones(2, 2, 8, 8), "mode": "concat", "cfg": 1.5}),  # MONAI's loop
        ({}, {"cfg": 3.0}),
        ({"spatial_dims": 3}, {}),
        ({"spatial_dims": 3} | CROSS, {"conditioning": CONTEXT.float(), "cfg": 2.0}),
    ],
)
def test_conditions_reach_the_network(option: dict[str, Any], arguments: dict[str, Any]) -> None:
    unet, scheduler = make(option), SCHEDULERS["ddim"]()
    expected, _ = images(unet, DiffusionInferer(scheduler), None, **arguments)
    fast = accelerate(DiffusionInferer(scheduler), unet, scheduler)
    drawn, _ = images(unet, fast, scheduler, **arguments)
    if "save_intermediates" in arguments:
        assert len(drawn[1]) == len(expected[1]) > 1
        for ours, theirs in zip(drawn[1], expected[1], strict=True):
            close(ours, theirs, 3e-5)
        drawn, expected = drawn[0], expected[0]
    close(drawn, expected, 3e-5)


@pytest.mark.parametrize("kind", [PNDMScheduler, RFlowScheduler])
def test_other_schedulers_run_in_monais_loop(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    unet, scheduler = make({}), stepped(kind(20), 4)
    expected, _ = images(unet, DiffusionInferer(stepped(kind(20), 4)), None)
    drawn, _ = images(unet, accelerate((unet, scheduler)), None)
    close(drawn, expected, 3e-5)
    assert f"the scheduler is a {kind.__name__}, must be" in caplog.text
    assert "MONAI's own loop runs" in caplog.text
    with pytest.raises(ValueError, match="or allow_general must be True"):
        images(unet, accelerate((unet, scheduler), allow_general=False), None)


def test_latents_are_decoded_by_monai() -> None:
    class Decoder(nn.Module):
        def decode_stage_2_outputs(self, z: Tensor) -> Tensor:
            return torch.tanh(z)

    unet, scheduler = make({}), SCHEDULERS["ddpm"]()
    inferer, decoder = LatentDiffusionInferer(scheduler, scale_factor=0.7), Decoder()
    expected, _ = images(unet, inferer, None, autoencoder_model=decoder)
    fast = accelerate(inferer, unet)
    assert isinstance(fast, LatentDiffusionInferer)
    assert type(inferer) is LatentDiffusionInferer
    drawn, _ = images(unet, fast, None, autoencoder_model=decoder)
    close(drawn, expected, 3e-5)


def test_a_controlnet_keeps_monais_loop_and_forward() -> None:
    unet, scheduler = make({"spatial_dims": 3}), SCHEDULERS["ddim"]()
    control = ControlNet(
        spatial_dims=3, in_channels=1, num_res_blocks=(1, 2), channels=(8, 16), attention_levels=(False, True),
        norm_num_groups=4, num_head_channels=4, conditioning_embedding_in_channels=1,
        conditioning_embedding_num_channels=(8,),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    more = {"controlnet": control.eval(), "cn_cond": torch.randn(2, 1, 8, 8, 8)}
    inferer = ControlNetDiffusionInferer(scheduler)
    expected, _ = images(unet, inferer, None, **more)
    drawn, _ = images(unet, accelerate(inferer, unet), None, **more)
    close(drawn, expected, 3e-5)


def test_layers_of_three_dimensions_are_fused() -> None:
    """They share the weights, which may be trained on; MONAI's switches stay as they were."""
    unet = make({"spatial_dims": 3})
    fused, what = with_fused_layers(unet)
    assert what == "21 of 27 norms and 6 attentions are fused"  # the six others precede attention
    assert all(a is b for a, b in zip(unet.parameters(), fused.parameters(), strict=True))
    assert not any(getattr(layer, "use_flash_attention", False) for layer in unet.modules())


def test_weights_networks_and_schedulers_may_change() -> None:
    unet, scheduler = make({}), SCHEDULERS["ddpm"]()
    fast = accelerate(DiffusionInferer(scheduler), unet)
    before, _ = images(unet, fast, None)
    with torch.no_grad():
        unet.conv_in.conv.weight.mul_(2)
    expected, _ = images(unet, DiffusionInferer(scheduler), None)
    drawn, _ = images(unet, fast, None)
    close(drawn, expected, 3e-5)
    assert not torch.allclose(drawn, before)
    other = make({"resblock_updown": True})
    expected, _ = images(other, DiffusionInferer(scheduler), SCHEDULERS["ddim"]())
    drawn, _ = images(other, fast, SCHEDULERS["ddim"]())
    close(drawn, expected, 3e-5)
    kept = accelerate(DiffusionInferer(scheduler), unet, inplace=True)
    assert images(unet, copy.copy(kept), None)[0].shape == (2, 1, 8, 8)


def test_philox_noise_does_not_depend_on_the_batch() -> None:
    unet, scheduler = make({}), SCHEDULERS["ddpm"]()
    fast, noise = accelerate((unet, scheduler), noise="philox"), torch.randn(3, 1, 8, 8)
    torch.manual_seed(0)
    three = fast.sample(noise, verbose=False)
    torch.manual_seed(0)
    close(fast.sample(noise[:1], verbose=False), three[:1], 3e-5)


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, scheduler = make(CROSS), SCHEDULERS["ddim"]()
    fast = accelerate((unet, scheduler))
    with pytest.raises(ValueError, match=r"input_noise has shape \(2, 1, 7, 8\), must be \[N, C, H, W\] of posit"):
        fast.sample(torch.zeros(2, 1, 7, 8))
    with pytest.raises(ValueError, match="context is missing"):
        fast.sample(torch.zeros(2, 1, 8, 8), verbose=False)
    with pytest.raises(ValueError, match="context has shape"):
        fast.sample(torch.zeros(2, 1, 8, 8), conditioning=torch.zeros(2, 3, 5), verbose=False)
    with pytest.raises(ValueError, match="conditioning is None but mode is 'concat'"):
        fast.sample(torch.zeros(2, 1, 8, 8), mode="concat")
    with pytest.raises(TypeError, match="model is a Linear, must be a DiffusionModelUNet"):
        accelerate(DiffusionInferer(scheduler), nn.Linear(2, 2))
    with pytest.raises(TypeError, match="an inferer of MONAI, a tuple"):
        accelerate((nn.Linear(2, 2), scheduler))
    with pytest.raises(TypeError, match="2 parts are given beside a Linear, must be an inferer of MONAI"):
        accelerate(nn.Linear(2, 2), unet, scheduler)
    monkeypatch.setattr(networks, "free_memory", lambda _: 2**30)
    volume = accelerate((make({"spatial_dims": 3}), scheduler))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        volume.sample(torch.empty(1, 1, 512, 512, 256, device="meta"))
    expected = "input_noise is 1 of 512x512x256, whose skip connections alone need 5.2 GiB: 1.0 GiB are free on cpu"
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_frozen_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    unet = make({})
    unet.down_blocks[1].attentions[0].attn.save_attn = True
    assert "has causal, relative positions and save_attn (False, False, True)" in str(why_not(unet))
    scheduler = SCHEDULERS["ddpm"]()
    expected, _ = images(unet, DiffusionInferer(scheduler), None)
    drawn, _ = images(unet, accelerate((unet, scheduler)), None)
    close(drawn, expected, 3e-5)
    assert "norms and 5 attentions are fused" in caplog.text
    assert "it has spatial_dims 3, must have 2" in str(why_not(make({"spatial_dims": 3})))
