"""Accelerated pipelines as objects: what of diffusers' behaviour they keep, and what may change under them."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

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
    UNet2DModel,
)
from diffusers_objects import CLOSE, SMALL, ddpm, draw, quiet, seeded, unet

from fastddpm.interop import accelerate
from fastddpm.interop.diffusers.unet import share_unet
from fastddpm.sampling.sampler import Sampler


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
    pipeline.to(torch.float64)  # and with it the U-Net that both have
    assert float((draw(fast) - draw(pipeline)).abs().max()) < CLOSE


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
    built: list[Sampler] = []
    init = Sampler.__init__
    monkeypatch.setattr(Sampler, "__init__", lambda self, *a, **k: (built.append(self), init(self, *a, **k))[1])
    fast = accelerate(quiet(DDIMPipeline(model, DDIMScheduler())))
    for steps, eta in ((3, 0.0), (5, 0.0), (5, 1.0), (3, 0.5)):
        draw(fast, num_inference_steps=steps, eta=eta)
    # The other one has compared the scheduler with its table, once.
    assert sorted(type(sampler.model).__name__ for sampler in built) == ["UNet", "function"]


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
