"""An accelerated diffusion of denoising_diffusion_pytorch stays that object; what it cannot do is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("denoising_diffusion_pytorch", reason="needs denoising_diffusion_pytorch")

from denoising_diffusion_pytorch import GaussianDiffusion, LearnedGaussianDiffusion
from lucidrains_objects import CLOSE, STEPS, Fixed, both, diffusion, diffusion_1d, fast, guided_diffusion, same, unet

from fastddpm.interop.lucidrains import AcceleratedDiffusion, accelerate


def test_everything_else_is_the_original() -> None:
    theirs = diffusion()
    ours = fast(theirs)
    assert isinstance(ours, AcceleratedDiffusion)
    assert ours.model is theirs.model
    assert (ours.image_size, ours.channels, ours.num_timesteps) == ((8, 8), 3, STEPS)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert "GaussianDiffusion" in repr(ours)
    with pytest.raises(AttributeError, match="nothing"):
        _ = ours.nothing
    images = torch.rand(2, 3, 8, 8)
    losses = both(theirs, ours, "__call__", images)
    assert torch.equal(*losses)
    losses[1].backward()
    assert theirs.model.init_conv.weight.grad is not None
    assert ours.train() is ours
    assert theirs.training
    assert ours.eval() is ours
    assert not theirs.training
    assert ours.to("cpu") is ours.cpu() is ours
    assert "sample" not in vars(theirs)


def test_sampling_leaves_the_mode_alone() -> None:
    theirs = diffusion(unet(dropout=0.5), sampling_timesteps=5).train()
    ours = fast(theirs)
    first, second = (both(theirs, ours, "sample", 2, after=False)[1] for _ in range(2))
    assert torch.equal(first, second)
    assert all(module.training for module in theirs.modules())
    same(both(theirs.eval(), ours, "sample", 2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16"},
        {"freeze": False, "dtype": "bfloat16"},
        {"freeze": False, "channels_last": True, "fuse_norms": True},
    ],
)
def test_training_goes_on(options: dict[str, Any]) -> None:
    """New weights are sampled with, also where the sampler has a copy of them; other layers too."""
    theirs = diffusion(sampling_timesteps=5)
    ours = fast(theirs, noise="philox", **options)
    before = ours.sample(2, seed=0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    after = ours.sample(2, seed=0)
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(after, fast(theirs, noise="philox", **options).sample(2, seed=0))
    theirs.model.final_conv = nn.Conv2d(8, 3, 1)
    other = ours.sample(2, seed=0)
    assert not torch.allclose(other, after, atol=1e-3)
    assert torch.equal(other, fast(theirs, noise="philox", **options).sample(2, seed=0))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("bfloat16", {}), ("float16", {}), ("bfloat16", {"freeze": False, "fuse_norms": False}),
     ("float16", {"freeze": False, "fuse_norms": True})],
)  # fmt: skip
def test_lower_precision_is_that_of_autocast(dtype: str, options: dict[str, Any]) -> None:
    """It loses at most twice what the library's own way to lower precision does."""
    theirs = diffusion(sampling_timesteps=6)
    ours = fast(theirs, dtype=dtype, **options)
    expected, images = both(theirs, ours, "sample", 4)
    with torch.autocast("cpu", getattr(torch, dtype)):
        torch.manual_seed(7)
        cast = theirs.sample(4)
    assert images.dtype == torch.float32
    assert 0 < float((images - expected).square().mean()) < 4 * float((cast - expected).square().mean())
    assert theirs.model.init_conv.weight.dtype == torch.float32


@pytest.mark.parametrize("make", [diffusion_1d, guided_diffusion])
def test_lower_precision_of_the_others(make: Callable[..., Any]) -> None:
    theirs = make(sampling_timesteps=6)
    argument = torch.tensor([1, 2]) if make is guided_diffusion else 2
    expected, images = both(theirs, fast(theirs, dtype="bfloat16"), "sample", argument)
    assert 0 < float((images - expected).abs().mean()) < 0.05


@pytest.mark.parametrize("make", [diffusion, diffusion_1d])
def test_in_place(make: Callable[..., Any]) -> None:
    theirs = make(sampling_timesteps=5)
    torch.manual_seed(7)
    expected = theirs.sample(2)
    assert fast(theirs, inplace=True) is theirs
    fast(theirs, inplace=True)  # again, as with other options
    torch.manual_seed(7)
    images = theirs.sample(2)
    torch.testing.assert_close(images, expected, rtol=0, atol=CLOSE)
    assert isinstance(theirs.sample.__self__, AcceleratedDiffusion)
    copied = copy.deepcopy(theirs)
    assert copied.sample.__self__.diffusion is copied
    torch.manual_seed(7)
    assert torch.equal(copied.sample(2), images)
    for name in AcceleratedDiffusion.methods:
        delattr(theirs, name)
    torch.manual_seed(7)
    assert torch.equal(theirs.sample(2), expected)


def test_inside_inference_mode() -> None:
    """As the library's Trainer calls `sample`; what is kept from there serves outside."""
    theirs = diffusion(sampling_timesteps=5)
    ours = fast(theirs)
    with torch.inference_mode():
        first, second = torch.rand(2, 2, 3, 8, 8)
        same(both(theirs, ours, "sample", 2))
        same(both(theirs, ours, "interpolate", first, second, 5), 2 * CLOSE)
    same(both(theirs, ours, "sample", 2))


def test_other_objects_are_named() -> None:
    with pytest.raises(TypeError, match=r"obj is a denoising_diffusion_pytorch\.Unet, must be .* GaussianDiffusion1D"):
        accelerate(unet())

    class New(GaussianDiffusion):  # as another version of the library may have one
        __module__ = "denoising_diffusion_pytorch.new_diffusion"
        p_mean_variance = LearnedGaussianDiffusion.p_mean_variance

    with pytest.raises(ValueError, match=r"^new_diffusion\.\S*New has its own p_mean_variance, which would"):
        accelerate(New(unet(), image_size=8), allow_general=False)

    class Own(GaussianDiffusion):
        def q_posterior(self, *arguments: Any, **named: Any) -> Any:
            return super().q_posterior(*arguments, **named)

        def p_losses(self, *arguments: Any, **named: Any) -> Any:  # of training, which stays its own
            return super().p_losses(*arguments, **named)

    with pytest.raises(ValueError, match="Own has its own q_posterior, which would not be called"):
        accelerate(Own(unet(), image_size=8), allow_general=False)
    theirs = diffusion()
    theirs.p_sample = lambda *_: None
    with pytest.raises(ValueError, match="has its own p_sample,"):
        accelerate(theirs, allow_general=False)
    ours = fast(diffusion())
    ours.p_sample = theirs.p_sample
    with pytest.raises(ValueError, match="^denoising_diffusion_pytorch.GaussianDiffusion has its own p_sample,"):
        ours.sample(1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nosie": "torch"}, TypeError, "nosie is no option, must be one of dtype, device, "),
        ({"noise": "numpy"}, ValueError, "noise is 'numpy', must be one of 'philox', 'torch'"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"dtype": torch.float64}, ValueError, "dtype is torch.float64"),
        ({"cuda_graph": "sometimes"}, ValueError, "cuda_graph is 'sometimes'"),
        ({"device": "nowhere"}, RuntimeError, "nowhere"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        accelerate(diffusion(), **options)


def test_options_that_are_not_for_an_object() -> None:
    with pytest.raises(ValueError, match="fuse_norms is True but the diffusion's model, a Fixed, has no norms"):
        accelerate(diffusion(Fixed()), fuse_norms=True)
    with pytest.raises(ValueError, match="freeze is True but .* be frozen: it is a Fixed, must be a fastddpm"):
        accelerate(diffusion(Fixed()), freeze=True)
    with pytest.raises(ValueError, match="channels_last is True but the diffusion is one-dimensional"):
        accelerate(diffusion_1d(), channels_last=True)


def test_settings_that_cannot_be_sampled_are_named() -> None:
    for name, value, message in (
        ("objective", "pred_xprev", "objective is 'pred_xprev', must be one of pred_noise, pred_x0, pred_v"),
        ("posterior_mean_coef1", torch.ones(3), r"posterior_mean_coef1 has shape \[3\], must be a tensor of .* 24"),
    ):
        theirs = diffusion()
        setattr(theirs, name, value)
        with pytest.raises(ValueError, match=message):
            accelerate(theirs)
    ours = fast(diffusion(sampling_timesteps=5))
    for name, value, message in (
        ("sampling_timesteps", 25, "sampling_timesteps is 25, must be an integer from 1 to 24"),
        ("ddim_sampling_eta", 40.0, "ddim_sampling_eta is 40.0, too large"),
    ):
        before = getattr(ours, name)
        setattr(ours, name, value)
        with pytest.raises(ValueError, match=message):
            ours.sample(1)
        setattr(ours, name, before)
    with pytest.raises(ValueError, match=r"alphas_cumprod\[19\] is 0.0, .*fewer than 21 timesteps of the linear"):
        accelerate(diffusion(timesteps=20, beta_schedule="linear", objective="pred_noise"))


def test_arguments_are_checked() -> None:
    ours = fast(diffusion(), batch_size=2)
    for call, error, message in (
        (lambda: ours.sample(0), ValueError, "batch_size is 0"),
        (lambda: ours.sample(1, seeds=[1]), TypeError, "seeds is no argument"),
        (lambda: ours.sample(1, noise="gauss"), ValueError, "noise is 'gauss'"),
        (lambda: ours.sample(1, seed=1), ValueError, "seed is 1 but noise is 'torch'"),
        (lambda: ours.sample(3), ValueError, "batch_size is 2 for 3 samples but noise is 'torch'"),
    ):
        with pytest.raises(error, match=message):
            call()
    images = torch.zeros(1, 3, 8, 8)
    for arguments, error, message in (
        ((images, images, 24), ValueError, "t is 24, must be an integer from 0 to 23"),
        ((images, images[:, :1]), ValueError, "x2 has shape"),
        ((images, images, 3, float("nan")), ValueError, "lam is nan"),
        ((8, images), TypeError, "x1 is of int"),
    ):
        with pytest.raises(error, match=message):
            ours.interpolate(*arguments)
    guided = fast(guided_diffusion())
    for classes, error, message in (
        (torch.tensor([0, 5]), ValueError, "class_labels has 5, every label must be from 0 to 4"),
        ([0, 1], TypeError, "classes must be an integer tensor"),
        (torch.tensor([0.5]), TypeError, "must be integers"),
    ):
        with pytest.raises(error, match=message):
            guided.sample(classes)
    with pytest.raises(ValueError, match="cond_scale is inf"):
        guided.sample(torch.tensor([0]), cond_scale=float("inf"))
