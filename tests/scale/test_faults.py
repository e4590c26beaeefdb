"""What breaks on machines: nothing is lost, nothing is there twice or in part, and a second start finishes the job."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastddpm import NoiseSchedule, Sampler
from fastddpm.cli import main
from fastddpm.common.shards import ShardFolder
from fastddpm.scale import Incomplete, Report, sample_shards
from fastddpm.scale import places as _places

Contents = Callable[[Path], dict[str, bytes]]
Command = Callable[..., "subprocess.Popen[str]"]


def draw(sampler: Sampler, out: Path, count: int = 40, **changed: Any) -> Report:
    settings: dict[str, Any] = {"shard_size": 8, "class_labels": 1, "batch_size": 4, "progress": False} | changed
    return sample_shards(sampler, out, count, **settings)


@pytest.fixture
def whole(sampler: Sampler, tmp_path: Path, contents: Contents) -> dict[str, bytes]:
    """What the folder holds at the end of a run that nothing interrupts."""
    draw(sampler, tmp_path / "whole")
    return contents(tmp_path / "whole")


# -- killed -----------------------------------------------------------------------------------------------------------


def test_killed_at_any_call_of_the_system(
    sampler: Sampler, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child is killed at its k-th call that changes the disk, for every k of a job of two shards.

    It is forked, so that a kill costs milliseconds; `os._exit` leaves everything as SIGKILL does.
    """

    def no_network(count: int, *, first_sample: int, **_: Any) -> torch.Tensor:  # its threads do not survive a fork
        places = torch.arange(first_sample, first_sample + count).float()
        return torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8) * places.reshape(-1, 1, 1, 1).sin()

    monkeypatch.setattr(sampler, "sample", no_network)
    for format in ("npz", "png"):
        draw(sampler, tmp_path / f"{format}-whole", 4, shard_size=2, format=format)
        want = contents(tmp_path / f"{format}-whole")
        kills = 0
        for k in range(1, 200, 1 if format == "npz" else 3):  # a picture is written as an archive is
            out = tmp_path / f"{format}-{k}"
            child = os.fork()
            if child == 0:
                _die_at(k)
                try:
                    draw(sampler, out, 4, shard_size=2, format=format)
                finally:
                    os._exit(0)
            _, status = os.waitpid(child, 0)
            kills += os.waitstatus_to_exitcode(status) == 137
            left = contents(out) if out.exists() else {}
            for name, content in left.items():
                if not name.startswith("."):
                    assert want[name] == content, f"{name} is not whole after call {k}"
            draw(sampler, out, 4, shard_size=2, format=format)
            assert contents(out) == want
            assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / f"{format}-whole"))
            if os.waitstatus_to_exitcode(status) == 0:
                break
            shutil.rmtree(out)
        assert kills >= (15 if format == "npz" else 5)


def _die_at(k: int) -> None:
    """End this process at its k-th call that changes the disk."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == k:
                os._exit(137)
            return function(*arguments, **named)

        return call

    def half(path: Path, content: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == k:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content[: len(content) // 2])
            os._exit(137)
        write(path, content)

    write, _places._write = _places._write, half
    for owner, name in (
        (os, "fsync"), (os, "link"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"),
        (os, "open"), (os, "pwrite"),
    ):  # fmt: skip
        setattr(owner, name, counted(getattr(owner, name)))
    for name in ("replace", "unlink", "mkdir", "rmdir"):
        setattr(Path, name, counted(getattr(Path, name)))


@pytest.mark.slow
def test_sigterm_drops_the_shard_and_exits_with_143(
    model: str, tmp_path: Path, contents: Contents, command: Command
) -> None:
    arguments = ["sample", model, "-n", "400", "--shard-size", "8", "--batch-size", "4", "--steps", "20", "-o"]
    process = command(*arguments, str(tmp_path / "out"))
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("shard-*"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error.splitlines()[-1] == "terminated"
    saved = contents(tmp_path / "out")
    assert 2 <= sum(name.startswith("shard-") for name in saved) < 50
    assert not [name for name in saved if name.startswith(".")]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# -- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("this user may not mount a tmpfs; the stand-in below is tested")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(sampler: Sampler, disk: Path, contents: Contents, tmp_path: Path) -> None:
    draw(sampler, tmp_path / "whole", 400)
    want = contents(tmp_path / "whole")
    with pytest.raises(Incomplete, match=r"No space left on device; \d+ of 50 ranges are saved by this process"):
        draw(sampler, disk / "out", 400)
    saved = contents(disk / "out")
    assert 2 < len(saved) < 50
    assert all(want[name] == content for name, content in saved.items())
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    report = draw(sampler, disk / "out", 400)
    assert report.kept == len(saved) - 1
    assert contents(disk / "out") == want


def test_an_output_that_becomes_read_only(
    sampler: Sampler, disk: Path, contents: Contents, whole: dict[str, bytes]
) -> None:
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    draw(sampler, disk / "out")
    (disk / "out/shard-00008-00015.npz").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(ValueError, match=f"output is {disk}/out, which cannot be written: Read-only file system"):
        draw(sampler, disk / "out")
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert draw(sampler, disk / "out").written == 1
    assert contents(disk / "out") == whole


@pytest.mark.parametrize(
    ("format", "number"), [("npz", errno.ENOSPC), ("npz", errno.EDQUOT), ("png", errno.EROFS), ("wds", errno.EIO)]
)
def test_a_write_that_fails_leaves_nothing(
    sampler: Sampler, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch, number: int, format: str
) -> None:
    """A stand-in for disks that this user cannot mount: the third file fails after half of it is written."""
    draw(sampler, tmp_path / "whole", format=format)
    written = 0

    def fail(path: Path, content: bytes) -> None:
        nonlocal written
        written += 1
        if written == 12:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(number, os.strerror(number), str(path))
        write(path, content)

    write = _places._write
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(_places, "_write", fail)
        if format != "png":
            written = 9
        with pytest.raises(Incomplete, match=f"{os.strerror(number)}; 1 of 5 ranges are saved"):
            draw(sampler, out, format=format)
    assert not [name for name in contents(out) if name.startswith(".")]
    assert draw(sampler, out, format=format).kept == 1
    assert contents(out) == contents(tmp_path / "whole")


def test_the_command_ends_with_1_and_says_how_to_go_on(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path, content: bytes) -> None:
        if "shard-" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    write = _places._write
    monkeypatch.setattr(_places, "_write", fail)
    out = str(tmp_path / "out")
    assert main(["sample", model, "-n", "8", "--shard-size", "4", "--steps", "2", "-o", out]) == 1
    error = capsys.readouterr().err
    assert error == (
        f"fastddpm sample: error: {out}: No space left on device; 0 of 2 ranges are saved by this process, and the "
        "same command continues with what is missing\n"
    )


# -- samples that are not finite, and memory --------------------------------------------------------------------------


def test_a_range_that_is_not_finite_is_marked_and_the_rest_goes_on(tmp_path: Path, contents: Contents) -> None:
    from spoilt_model import spoilt_unet

    sampler = Sampler(spoilt_unet(), NoiseSchedule.linear(), method="ddim", num_inference_steps=2)
    labels = [0] * 40
    labels[9] = labels[12] = 1  # whose embedding is not a number
    out = tmp_path / "out"
    message = r"1 of 5 ranges failed: 00008-00015 \(2 samples are not finite \(9, 12\), sample 9 since step 1 of 2"
    with pytest.raises(Incomplete, match=message):
        draw(sampler, out, class_labels=labels)
    failure = json.loads((out / "failed-00008-00015.json").read_text())
    assert failure["samples"] == [9, 12]
    assert failure["step"].startswith("step 1 of 2 (timestep ")
    assert sum(name.startswith("shard-") for name in contents(out)) == 4
    with pytest.raises(ValueError, match=r"lacks 1 of 5 ranges \(00008-00015; 1 of them failed\)"):
        ShardFolder(out)
    with pytest.raises(Incomplete, match=message):  # it is tried again, the others are kept
        draw(sampler, out, class_labels=labels)


def test_a_failure_that_is_gone_leaves_no_mark(
    sampler: Sampler, tmp_path: Path, contents: Contents, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = sampler.sample

    def spoil(*arguments: Any, **named: Any) -> Any:
        result = sample(*arguments, **named)
        if named["first_sample"] == 16:
            result[1] = torch.nan
        return result

    with monkeypatch.context() as patch:
        patch.setattr(sampler, "sample", spoil)
        with pytest.raises(Incomplete, match=r"ranges failed: 00016-00023 \(1 samples are not finite \(17\)\)"):
            draw(sampler, tmp_path / "out")
    assert "failed-00016-00023.json" in contents(tmp_path / "out")
    assert draw(sampler, tmp_path / "out").kept == 4
    assert contents(tmp_path / "out") == whole


def test_out_of_memory_halves_and_goes_on(
    sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draw(sampler, tmp_path / "whole")
    sample, sizes = sampler.sample, []

    def room_for_two(count: int, **named: Any) -> Any:
        sizes.append(count)
        if count > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(count, **named)

    monkeypatch.setattr(sampler, "sample", room_for_two)
    with caplog.at_level(logging.WARNING):
        assert draw(sampler, tmp_path / "out").samples == 40
    assert sizes == [4, *[2] * 20]
    assert "memory ran out: 2 samples at once from here on" in caplog.text
    for mine, want in zip(ShardFolder(tmp_path / "out"), ShardFolder(tmp_path / "whole"), strict=True):
        assert np.abs(mine.values.astype(int) - want.values.astype(int)).max() <= 1

    def no_room(count: int, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampler, "sample", no_room)
    with pytest.raises(Incomplete, match="not enough memory for one sample at a time: CUDA out of.*0 of 5 ranges"):
        draw(sampler, tmp_path / "none")


# -- two jobs in one folder -------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_by_name(sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddpm.scale.ranks.PATIENCE_S", 0.2)
    out = tmp_path / "out"
    holder = (
        "import sys, time; from pathlib import Path; from fastddpm.scale.ranks import Rank, holding\n"
        "with holding(Path(sys.argv[1]), Rank(0, 1)): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        for rank in ((0, 1), (1, 2)):
            message = f"output {out} is in use by process {process.pid} on .* .rank-0-of-1., must be free"
            with pytest.raises(ValueError, match=message):
                draw(sampler, out, rank=rank)
    finally:
        process.kill()
        process.wait()
    assert draw(sampler, out).written == 5  # a lock ends with its process
    assert sorted(os.listdir(out))[0] == "manifest.json"


def test_a_file_system_without_locks_is_a_warning(
    sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(RuntimeWarning, match="has no file locks .No locks available.: do not start a job twice there"):
        assert draw(sampler, tmp_path / "out").written == 5


# -- long runs --------------------------------------------------------------------------------------------------------


def test_memory_handles_threads_and_loops_stay_flat(sampler: Sampler, tmp_path: Path) -> None:
    """200 shards, counted after 50 and at the end; `benchmarks/faults_scale.py` does 10,000."""
    from fastddpm.scale import worker as working

    seen: list[tuple[int, int, int, int]] = []
    settle = working.Worker.settle

    def counted(self: working.Worker, index: int) -> Any:
        if index in (50, 199):
            with open("/proc/self/statm", encoding="ascii") as file:
                resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            handles, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
            seen.append((resident, handles, threads, sampler._pool.built))
        return settle(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(working.Worker, "settle", counted)
        draw(sampler, tmp_path / "out", 799, shard_size=4)  # the last one is shorter
    early, late = seen
    assert late[0] - early[0] < 4 << 20
    assert late[1:] == early[1:]
    assert late[3] == 1  # one loop for every shape there is
