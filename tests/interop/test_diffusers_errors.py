"""What `accelerate` does not support in diffusers' objects: errors, and the general path."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers_objects import CLOSE, SMALL, ddpm, draw, quiet, seeded, unet
from torch import Tensor, nn

from fastddpm.interop import accelerate
from fastddpm.interop.diffusers.scheduler import recognise

# -- the general path -----------------------------------------------------------------------------------------------


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("fastddpm")]


def other_activation() -> UNet2DModel:
    """Return a U-Net of an activation that is not supported, as one of a diffusers yet to come has."""
    model = unet()
    for part in model.modules():
        if isinstance(getattr(part, "nonlinearity", None), nn.SiLU):
            part.nonlinearity = nn.Tanh()
    model.register_to_config(act_fn="tanh")
    return model


def cross_attention() -> UNet2DModel:
    """Return a U-Net with a block of cross-attention, which attends to itself in a pipeline without text."""
    kinds = {"down_block_types": ("KDownBlock2D",) * 2, "up_block_types": ("KCrossAttnUpBlock2D", "KUpBlock2D")}
    return unet(**kinds, block_out_channels=(32, 64), norm_num_groups=32, attention_head_dim=32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_activation, "act_fn is 'tanh', must be one of 'silu'"),
        (cross_attention, "up_block_types is .'KCrossAttnUpBlock2D"),
    ],
)
def test_general_unet(make: Callable[[], UNet2DModel], message: str, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = quiet(DDPMPipeline(make(), DDPMScheduler()))
    with pytest.raises(ValueError, match=f"{message}.*; with allow_general=True"):
        accelerate(pipeline, allow_general=False)
    expected = draw(pipeline)
    with caplog.at_level(logging.WARNING):
        fast = accelerate(pipeline)
        assert float((draw(fast) - expected).abs().max()) < CLOSE
    assert [bool(re.search(message, text)) for text in ours(caplog)] == [True]


M: dict[str, Any] = {"prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPMSolverMultistepScheduler(**M, algorithm_type="dpmsolver", thresholding=True,
                                             final_sigmas_type="sigma_min"), "thresholding is True, must be False"),
        (lambda: DPMSolverSinglestepScheduler(**M, algorithm_type="sde-dpmsolver++"), "algorithm_type is 'sde-dpmsolv"),
        (lambda: DDPMScheduler(variance_type="fixed_large_log"), "variance_type is 'fixed_large_log'"),
        (lambda: DDPMScheduler(beta_end=0.9), "beta_end is 0.9, so large that alphas_cumprod is 0 .* 444 of 1000 on"),
        (lambda: EulerDiscreteScheduler(), "scales the network's input, which the loop of this pipeline does not"),
        (lambda: TCDScheduler(), "scheduler is a TCDScheduler of .*, must be one of DDPMScheduler"),
    ],
)  # fmt: skip
def test_general_scheduler(make: Callable[[], Any], message: str, caplog: pytest.LogCaptureFixture) -> None:
    """The pipeline's own loop around fastddpm's U-Net, without being asked, and said once."""
    pipeline = quiet(DDPMPipeline(unet(), make()))
    with pytest.raises(ValueError, match=f"{message}.*its own loop"):
        accelerate(pipeline, allow_general=False)
    expected = draw(pipeline)
    with caplog.at_level(logging.WARNING):
        fast = accelerate(pipeline)
        called: list[object] = []
        fast._plan().model.register_forward_hook(lambda *_: called.append(1))
        torch.testing.assert_close(draw(fast), expected, rtol=0, atol=CLOSE, equal_nan=True)
    assert len(called) == 9  # it was fastddpm's U-Net
    assert [bool(re.search(message, text)) for text in ours(caplog)] == [True]
    assert fast.unet is pipeline.unet


@pytest.mark.parametrize(
    ("make", "steps", "message"),
    [
        (lambda: DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), 5, "zero terminal SNR"),
        (
            lambda: DPMSolverMultistepScheduler(num_train_timesteps=20),
            45,
            "num_inference_steps",
        ),
        # At -1 the scheduler reads its last level; with the usual betas that amplifies rounding by 158.
        (
            lambda: DDIMScheduler(timestep_spacing="trailing", beta_end=0.002),
            61,
            "timesteps has -1, every one must be from 0 to 999",
        ),
    ],
    ids=["zero SNR", "a timestep twice", "a timestep below 0"],
)
def test_general_calls(make: Callable[[], Any], steps: int, message: str, caplog: pytest.LogCaptureFixture) -> None:
    """What shows only once the timesteps are set: the same, for that call."""
    pipeline = quiet(DDPMPipeline(unet(), make()))
    with caplog.at_level(logging.WARNING):
        fast = accelerate(pipeline)
        try:
            expected = draw(pipeline, num_inference_steps=steps)
        except IndexError:  # diffusers begins with the second of two equal timesteps, and so runs out of them
            with pytest.raises(IndexError):
                draw(fast, num_inference_steps=steps)
        else:
            for _ in range(2):
                torch.testing.assert_close(
                    draw(fast, num_inference_steps=steps), expected, rtol=0, atol=CLOSE, equal_nan=True
                )
    assert [message in text for text in ours(caplog)] == [True]


def test_a_step_of_no_length() -> None:
    scheduler = UniPCMultistepScheduler(num_train_timesteps=25, final_sigmas_type="sigma_min")
    recognised = recognise(scheduler)
    scheduler.set_timesteps(25)
    with pytest.raises(ValueError, match="two levels it visits are so close that a step has no coefficients"):
        recognised.table(scheduler)


def test_nothing_left_to_accelerate() -> None:
    pipeline = DDPMPipeline(other_activation(), TCDScheduler())
    with pytest.raises(ValueError, match="act_fn is 'tanh'.*TCDScheduler.*nothing left"):
        accelerate(pipeline)
    fast = accelerate(quiet(DDPMPipeline(other_activation(), DDPMScheduler())))
    fast.scheduler = TCDScheduler()  # one that was accelerated goes on
    torch.testing.assert_close(draw(fast), draw(quiet(pipeline)), rtol=0, atol=0)


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(1, 1), "obj is a linear.Linear, must be a DDPMPipeline"),
        (lambda: UNet2DModel(**SMALL), r"a unet_2d.UNet2DModel, must be .*Sampler\(model, schedule\).*fuse\(model\)"),
        (lambda: (1, 2), r"obj is a tuple of \(int, int\), must be"),
        (lambda: (unet(), 2), r"obj is a tuple of \(unet_2d.UNet2DModel, int\), must be"),
        (lambda: type("Own", (DDPMPipeline,), {"__call__": print})(unet(), DDPMScheduler()), r"\.Own, must be"),
    ],
)
def test_other_objects(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        accelerate(make())


def hooked() -> UNet2DModel:
    model = unet()
    model.mid_block.register_forward_hook(lambda *_: None)
    return model


def newer() -> UNet2DModel:
    model = other_activation()
    model.register_to_config(gate=2)  # a field of a diffusers yet to come
    return model


def other_embedding() -> UNet2DModel:
    model = other_activation()
    model.register_to_config(time_embedding_type="sine")
    return model


def offloaded() -> UNet2DModel:
    model = unet()
    model._hf_hook = object()  # as the library accelerate marks it
    return model


def replaced() -> UNet2DModel:
    model = unet()
    model.conv_out = type("Other", (nn.Conv2d,), {"__module__": "elsewhere"})(4, 3, 3, padding=1)
    return model


class Processor:
    """Of attention, with a behaviour of its own."""

    def __call__(self, attn: Any, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


def processed() -> UNet2DModel:
    model = unet()
    model.mid_block.attentions[0].set_processor(Processor())
    return model


def more_parameters() -> UNet2DModel:
    model = unet()
    model.conv_out.extra = nn.Parameter(torch.zeros(1))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (unet(), PNDMScheduler()), "PNDMScheduler: skip_prk_steps is False, only True is supported"),
        (lambda: (unet(), DDPMScheduler(variance_type="fixed_large_log")), "DDPMScheduler: variance_type is 'fixed_l"),
        (lambda: (unet(out_channels=6), DDPMScheduler()), "out_channels is 6, must be 3 for in_channels 3"),
        (lambda: (unet(), DDPMScheduler(variance_type="learned")), "out_channels is 3, must be 6"),
        (
            lambda: (unet(in_channels=1, out_channels=2), DPMSolverMultistepScheduler(variance_type="learned")),
            "variance_type is 'learned' but unet.config.in_channels is 1, must be 3",
        ),
        (
            lambda: (
                unet(out_channels=6),
                DPMSolverMultistepScheduler(variance_type="learned", prediction_type="v_prediction"),
            ),
            "variance_type is 'learned' but prediction_type is 'v_prediction'",
        ),
        (lambda: (unet(num_class_embeds=10), DDPMScheduler()), "num_class_embeds is 10, must be None"),
        (lambda: (other_activation(), DDPMScheduler()), "unet.config: act_fn is 'tanh', must be one of 'silu'"),
        (
            lambda: (other_embedding(), DDPMScheduler()),
            "unet.config: time_embedding_type is 'sine', must be one of 'positional', 'fourier', 'learned'; "
            "act_fn is 'tanh', must",
        ),
        (lambda: (newer(), DDPMScheduler()), r"act_fn is 'tanh'.*; gate \(2\) is no field of a U-Net"),
        (lambda: (offloaded(), DDPMScheduler()), "unet is offloaded by accelerate's hooks, and runs as it is"),
        (lambda: (hooked(), DDPMScheduler()), "its layer mid_block has hooks"),
        (lambda: (replaced(), DDPMScheduler()), "its layer conv_out is a Other of elsewhere"),
        (lambda: (processed(), DDPMScheduler()), "processor is a Processor of .*, must be one of AttnProcessor"),
        (lambda: (more_parameters(), DDPMScheduler()), r"unet has, unexpectedly, conv_out.extra \(1 of"),
    ],
)
def test_what_is_not_supported(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        accelerate(make(), allow_general=False)
    assert "\n" not in str(error.value)


def test_options() -> None:
    with pytest.raises(ValueError, match="noise is 'numpy', must be one of 'philox', 'torch'"):
        accelerate(ddpm(), noise="numpy")
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        accelerate(ddpm(), steps=3)
    with pytest.raises(ValueError, match="inplace is True but obj is a tuple"):
        accelerate((unet(), DDPMScheduler()), inplace=True)
    other = DDPMPipeline(unet(), TCDScheduler())
    with pytest.raises(ValueError, match="dtype is 'float16' but .*TCDScheduler.*must be None"):
        accelerate(other, dtype="float16")
    assert type(other) is DDPMPipeline


def test_calls_that_cannot_be() -> None:
    fast = accelerate(ddpm())
    with pytest.raises(ValueError, match="generator has 2 entries, must have one per image, 3"):
        draw(fast, batch_size=3, generator=[seeded(), seeded()])
    with pytest.raises(ValueError, match="cannot be larger than"):  # diffusers' own
        draw(fast, num_inference_steps=1001)
    ddim = accelerate(quiet(DDIMPipeline(unet(), DDIMScheduler())))
    with pytest.raises(ValueError, match="generator has 3 entries, must have one per image, 2"):
        draw(ddim, generator=[seeded()] * 3)
    with pytest.raises(ValueError, match="eta is -1, must be a finite number"):
        draw(accelerate(quiet(DDIMPipeline(unet(), DDIMScheduler())), allow_general=False), eta=-1)
    ddim.scheduler = DDPMScheduler()
    with pytest.raises(TypeError, match="scheduler is a DDPMScheduler, must be a DDIMScheduler"):
        draw(ddim)
    fast.unet = unet(sample_size=None)
    with pytest.raises(ValueError, match="sample_size is None, must be the pixels"):
        draw(fast)
    fast = accelerate(ddpm(), allow_general=False)
    fast.unet = other_activation()
    with pytest.raises(ValueError, match="act_fn is 'tanh'"):
        draw(fast)
