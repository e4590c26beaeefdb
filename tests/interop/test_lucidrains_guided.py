"""Guidance as in denoising_diffusion_pytorch.classifier_free_guidance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("denoising_diffusion_pytorch", reason="needs denoising_diffusion_pytorch")

from lucidrains_objects import CLOSE, NETWORKS, STEPS, both, diffusion, fast, guided_diffusion, same

from fastddpm.interop.lucidrains.models import GuidedPredictor
from fastddpm.interop.lucidrains.tables import OBJECTIVES


@pytest.mark.parametrize(("objective", "steps"), [*((objective, 6) for objective in OBJECTIVES), ("pred_v", None)])
def test_guided_samples_are_theirs(objective: str, steps: int | None) -> None:
    theirs = guided_diffusion(objective=objective, sampling_timesteps=steps)
    ours = fast(theirs)
    classes = torch.tensor([0, 4, 2])
    scales = ((6.0, 0.7), (3.0, 0.0), (0.0, 1.0))
    for cond_scale, rescaled_phi in scales if steps else scales[:2]:
        same(both(theirs, ours, "sample", classes, cond_scale=cond_scale, rescaled_phi=rescaled_phi), 5 * CLOSE)
    if steps is None or objective == "pred_x0":  # the other two show the rest
        return
    same(both(theirs, ours, "sample", classes), 5 * CLOSE)
    same(both(theirs, fast(theirs, freeze=False), "sample", classes), 5 * CLOSE)
    same(both(theirs, ours, "p_sample_loop", classes, (3, 3, 8, 8), 2.0, 0.5), 5 * CLOSE)
    same(both(theirs, ours, "ddim_sample", classes, (3, 3, 8, 8), 2.0, 0.5), 5 * CLOSE)
    if objective != "pred_noise":  # which from random weights grows without bound
        same(both(theirs, ours, "ddim_sample", classes, (3, 3, 8, 8), 2.0, 0.5, False), 5 * CLOSE)


def test_guided_scale_of_one_is_the_conditional_network() -> None:
    theirs = guided_diffusion()
    ours = fast(theirs)
    calls = []
    theirs.model.register_forward_hook(lambda module, inputs, out: calls.append(len(inputs[0])))
    classes = torch.tensor([1, 3])
    torch.manual_seed(7)
    images = ours.sample(classes, cond_scale=1.0)
    assert calls == [2] * STEPS
    calls.clear()
    ours.sample(classes, cond_scale=2.0)
    assert calls == [4] * STEPS

    class Conditional(nn.Module):
        channels = out_dim = 3
        self_condition = False

        def forward(self, x: Tensor, t: Tensor, _: None) -> Tensor:
            return theirs.model(x, t, classes, cond_drop_prob=0.0)

    alone = diffusion(Conditional(), objective="pred_noise", beta_schedule="cosine")
    torch.manual_seed(7)
    torch.testing.assert_close(images, alone.sample(2), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_guided_interpolate(offset: float) -> None:
    theirs = guided_diffusion(offset_noise_strength=offset)
    first, second = torch.rand(2, 2, 3, 8, 8).mul(2).sub(1)
    classes = torch.tensor([0, 3])
    ours = fast(theirs)
    same(both(theirs, ours, "interpolate", first, second, classes, 8, 0.4), 1e-4)
    results = [ours.interpolate(first, second, classes, 8, noise="philox", seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_philox_interpolation_noises_as_q_sample() -> None:
    """With t = 0 nothing is denoised: what is returned is the mixture of both noised images."""
    theirs = guided_diffusion(offset_noise_strength=0.5)
    ours = fast(theirs, noise="philox")
    images, classes = torch.zeros(64, 3, 8, 8), torch.zeros(64, dtype=torch.int64)
    noised = ours.interpolate(images, images, classes, 0, 0.0, seed=1) / float(theirs.sqrt_one_minus_alphas_cumprod[0])
    # noise of variance 1, and per channel an offset of standard deviation 0.5
    assert float(noised.var(dim=(2, 3)).mean()) == pytest.approx(1, abs=0.05)
    assert float(noised.mean(dim=(2, 3)).var()) == pytest.approx(0.25 + 1 / 64, abs=0.06)


def test_guidance_plus_plus(caplog: pytest.LogCaptureFixture) -> None:
    theirs = guided_diffusion(use_cfg_plus_plus=True, sampling_timesteps=6)
    classes = torch.tensor([0, 3])
    same(both(theirs, fast(theirs), "p_sample_loop", classes, (2, 3, 8, 8)), 5 * CLOSE)  # DDPM has no use for it
    with pytest.raises(ValueError, match="use_cfg_plus_plus is True, .* allow_general be True"):
        fast(theirs, allow_general=False).sample(classes)
    ours = fast(theirs)
    with caplog.at_level("WARNING"):
        for scales in ((6.0, 0.7), (2.0, 0.0)):
            same(both(theirs, ours, "sample", classes, *scales), 5 * CLOSE)
    assert caplog.text.count("use_cfg_plus_plus is True: the original ddim_sample runs") == 1
    with pytest.raises(ValueError, match="seed is given but use_cfg_plus_plus is True"):
        ours.sample(classes, seed=1)
    for theirs.objective, options in (("pred_x0", {}), ("pred_v", {"freeze": False})):
        same(both(theirs, fast(theirs, **options), "sample", classes), 5 * CLOSE)


def test_guidance_of_a_network_that_takes_no_mask() -> None:
    """As in earlier versions of the library: two evaluations, the same prediction."""
    model, (x, classes) = NETWORKS["guided"]()
    predictor = GuidedPredictor(model, guided=True, rescaled=True, device=x.device).eval()
    predictor.set_scales(4.0, 0.7)
    arguments = (x, torch.tensor([3, 17]), classes)
    masked = predictor(*arguments)
    predictor._masks = False
    torch.testing.assert_close(predictor(*arguments), masked, rtol=0, atol=CLOSE)
    expected, _ = model.forward_with_cond_scale(*arguments, cond_scale=4.0, rescaled_phi=0.7)
    torch.testing.assert_close(masked, expected, rtol=0, atol=CLOSE)
