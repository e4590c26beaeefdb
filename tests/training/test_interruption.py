"""What a run that is interrupted leaves to do, and leaves lying about."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from training_objects import small, trainer, weights

from fastddpm import Trainer
from fastddpm.training import preview, read_log


def end_at(run: Trainer, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains until SIGTERM comes within a step."""
    update = run.averages[0].update_parameters

    def told(model: Any) -> None:
        update(model)
        if run.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run.averages[0], "update_parameters", told)
    with pytest.raises(SystemExit):
        run.train()
    assert run.step == step


def test_samples_and_metrics_that_were_due_are_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 3 is the best one: told to stop there, a run has not the time to find out."""
    settings: dict[str, Any] = {"sample_every": 3, "metric_every": 3, "keep_last": 1, "train_num_steps": 9}

    def metric(run: Trainer) -> float:
        return abs(run.step - 3.5)

    whole = trainer(tmp_path / "whole", metric=metric, **settings)
    whole.train()
    run = trainer(tmp_path / "cut", metric=metric, **settings)
    end_at(run, 3, monkeypatch)
    assert not (tmp_path / "cut" / "samples").exists()
    assert run._best is None
    resumed = trainer(tmp_path / "cut", metric=metric, resume=True, **settings)
    assert resumed.train().metrics == whole._metrics
    assert resumed._best == whole._best == {"step": 3, "value": 0.5}
    assert resumed.checkpoints.steps() == whole.checkpoints.steps() == [3, 9]
    for name in ("samples", "model-best"):
        made, expected = (sorted(p.name for p in (tmp_path / run / name).iterdir()) for run in ("cut", "whole"))
        assert made == expected
    timed = {"images_per_second", "data_wait"}
    logs = [
        [{name: value for name, value in record.items() if name not in timed} for record in read_log(path)]
        for path in (tmp_path / "cut" / "log.jsonl", tmp_path / "whole" / "log.jsonl")
    ]
    assert logs[0] == logs[1]
    assert weights(resumed.diffusion).equal(weights(whole.diffusion))


def test_what_was_written_when_it_was_killed_is_removed(tmp_path: Path) -> None:
    trainer(tmp_path, ema_decay=(0.9, 1e-5)).train()
    left = [".model-abcd_123", ".model-best-x1", ".model-ema-1e-05-y2"]
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_bytes(b"part")
    (tmp_path / "model-ema-1e-05").rename(tmp_path / ".model-ema-1e-05-old")  # between two renames
    (tmp_path / ".mine").mkdir()
    trainer(tmp_path, ema_decay=(0.9, 1e-5), resume=True).train()
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {".mine", "checkpoints", "config.toml", "log.jsonl", "model", "model-ema-1e-05", "samples"}


def test_a_best_model_that_cannot_be_written_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = preview.export

    def export(folder: Path, *arguments: Any) -> None:
        if folder.name == "model-best" and run.step == 2:
            raise OSError(28, "No space left on device")
        real(folder, *arguments)

    monkeypatch.setattr(preview, "export", export)
    run = trainer(tmp_path, metric=lambda run: float(run.step), metric_every=2)
    run.train()
    assert run._best == {"step": 4, "value": 4.0}
    assert (tmp_path / "model-best").is_dir()


@pytest.mark.parametrize("resumed", [False, True])
def test_dropout_is_a_function_of_the_seed(tmp_path: Path, resumed: bool) -> None:
    """Whatever random state the caller is in, and without a checkpoint to take one from."""
    ends = []
    for place, seed in enumerate((0, 0, 1)):
        torch.manual_seed(place)
        steps = {"train_num_steps": 3, "lr_scheduler": "constant", "lr_warmup_steps": 0}
        folder = tmp_path / str(place)
        diffusion = small(dropout=0.5)
        if resumed:
            trainer(folder, diffusion, seed=seed, **{**steps, "train_num_steps": 1}).train()
        run = trainer(folder, diffusion, seed=seed, resume=resumed, **steps)
        torch.rand(place + 1)
        run.train()
        ends.append(weights(run.diffusion))
    assert ends[0].equal(ends[1])
    assert not ends[0].equal(ends[2])


def test_what_a_resumed_run_may_be_told_anew(tmp_path: Path) -> None:
    trainer(tmp_path, train_num_steps=2).train()
    with pytest.raises(ValueError, match="is 'v_prediction', but .* has been trained with 'epsilon'"):
        trainer(tmp_path, small(prediction_type="v_prediction"), resume=True)
    drawn = trainer(tmp_path, small(timestep_sampling="importance"), resume=True, train_num_steps=4)
    assert drawn.train().step == 4
    assert int(drawn.diffusion.timestep_sampler.counts.sum()) == 2 * 4
    evenly = trainer(tmp_path, small(timestep_sampling="stratified"), resume=True)
    assert weights(evenly.diffusion).equal(weights(drawn.diffusion))
