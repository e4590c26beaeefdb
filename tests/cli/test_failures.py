"""Results that are not finite, signals, full disks, other terminals: what is right is kept, and the rest is said."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm import NoiseSchedule, UNet, save_pretrained
from fastddpm.cli import main
from fastddpm.common.files import atomic_write

Refused = Callable[..., str]
FAST = ["--steps", "2"]


# -- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(tiny: dict[str, Any]) -> str:
    """A model of three classes, of which class 1 is not finite."""
    torch.manual_seed(0)
    unet = UNet(**tiny | {"num_class_embeds": 3})
    unet.class_embedding.weight.data[1] = torch.nan
    save_pretrained("spoilt", unet, NoiseSchedule.linear())
    return "spoilt"


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 1
    return capsys.readouterr().err


def test_what_is_finite_is_written(spoilt: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["sample", spoilt, *FAST, "--class-labels", "0,1,2"]
    error = fail(capsys, *common, "-o", "a.npz")
    assert "warning: 1 of 3 samples are not finite (1), sample 1 since step 1 of 2 (timestep 500)" in error
    assert "error: 1 of 3 images are not finite, 1; the others are written" in error
    with np.load("a.npz") as file:
        assert file["arr_0"].shape == (2, 8, 8, 1)
        assert file["arr_1"].tolist() == [0, 2]
    fail(capsys, *common, "-o", "folder")
    assert sorted(path.name for path in Path("folder").iterdir()) == ["00000-class0.png", "00002-class2.png"]
    for name in ("a.png", "a.gif"):
        fail(capsys, *common, "-o", name, "--trajectory", "t.png")
        assert Path(name).is_file()
    assert "nothing is written" in fail(capsys, "sample", spoilt, *FAST, "--class-labels", "1", "-o", "b.png")
    assert not Path("b.png").exists()


def test_other_commands_with_results_that_are_not_finite(
    spoilt: str, network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (8, 8)).save("image.png")
    task = ["--model", spoilt, *FAST, "--class-label", "1"]
    assert "nothing is written" in fail(capsys, "edit", "image.png", *task, "--strength", "1", "-o", "e.png")
    assert "nothing is written" in fail(capsys, "interpolate", "image.png", "image.png", *task, "-o", "p.gif")
    np.savez("real.npz", np.zeros((8, 8, 8, 1), np.uint8))
    command = ["evaluate", spoilt, "real.npz", *FAST, "-n", "6", "--feature-network", network, "--json", "a.json"]
    assert "2 of 6 samples are not finite, so nothing is measured" in fail(capsys, *command)
    assert sorted(path.name for path in Path().iterdir()) == ["image.png", "net.pt", "real.npz", "spoilt"]


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_is_new_or_empty(refused: Refused) -> None:
    assert main(["sample", *FAST, "-n", "3", "-o", "out"]) == 0
    assert len(list(Path("out").iterdir())) == 3
    error = refused("sample", *FAST, "-n", "2", "-o", "out")
    assert "--output is out, a folder that has 3 files; it must be empty or a new one" in error
    Path("empty").mkdir()
    assert main(["sample", *FAST, "-n", "2", "-o", "empty"]) == 0


def test_an_incomplete_folder_says_so_and_is_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastddpm.common import images

    written: list[Path] = []

    def save(path: Path, picture: Image.Image) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        picture.save(path)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(images, "save_picture", save)
        assert main(["sample", *FAST, "-n", "5", "-o", "out"]) == 2
    assert "5 pictures are being written" in Path("out/INCOMPLETE").read_text()
    Path("out/notes.txt").touch()
    assert main(["sample", *FAST, "--class-labels", "3", "-o", "out"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["00000-class3.png", "notes.txt"]


# -- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted"), (signal.SIGHUP, 129, "hung up")],
)
@pytest.mark.parametrize("place", ["sampling", "writing"])
def test_signals_end_in_a_line(
    sent: signal.Signals, code: int, word: str, place: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stop(*arguments: Any, **_: Any) -> None:
        for path in arguments:
            if isinstance(path, Path):
                path.write_bytes(b"half")
        os.kill(os.getpid(), sent)
        time.sleep(10)

    if place == "sampling":
        monkeypatch.setattr("fastddpm.sampling.loop.Loop.body", stop)
    else:
        monkeypatch.setattr("fastddpm.common.files.os.umask", lambda mask: stop())  # the temporary file is written
    # The tests may have been started with the signal ignored, as in the background or under nohup.
    before = signal.signal(sent, signal.default_int_handler if sent == signal.SIGINT else signal.SIG_DFL)
    try:
        assert main(["sample", *FAST, "-n", "1", "-o", "out.png"]) == code
    finally:
        signal.signal(sent, before)
    assert capsys.readouterr().err.splitlines()[-1] == word
    assert list(Path().iterdir()) == []


def test_main_leaves_signals_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is ignored, as SIGHUP under nohup, stays ignored."""
    before = signal.getsignal(signal.SIGTERM)
    hung_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr("fastddpm.common.images.save_npz", lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    try:
        assert main(["sample", *FAST, "-n", "1", "-o", "a.npz"]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, hung_up)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_output_that_is_not_read_or_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `fastddpm info | head -1` ends: quietly; and what is full is named."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    assert main(["info"]) == 141
    sys.stdout.close()  # raises nothing more
    assert capsys.readouterr().err == ""
    if Path("/dev/full").exists():
        monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115, main writes to it
        assert main(["info"]) == 2
        sys.stdout.close()
        assert capsys.readouterr().err == "fastddpm info: error: standard output: No space left on device\n"


def test_temporary_files_of_dead_processes_are_removed() -> None:
    """Also where this process has the number of the dead one, as in containers."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names: list[str] = []
    atomic_write("first.txt", lambda temporary: names.append(temporary.name))
    left = names[0].replace(f".{os.getpid()}.", f".{dead.pid}.").replace("first", "other")
    alive = names[0].replace(f".{os.getpid()}.", ".1.")
    same = names[0].replace("first", "same")
    foreign = ".mine.txt"
    folder = Path("new")
    folder.mkdir()
    for name in (left, alive, same, foreign):
        (folder / name).touch()
    os.utime(folder / same, (1, 1))
    atomic_write(folder / "b.txt", lambda temporary: temporary.write_text("b"))
    assert sorted(path.name for path in folder.iterdir()) == sorted([alive, foreign, "b.txt"])


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("64 requested and 0 written")]
)
def test_errors_of_writing_name_the_file(error: OSError, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(np, "savez", full)
    assert main(["sample", *FAST, "-n", "1", "-o", "a.npz"]) == 2
    assert list(Path().iterdir()) == []
    with pytest.raises(OSError, match="No space|requested") as caught:
        atomic_write("b.npz", lambda temporary: full())
    assert caught.value.filename == "b.npz"


# -- terminals and settings -------------------------------------------------------------------------------------------


def test_figures_outlive_a_terminal_that_cannot_print_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise UnicodeEncodeError("ascii", "±", 0, 1, "ordinal not in range")

    monkeypatch.setattr("fastddpm.cli.fidelity._print", broken)
    command = ["evaluate", "--steps", "2", "-n", "30", "--metrics", "fid", "--device", "cpu", "--json", "a.json"]
    assert main(command) == 2
    assert json.loads(Path("a.json").read_text())["fidelity"]["fid"] > 0


def test_ascii_terminals() -> None:
    code = "import sys; from fastddpm.cli import main; from fastddpm.cli.outputs import tolerant_streams\n" \
           "tolerant_streams(); print('\\u00b1', '\\udce9')"  # fmt: skip
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "\\xb1 \\udce9\n"
    assert done.returncode == 0


def test_other_default_dtypes() -> None:
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert main(["sample", *FAST, "-n", "2", "-o", f"{dtype}.npz".replace("torch.", "")]) == 0
            assert main(["edit", "3", *FAST, "-o", f"e-{dtype}.npz".replace("torch.", "")]) == 0
        finally:
            torch.set_default_dtype(torch.float32)
    for name in ("", "e-"):
        a, b = (np.load(f"{name}float{bits}.npz")["arr_0"].astype(int) for bits in (32, 64))
        assert np.abs(a - b).max() <= 1
