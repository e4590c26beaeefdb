"""What a model is, is what it does: edited networks, schedulers and diffusions are refused, or sampled as they are."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers_objects import CLOSE, draw, quiet, unet
from lucidrains_objects import diffusion, fast
from torch import nn

from fastddpm.interop import accelerate
from fastddpm.interop.diffusers import unet as interop_unet
from fastddpm.networks.frozen import freeze, why_not
from fastddpm.networks.unet.model import UNet

Edit = Callable[[Any], object]


def each(kind: type, **values: Any) -> Edit:
    """Set attributes of all layers of a kind."""
    return lambda model: [setattr(m, k, v) for m in model.modules() if isinstance(m, kind) for k, v in values.items()]


def method(path: str, name: str, function: Callable[..., Any]) -> Edit:
    """Replace a method of one layer."""
    return lambda model: setattr(model.get_submodule(path), name, function)


def same_name(model: Any) -> None:
    """Give the attention of diffusers a processor whose class has the name of a known one."""

    class Halved(AttnProcessor2_0):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) / 2

    Halved.__name__ = "AttnProcessor2_0"
    model.mid_block.attentions[0].set_processor(Halved())


def circular(self: Any, x: Any, weight: Any, bias: Any) -> Any:
    """Convolve on a torus, as scripts that make tiles replace `_conv_forward`."""
    return nn.functional.conv2d(nn.functional.pad(x, (1,) * 4, mode="circular"), weight, bias)


UNETS: dict[str, tuple[Edit, str]] = {
    "padding": (each(nn.Conv2d, padding_mode="circular"), "conv_in.padding_mode is 'circular', must be 'zeros'"),
    "eps": (each(nn.GroupNorm, eps=0.5), "eps is 0.5, must be"),
    "groups": (each(nn.GroupNorm, num_groups=2), "num_groups is 2, must be 4"),
    "scale": (lambda m: setattr(m.mid_block.resnets[0], "output_scale_factor", 3.0), "output_scale_factor is 3.0"),
    "sinusoids": (lambda m: setattr(m.time_proj, "flip_sin_to_cos", False), "time_proj.flip_sin_to_cos is False"),
    "a method": (
        lambda m: setattr(m.conv_in, "_conv_forward", types.MethodType(circular, m.conv_in)),
        "conv_in._conv_forward has been replaced",
    ),
    "a forward": (method("mid_block", "forward", lambda x, emb: x), "mid_block.forward has been replaced"),
    "a hook": (lambda m: m.conv_out.register_forward_pre_hook(lambda *_: None), "conv_out has hooks"),
    "a layer": (lambda m: setattr(m, "conv_act", nn.Tanh()), "conv_act is a Tanh, must be a SiLU"),
    "a processor": (same_name, "processor is a AttnProcessor2_0 of"),
}


strict = partial(accelerate, allow_general=False)


@pytest.mark.parametrize("edit", UNETS)
def test_edited_unets_are_refused_by_the_layers_name(edit: str) -> None:
    """Edited before, and after: weights may change, layers may not."""
    change, message = UNETS[edit]
    model = unet()
    pipeline = quiet(strict((model, DDIMScheduler())))
    draw(pipeline, num_inference_steps=2)
    change(model)
    for attempt in (lambda: draw(pipeline, num_inference_steps=2), lambda: strict((model, DDIMScheduler()))):
        with pytest.raises(ValueError, match=message):
            attempt()


def test_an_edited_unet_may_run_as_it_is() -> None:
    """The tiling trick: the original's images."""
    model = unet()
    each(nn.Conv2d, padding_mode="circular")(model)
    fast = quiet(accelerate((model, DDIMScheduler())))
    model.forward = model.forward  # what the pipeline itself calls stays the model's
    expected = draw(quiet(fast.base(model, DDIMScheduler())))
    assert float((draw(fast) - expected).abs().max()) < CLOSE


def test_a_class_whose_method_was_replaced_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer says so; the comparison does."""
    block = type(unet().mid_block.resnets[0])
    own = block.forward
    monkeypatch.setattr(block, "forward", lambda self, *args, **kwargs: 1.1 * own(self, *args, **kwargs))
    with pytest.raises(ValueError, match="computes something else than its config says .*a method or a processor"):
        strict((unet(), DDIMScheduler()))


def test_networks_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every call, nor where weights alone have changed."""
    compared: list[object] = []
    check = interop_unet.check_same
    monkeypatch.setattr("fastddpm.interop.diffusers.engine.check_same", lambda *a: (compared.append(a), check(*a)))
    model = unet()
    fast = quiet(accelerate((model, DDIMScheduler())))
    for _ in range(2):
        draw(fast, num_inference_steps=2)
        with torch.no_grad():
            model.conv_out.bias += 1
    assert len(compared) == 1


def half_the_noise(scheduler: Any) -> None:
    own = scheduler._get_variance
    scheduler._get_variance = lambda *args, **kwargs: own(*args, **kwargs) / 4


SCHEDULERS: dict[str, tuple[Callable[[], Any], Edit, str]] = {
    "step": (DDPMScheduler, lambda s: setattr(s, "step", lambda *a, **k: None), "its step has been replaced"),
    "variance": (DDPMScheduler, half_the_noise, "its _get_variance has been replaced"),
    "input": (DDIMScheduler, lambda s: setattr(s, "scale_model_input", lambda x, t: x / 2), "scale_model_input has"),
    "last level": (DDIMScheduler, lambda s: setattr(s, "final_alpha_cumprod", torch.tensor(0.5)), "its steps give NaN"),
    "first noise": (DDIMScheduler, lambda s: setattr(s, "init_noise_sigma", 2.0), "its steps are not those"),
    "order": (DPMSolverMultistepScheduler, lambda s: setattr(s, "convert_model_output", lambda o, **_: o), "replaced"),
}


@pytest.mark.parametrize("edit", SCHEDULERS)
def test_edited_schedulers_are_refused(edit: str) -> None:
    make, change, message = SCHEDULERS[edit]
    fast = quiet(strict((unet(), make())))
    change(fast.scheduler)
    with pytest.raises(ValueError, match=message):
        draw(fast, num_inference_steps=3)
    with pytest.raises(ValueError, match=message):
        strict(DDPMPipeline(unet(), fast.scheduler))  # a DDIMPipeline makes a new one of the config


def test_subclasses_of_schedulers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = type("DDIMScheduler", (DDIMScheduler,), {"step": lambda *_, **__: None, "__module__": "elsewhere"})
    with pytest.raises(ValueError, match="scheduler is a DDIMScheduler of elsewhere, must be"):
        strict(DDPMPipeline(unet(), own()))
    step = DDPMScheduler.step

    def other(self: Any, out: Any, *args: Any, **kwargs: Any) -> Any:
        return step(self, 0.9 * out, *args, **kwargs)

    fast = quiet(strict((unet(), DDPMScheduler())))
    monkeypatch.setattr(DDPMScheduler, "step", other)  # of the class, which no object shows
    with pytest.raises(ValueError, match="its steps are not those of its config"):
        draw(fast)


def test_edited_diffusions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = diffusion()
    ours = fast(theirs, allow_general=False)
    theirs.q_posterior = lambda *_: None  # after it was accelerated
    with pytest.raises(ValueError, match="has its own q_posterior"):
        ours.sample(1)
    del theirs.q_posterior
    own = type(theirs).p_sample
    monkeypatch.setattr(type(theirs), "p_sample", lambda *args, **kwargs: own(*args, **kwargs))
    for attempt in (lambda: ours.sample(1), lambda: fast(diffusion(), allow_general=False)):
        with pytest.raises(ValueError, match="has its own p_sample"):
            attempt()


OWN: dict[str, tuple[Edit, str]] = {
    "padding": (each(nn.Conv2d, padding_mode="circular"), "its conv_in.padding_mode is 'circular', must be 'zeros'"),
    "eps": (each(nn.GroupNorm, eps=0.5), "eps is 0.5, must be 1e-05"),
    "scale": (lambda m: setattr(m.mid_block.resnets[0], "output_scale", 2.0), "output_scale is 2.0, must be 1"),
    "a method": (method("conv_in", "_conv_forward", lambda *_: None), "conv_in._conv_forward has been replaced"),
}


@pytest.mark.parametrize("edit", OWN)
def test_fastddpms_own_edited_unet_is_not_frozen(edit: str) -> None:
    change, message = OWN[edit]
    fields: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = UNet(sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **fields).eval()
    program = (frozen := freeze(model, [5])).bind(frozen.new_input((1, 3, 8, 8)))
    program.load()
    model.train()
    program.load()  # the mode and the backend are no layer's
    change(model)
    assert message in str(why_not(model))
    with pytest.raises(ValueError, match=f"changed since it was frozen.*{message}"):
        program.load()


def test_a_hook_for_all_modules_is_seen() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert why_not(UNet(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)))
    finally:
        handle.remove()
