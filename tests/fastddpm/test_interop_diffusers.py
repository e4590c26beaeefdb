"""Accelerated pipelines against diffusers' own, at the same generators; and what of diffusers' behaviour they keep."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    ImagePipelineOutput,
    LDMPipeline,
    PNDMScheduler,
    UNet2DModel,
    VQModel,
)
from PIL import Image
from torch import Tensor, nn

from fastddpm.interop import accelerate
from fastddpm.interop.diffusers_scheduler import StepNoise, recognise
from fastddpm.interop.diffusers_unet import share_unet
from fastddpm.precision import tf32
from fastddpm.sampler import Sampler

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_diffusers.py"
# Both compute in float32, with different but equivalent formulas: a few units of rounding per step, which steps of
# large gain (x0 from epsilon at high noise) carry on. One level of an 8-bit image is 4e-3.
CLOSE = 1e-4
# The U-Net of diffusers' own fast tests.
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def unet(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**{**SMALL, **changes}).eval()


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ddpm(**settings: Any) -> Any:
    return quiet(DDPMPipeline(unet(), DDPMScheduler(**settings)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipeline: Any, **arguments: Any) -> Tensor:
    given = {"batch_size": 2, "generator": seeded(), "num_inference_steps": 9, "output_type": "pt", **arguments}
    images = pipeline(**given).images
    assert images.shape[0] == given["batch_size"]
    return images


def check_equal(pipeline: Any, **arguments: Any) -> None:
    """An accelerated pipeline gives the images of the original, and leaves the generator where that does."""
    theirs, ours = seeded(), seeded()
    expected = draw(pipeline, generator=theirs, **arguments)
    actual = draw(accelerate(pipeline), generator=ours, **arguments)
    # Images that are nothing but 0 and 1 would hide differences.
    assert float(((expected > 0.01) & (expected < 0.99)).float().mean()) > 0.1
    assert actual.dtype == expected.dtype
    assert float((actual - expected).abs().max()) < CLOSE
    assert torch.equal(ours.get_state(), theirs.get_state())


V = {"prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
GENTLE = {"beta_end": 1e-3}  # not much noise: without clipping, an untrained network stays within the image's range
SCHEDULES: list[dict[str, Any]] = [
    {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.linspace(1e-4, 0.3, 50), "num_train_timesteps": 50},
    {"num_train_timesteps": 30},
]
COMMON: list[dict[str, Any]] = [
    {},
    V,
    {"prediction_type": "sample"},
    {"clip_sample_range": 2.0},
    {"clip_sample": False, **V},
    THRESHOLD,
    ZERO_SNR,
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"steps_offset": 1},
    *SCHEDULES,
]


def ids(settings: Any) -> str:
    return ",".join(f"{name}={np.shape(v) or v}" for name, v in settings.items()) or "defaults"


@pytest.mark.parametrize(
    "settings",
    [
        *COMMON,
        {"variance_type": "fixed_small_log"},
        {"variance_type": "fixed_large"},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace"},
    ],
    ids=ids,
)
def test_ddpm_scheduler(settings: dict[str, Any]) -> None:
    check_equal(ddpm(**settings))


def test_ddpm_at_its_full_length() -> None:
    check_equal(ddpm(variance_type="fixed_large"), num_inference_steps=1000)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_ddpm_learned_variance(variance_type: str) -> None:
    model = unet(out_channels=6)
    with torch.no_grad():  # variances, or shares between two, that are positive
        model.conv_out.weight[3:] *= 0.01
        model.conv_out.bias[3:] = 0.3
    check_equal(quiet(DDPMPipeline(model, DDPMScheduler(variance_type=variance_type))))


@pytest.mark.parametrize(
    "call", [{}, {"eta": 0.5}, {"eta": 1.0, "use_clipped_model_output": True}, {"use_clipped_model_output": False}]
)
@pytest.mark.parametrize("settings", [*COMMON, {"set_alpha_to_one": False}], ids=ids)
def test_ddim_scheduler(settings: dict[str, Any], call: dict[str, Any]) -> None:
    if settings is ZERO_SNR and call.get("eta") == 1:
        call = {**call, "eta": 0.9}  # with 1 diffusers takes the root of 0, which rounding may make negative: NaN
    check_equal(quiet(DDIMPipeline(unet(), DDIMScheduler(**settings))), **call)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 49, 50])
def test_ddim_steps_that_do_not_divide(spacing: str, steps: int) -> None:
    """diffusers' DDIM steps by T // S, wherever the next timestep is."""
    scheduler = DDIMScheduler(num_train_timesteps=50, timestep_spacing=spacing)
    check_equal(quiet(DDIMPipeline(unet(), scheduler)), num_inference_steps=steps, eta=0.3)


@pytest.mark.parametrize(
    "settings",
    [
        GENTLE,
        V,
        {"prediction_type": "sample"},
        THRESHOLD,
        ZERO_SNR,
        *({**schedule, **V} for schedule in SCHEDULES),
        {**GENTLE, "solver_order": 1},
        {**GENTLE, "timestep_spacing": "leading", "steps_offset": 1},
        {**GENTLE, "timestep_spacing": "trailing"},
        {**GENTLE, "final_sigmas_type": "sigma_min"},
        {**GENTLE, "final_sigmas_type": "sigma_min", "lower_order_final": False},
    ],
    ids=ids,
)
@pytest.mark.parametrize("steps", [9, 20])  # below 15 the last step may be of a lower order
def test_dpmsolver_scheduler(settings: dict[str, Any], steps: int) -> None:
    check_equal(quiet(DDPMPipeline(unet(), DPMSolverMultistepScheduler(**settings))), num_inference_steps=steps)


def test_dpmsolver_beside_a_learned_variance() -> None:
    scheduler = DPMSolverMultistepScheduler(**GENTLE, variance_type="learned_range")
    check_equal(quiet(DDPMPipeline(unet(out_channels=6), scheduler)))


@pytest.mark.parametrize("settings", [{}, {"prediction_type": "sample"}], ids=ids)
def test_ddim_scheduler_in_ddpm_pipeline(settings: dict[str, Any]) -> None:
    check_equal(quiet(DDPMPipeline(unet(), DDIMScheduler(**settings))))


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_size": (8, 4)},
        {"in_channels": 1, "out_channels": 1},
        {"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
        {"resnet_time_scale_shift": "scale_shift", "center_input_sample": True, "norm_eps": 1e-3},
    ],
    ids=ids,
)
def test_unets(changes: dict[str, Any]) -> None:
    check_equal(quiet(DDPMPipeline(unet(**changes), DDPMScheduler())))


# -- random numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "generators",
    [
        lambda: [seeded(k) for k in (5, 6, 7)],
        lambda: [seeded(5)],
        lambda: torch.manual_seed(5),
        lambda: [seeded(k) for k in (5, 6, 7, 8)],
    ],
    ids=["one each", "a list of one", "the global one", "more than images"],
)
def test_kinds_of_generators(generators: Callable[[], Any]) -> None:
    pipeline = ddpm()
    expected = draw(pipeline, batch_size=3, generator=generators())
    actual = draw(accelerate(pipeline), batch_size=3, generator=generators())
    assert float((actual - expected).abs().max()) < CLOSE


def test_a_generator_per_image_makes_it_independent_of_the_others() -> None:
    fast = accelerate(ddpm())
    both = draw(fast, generator=[seeded(1), seeded(2)])
    torch.testing.assert_close(draw(fast, batch_size=1, generator=seeded(2)), both[1:], rtol=0, atol=CLOSE)


def test_philox_noise_without_a_generator() -> None:
    fast = accelerate(ddpm())
    torch.manual_seed(3)
    first, second = draw(fast, generator=None), draw(fast, generator=None)
    assert float((first - second).abs().max()) > 0.1
    torch.manual_seed(3)
    assert torch.equal(draw(fast, generator=None), first)
    torch.manual_seed(3)  # an image does not depend on how many are drawn with it
    torch.testing.assert_close(draw(fast, batch_size=5, generator=None)[:2], first, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline])
def test_torch_noise_without_a_generator(kind: Any) -> None:
    scheduler = DDPMScheduler() if kind is DDPMPipeline else DDIMScheduler()
    call = {} if kind is DDPMPipeline else {"eta": 1.0}
    pipeline = quiet(kind(unet(), scheduler))
    torch.manual_seed(3)
    expected = [draw(pipeline, generator=None, **call) for _ in range(2)]
    fast = accelerate(pipeline, noise="torch")
    torch.manual_seed(3)
    for images in expected:  # the second call begins where the first has left the generator
        assert float((draw(fast, generator=None, **call) - images).abs().max()) < CLOSE


def test_step_noise_is_drawn_in_order() -> None:
    drawn: list[int] = []

    def one() -> Tensor:
        drawn.append(len(drawn))
        return torch.tensor(float(drawn[-1]))

    noise = StepNoise([True, False, True, True, True], one)
    assert float(noise(0, ())) == 0
    assert float(noise(3, ())) == 2  # that of row 2 is drawn, and not used
    noise.finish()
    assert drawn == [0, 1, 2, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_generators_on_a_gpu(device: str) -> None:
    pipeline = ddpm(prediction_type="v_prediction").to("cuda")
    with tf32(False):  # which diffusers' convolutions would else round to
        expected, actual = (
            draw(p, generator=[torch.Generator(device).manual_seed(k) for k in range(2)])
            for p in (pipeline, accelerate(pipeline))
        )
    assert actual.device == expected.device
    assert float((actual - expected).abs().max()) < CLOSE


# -- diffusers' published results -----------------------------------------------------------------------------------


def old_unet() -> UNet2DModel:
    return unet(sample_size=32, block_out_channels=(32, 64), layers_per_block=2, norm_num_groups=32)


def ldm(**settings: Any) -> Any:
    torch.manual_seed(0)
    decoder = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
    )
    return quiet(LDMPipeline(vqvae=decoder.eval(), unet=old_unet(), scheduler=DDIMScheduler(**settings)))


@pytest.mark.parametrize(
    ("make", "size", "expected", "tolerance"),
    [
        pytest.param(
            ddpm, 8, [0.0, 0.9996672, 0.00329116, 1.0, 0.9995991, 1.0, 0.0060907, 0.00115037, 0.0], 1e-2, id="DDPM"
        ),
        pytest.param(
            lambda: DDIMPipeline(unet(), DDIMScheduler()),
            8,
            [0.0, 9.979e-01, 0.0, 9.999e-01, 9.986e-01, 9.991e-01, 7.106e-04, 0.0, 0.0],
            1e-3,
            id="DDIM",
        ),
        pytest.param(
            lambda: DDIMPipeline(old_unet(), DDIMScheduler()),
            32,
            [1.0, 5.717e-01, 4.717e-01, 1.0, 0.0, 1.0, 3.0e-04, 0.0, 9.0e-04],
            1e-3,
            id="DDIM, an older test",
        ),
        pytest.param(ldm, 64, [0.8512, 0.818, 0.6411, 0.6808, 0.4465, 0.5618, 0.46, 0.6231, 0.5172], 1e-2, id="LDM"),
    ],
)
def test_published_slices(make: Callable[[], Any], size: int, expected: list[float], tolerance: float) -> None:
    """The numbers and tolerances of tests/pipelines/{ddpm,ddim,latent_diffusion} in diffusers."""
    pipeline = quiet(accelerate(make()))
    images = pipeline(generator=seeded(), num_inference_steps=2, output_type="np").images
    assert images.shape == (1, size, size, 3)
    assert np.abs(images[0, -3:, -3:, -1].flatten() - np.array(expected)).max() < tolerance
    as_tuple = pipeline(generator=seeded(), num_inference_steps=2, output_type="np", return_dict=False)[0]
    assert np.array_equal(as_tuple, images)


def test_ldm_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = ldm(prediction_type="sample")
    # Without the codebook: where two entries are equally near, rounding chooses.
    monkeypatch.setattr(pipeline.vqvae, "decode", partial(pipeline.vqvae.decode, force_not_quantize=True))
    fast = accelerate(pipeline)
    for call in ({}, {"eta": 0.8}):  # the noise of its steps is torch's own, whatever the generator
        torch.manual_seed(4)
        expected = pipeline(2, seeded(), num_inference_steps=4, output_type="np", **call).images
        torch.manual_seed(4)
        actual = fast(2, seeded(), num_inference_steps=4, output_type="np", **call).images
        assert np.abs(actual - expected).max() < CLOSE
    assert isinstance(fast(num_inference_steps=1).images[0], Image.Image)
    assert isinstance(fast(num_inference_steps=1, output_type="pt").images, np.ndarray)  # as in diffusers


# -- the same object otherwise --------------------------------------------------------------------------------------


def test_outputs() -> None:
    pipeline = ddpm()
    fast = accelerate(pipeline)
    assert isinstance(fast, DDPMPipeline)
    for output_type in ("pil", "np", "pt"):
        theirs, ours = (p(2, seeded(), 3, output_type) for p in (pipeline, fast))
        assert type(ours) is type(theirs) is ImagePipelineOutput
        as_tuple = fast(2, seeded(), 3, output_type, return_dict=False)
        assert type(as_tuple) is tuple
        assert len(as_tuple) == 1
        if output_type == "pil":
            for one, other, third in zip(theirs.images, ours.images, as_tuple[0], strict=True):
                assert (one.mode, one.size) == (other.mode, other.size)
                # a value beside the edge between two levels may fall on its other side
                assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
                assert np.array_equal(other, third)
        else:
            assert type(ours.images) is type(theirs.images)
            assert ours.images.dtype == theirs.images.dtype
            assert ours.images.shape == theirs.images.shape
            assert abs(ours.images - theirs.images).max() < CLOSE


def test_progress_bar() -> None:
    fast = accelerate(DDPMPipeline(unet(), DDPMScheduler()))
    seen = io.StringIO()
    fast.set_progress_bar_config(file=seen, desc="drawing", disable=False)
    draw(fast, num_inference_steps=6)
    assert "drawing: 100%" in seen.getvalue()
    assert "6/6" in seen.getvalue()
    silent = io.StringIO()
    fast.set_progress_bar_config(file=silent, disable=True)
    draw(fast)
    assert silent.getvalue() == ""


def test_what_is_saved_is_diffusers(tmp_path: Path) -> None:
    pipeline = ddpm(prediction_type="v_prediction")
    accelerate(pipeline).save_pretrained(tmp_path)
    loaded = quiet(DDPMPipeline.from_pretrained(tmp_path))
    assert type(loaded) is DDPMPipeline
    assert torch.equal(draw(loaded), draw(pipeline))


def test_the_original_stays_as_it_is() -> None:
    pipeline = ddpm()
    scheduler, before = pipeline.scheduler, copy.deepcopy(pipeline.unet.state_dict())
    timesteps = scheduler.timesteps.clone()
    fast = accelerate(pipeline)
    draw(fast)
    assert type(pipeline) is DDPMPipeline
    assert pipeline.scheduler is scheduler
    assert scheduler.num_inference_steps is None
    assert torch.equal(scheduler.timesteps, timesteps)
    assert fast.unet is pipeline.unet
    assert fast.scheduler.timesteps.tolist() == [888, 777, 666, 555, 444, 333, 222, 111, 0]
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert vars(pipeline).keys().isdisjoint({"_engine"})


def test_inplace() -> None:
    pipeline = ddpm()
    expected = draw(pipeline)
    scheduler = pipeline.scheduler
    assert accelerate(pipeline, inplace=True) is pipeline
    assert type(pipeline) is not DDPMPipeline
    assert isinstance(pipeline, DDPMPipeline)
    assert pipeline.scheduler is scheduler
    assert float((draw(pipeline) - expected).abs().max()) < CLOSE


def test_a_unet_and_a_scheduler() -> None:
    model = unet()
    for scheduler, kind in (
        (DDIMScheduler(), DDIMPipeline),
        (DDPMScheduler(), DDPMPipeline),
        (DPMSolverMultistepScheduler(), DDPMPipeline),
    ):
        fast = quiet(accelerate((model, scheduler)))
        assert isinstance(fast, kind)
        assert fast.unet is model
        difference = draw(fast) - draw(quiet(kind(model, scheduler)))
        assert float(difference.abs().max()) < CLOSE


def test_parts_may_change() -> None:
    pipeline = ddpm()
    fast = accelerate(pipeline)
    first = draw(fast)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.1  # in place: both have the same parameters
    changed = draw(fast)
    assert float((changed - first).abs().max()) > 1e-3
    assert float((changed - draw(pipeline)).abs().max()) < CLOSE
    torch.manual_seed(1)
    pipeline.unet.load_state_dict(UNet2DModel(**SMALL).state_dict())
    assert float((draw(fast) - draw(pipeline)).abs().max()) < CLOSE
    for part in ({"unet": UNet2DModel(**SMALL).eval()}, {"scheduler": DDPMScheduler(prediction_type="sample")}):
        for name, value in part.items():
            setattr(fast, name, value)
            setattr(pipeline, name, value)
        assert float((draw(fast) - draw(pipeline)).abs().max()) < CLOSE
    fast.scheduler = pipeline.scheduler = DPMSolverMultistepScheduler.from_config(fast.scheduler.config)
    assert float((draw(fast) - draw(pipeline)).abs().max()) < CLOSE
    assert fast.components["scheduler"] is fast.scheduler


def test_to_and_dtype() -> None:
    pipeline = ddpm()
    fast = accelerate(pipeline)
    first = draw(fast)
    assert fast.to(torch.bfloat16) is fast
    assert fast.dtype == pipeline.unet.dtype == torch.bfloat16  # the components are shared
    images = draw(fast)
    assert images.dtype == torch.bfloat16
    assert images.isfinite().all()
    assert fast(generator=seeded(), num_inference_steps=2, output_type="np").images.dtype == np.float32
    fast.to(torch.float32)  # with what bfloat16 has left of the weights
    assert not torch.equal(draw(fast), first)
    assert float((draw(fast) - draw(pipeline)).abs().max()) < CLOSE
    assert str(fast.to("cpu").device) == "cpu"
    check_equal(pipeline.to(torch.float64))


def test_dtype_of_the_network() -> None:
    """Another dtype than the U-Net's: the same random numbers, and images that differ by its rounding."""
    exact, rounded = (draw(accelerate(ddpm(), dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    assert 0 < float((exact - rounded).abs().mean()) < 0.02


def test_the_weights_are_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unet()
    ours = share_unet(model)
    theirs = dict(model.named_parameters())
    assert all(parameter is theirs[name] for name, parameter in ours.named_parameters())
    built: list[object] = []
    init = Sampler.__init__
    monkeypatch.setattr(Sampler, "__init__", lambda self, *a, **k: (built.append(self), init(self, *a, **k))[1])
    fast = accelerate(quiet(DDIMPipeline(model, DDIMScheduler())))
    for steps, eta in ((3, 0.0), (5, 0.0), (5, 1.0), (3, 0.5)):
        draw(fast, num_inference_steps=steps, eta=eta)
    assert len(built) == 1


def test_copies_and_accelerating_twice() -> None:
    fast = accelerate(ddpm())
    expected = draw(fast)
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        fast.unet.conv_out.bias += 0.1
    assert torch.equal(draw(twin), expected)
    again = accelerate(twin, noise="torch")
    assert type(again) is type(fast)
    assert torch.equal(draw(again), expected)
    assert torch.equal(draw(quiet(type(fast)(**twin.components))), expected)
    assert torch.equal(draw(pickle.loads(pickle.dumps(twin))), expected)
    assert type(DDPMPipeline.from_pipe(twin)) is DDPMPipeline


def test_compiled_unet_is_unwrapped() -> None:
    pipeline = ddpm()
    expected = draw(pipeline)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    assert float((draw(accelerate(pipeline)) - expected).abs().max()) < CLOSE


# -- the general path -----------------------------------------------------------------------------------------------


def test_general_unet(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = quiet(DDPMPipeline(unet(downsample_type="resnet"), DDPMScheduler()))
    with pytest.raises(ValueError, match="downsample_type is 'resnet', must be one of 'conv'; with allow_general=True"):
        accelerate(pipeline)
    expected = draw(pipeline)
    with caplog.at_level(logging.WARNING):
        fast = accelerate(pipeline, allow_general=True)
    assert "downsample_type is 'resnet'" in caplog.text
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
    pipeline = quiet(DDPMPipeline(unet(), DPMSolverMultistepScheduler(**settings, **V)))
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
    pipeline = DDPMPipeline(unet(downsample_type="resnet"), DPMSolverMultistepScheduler(use_karras_sigmas=True))
    with pytest.raises(ValueError, match="downsample_type.*use_karras_sigmas.*nothing left"):
        accelerate(pipeline, allow_general=True)


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(1, 1), "obj is a Linear, must be a DDPMPipeline"),
        (lambda: UNet2DModel(**SMALL), r"obj is a UNet2DModel, must be .*Sampler\(model, schedule\).*fuse\(model\)"),
        (lambda: (1, 2), r"obj is a tuple of \(int, int\), must be"),
        (lambda: (unet(), 2), r"obj is a tuple of \(UNet2DModel, int\), must be"),
        (lambda: type("Own", (DDPMPipeline,), {})(unet(), DDPMScheduler()), "obj is a Own, must be"),
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
            lambda: (unet(out_channels=6), DPMSolverMultistepScheduler(variance_type="learned", **V)),
            "variance_type is 'learned' but prediction_type is 'v_prediction'",
        ),
        (lambda: (unet(num_class_embeds=10), DDPMScheduler()), "num_class_embeds is 10, must be None"),
        (lambda: (unet(act_fn="gelu"), DDPMScheduler()), "unet.config: act_fn is 'gelu', must be one of 'silu'"),
        (
            lambda: (unet(act_fn="gelu", downsample_type="resnet"), DDPMScheduler()),
            "unet.config: downsample_type is 'resnet', must be one of 'conv'; act_fn is 'gelu', must be one of",
        ),
        (lambda: (newer(), DDPMScheduler()), r"gate \(2\) is no field of a U-Net.*; act_fn is 'gelu'"),
        (lambda: (skipping(), DDPMScheduler()), "down_block_types is .*SkipDownBlock2D.*, must be a sequence of"),
        (lambda: (offloaded(), DDPMScheduler()), "unet is offloaded, must be on its device"),
        (lambda: (hooked(), DDPMScheduler()), "unet.mid_block has hooks"),
        (lambda: (replaced(), DDPMScheduler()), "unet.conv_out is a Other of elsewhere"),
        (lambda: (processed(), DDPMScheduler()), "processor is a Processor, must be one of AttnProcessor"),
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


def test_levels_are_the_schedulers_own() -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    levels = recognise(scheduler).schedule.alphas_cumprod
    torch.testing.assert_close(levels, scheduler.alphas_cumprod.double(), rtol=1e-12, atol=0)


def test_diffusers_is_not_imported_for_others() -> None:
    code = "import sys, fastddpm, fastddpm.interop\n"
    code += "try: fastddpm.interop.accelerate(1)\nexcept TypeError: pass\nelse: raise AssertionError\n"
    code += "assert not {'diffusers', 'denoising_diffusion_pytorch'} & {name.split('.')[0] for name in sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 32
    monkeypatch.setattr(sys, "argv", ["accelerate_diffusers.py", "--steps", "3", "--batch-size", "1"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = re.findall(r"^(before|after|largest difference): (\S+)", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in printed] == ["before", "after", "largest difference"]
    assert float(printed[2][1]) < CLOSE
