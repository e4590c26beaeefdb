"""What the tests of `benchmarks/gpu_check.py` and of `report.py` share."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--small", "--compile-batch", "--budget", "900", "--commit", "abc"]
SOURCE = "0123456789ab"
MODULES = (
    "arms baselines engine loops marks networks op_cases ops outcome_log peers precompile profiler pytest_run results "
    "summary timing tune"
)


def modules(patch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of the package `gpu`, and the scripts beside it."""
    patch.syspath_prepend(ROOT / "benchmarks")
    parts = {name: importlib.import_module(f"gpu.{name}") for name in MODULES.split()}
    scripts = {name: importlib.import_module(name) for name in ("gpu_check", "report", "cpu_check", "cpu_step")}
    # Other sources would be other measurements; here they may be edited while the tests run.
    patch.setattr(scripts["gpu_check"], "source_digest", lambda: SOURCE)
    return SimpleNamespace(**parts, **scripts)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def new_section(gpu: SimpleNamespace, tmp_path: Path, seconds: float = 60) -> Any:
    return gpu.results.Section(gpu.results.Results(tmp_path / "results.json", {}), "cifar10", seconds)


def measured(us: float, pipeline: float, compiled: float) -> dict[str, Any]:
    """What a file of a GPU holds where every mark can be judged."""

    def record(group: str, arm: str, value: float, what: str, batch: int) -> dict[str, Any]:
        times = {"median": value, "p20": value, "p80": value, "min": value, "samples": 9}
        base = {"group": group, "arm": arm, "what": what, "batch": batch, "status": "ok", "us_per_step": times}
        return base | {"steps": 10}

    loops = []
    for batch in (1, 8, 64, 256, 1024):
        scale = max(1.0, batch / 8)
        group = f"loop batch {batch}"
        loops.append(record(group, "fastddpm fp16", us * scale, "loop", batch))
        loops.append(record(group, "DDPMPipeline", pipeline * scale, "loop", batch))
    group = "compiled batch 8"
    loops += [record(group, "fastddpm fp16", us, "compiled", 8)]
    loops += [record(group, "torch.compile fp16", compiled, "compiled", 8)]
    profile = [
        {"batch": n, "status": "ok", "idle_share": 0.01, "counted": "all", "group": f"batch {n}"} for n in (1, 64, 256)
    ]
    ops = [
        {"what": op, "arm": "triton", "status": "ok", "large": large, "percent_of_copy": p, "case": "c", "group": op}
        for op in ("reverse_step", "q_sample", "group_norm_silu")
        for large, p in ((True, 90.0), (False, 3.0))
    ]
    machine = {"status": "done", "records": [], "matmul_tflops": {"fp16": 790.0}, "versions": {"torch": "2.11"}}
    problem = {"flops_per_image_and_step": 12.444e9}
    return {
        "schema": "fastddpm.gpu_check/1",
        "device": {"kind": "cuda", "name": "Some GPU", "slug": "some-gpu"},
        "commit": "abc",
        "dirty": False,
        "small": False,
        "written": "2026-01-02T03:04:05Z",
        "sections": {
            "machine": machine,
            "ops": {"status": "done", "records": ops},
            "cifar10": {"status": "done", "records": loops, "problem": problem},
            "profile": {"status": "done", "records": profile},
        },
    }
