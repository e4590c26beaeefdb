"""Every kernel that a run launches compiles, with the specialisation that it is launched with, without spilling.

`python tests/shared/fake_cuda_compile.py` compiles each for all four targets, half an hour's work of one core. With
`--rotate` each is compiled for one of them, in turn: so is the committed `benchmarks/results/aot_launched.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
for _library in ("diffusers", "monai", "denoising_diffusion_pytorch"):
    pytest.importorskip(_library)
SHARED_FOLDER = Path(__file__).parents[1] / "shared"
COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "aot_launched.json"


@pytest.mark.long
def test_what_is_launched_compiles(tmp_path: Path) -> None:
    path = os.pathsep.join([str(SHARED_FOLDER), *(p for p in sys.path if p)])
    child = subprocess.run(
        [sys.executable, str(SHARED_FOLDER / "fake_cuda_compile.py"), "--rotate"], capture_output=True, text=True,
        timeout=900, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    lines = child.stdout.splitlines()
    (found,) = (json.loads(line.removeprefix("FOUND ")) for line in lines if line.startswith("FOUND "))
    assert found["failures"] == {}
    rows = [json.loads(line.removeprefix("ROW ")) for line in lines if line.startswith("ROW ")]
    assert len(rows) == found["kernels"] > 50
    assert [row for row in rows if "error" in row or row["spills"]] == []
    assert child.returncode == 0, child.stderr[-2000:]


def test_what_is_committed_compiled() -> None:
    rows = json.loads(COMMITTED.read_text())["rows"]
    assert {row["target"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100"}
    assert {"_one_pass", "_reverse_step", "_pointwise_conv"} <= {row["kernel"] for row in rows}
    assert [row for row in rows if row["spills"] or row["errors"]] == []
