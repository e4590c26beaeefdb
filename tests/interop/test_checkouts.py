"""EDM's and PhysicsNeMo's own code against ours, where a variable names a checkout (`tests/shared/checkouts.py`).

With FASTDDPM_LEROBOT and FASTDDPM_DIFFUSION_POLICY all of `test_robots.py` runs on the libraries' networks.
"""

from __future__ import annotations

from typing import Any

import checkouts
import pytest
import torch
from edm_restated import close, drawing
from torch import Tensor

from fastddpm.interop import accelerate

SIZE = 16
SMALL: dict[str, Any] = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}


def randomised(net: Any) -> Any:
    """Random values, also where the libraries begin with zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


@pytest.mark.parametrize("precond", ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"])
@pytest.mark.parametrize(
    "model",
    [
        SMALL | {"model_type": "SongUNet"},
        SMALL | {"model_type": "SongUNet", "embedding_type": "fourier", "encoder_type": "residual",
                 "resample_filter": [1, 3, 3, 1], "channel_mult_noise": 2},
        SMALL | {"model_type": "DhariwalUNet"},
    ],
    ids=["ddpmpp", "ncsnpp", "adm"],
)  # fmt: skip
def test_edm_samplers(precond: str, model: dict[str, Any]) -> None:
    networks, generate = checkouts.edm(), checkouts.edm("generate")
    net = randomised(getattr(networks, precond)(img_resolution=SIZE, img_channels=3, label_dim=3, **model))
    fast, latents, labels = accelerate(net, allow_general=False), torch.randn(2, 3, SIZE, SIZE), torch.eye(3)[:2]
    for name, options in (
        ("edm_sampler", {"S_churn": 4, "S_noise": 1.003}),
        ("ablation_sampler", {"solver": "heun", "discretization": "vp", "schedule": "vp", "scaling": "vp"}),
    ):
        if precond == "iDDPMPrecond" and name == "ablation_sampler":
            continue  # its levels are its own
        theirs, ours = drawing(1), drawing(1)
        with torch.no_grad():
            expected: Tensor = getattr(generate, name)(net, latents, labels, randn_like=theirs, num_steps=4, **options)
        close(getattr(fast, name)(latents, labels, randn_like=ours, num_steps=4, **options), expected, 1e-4)
        assert torch.equal(theirs(latents), ours(latents)), "drew another number of random numbers"


def test_physicsnemo_samplers() -> None:
    preconditioners = checkouts.physicsnemo("diffusion.preconditioners.legacy")
    net = randomised(preconditioners.EDMPrecondSuperResolution(SIZE, 4, 3, model_type="SongUNet", **SMALL))
    fast, latents, weather = accelerate(net), torch.randn(2, 3, SIZE, SIZE), torch.randn(2, 4, SIZE, SIZE)
    for kind in ("stochastic", "deterministic"):
        theirs, ours = drawing(1), drawing(1)
        sampler = getattr(checkouts.physicsnemo(f"diffusion.samplers.legacy_{kind}_sampler"), f"{kind}_sampler")
        with torch.no_grad():
            expected = sampler(net, latents, weather, randn_like=theirs, num_steps=4)
        drawn = getattr(fast, f"{kind}_sampler")(latents, weather, randn_like=ours, num_steps=4)
        close(drawn, expected, 1e-4)
