"""A training step on every backend, compiled, and in every precision: the same loss and the same gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm import GaussianDiffusion, NoiseSchedule, UNet

SCHEDULE = NoiseSchedule.cosine(50)
# Between them everything that a step may have, but what is said not to compile.
OPTIONS: dict[str, dict[str, Any]] = {
    "epsilon": {
        "label_dropout": 0.5,
        "offset_noise": 0.1,
        "input_perturbation": 0.1,
        "timestep_sampling": "importance",
        "variance_type": "learned_range",
        "loss": "hybrid",
        "vlb_weight": 0.01,
    },
    "v": {"prediction_type": "v_prediction", "weighting": "min_snr", "timestep_sampling": "stratified"},
}


def make(name: str, **more: Any) -> tuple[GaussianDiffusion, Tensor, Tensor | None]:
    options = OPTIONS[name]
    labelled = "label_dropout" in options
    net = UNet(
        sample_size=4,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        out_channels=6 if "variance_type" in options else 3,
        num_class_embeds=4 if labelled else None,
        null_class=3 if labelled else None,
    )
    x0 = torch.randint(0, 256, (3, 3, 4, 4)).float() / 127.5 - 1
    labels = torch.tensor([0, 1, 2]) if labelled else None
    return GaussianDiffusion(net, SCHEDULE, **options, **more), x0, labels


def step(diffusion: Any, parameters: list[Tensor], x0: Tensor, labels: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    loss = diffusion(x0, labels, step=torch.tensor([5], device=x0.device))
    return loss.detach(), list(torch.autograd.grad(loss, parameters))


def assert_same_step(actual: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], bound: float) -> None:
    """Loss and gradients within `bound` of the largest value of each tensor."""
    torch.testing.assert_close(actual[0], expected[0], rtol=bound, atol=0)
    scale = max(float(gradient.abs().max()) for gradient in expected[1])
    for got, wanted in zip(actual[1], expected[1], strict=True):
        # a gradient that is zero but for rounding, as that of a bias before a norm, is compared with the others
        error = float((got - wanted).abs().max())
        assert error <= bound * max(float(wanted.abs().max()), 1e-2 * scale), error


@pytest.mark.parametrize("name", OPTIONS)
def test_fused_equals_eager(name: str, device: torch.device) -> None:
    """q_sample, and the norms with their backward, as the triton kernels (where there is no GPU, interpreted)."""
    diffusion, x0, labels = make(name, backend="triton")
    fused = diffusion.to(device)
    eager = copy.deepcopy(fused)
    eager.backend = eager.unet.backend = "eager"  # type: ignore[union-attr]
    assert fused.unet.backend == "triton"
    x0, labels = x0.to(device), None if labels is None else labels.to(device)
    actual = step(fused, list(fused.parameters()), x0, labels)
    expected = step(eager, list(eager.parameters()), x0, labels)
    assert_same_step(actual, expected, 1e-4)


def test_compiled_without_a_break() -> None:
    diffusion, x0, labels = make("epsilon")
    other = copy.deepcopy(diffusion)
    compiled = torch.compile(diffusion, backend="aot_eager", fullgraph=True)
    expected = step(other, list(other.parameters()), x0, labels)
    assert_same_step(step(compiled, list(diffusion.parameters()), x0, labels), expected, 1e-5)
    for (key, value), wanted in zip(diffusion.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, wanted, msg=lambda text, key=key: f"{key}: {text}")  # the history, too


@pytest.mark.parametrize("name", OPTIONS)
def test_autocast_leaves_the_loss_in_float32(name: str) -> None:
    diffusion, x0, labels = make(name)
    diffusion.unet.backend = "eager"  # native convolutions stay in float32
    exact = diffusion(x0, labels, step=5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = diffusion(x0, labels, step=5)
        out = diffusion.unet(x0, torch.zeros(3, dtype=torch.int64), labels)
    assert loss.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    # not a bfloat16 rounding of the sum
    assert loss.bfloat16().item() != loss.item()


def test_networks_of_other_precision() -> None:
    diffusion, x0, _ = make("v")
    expected = diffusion(x0, step=5)
    wide = copy.deepcopy(diffusion).double()
    assert wide(x0.double(), step=5).dtype == torch.float64
    torch.testing.assert_close(wide(x0.double(), step=5).float(), expected, rtol=1e-5, atol=0)
    narrow = copy.deepcopy(diffusion).bfloat16()  # its tables are not cast
    loss = narrow(x0, step=5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


@pytest.mark.gpu
def test_on_a_gpu_a_step_is_that_of_the_cpu_and_waits_for_nothing(device: torch.device) -> None:
    diffusion, x0, labels = make("epsilon")
    expected = step(diffusion, list(diffusion.parameters()), x0, labels)
    moved = copy.deepcopy(diffusion).to(device)
    x0, labels = x0.to(device), None if labels is None else labels.to(device)
    step(moved, list(moved.parameters()), x0, labels)  # compiles the kernels
    counter = torch.tensor([5], device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = moved(x0, labels, step=counter)
        gradients = list(torch.autograd.grad(loss, list(moved.parameters())))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_step((loss.detach().cpu(), [g.cpu() for g in gradients]), expected, 1e-3)
