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
    PNDMScheduler,
    UNet2DModel,
)
from diffusers_objects import CLOSE, SMALL, ddpm, draw, quiet, seeded, unet
from torch import Tensor, nn

from fastddpm.interop import accelerate

# -- the general path -----------------------------------------------------------------------------------------------


def test_general_unet(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = quiet(DDPMPipeline(unet(act_fn="gelu"), DDPMScheduler()))
    with pytest.raises(ValueError, match="act_fn is 'gelu', must be one of 'silu', 'swish'; with allow_general=True"):
        accelerate(pipeline)
    expected = draw(pipeline)
    with caplog.at_level(logging.WARNING):
        fast = accelerate(pipeline, allow_general=True)
    assert "act_fn is 'gelu'" in caplog.text
    assert float((draw(fast) - expected).abs().max()) < CLOSE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_karras_sigmas": True}, "use_karras_sigmas is True, only False is supported"),
        ({"algorithm_type": "sde-dpmsolver++"}, "algorithm_type is 'sde-dpmsolver++', only 'dpmsolver++'"),
        ({"solver_order": 3}, "solver_order is 3, must be 1 or 2"),
    ],
)
def test_general_scheduler(settings: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = quiet(DDPMPipeline(unet(), DPMSolverMultistepScheduler(**settings, prediction_type="v_prediction")))
    with pytest.raises(ValueError, match=f"DPMSolverMultistepScheduler: {re.escape(message)}.*its own loop"):
        accelerate(pipeline)
    expected = draw(pipeline)
    with caplog.at_level(logging.WARNING):
        fast = accelerate(pipeline, allow_general=True)
    assert message in caplog.text
    called: list[object] = []
    fast._plan().model.register_forward_hook(lambda *_: called.append(1))
    assert float((draw(fast) - expected).abs().max()) < CLOSE
    assert len(called) == 9  # it was fastddpm's U-Net
    assert fast.unet is pipeline.unet


def test_nothing_left_to_accelerate() -> None:
    pipeline = DDPMPipeline(unet(time_embedding_type="fourier"), DPMSolverMultistepScheduler(use_karras_sigmas=True))
    with pytest.raises(ValueError, match="time_embedding_type.*use_karras_sigmas.*nothing left"):
        accelerate(pipeline, allow_general=True)


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(1, 1), "obj is a Linear of torch.*, must be a DDPMPipeline"),
        (lambda: UNet2DModel(**SMALL), r"a UNet2DModel of .*, must be .*Sampler\(model, schedule\).*fuse\(model\)"),
        (lambda: (1, 2), r"obj is a tuple of \(int, int\), must be"),
        (lambda: (unet(), 2), r"obj is a tuple of \(UNet2DModel, int\), must be"),
        (lambda: type("Own", (DDPMPipeline,), {})(unet(), DDPMScheduler()), "obj is a Own of .*, must be"),
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
    model = unet(act_fn="gelu")
    model.register_to_config(gate=2)  # a field of a diffusers yet to come
    return model


def skipping() -> UNet2DModel:
    changes = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2}
    return unet(**changes, block_out_channels=(32, 32), norm_num_groups=32)


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
        (lambda: (unet(), PNDMScheduler()), "scheduler is a PNDMScheduler, must be one of DDPMScheduler, DDIM"),
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
        (lambda: (unet(act_fn="gelu"), DDPMScheduler()), "unet.config: act_fn is 'gelu', must be one of 'silu'"),
        (
            lambda: (unet(act_fn="gelu", time_embedding_type="fourier"), DDPMScheduler()),
            "unet.config: time_embedding_type is 'fourier', must be one of 'positional'; act_fn is 'gelu', must",
        ),
        (lambda: (newer(), DDPMScheduler()), r"act_fn is 'gelu'.*; gate \(2\) is no field of a U-Net"),
        (lambda: (skipping(), DDPMScheduler()), "down_block_types is .*SkipDownBlock2D.*, must be a sequence of"),
        (lambda: (offloaded(), DDPMScheduler()), "unet is offloaded, must be on its device"),
        (lambda: (hooked(), DDPMScheduler()), "its layer mid_block has hooks"),
        (lambda: (replaced(), DDPMScheduler()), "its layer conv_out is a Other of elsewhere"),
        (lambda: (processed(), DDPMScheduler()), "processor is a Processor of .*, must be one of AttnProcessor"),
        (lambda: (more_parameters(), DDPMScheduler()), r"unet has, unexpectedly, conv_out.extra \(1 of"),
    ],
)
def test_what_is_not_supported(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        accelerate(make())
    assert "\n" not in str(error.value)


def test_options() -> None:
    with pytest.raises(ValueError, match="noise is 'numpy', must be one of 'philox', 'torch'"):
        accelerate(ddpm(), noise="numpy")
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        accelerate(ddpm(), steps=3)
    with pytest.raises(ValueError, match="inplace is True but obj is a tuple"):
        accelerate((unet(), DDPMScheduler()), inplace=True)
    karras = DDPMPipeline(unet(), DPMSolverMultistepScheduler(use_karras_sigmas=True))
    with pytest.raises(ValueError, match="dtype is 'float16' but .*use_karras_sigmas.*must be None"):
        accelerate(karras, allow_general=True, dtype="float16")
    assert type(karras) is DDPMPipeline


def test_calls_that_cannot_be() -> None:
    fast = accelerate(ddpm())
    with pytest.raises(ValueError, match="generator has 2 entries, must have one per image, 3"):
        draw(fast, batch_size=3, generator=[seeded(), seeded()])
    with pytest.raises(ValueError, match="cannot be larger than"):  # diffusers' own
        draw(fast, num_inference_steps=1001)
    ddim = accelerate(quiet(DDIMPipeline(unet(), DDIMScheduler())))
    with pytest.raises(ValueError, match="generator has 3 entries, must have one per image, 2"):
        draw(ddim, generator=[seeded()] * 3)
    with pytest.raises(ValueError, match="eta is -1"):
        draw(ddim, eta=-1)
    ddim.scheduler = DDPMScheduler()
    with pytest.raises(TypeError, match="scheduler is a DDPMScheduler, must be a DDIMScheduler"):
        draw(ddim)
    fast.unet = unet(sample_size=None)
    with pytest.raises(ValueError, match="sample_size is None, must be the pixels"):
        draw(fast)
    fast.unet = unet(act_fn="gelu")
    with pytest.raises(ValueError, match="act_fn is 'gelu'"):
        draw(fast)
