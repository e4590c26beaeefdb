"""Predictions follow from counts, which agree with the files that hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastddpm import UNet
from fastddpm.cli.profile import GPUS
from fastddpm.networks.frozen import cuda_instructions
from fastddpm.networks.frozen.instructions import Instruction
from fastddpm.perf.profiling import predict
from fastddpm.perf.profiling.predict import MACHINES

AOT = Path(__file__).parents[2] / "benchmarks" / "results" / "aot.json"
# The kernel that each count is of.
COUNTED = {
    "norm": "group_norm_silu.one_pass[fp16, 32x32 residual]",
    "residual": "residual_add[fp16, all]",
    "reverse_step": "reverse_step[fp16,channels_last,clip,net_in,philox]",
}


def conv(m: int, n: int, channels: int, side: int) -> Instruction:
    """Return a convolution of 3x3 whose result is m pixels of n channels."""
    size = 2 * (m * channels + 9 * channels * n + m * n)
    return Instruction("c", "conv", (), (), 1, 2 * m * n * 9 * channels, size, lambda: None, (side, side))


def test_counts_are_those_of_the_compiled_kernels() -> None:
    rows = {row["variant"]: row for row in json.loads(AOT.read_text())["rows"] if row["target"] == "sm_90"}
    for kind, variant in COUNTED.items():
        assert predict.PER_ELEMENT[kind] == pytest.approx(rows[variant]["per_element"], rel=0.1), kind


def test_the_command_knows_the_machines() -> None:
    assert set(GPUS) == set(MACHINES)


@pytest.mark.parametrize(("m", "n", "channels"), [(1024, 128, 256), (262144, 256, 256), (64, 256, 512)])
def test_sizes_of_a_product_follow_from_its_counts(m: int, n: int, channels: int) -> None:
    columns, k = predict._columns(conv(m, n, channels, 8), m)
    assert columns == pytest.approx(n, rel=1e-6)
    assert k == pytest.approx(9 * channels, rel=1e-6)


def test_a_large_product_runs_at_its_rate_and_a_small_one_at_that_of_its_tiles() -> None:
    machine = MACHINES["h200"]
    large, small = conv(262144, 256, 256, 32), conv(64, 256, 256, 8)
    (at_rate, *_), (alone, *_) = (
        predict.predict([one], machine, batch, (3, 32, 32)) for one, batch in ((large, 256), (small, 1))
    )
    assert at_rate["bound"] == "compute"
    assert at_rate["us"] == pytest.approx(1e6 * large.flops / machine.flops[2], rel=0.1)
    assert alone["us"] > 5e6 * small.flops / machine.flops[2]


def test_a_step_is_all_of_its_kernels() -> None:
    torch.manual_seed(0)
    unet = UNet(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    instructions = cuda_instructions(unet, 2)
    times = {}
    for name, machine in MACHINES.items():
        rows = predict.predict(instructions, machine, 2, (3, 8, 8))
        assert sum(row["kernels"] for row in rows) == sum(i.kernels for i in instructions) + 2
        assert all(row["us"] >= 0.99 * machine.kernel_us * row["kernels"] for row in rows)
        times[name] = sum(row["us"] for row in rows)
        groups = predict.grouped(rows)
        assert sum(group["us"] for group in groups) == pytest.approx(times[name])
    assert times["h200"] <= times["h100"] < times["a100"]
