"""A few cases of the grid of pipelines, schedulers and fields; `grid.py` runs as many as one likes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from sampled import few

GRID = runpy.run_path(str(Path(__file__).with_name("grid.py")))


@pytest.mark.parametrize("seed", few(1, [12, 11]))
def test_a_few_random_cases(seed: int) -> None:
    counts, cases = GRID["run"](8, seed)
    assert cases == []
    assert counts.get("equal", 0) > 0
