"""What a run says about itself, also where that cannot be written."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from fastddpm.training import read_log
from fastddpm.training.logs import RunLog


class Board:
    """As torch's SummaryWriter, whose thread has found the disk full: every later call raises what it raised."""

    full = False

    def __init__(self, folder: str, purge_step: int) -> None:
        self.calls: list[tuple[Any, ...]] = [(folder, purge_step)]

    def add_scalar(self, *arguments: Any) -> None:
        if Board.full:
            raise OSError(28, "No space left on device")
        self.calls.append(arguments)

    def add_image(self, name: str, pixels: Any, step: int, dataformats: str) -> None:
        self.calls.append((name, pixels.shape, step, dataformats))

    def close(self) -> None:
        self.calls.append(("closed",))


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Board  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Board, "full", False)


@pytest.mark.usefixtures("tensorboard")
def test_tensorboard_has_the_numbers_and_the_pictures(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 4)
    board = log._board
    log.write(5, {"loss": 0.5, "said": "words"})
    log.picture(5, Image.new("RGB", (6, 4)))
    log.close()
    folder = str(tmp_path / "tensorboard")
    assert board.calls == [(folder, 5), ("loss", 0.5, 5), ("samples", (4, 6, 3), 5, "HWC"), ("closed",)]
    assert RunLog(tmp_path, tensorboard=False)._board is None


@pytest.mark.usefixtures("tensorboard")
def test_a_full_disk_under_tensorboard_ends_its_files_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(tmp_path)
    monkeypatch.setattr(Board, "full", True)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            log.write(step, {"loss": 0.5})
        log.picture(2, Image.new("L", (2, 2)))
        log.close()
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [1, 2]
    assert caplog.messages == ["TensorBoard's files cannot be written any more: [Errno 28] No space left on device"]


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert RunLog(tmp_path)._board is None
    with pytest.raises(ModuleNotFoundError, match="tensorboard is missing: pip install tensorboard"):
        RunLog(tmp_path, tensorboard=True)
