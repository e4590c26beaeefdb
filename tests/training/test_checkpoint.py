"""Checkpoints are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fastddpm.training import checkpoint as module
from fastddpm.training.checkpoint import Checkpoint, Checkpoints, atomic_folder


def content(step: int) -> Checkpoint:
    weight = torch.full((3, 4, 2, 2), float(step)).contiguous(memory_format=torch.channels_last)
    training = {"optimizer": {"state": {0: {"exp_avg": weight * 2}}, "groups": [(0.9, 0.99)]}, "none": None}
    bias = torch.full((3,), float(step))
    return Checkpoint(
        {"diffusion": {"w": weight, "b": bias, "tied": bias}, "ema-0": {"w": weight + 1}}, training, {"step": step}
    )


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new" / "checkpoints")
    assert checkpoints.latest() is None
    checkpoints.save(7, content(7))
    assert checkpoints.latest() == 7
    loaded, saved = checkpoints.load(7), content(7)
    assert loaded.state == saved.state
    for name, tensors in saved.weights.items():
        assert loaded.weights[name].keys() == tensors.keys()
        assert all(loaded.weights[name][key].equal(value) for key, value in tensors.items())
    moment = loaded.training["optimizer"]["state"][0]["exp_avg"]
    assert moment.equal(saved.training["optimizer"]["state"][0]["exp_avg"])
    assert moment.is_contiguous(memory_format=torch.channels_last)  # as the weights it belongs to
    assert loaded.training["optimizer"]["groups"] == [(0.9, 0.99)]
    with pytest.raises(FileNotFoundError, match="step-0000008 is missing"):
        checkpoints.load(8)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 7):
        checkpoints.save(step, content(step), keep=[2] if step >= 2 else [])
    assert checkpoints.steps() == [2, 5, 6]
    assert names(tmp_path) == ["step-0000002", "step-0000005", "step-0000006"]


def damage(folder: Path, how: str) -> None:
    file = folder / ("manifest.json" if "manifest" in how else "training.pt")
    if how.startswith("cut"):
        file.write_bytes(file.read_bytes()[:-20])
    elif how.startswith("lost"):
        file.unlink()
    else:  # one bit
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "lost", "flipped", "cut manifest", "lost manifest"])
def test_a_broken_one_is_left_out_with_a_warning(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, content(1))
    checkpoints.save(2, content(2))
    damage(checkpoints.path(2), how)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.latest() == 1
    assert "step-0000002 is left out: " in caplog.text
    with pytest.raises(ValueError, match="step-0000002 cannot be read: "):
        checkpoints.load(2)
    checkpoints.save(2, content(2))  # written anew
    assert checkpoints.latest() == 2


def full_disk(after: int) -> Any:
    """`save_file` of a disk that is full after so many files."""
    count = 0

    def save(tensors: Any, path: Path) -> None:
        nonlocal count
        count += 1
        if count > after:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        safetensors.torch.save_file(tensors, path)

    return save


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_destroys_nothing(tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, content(1))
    monkeypatch.setattr(module, "save_file", full_disk(after))
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.save(2, content(2))
    assert names(tmp_path) == ["step-0000001"]
    assert checkpoints.latest() == 1


def test_a_write_that_a_library_reports_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="training.pt cannot be written .* MB are free.*: PytorchStreamWriter failed"):
        Checkpoints(tmp_path).save(1, content(1))
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, content(1))
    checkpoints.save(2, content(2))
    (tmp_path / ".step-0000003-abc").mkdir()
    (tmp_path / ".step-0000003-abc" / "diffusion.safetensors").write_bytes(b"part")
    checkpoints.path(2).rename(tmp_path / ".step-0000002-old")  # killed between the two renames of a replacement
    assert checkpoints.latest() == 1
    checkpoints.remove_leftovers()
    assert names(tmp_path) == ["step-0000001", "step-0000002"]
    assert checkpoints.latest() == 2


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model"

    def write(text: str, fail: bool = False) -> None:
        def fill(folder: Path) -> None:
            (folder / "sub").mkdir()
            (folder / "sub" / text).write_text(text)
            if fail:
                raise OSError(errno.ENOSPC, "full")

        atomic_folder(path, fill)

    write("one")
    write("two")
    with pytest.raises(OSError, match="full"):
        write("three", fail=True)
    assert names(path / "sub") == ["two"]
    assert names(tmp_path) == ["model"]


class Payload:
    """What must not run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")

    def save_payload(_: Any, path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(Payload()))
            file.writestr("archive/version", "3\n")

    monkeypatch.setattr(torch, "save", save_payload)
    checkpoints.save(1, content(1))
    with pytest.raises(ValueError, match="training.pt cannot be read: it is damaged, or holds more than tensors"):
        checkpoints.load(1)
    assert not (tmp_path / "executed").exists()
