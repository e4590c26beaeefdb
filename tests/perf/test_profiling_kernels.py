"""Traces: what belongs to whom, what a step is, and what is between its kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastddpm import UNet
from fastddpm.networks.frozen import freeze
from fastddpm.perf.profiling import kernels

Event = kernels.Event


def test_analysis_of_a_trace() -> None:
    step = [Event("conv", 0, 4), Event("norm", 3, 2), Event("_reverse_step_0", 6, 2)]  # 1 us of overlap, 1 us of gap
    events = [Event(name, 100 + 10 * i + start, us) for i in range(5) for name, start, us in step]
    found = kernels.analyse([Event("noise", 0, 50), *events], steps=5)
    assert found["kernels_per_step"] == 3
    assert found["traced_us_per_step"] == pytest.approx(10)
    assert found["busy_us_per_step"] == pytest.approx(7)
    assert found["idle_share"] == pytest.approx(0.3)
    assert [entry["kernel"] for entry in found["top"]] == ["conv", "norm", "_reverse_step_0"]
    assert found["top"][0]["us_per_step"] == pytest.approx(4)
    assert found["top"][0]["share"] == pytest.approx(0.5)
    whole = kernels.analyse(events, steps=4)  # one more than was asked for
    assert "whole run" in whole["counted"]
    with pytest.raises(ValueError, match="no event"):
        kernels.analyse([], steps=1)


def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None, tid: int = 1) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def test_reading_a_trace() -> None:
    content = {
        "traceEvents": [
            event("kernel", "b", 5.0, 1.0),
            event("cpu_op", "aten::add", 0.0, 9.0),
            event("gpu_memset", "a", 1.0, 2.0),
            {"ph": "M", "name": "process_name"},
        ]
    }
    assert [found.name for found in kernels.read_trace(content)] == ["a", "b"]


def test_kernels_belong_to_who_launched_them() -> None:
    """By the time of the launch on the host, not by that of the kernel, which runs later."""
    content = {
        "traceEvents": [
            event("user_annotation", "layer 0: conv conv_in", 0, 10),
            event("user_annotation", "layer 1: norm norm1", 10.5, 5),
            event("user_annotation", "layer 2: conv conv1", 16, 4),
            event("user_annotation", "something else", 0, 30),
            event("cuda_runtime", "cudaLaunchKernel", 1, 1, 7),
            event("cuda_runtime", "cudaLaunchKernel", 3, 1, 8),
            event("cuda_driver", "cuLaunchKernelEx", 12, 1, 9),
            event("cuda_runtime", "cudaLaunchKernel", 25, 1, 10),  # after the layers
            event("cuda_runtime", "cudaLaunchKernel", 2, 1, 11, tid=2),  # by another thread
            event("kernel", "implicit_gemm", 100, 4, 7),
            event("gpu_memset", "memset", 104, 1, 8),
            event("kernel", "norm_kernel", 105, 3, 9),
            event("kernel", "stranger", 108, 3, 10),
            event("kernel", "stranger", 111, 3, 11),
        ]
    }
    assert kernels.kernels_of_layers(content) == {0: {"implicit_gemm": 4.0, "memset": 1.0}, 1: {"norm_kernel": 3.0}}


def test_operators_have_their_own_time() -> None:
    content = {
        "traceEvents": [
            event("user_annotation", "layer 0: conv conv_in", 0, 20),
            event("cpu_op", "aten::conv2d", 1, 10),
            event("cpu_op", "aten::mkldnn_convolution", 2, 8),
            event("cpu_op", "aten::empty", 3, 1),
            event("cpu_op", "aten::empty", 12, 3),
            event("user_annotation", "layer 1: norm norm1", 20, 6),
        ]
    }
    found = kernels.host_operators(content, steps=2)
    assert {entry["kernel"]: entry["us_per_step"] for entry in found["top"]} == {
        "aten::mkldnn_convolution": 3.5,
        "(conv, outside of operators)": 3.5,
        "(norm, outside of operators)": 3.0,
        "aten::empty": 2.0,
        "aten::conv2d": 1.0,
    }
    assert found["operators_per_step"] == 2
    assert sum(entry["share"] for entry in found["top"]) == pytest.approx(1)
    with pytest.raises(ValueError, match="no operator"):
        kernels.host_operators({}, 1)


def test_trace_of_an_annotated_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    frozen = freeze(unet.eval(), [7])
    program = frozen.bind(frozen.new_input((2, 1, 8, 8)))
    runs = [instruction.run for instruction in program.instructions]
    step = torch.zeros(1, dtype=torch.int64)
    path = tmp_path / "trace.json"
    with kernels.annotated(program.instructions):
        content = kernels.record(lambda: program(step), torch.device("cpu"), host=True, path=path)
    assert [instruction.run for instruction in program.instructions] == runs
    labels = [e["name"] for e in content["traceEvents"] if str(e.get("name")).startswith(kernels.LABEL)]
    expected = [f"layer {k}: {i.kind} {i.name}" for k, i in enumerate(program.instructions)]
    assert [label for label in labels if label in expected] == labels
    assert set(labels) == set(expected)
    assert json.loads(path.read_text(encoding="utf-8")) == content
    assert kernels.kernels_of_layers(content) == {}
    assert kernels.host_operators(content, 1)["operators_per_step"] > len(expected)
