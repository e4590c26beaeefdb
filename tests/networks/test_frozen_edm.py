"""A frozen U-Net of EDM or PhysicsNeMo is that U-Net: exactly in float64, to rounding in the native kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from edm_restated import EDM, PHYSICSNEMO
from fastddpm_kernels.backend import why_not as why_not_backend
from torch import Tensor

from fastddpm.networks.frozen import FrozenUNet, cuda_instructions, instructions, why_not

NOISE = torch.tensor([1.0, -0.3, 250.0], dtype=torch.float64)  # c_noise, which need not be an integer
# The class, its arguments after (size, in, out), and what each case is here for.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpmpp": (EDM.SongUNet, {}),
    "three_levels": (EDM.SongUNet, {"channel_mult": (1, 2, 2), "num_blocks": 2, "attn_resolutions": (8, 4)}),  # scales
    "ncsnpp": (
        EDM.SongUNet,
        {
            "embedding_type": "fourier",
            "channel_mult_noise": 2,
            "encoder_type": "residual",
            "resample_filter": (1, 3, 3, 1),
            "channel_mult": (1, 2, 2),
        },
    ),
    "skips": (EDM.SongUNet, {"encoder_type": "skip", "decoder_type": "skip"}),
    "skips_filtered": (
        EDM.SongUNet,
        {"encoder_type": "skip", "decoder_type": "skip", "resample_filter": (1, 3, 3, 1)},
    ),
    "residual_means": (EDM.SongUNet, {"encoder_type": "residual"}),
    "labels": (EDM.SongUNet, {"label_dim": 5}),
    "adm": (EDM.DhariwalUNet, {"channels_per_head": 4}),
    "adm_one_head": (EDM.DhariwalUNet, {"channels_per_head": 16, "label_dim": 5, "channel_mult": (2, 2)}),
    "physicsnemo": (PHYSICSNEMO.SongUNet, {"attn_resolutions": (8,)}),  # attention of its own, unbiased variance
    "physicsnemo_adm": (PHYSICSNEMO.DhariwalUNet, {"channels_per_head": 8}),
    "positions": (PHYSICSNEMO.SongUNetPosEmbd, {"N_grid_channels": 2}),
    "probabilities": (PHYSICSNEMO.SongUNetPosEmbd, {"lead_time_channels": 2, "prob_channels": (0, 2)}),
    "regression": (PHYSICSNEMO.SongUNet, {"embedding_type": "zero"}),
}


def make(case: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    kind, fields = CASES[case]
    return kind(8, 3, 3, **fields).eval().to(dtype)


def inputs_of(unet: Any, batch: int = 2, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor | None]:
    x = torch.randn(batch, 3, *size, dtype=torch.float64)
    labels = torch.rand(batch, unet.label_dim, dtype=torch.float64) if unet.label_dim else None
    return x, labels


@torch.no_grad()
def theirs(frozen: FrozenUNet, x: Tensor, labels: Tensor | None, row: int) -> Tensor:
    return frozen.blueprint.call(x, NOISE[row].expand(len(x)), labels)


@torch.no_grad()
def ours(frozen: FrozenUNet, x: Tensor, labels: Tensor | None, row: int) -> Tensor:
    inputs = frozen.new_input(x.shape)
    inputs.copy_(x)
    program = frozen.bind(inputs, NOISE.to(frozen.row_dtype), labels)
    first = program(torch.tensor([row])).clone()
    program.arena.fill_(255)  # NaN, were it read before it is written
    assert torch.equal(first, program(torch.tensor([row]))), "a run changed what the next one reads"
    return first


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= tolerance, f"differs by {error:.1e} of the rms"


@pytest.mark.parametrize("case", CASES)
def test_equals_the_unet_in_float64(case: str) -> None:
    """In plain torch and by the fused ops, on the sizes it is for and on others."""
    unet = make(case)
    for fused in (False, True):
        frozen = FrozenUNet(unet, backend="eager", fused=fused)
        assert frozen.differs() is None
        for size in ((8, 8), (4, 12)):
            x, labels = inputs_of(unet, size=size)
            if frozen.blueprint.in_channels == 3:
                for row in (0, 2):
                    close(ours(frozen, x, labels, row), theirs(frozen, x, labels, row), 1e-12)
    # New weights, with both sizes bound.
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.1)
    x, labels = inputs_of(unet)
    frozen.refresh()
    close(ours(frozen, x, labels, 1), theirs(frozen, x, labels, 1), 1e-12)


@pytest.mark.parametrize("case", ["ddpmpp", "ncsnpp", "adm", "physicsnemo", "labels"])
def test_equals_the_unet_in_the_plan_of_cuda(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every result has its place in one block, and convolutions leave their biases to norms."""

    def conv(x: Tensor, w: Tensor, stride: int, padding: int, allow_tf32: bool, out: Tensor) -> None:
        out.copy_(F.conv2d(x, w, None, stride, padding))

    def conv_transpose(x: Tensor, w: Tensor, allow_tf32: bool) -> Tensor:
        return F.conv_transpose2d(x, w, None, stride=2, padding=1).contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(instructions, "cudnn_conv", conv)
    monkeypatch.setattr(instructions, "cudnn_conv_transpose", conv_transpose)
    unet = make(case)
    frozen = FrozenUNet(unet, backend="eager", fused=True)
    frozen.static = True
    x, labels = inputs_of(unet)
    close(ours(frozen, x, labels, 1), theirs(frozen, x, labels, 1), 1e-12)


@pytest.mark.skipif(why_not_backend("native", "cpu") is not None, reason="no native backend")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.bfloat16, 6e-2)])
def test_the_native_kernels_compute_it(dtype: torch.dtype, tolerance: float, request: pytest.FixtureRequest) -> None:
    if dtype == torch.bfloat16:
        request.getfixturevalue("native_bfloat16")
    for case in ("three_levels", "ncsnpp", "adm", "physicsnemo"):
        unet = make(case)
        frozen, exact = FrozenUNet(unet, dtype, backend="native"), FrozenUNet(unet, backend="eager")
        x, labels = inputs_of(unet, batch=3)
        close(ours(frozen, x, labels, 0), theirs(exact, x, labels, 0), tolerance)


def test_scales_cost_no_instruction() -> None:
    """DDPM++ multiplies every block by sqrt(1/2); here one instruction is left of these, at the lowest resolution."""
    names = [one.name for one in cuda_instructions(make("three_levels", torch.float32), 4)]
    assert sum(name.endswith(".scale") for name in names) <= 1


def test_what_is_not_taken_says_why() -> None:
    unet = make("ddpmpp")
    unet.dec["8x8_block0"].norm0.act = "gelu"
    assert "act 'gelu', must have 'silu'" in str(why_not(unet))
    unet = make("physicsnemo")
    unet.amp_mode = True
    assert "amp_mode True" in str(why_not(unet))

    class Own(EDM.SongUNet):  # type: ignore[misc, name-defined]
        pass

    assert "it is a Own" in str(why_not(Own(8, 3, 3)))
    with pytest.raises(ValueError, match=r"class_labels are torch.float32 \(2, 4\), must be floating-point \(2, 5\)"):
        FrozenUNet(make("labels", torch.float32)).bind(torch.zeros(2, 3, 8, 8), torch.zeros(1), torch.zeros(2, 4))
