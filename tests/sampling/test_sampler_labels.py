"""Labels that are real numbers, and samples of a seed that several calls share."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor
from unets import TINY

from fastddpm import NoiseSchedule, Sampler, UNet

SCHEDULE = NoiseSchedule.linear(40)


def labels(kind: str) -> Tensor:
    return torch.randn(3, 32) if kind == "identity" else torch.tensor([1.5, 20.0, 3.0])


@pytest.mark.parametrize("kind", ["timestep", "identity"])
@pytest.mark.parametrize("of_diffusers", [False, True])
def test_real_labels(kind: str, of_diffusers: bool) -> None:
    """The samples of three networks that each have one of the labels built in."""
    torch.manual_seed(0)
    theirs = UNet2DModel(**TINY, class_embed_type=kind).eval()
    given = labels(kind)
    model = theirs if of_diffusers else UNet.from_diffusers(theirs)
    sampler = Sampler(model, SCHEDULE, num_inference_steps=5)
    assert (sampler.network.frozen is None) == of_diffusers
    images = sampler.sample(3, class_labels=given, seed=4, batch_size=2)
    for index, label in enumerate(given):
        alone = Sampler(lambda x, t, label=label[None]: theirs(x, t, label).sample, SCHEDULE, num_inference_steps=5)
        expected = alone.sample(1, shape=(1, 8, 8), seed=4, first_sample=index)
        torch.testing.assert_close(images[index : index + 1], expected, rtol=0, atol=2e-5)
    assert float((images[0] - images[1]).abs().max()) > 1e-3
    if kind == "timestep":  # one for all
        all_alike = sampler.sample(3, class_labels=20, seed=4)
        torch.testing.assert_close(all_alike[1], images[1], rtol=0, atol=2e-5)


def test_a_seed_may_be_shared_by_calls() -> None:
    sampler = Sampler(lambda x, t: 0.1 * x, SCHEDULE, num_inference_steps=5)
    together = sampler.sample(5, shape=(3,), seed=7)
    parts = [sampler.sample(2, shape=(3,), seed=7), sampler.sample(3, shape=(3,), seed=7, first_sample=2)]
    assert torch.equal(torch.cat(parts), together)
