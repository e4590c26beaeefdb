"""Every kernel compiles for GPUs that are not here, without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastddpm_kernels import aot
from fastddpm_kernels._backend import OPS

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_all_variants_compile_for_both_vendors_without_spills(tmp_path: Path) -> None:
    """For the GPU that is most tuned for, and for one of 64 threads to a warp; without --target it is all four."""
    targets = ["sm_90", "gfx942"]
    assert set(targets) < set(aot.TARGETS)
    report = tmp_path / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "fastddpm_kernels.aot", "--json", str(report), "--target", *targets],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stderr
    rows = json.loads(report.read_text())
    assert {row["target"] for row in rows} == set(targets)
    for op in OPS:
        assert any(row["variant"].startswith(op) for row in rows), op
    assert all(row["registers"] > 0 for row in rows)
    assert all(row["store_bits"] > 0 for row in rows)


def test_a_spill_or_an_error_is_a_failure() -> None:
    clean = {"variant": "a", "target": "sm_90", "spills": 0}
    assert aot.failures([clean]) == []
    assert aot.failures([clean, {**clean, "spills": 8}]) == ["a for sm_90: 8 bytes spilled"]
    assert aot.failures([{"variant": "b", "target": "sm_80", "error": "CompilationError: no"}]) == [
        "b for sm_80: CompilationError: no"
    ]


def test_unknown_target_is_named() -> None:
    from fastddpm_kernels._triton.compile import target

    assert target("sm_90").arch == 90
    assert target("gfx942").warp_size == 64
    with pytest.raises(ValueError, match="target is 'h100', must be of the form"):
        target("h100")
