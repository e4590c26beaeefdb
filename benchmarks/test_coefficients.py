"""Building a table: it happens before every loop, so at 1000 steps it must cost less than 5 ms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from fastddpm.process.multistep import dpmsolver_table
from fastddpm.process.repaint import repaint_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import StepTable, ddim_inversion_table, ddim_table, ddpm_table

LIMIT = 5e-3  # seconds; a loop of 1000 steps takes at least a hundred times as long on any device

BUILDERS: dict[str, Callable[..., StepTable]] = {
    "ddpm": ddpm_table,
    "ddpm_learned_range": partial(ddpm_table, variance_type="learned_range"),
    "ddim": partial(ddim_table, eta=0.5),
    "ddim_inversion": ddim_inversion_table,
    "dpmsolver": dpmsolver_table,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_table_of_1000_steps(name: str, benchmark: Any) -> None:
    schedule = NoiseSchedule.linear()
    timesteps = schedule.timesteps()
    table = benchmark.pedantic(BUILDERS[name], (schedule, timesteps), warmup_rounds=3, rounds=30)
    check(table)
    report(benchmark, len(table))


def test_table_of_repaint(benchmark: Any) -> None:
    """The paper's walk: 250 steps, jumps of 10, each stretch 10 times, 4570 rows."""
    schedule = NoiseSchedule.linear()
    table = benchmark.pedantic(
        repaint_table, (schedule, schedule.timesteps(250)), {"order": "repaint"}, warmup_rounds=3, rounds=30
    )
    check(table)
    report(benchmark, len(table))


def check(table: StepTable) -> None:
    """With the true x0 and epsilon every row leads from its level exactly to the next, whatever the sampler."""
    before = torch.cat([torch.tensor([table.start], dtype=torch.float64), table.levels[:-1]])
    _, _, c, d, e, f, s = table.rows.unbind(1)
    torch.testing.assert_close(c + f + d * before[:, 0], table.levels[:, 0], rtol=1e-9, atol=1e-12)
    if table.learned is None:
        torch.testing.assert_close(torch.hypot(d * before[:, 1] + e, s), table.levels[:, 1], rtol=1e-9, atol=1e-9)


def report(benchmark: Any, rows: int) -> None:
    benchmark.extra_info.update({"rows": rows, "torch": torch.__version__})
    if benchmark.stats is not None:  # None when run once, as a smoke test
        assert benchmark.stats.stats.median < LIMIT * max(1, rows / 1000)
