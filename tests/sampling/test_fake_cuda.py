"""The host's side of sampling on CUDA, on a device that is not there (`fake_cuda`): every option, without a GPU.

Nothing mixes devices, a capture holds only what a graph can, and the host waits for the device at no step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
RUNS = Path(__file__).parents[1] / "shared" / "fake_cuda_runs.py"
sys.path.insert(0, str(RUNS.parent))
CASES = (
    "plain", "float32", "full", "full_step", "tf32", "auto", "step", "unrolled", "while", "batch_auto", "progress",
    "trajectory", "callback", "host_noise", "too_many_elements", "inpainting", "multistep", "threshold", "classes",
    "guidance", "guidance_interval", "learned_variance", "film", "heads", "self_condition", "condition", "lucidrains",
    "own",
)  # fmt: skip
MODES = {
    "plain": "plain",
    "float32": "plain",
    "full": "plain",
    "tf32": "plain",
    "unrolled": "unrolled",
    "while": "while",
}
NOT_FUSED = {"own"}
MOST_KERNELS = 40  # that a first call compiles


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    """Return the report of every case, from one child process."""
    path = os.pathsep.join([str(RUNS.parent), *(p for p in sys.path if p)])
    child = subprocess.run(
        [sys.executable, str(RUNS)], capture_output=True, text=True, timeout=900, env=os.environ | {"PYTHONPATH": path}
    )
    lines = [json.loads(line.removeprefix("REPORT ")) for line in child.stdout.splitlines() if "REPORT" in line]
    assert [line["name"] for line in lines] == list(CASES), child.stderr[-2000:]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", CASES)
def test_runs_on_a_device(name: str, reports: dict[str, dict[str, Any]]) -> None:
    report = reports[name]
    assert "raised" not in report, report["raised"]
    assert report["mode"] == MODES.get(name, "step")
    assert report["fused"] is (name not in NOT_FUSED)
    assert not report["waits"]
    assert report["kernels"] <= MOST_KERNELS
    if report["error"] is not None:
        assert report["error"] < 0.02  # float16, two steps
