"""Accelerated text-to-image pipelines against diffusers' own, at the same generators: by the loop and by the U-Net."""

from __future__ import annotations

import copy
import logging
import pickle
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conditional_objects import (
    CLOSE,
    IF,
    IF_LEVELS,
    SD,
    WIDTH,
    apart,
    draw,
    pipeline,
    prompts,
    scheduler,
    text,
    unet,
)
from torch import Tensor

import fastddpm
from fastddpm import accelerate, accelerated, unaccelerate
from fastddpm.interop.conditional import Forward

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_stable_diffusion.py"
IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., 8:20, 4:24] = 1
SIZE: dict[str, Any] = {"height": 32, "width": 32}
MASKED: dict[str, Any] = {"image": IMAGE, "mask_image": MASK, "strength": 0.8, **SIZE}
V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
DPM = "DPMSolverMultistep"
Case = tuple[Callable[[], Any], dict[str, Any]]


def sd(name: str = "DDIM", kind: str = "", config: dict[str, Any] | None = None, **settings: Any) -> Callable[[], Any]:
    return lambda: pipeline(f"StableDiffusion{kind}Pipeline", config, scheduler=scheduler(name, **settings))


def xl(kind: str = "", name: str = "EulerDiscrete") -> Callable[[], Any]:
    return lambda: pipeline(f"StableDiffusionXL{kind}Pipeline", scheduler=scheduler(name))


def pixels(name: str = "IFPipeline", config: dict[str, Any] = IF, **settings: Any) -> Callable[[], Any]:
    own = {**IF_LEVELS, "thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5, **settings}
    more = {"image_noising_scheduler": scheduler("DDPM")} if "Super" in name else {}
    return lambda: pipeline(name, config, scheduler=diffusers.DDPMScheduler(**own), **more)


def upscale() -> Any:
    config = {**SD, "in_channels": 7, "num_class_embeds": 1000}
    return pipeline("StableDiffusionUpscalePipeline", config, low_res_scheduler=scheduler("DDPM"))


# Why a case is there: what differs in the loop.
LOOPS: dict[str, Case] = {
    "plain": (sd(), text()),
    "noise at every step, in the original's order": (sd(), {**text(), "eta": 0.7}),
    "a standard deviation to restore": (sd(**V), {**text(), "guidance_rescale": 0.6}),
    "without guidance": (sd(), {**text(), "guidance_scale": 1.0}),
    "a list of generators' order: ancestral": (sd("EulerAncestralDiscrete"), text()),
    "a scaled input": (sd("EulerDiscrete", use_karras_sigmas=True), text()),
    "multistep": (sd(DPM), text()),
    "a first timestep that comes twice": (sd("PNDM"), text()),
    "two evaluations a step": (sd("HeunDiscrete"), text()),
    "guidance as an embedding": (sd("LCM", config={**SD, "time_cond_proj_dim": WIDTH}), text()),
    "from an image": (sd(kind="Img2Img"), {**text(), "image": IMAGE.repeat(2, 1, 1, 1), "strength": 0.6}),
    "from an image, multistep": (sd(DPM, "Img2Img"), {**text(), "image": IMAGE.repeat(2, 1, 1, 1), "strength": 0.6}),
    "from an image, two evaluations": (
        sd("HeunDiscrete", "Img2Img"), {**text(), "image": IMAGE.repeat(2, 1, 1, 1), "strength": 0.6}),
    "a region that stays": (sd(kind="Inpaint"), {**text(), **MASKED}),
    "a region that stays, scaled": (sd("EulerDiscrete", "Inpaint"), {**text(), **MASKED}),
    "nine channels": (sd(kind="Inpaint", config={**SD, "in_channels": 9}), {**text(), **MASKED, "strength": 1.0}),
    "a small image beside, with its noise": (upscale, {**text(), "image": IMAGE[..., :16, :16].repeat(2, 1, 1, 1)}),
    "SDXL": (xl(), {**text(xl=True), **SIZE}),
    "SDXL, the first part of the steps": (xl(), {**text(xl=True), **SIZE, "denoising_end": 0.6}),
    "SDXL, the last part of the steps": (
        xl("Img2Img"), {**text(xl=True), "image": prompts(2, 5).new_ones(2, 4, 16, 16), "denoising_start": 0.6}),
    "SDXL, a region that stays": (xl("Inpaint"), {**text(xl=True), **MASKED}),
    "IF: a learned variance, quantiles": (pixels(), text(pixels=True)),
    "IF with a variance that nothing reads": (pixels(variance_type="fixed_small"), text(pixels=True)),
    "IF, of a small image with noise": (
        pixels("IFSuperResolutionPipeline", {**IF, "in_channels": 6, "class_embed_type": "timestep"}),
        {**text(pixels=True), "image": IMAGE[..., :8, :8].repeat(2, 1, 1, 1) * 2 - 1, "height": 16, "width": 16}),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_the_latents_are_the_originals(name: str) -> None:
    make, arguments = LOOPS[name]
    original = make()
    expected, state = draw(original, **arguments)
    for loop in (True, False):
        pipe = accelerate(original, loop=loop)
        actual, own_state = draw(pipe, **arguments)
        forward = pipe.unet.forward
        assert isinstance(forward, Forward)
        # In the loop the sampler's own program runs; else every evaluation of the pipeline is one of ours.
        assert (forward.runs == 0) == loop
        assert apart(expected, actual) < CLOSE
        assert torch.equal(own_state, state)
    assert "forward" not in vars(original.unet)


HOST = {
    "a callback": (sd(), {"callback_on_step_end": lambda pipe, step, timestep, given: given}, "callback_on_step_end"),
    "a scheduler without a table": (lambda: pipeline(scheduler=diffusers.IPNDMScheduler()), {}, "IPNDMScheduler"),
    "multistep from the middle": (
        sd("PNDM", "Img2Img"), {"image": IMAGE.repeat(2, 1, 1, 1), "strength": 0.6}, "PNDMScheduler"),
    "a mask and two evaluations": (sd("HeunDiscrete", "Inpaint"), MASKED, "HeunDiscreteScheduler"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOST)
def test_a_loop_that_needs_the_host_stays(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, more, word = HOST[name]
    original, pipe = make(), accelerate(make())
    with caplog.at_level(logging.INFO, "fastddpm"):
        (expected, state), (actual, own_state) = (draw(each, **text(), **more) for each in (original, pipe))
        draw(pipe, **text(), **more)
    assert pipe.unet.forward.runs > 0
    assert apart(expected, actual) < CLOSE
    assert torch.equal(own_state, state)
    assert len([record for record in caplog.messages if word in record]) == 1


def add_hooks(pipe: Any) -> None:
    pipe.unet.conv_in.register_forward_hook(lambda module, given, out: out * 1.5)


def add_lora(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_()


CHANGES: dict[str, Callable[[Any], object]] = {
    "hooks": add_hooks,
    "LoRA": add_lora,
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_afterwards_is_diffusers_to_compute(name: str, caplog: pytest.LogCaptureFixture) -> None:
    original = pipeline()
    pipe = accelerate(pipeline())
    plain, _ = draw(pipe, **text())
    CHANGES[name](original)
    CHANGES[name](pipe)
    expected, _ = draw(original, **text())
    with caplog.at_level(logging.WARNING, "fastddpm"):
        actual, _ = draw(pipe, **text())
        draw(pipe, **text())
    assert apart(expected, actual) < CLOSE
    assert apart(expected, plain) > 100 * CLOSE
    assert len([record for record in caplog.messages if "diffusers computes it" in record]) == 1


def test_a_lora_that_is_fused_or_removed_is_seen() -> None:
    original, pipe = pipeline(), accelerate(pipeline())
    before, _ = draw(pipe, **text())
    add_lora(original)
    add_lora(pipe)
    for change in ("fuse_lora", "unfuse_lora"):
        getattr(original.unet, change)()
        getattr(pipe.unet, change)()
        assert apart(draw(original, **text())[0], draw(pipe, **text())[0]) < CLOSE
    pipe.unet.delete_adapters("default")
    pipe.unet.unload_lora()
    assert apart(before, draw(pipe, **text())[0]) < CLOSE


@pytest.mark.parametrize("loop", [True, False])
def test_weights_that_change_are_seen(loop: bool) -> None:
    original = pipeline()
    pipe = accelerate(original, loop=loop)
    draw(pipe, **text())
    first = pipe.unet.conv_in.weight
    for change in (
        lambda: first.data.mul_(1.5),  # behind autograd's back
        lambda: original.unet.load_state_dict({k: v * 0.9 for k, v in original.unet.state_dict().items()}),
        lambda: original.to(torch.float64),
    ):
        change()
        arguments = {k: v.to(first.dtype) if isinstance(v, Tensor) else v for k, v in text().items()}
        expected, _ = draw(original, **arguments)
        assert apart(expected, draw(pipe, **arguments)[0]) < CLOSE


def test_calls_by_hand() -> None:
    """The U-Net alone in a loop of the user's, with timesteps of every form, and calls that are not ours to compute."""
    theirs = unet()
    ours = accelerate(theirs)
    x, other = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 12, 20)
    forward = ours.forward
    with torch.no_grad():
        for t in (999, 500.5, torch.tensor(20), torch.tensor([700, 700]), torch.arange(3).flip(0)[1]):
            for sample in (x, other):
                expected = theirs(sample, t, prompts()).sample
                assert apart(expected, ours(sample, t, prompts(), return_dict=False)[0]) < CLOSE
        assert forward.runs == 10
        both = torch.tensor([10, 900])
        assert torch.equal(theirs(x, both, prompts()).sample, ours(x, both, prompts()).sample)
    for model in (theirs, ours):
        model.zero_grad()
        model(x, 7, prompts()).sample.sum().backward()
    assert forward.runs == 10
    for wrong in (prompts(width=5), prompts(3)):
        with torch.no_grad(), pytest.raises(RuntimeError):
            ours(x, 7, wrong)


def test_text_is_read_once_a_call() -> None:
    pipe = accelerate(pipeline(), loop=False)
    for _ in range(2):
        draw(pipe, **text())
    forward = pipe.unet.forward
    (bound,) = forward._bound.values()
    assert forward.runs == 12
    assert bound.program.loads == 1  # the same timesteps, and all of them known from the first
    assert len(bound.rows) == 6


def test_undoing(tmp_path: Path) -> None:
    original = pipeline()
    kind, own = type(original), original.unet
    with accelerated(original) as pipe:
        assert pipe is original
        assert pipe.unet is own
        assert isinstance(pipe, kind)
        assert isinstance(own.forward, Forward)
        expected, _ = draw(pipe, **text())
    assert type(original) is kind
    assert "forward" not in vars(own)
    assert apart(draw(original, **text())[0], expected) < CLOSE
    assert unaccelerate(original) is original

    pipe = accelerate(original)
    for again in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert isinstance(again.unet.forward, Forward)
        assert again.unet.forward.unet is again.unet
        assert apart(expected, draw(again, **text())[0]) < CLOSE
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    saved = kind.from_pretrained(tmp_path, **absent)
    assert type(saved) is kind
    assert apart(expected, draw(saved, **text())[0]) < CLOSE
    img2img = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert isinstance(img2img.unet.forward, Forward)
    pipe.unet = unet()  # a new one is taken over at the next call
    draw(pipe, **text(), eta=0.0)
    assert isinstance(pipe.unet.forward, Forward)


def test_bad_input() -> None:
    for wrong in (scheduler(), torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="obj is a"):
            accelerate(wrong)
    with pytest.raises(TypeError, match="UNet2DConditionModel"):
        unaccelerate(object())
    pipe = pipeline()
    add_hooks(pipe)
    with pytest.raises(ValueError, match="hooks"):
        accelerate(pipe, allow_general=False)
    xl_pipe = accelerate(pipeline("StableDiffusionXLPipeline"))
    with torch.no_grad(), pytest.raises(TypeError, match="NoneType"):  # as diffusers: added_cond_kwargs is missing
        xl_pipe.unet(torch.randn(2, 4, 16, 16), 7, prompts())


def test_lower_precision() -> None:
    pipe = accelerate(pipeline(), dtype="bfloat16")
    expected, _ = draw(pipeline(), **text())
    actual, _ = draw(pipe, **text())
    assert actual.dtype == torch.float32
    assert CLOSE / 10 < apart(expected, actual) < 0.1


def test_the_progress_bar_moves_once(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = accelerate(pipeline())
    pipe.set_progress_bar_config()
    draw(pipe, **text())
    assert "6/6" in capsys.readouterr().err


def test_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--steps", "3"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    before, after, difference = capsys.readouterr().out.strip().splitlines()[-3:]
    assert before.startswith("before")
    assert after.startswith("after")
    assert float(difference.rpartition(" ")[2]) < CLOSE


def test_the_names_are_public() -> None:
    assert {"accelerate", "accelerated", "unaccelerate"} <= set(fastddpm.__all__)
