"""A run that is killed, or cut into processes, is the run that it would have been."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import launch, train

from fastddpm.training import read_log


def final(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "checkpoints" / "step-0000020").glob("*.safetensors"))
    return {f"{file.stem} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_log(folder / "log.jsonl")]


def test_killed_at_a_random_step_and_resumed_it_ends_the_same(tmp_path: Path) -> None:
    assert launch(train, tmp_path / "whole", 0.2) == [0]
    last = random.Random(os.environ.get("FASTDDPM_KILL_SEED", "8")).randrange(5, 20)
    assert launch(train, tmp_path / "killed", 0.2, last) == [-signal.SIGKILL]
    assert launch(train, tmp_path / "killed", 0.2) == [0]
    whole, killed = final(tmp_path / "whole"), final(tmp_path / "killed")
    assert {name.split()[0] for name in whole} == {"diffusion", "ema-0", "ema-1"}
    assert whole.keys() == killed.keys()
    assert all(killed[name].equal(value) for name, value in whole.items())
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_two_processes_are_one_with_the_same_batch(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert launch(train, one, 0.0) == [0]
    assert launch(train, two, 0.0, 10, processes=2) == [-signal.SIGKILL] * 2  # after the checkpoint of step 8
    assert launch(train, two, 0.0, processes=2) == [0, 0]
    assert [step for step, *_ in losses(two)] == [3, 6, 9, 12, 15, 18, 20]
    for (_, loss, norm), (_, expected, expected_norm) in zip(losses(two), losses(one), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    for name, value in final(one).items():
        torch.testing.assert_close(final(two)[name], value, rtol=1e-3, atol=1e-4)
