"""Frozen networks bind their ops at the first run where slots have fixed places, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastddpm_kernels.attention import attention_
from fastddpm_kernels.conv import conv_
from fastddpm_kernels.group_norm_silu import group_norm_silu_
from fastddpm_kernels.pointwise_conv import pointwise_conv_

from fastddpm import UNet
from fastddpm.networks.frozen.frozen_unet import FrozenUNet


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_ops_are_checked_once_where_slots_stay(
    backend: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "native":
        request.getfixturevalue("native")
    counts: dict[str, int] = {}

    def count(op: Any) -> None:
        bind = op.bind

        def counted(*arguments: Any, **options: Any) -> Any:
            counts[op.__name__] = counts.get(op.__name__, 0) + 1
            return bind(*arguments, **options)

        monkeypatch.setattr(op, "bind", counted)

    for op in (conv_, group_norm_silu_, attention_, pointwise_conv_):
        count(op)
    torch.manual_seed(0)
    unet = UNet(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    frozen = FrozenUNet(unet, backend=backend, fused=True)
    frozen.timesteps = torch.tensor([7, 3])
    inputs = frozen.new_input((2, 1, 8, 8))
    program = frozen.bind(inputs)
    for run in range(1, 4):
        inputs.copy_(torch.randn(inputs.shape))
        out = program(torch.tensor([1]))
        torch.testing.assert_close(out, unet(inputs, torch.tensor(3)), rtol=0, atol=1e-4)
        if run == 1:
            first = dict(counts)
    assert min(first.values()) > 0
    times = 1 if backend == "native" else 3
    assert counts == {name: times * count for name, count in first.items()}
