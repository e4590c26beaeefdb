"""A few configurations of the grid of denoising_diffusion_pytorch's diffusions, one of every class."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from sampled import few

pytest.importorskip("denoising_diffusion_pytorch", reason="needs denoising_diffusion_pytorch")

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1, 2, 3, 5, 9, 13, 14, 16, 17, 19, 20)  # one of every class


@pytest.fixture(scope="module")
def grid() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lucidrains_grid", Path(__file__).with_name("lucidrains_grid.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", few(5, SEEDS))
def test_images_are_the_original_s(grid: ModuleType, seed: int) -> None:
    given = grid.case(seed)
    assert grid.verdict(given)[0] == ("original fails" if "Weighted" in given.words["class"] else "equal"), given.words


def test_every_class_is_among_them(grid: ModuleType) -> None:
    assert {grid.case(seed).words["class"] for seed in SEEDS} == set(grid._KINDS)


def test_the_counts_that_are_kept() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "grid_lucidrains.json").read_text(encoding="utf-8"))
    counts = kept["counts"]
    assert counts["different"] == counts["crash"] == 0
    assert sum(counts.values()) == kept["seeds"][1] - kept["seeds"][0] + 1
