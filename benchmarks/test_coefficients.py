"""Building a table: it happens before every loop, so at 1000 steps it must cost less than 5 ms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from fastddpm.process.multistep import dpmsolver_table
from fastddpm.process.repaint import repaint_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import StepTable, ddim_inversion_table, ddim_table, ddpm_table

LIMIT = 5e-6  # seconds a row; a loop of 1000 steps takes at least a hundred times as long on any device
SCHEDULE = NoiseSchedule.linear()
BUILDERS: dict[str, tuple[Callable[..., StepTable], int]] = {
    "ddpm": (ddpm_table, 1000),
    "ddpm_learned_range": (partial(ddpm_table, variance_type="learned_range"), 1000),
    "ddim": (partial(ddim_table, eta=0.5), 1000),
    "ddim_inversion": (ddim_inversion_table, 1000),
    "dpmsolver": (dpmsolver_table, 1000),
    "repaint": (partial(repaint_table, order="repaint"), 250),  # the paper's walk: 4570 rows
}


@pytest.mark.parametrize("name", BUILDERS)
def test_table(name: str, benchmark: Any) -> None:
    build, steps = BUILDERS[name]
    table = benchmark.pedantic(build, (SCHEDULE, SCHEDULE.timesteps(steps)), warmup_rounds=3, rounds=30)
    benchmark.extra_info["rows"] = len(table)
    assert len(table) >= steps
    if benchmark.stats is not None:  # None when run once, as a smoke test
        assert benchmark.stats.stats.median < LIMIT * len(table)
