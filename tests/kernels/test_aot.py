"""Every kernel compiles for GPUs that are not here: without spills, and with no more of anything than before.

`benchmarks/results/aot.json` is the limit: registers and shared memory of every variant for every target. Where a
kernel is meant to take more, or is new, `python -m fastddpm_kernels.aot --json benchmarks/results/aot.json` writes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastddpm_kernels import aot

LIMITS = Path(__file__).parents[2] / "benchmarks" / "results" / "aot.json"
# What another version of triton than that of the limits may take above them: its compiler allots registers otherwise.
OTHER_VERSION = {"registers": (1.25, 8), "shared": (1.0, 2048)}  # times, and plus

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("every", [24, pytest.param(1, marks=pytest.mark.long)])
def test_variants_compile_for_both_vendors_without_spills(every: int, tmp_path: Path) -> None:
    """Of every op one variant in 24, others for each GPU; with --long all."""
    targets = ["sm_90", "gfx942", "sm_80", "sm_100"]
    assert set(targets) == set(aot.TARGETS)
    report = tmp_path / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "fastddpm_kernels.aot",
            "--json",
            str(report),
            "--target",
            *targets,
            "--every",
            str(every),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stderr
    written = json.loads(report.read_text())
    rows = written["rows"]
    assert {row["target"] for row in rows} == set(targets)
    for op in aot.OPS:
        assert any(row["variant"].startswith(op) for row in rows), op
    assert all(row["registers"] > 0 for row in rows)
    assert all(row["store_bits"] > 0 for row in rows)
    limits = json.loads(LIMITS.read_text())
    assert beyond(rows, limits["rows"], same_version=written["triton"] == limits["triton"]) == []


def beyond(rows: list[dict[str, Any]], limits: list[dict[str, Any]], *, same_version: bool) -> list[str]:
    """A line for everything of which a variant takes more than its limit, and for every variant without one."""
    allowed = {(row["variant"], row["target"]): row for row in limits}
    found = []
    for row in rows:
        limit = allowed.get((row["variant"], row["target"]))
        if limit is None:
            found.append(f"{row['variant']} for {row['target']} has no limit in {LIMITS.name}")
            continue
        for name, (times, plus) in OTHER_VERSION.items():
            most = limit[name] if same_version else limit[name] * times + plus
            if row[name] > most:
                found.append(f"{row['variant']} for {row['target']}: {row[name]} {name}, at most {most:g}")
    return found


def test_the_limits_are_of_every_variant_and_target() -> None:
    """A new kernel or variant is committed with what it uses; so is a table of tuned choices, of one GPU."""
    rows = json.loads(LIMITS.read_text())["rows"]
    variants = [variant for op in aot.OPS for variant in aot.variants(op)]
    expected = {(v.name, target) for v in variants for target in aot.TARGETS if v.target in (None, target)}
    assert {(row["variant"], row["target"]) for row in rows} == expected
    assert aot.failures(rows) == []


def test_more_of_anything_is_beyond_the_limit() -> None:
    limit = {"variant": "a", "target": "sm_90", "registers": 40, "shared": 2048}
    assert beyond([limit], [limit], same_version=True) == []
    assert beyond([{**limit, "registers": 41}], [limit], same_version=True) == ["a for sm_90: 41 registers, at most 40"]
    assert beyond([{**limit, "shared": 4096}], [limit], same_version=True) == ["a for sm_90: 4096 shared, at most 2048"]
    other = {**limit, "registers": 58, "shared": 4096}
    assert beyond([other], [limit], same_version=False) == []
    assert beyond([{**other, "registers": 59}], [limit], same_version=False) == [
        "a for sm_90: 59 registers, at most 58"
    ]
    assert beyond([{**limit, "target": "gfx942"}], [limit], same_version=True) == [
        "a for gfx942 has no limit in aot.json"
    ]


def test_the_report_is_written_as_the_limits_are(tmp_path: Path) -> None:
    limits = LIMITS.read_text(encoding="utf-8")
    rows = json.loads(limits)["rows"]
    aot.write_json(str(tmp_path / "aot.json"), rows)
    written = (tmp_path / "aot.json").read_text(encoding="utf-8")
    assert written.partition("\n")[2] == limits.partition("\n")[2]


def test_a_spill_or_an_error_is_a_failure() -> None:
    clean = {"variant": "a", "target": "sm_90", "spills": 0}
    assert aot.failures([clean]) == []
    assert aot.failures([clean, {**clean, "spills": 8}]) == ["a for sm_90: 8 bytes spilled"]
    assert aot.failures([{"variant": "b", "target": "sm_80", "error": "CompilationError: no"}]) == [
        "b for sm_80: CompilationError: no"
    ]


def test_unknown_target_is_named() -> None:
    from fastddpm_kernels.device.compile import target

    assert target("sm_90").arch == 90
    assert target("gfx942").warp_size == 64
    with pytest.raises(ValueError, match="target is 'h100', must be of the form"):
        target("h100")
