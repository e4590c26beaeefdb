"""Several processes on one job: torchrun, SLURM arrays, Ray. The folder is that of one process, byte for byte."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastddpm import Sampler
from fastddpm.cli import main
from fastddpm.common.shards import ShardFolder
from fastddpm.scale import Incomplete, Report, sample_shards
from fastddpm.scale.ranks import Rank, rank_of

Contents = Callable[[Path], dict[str, bytes]]
Command = Callable[..., "subprocess.Popen[str]"]


def draw(sampler: Sampler, out: Path, count: int = 40, **changed: Any) -> Report:
    settings: dict[str, Any] = {"shard_size": 8, "batch_size": 4, "progress": False, "class_labels": 1} | changed
    return sample_shards(sampler, out, count, **settings)


# -- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "8"}, (2, 8)),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0"}, (3, 4)),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1",
          "SLURM_ARRAY_TASK_STEP": "4"}, (2, 3)),
        # one task of an array again, alone: it does what is missing
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "5"}, (0, 1)),
        # torchrun in every task of an array
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, (7, 8)),
    ],
)  # fmt: skip
def test_the_rank_is_read_from_the_environment(environment: dict[str, str], rank: tuple[int, int]) -> None:
    assert rank_of(environment) == Rank(*rank)


def test_every_range_is_one_ranks_alone() -> None:
    for tasks in (1, 2, 3):
        for ranks in (1, 2, 3):
            found = [
                rank_of({
                    "RANK": str(rank), "WORLD_SIZE": str(ranks), "SLURM_ARRAY_TASK_ID": str(task),
                    "SLURM_ARRAY_TASK_COUNT": str(tasks),
                })
                for task in range(tasks) for rank in range(ranks)
            ]  # fmt: skip
            assert sorted(found) == [Rank(rank, tasks * ranks) for rank in range(tasks * ranks)]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2, must be from 0 to WORLD_SIZE - 1"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x', must be an integer"),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"},
         "SLURM_ARRAY_TASK_ID is 9 of 3 tasks from 1, must be an array without holes, such as --array=0-2"),
    ],
)  # fmt: skip
def test_an_environment_that_contradicts_itself(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_of(environment)


# -- what docs/scale.md promises --------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_processes_ends_with_the_same_bytes(
    digits_sampler: Sampler, tmp_path: Path, contents: Contents, world: int
) -> None:
    draw(digits_sampler, tmp_path / "one")
    for rank in reversed(range(world)):
        report = draw(digits_sampler, tmp_path / "many", rank=(rank, world))
        assert len(report.missing) == 5 - len(range(world)[rank:]) - sum(
            1 for index in range(world, 5) if index % world >= rank
        )
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def values(folder: Path) -> np.ndarray:
    return np.concatenate([each.values for each in ShardFolder(folder)])


def test_the_shard_size_changes_no_bit(digits_sampler: Sampler, tmp_path: Path) -> None:
    draw(digits_sampler, tmp_path / "8")
    for size in (1, 7, 64):
        draw(digits_sampler, tmp_path / str(size), shard_size=size)
        np.testing.assert_array_equal(values(tmp_path / str(size)), values(tmp_path / "8"))


def test_the_number_of_samples_changes_no_bit(digits_sampler: Sampler, tmp_path: Path) -> None:
    draw(digits_sampler, tmp_path / "40")
    draw(digits_sampler, tmp_path / "13", 13)
    np.testing.assert_array_equal(values(tmp_path / "13"), values(tmp_path / "40")[:13])


def test_resuming_changes_no_bit(digits_sampler: Sampler, tmp_path: Path, contents: Contents) -> None:
    draw(digits_sampler, tmp_path / "one")
    draw(digits_sampler, tmp_path / "two", rank=(1, 2))
    draw(digits_sampler, tmp_path / "two", rank=(0, 3))
    draw(digits_sampler, tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_the_batch_size_changes_last_digits(digits_sampler: Sampler, tmp_path: Path) -> None:
    """Convolutions choose their algorithm by the batch: within 1 of 255, and equal almost everywhere."""
    draw(digits_sampler, tmp_path / "4")
    for size in (1, 16, 40):
        draw(digits_sampler, tmp_path / str(size), batch_size=size)
        off = np.abs(values(tmp_path / str(size)).astype(int) - values(tmp_path / "4").astype(int))
        assert off.max() <= 1
        assert (off > 0).mean() < 1e-3


def test_other_backends_and_dtypes_stay_within_their_bounds(tmp_path: Path) -> None:
    from fastddpm import load_pretrained

    draw(load_pretrained().sampler(method="ddim", num_inference_steps=2, backend="eager"), tmp_path / "eager")
    draw(load_pretrained().sampler(method="ddim", num_inference_steps=2), tmp_path / "auto")
    draw(load_pretrained().sampler(method="ddim", num_inference_steps=2, dtype="bfloat16"), tmp_path / "bfloat16")
    want = values(tmp_path / "eager").astype(int)
    off = np.abs(values(tmp_path / "auto").astype(int) - want)
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-3
    off = np.abs(values(tmp_path / "bfloat16").astype(int) - want)
    assert np.sqrt((off**2).mean()) < 4


@pytest.mark.gpu
def test_a_gpu_draws_the_same_within_rounding(tmp_path: Path) -> None:
    from fastddpm import load_pretrained

    for device in ("cpu", "cuda"):
        sampler = load_pretrained().sampler(method="ddim", num_inference_steps=2, dtype="float32", device=device)
        draw(sampler, tmp_path / device)
    off = np.abs(values(tmp_path / "cuda").astype(int) - values(tmp_path / "cpu").astype(int))
    assert off.max() <= 1


# -- torchrun ---------------------------------------------------------------------------------------------------------


ARGUMENTS = ("--shard-size", "4", "--batch-size", "4")


def torchrun(count: int) -> tuple[str, ...]:
    return ("torch.distributed.run", "--standalone", "--nproc-per-node", str(count))


@pytest.mark.slow
def test_torchrun_with_a_worker_killed(model: str, tmp_path: Path, contents: Contents, command: Command) -> None:
    """It ends all; the same command again, which nothing interrupts, draws the rest: what one process draws."""
    out, count = tmp_path / "out", 2
    arguments = ("sample", model, "-n", "400", "--steps", "10", *ARGUMENTS, "-o")
    process = command(*arguments, str(out), module=torchrun(count))
    victim = None
    deadline = time.monotonic() + 200
    while victim is None:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
        if len(list(out.glob("shard-*"))) >= 2 * count:
            lock = out / ".locks" / f"rank-{count - 1}-of-{count}"
            victim = int(lock.read_text().split()[1]) if lock.exists() and lock.read_text() else None
    os.kill(victim, signal.SIGKILL)
    _, error = process.communicate(timeout=200)
    assert process.returncode != 0, error
    assert len(list(out.glob("shard-*"))) < 100
    process = command(*arguments, str(out), module=torchrun(count))
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert output.count("drawn now") == count
    assert main([*arguments, str(tmp_path / "one")]) == 0
    assert contents(out) == contents(tmp_path / "one")


def test_a_rank_with_failures_does_not_end_the_others(
    sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends all ranks when one ends with an error: so the last one at work reports what failed."""
    monkeypatch.setattr("fastddpm.scale.job.others_work", lambda folder: True)
    sample = sampler.sample

    def spoil(*arguments: Any, **named: Any) -> Any:
        return sample(*arguments, **named) * (float("nan") if named["first_sample"] == 8 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(sampler, "sample", spoil)
        report = draw(sampler, tmp_path / "out", rank=(1, 2))
    assert list(report.failed) == ["00008-00015"]
    monkeypatch.setattr("fastddpm.scale.job.others_work", lambda folder: False)
    with pytest.raises(Incomplete, match=r"1 of 5 ranges failed: 00008-00015; 4 ranges are saved"):
        draw(sampler, tmp_path / "out", rank=(0, 2))


# -- Ray --------------------------------------------------------------------------------------------------------------

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray Data: fastddpm[ray]")


@needs_ray
@pytest.mark.ray
@pytest.mark.long
def test_ray_with_a_worker_killed(model: str, tmp_path: Path, contents: Contents, command: Command) -> None:
    """Two actors, of which one is killed as soon as there are shards: Ray starts another, and nothing is missing."""
    out = tmp_path / "out"
    arguments = ("sample", model, "-n", "640", "--steps", "20", *ARGUMENTS, "-o")
    process = command(*arguments, str(out), "--engine", "ray", "--workers", "2")
    deadline = time.monotonic() + 300
    victims: list[int] = []
    while not victims:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
        if len(list(out.glob("shard-*"))) >= 4:
            victims = [pid for pid in _descendants(process.pid) if "MapWorker" in _title(pid)]
    os.kill(victims[0], signal.SIGKILL)
    _, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    assert main([*arguments, str(tmp_path / "one")]) == 0
    assert contents(out) == contents(tmp_path / "one")


@needs_ray
@pytest.mark.ray
@pytest.mark.slow
def test_ray_names_what_failed_and_writes_to_fsspec(tmp_path: Path, contents: Contents) -> None:
    from fastddpm import NoiseSchedule

    def make() -> Sampler:
        from spoilt_model import spoilt_unet

        return Sampler(spoilt_unet(), NoiseSchedule.linear(), method="ddim", num_inference_steps=2)

    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[1] / 'shared'}:{os.environ.get('PYTHONPATH', '')}"
    labels = [0] * 40
    labels[9] = 1
    here, there = tmp_path / "out", f"local://{tmp_path}/remote"
    for model, out, engine in ((make(), here, {}), (make, there, {"engine": "ray", "workers": 1})):
        with pytest.raises(Incomplete, match=r"1 of 5 ranges failed: 00008-00015 \(1 samples are not finite \(9\)"):
            draw(model, out, class_labels=labels, **engine)  # type: ignore[arg-type]
    assert contents(tmp_path / "remote") == contents(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("shard-*"))) == 4


def _descendants(process: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, queue = [], [process]
    while queue:
        parent = queue.pop()
        children = [pid for pid, each in parents.items() if each == parent]
        found += children
        queue += children
    return found


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
