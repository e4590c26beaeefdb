"""Find this process's part of a job from the environment of torchrun, accelerate or SLURM, and lock each rank."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

LOCKS = ".locks"
PATIENCE_S = 3.0  # a process that ends releases its lock a little after its parent sees it end
_LOCK = re.compile(r"rank-(\d+)-of-(\d+)")


class Rank(NamedTuple):
    """This process among those that share a job."""

    rank: int = 0
    world: int = 1

    def __str__(self) -> str:
        return f"{self.rank}-of-{self.world}"


def rank_of(environment: Mapping[str, str]) -> Rank:
    """Return the rank that the environment states.

    `RANK` and `WORLD_SIZE` are set by torchrun and accelerate launch. In a SLURM array every task is a rank, or, where
    it runs torchrun, as many as that has.

    Raises:
        ValueError: they contradict each other, or the array's indices are not evenly spaced.
    """
    rank, world = _integer(environment, "RANK", 0), _integer(environment, "WORLD_SIZE", 1)
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE is {world}, must be from 0 to WORLD_SIZE - 1")
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return Rank(rank, world)
    task, count = _integer(environment, "SLURM_ARRAY_TASK_ID", 0), _integer(environment, "SLURM_ARRAY_TASK_COUNT", 1)
    least, step = _integer(environment, "SLURM_ARRAY_TASK_MIN", 0), _integer(environment, "SLURM_ARRAY_TASK_STEP", 1)
    if count == 1:
        return Rank(rank, world)
    place, rest = divmod(task - least, max(step, 1))
    if rest or not 0 <= place < count:
        raise ValueError(
            f"SLURM_ARRAY_TASK_ID is {task} of {count} tasks from {least}, must be an array without holes, such as "
            f"--array=0-{count - 1}"
        )
    return Rank(place * world + rank, count * world)


def _integer(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not re.fullmatch(r"\d{1,9}", text):
        raise ValueError(f"{name} is {text!r}, must be an integer of at least 0")
    return int(text)


@contextmanager
def holding(folder: Path, rank: Rank) -> Iterator[None]:
    """Hold the lock of `rank` in `folder`; it is released when the process ends, for any reason.

    Raises:
        ValueError: another process holds it, or one of a job with another number of ranks works in the folder; the
            message names it.
    """
    locks = folder / LOCKS
    path = locks / f"rank-{rank}"
    handle = _acquire(path)
    try:
        if handle is not None:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            for other in _held(folder, path):
                if not other.name.endswith(f"-of-{rank.world}"):
                    raise ValueError(f"output {folder} is in use by {_holder(other)}, must be free")
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)  # while it is held: whoever waits sees that it is another file now
            os.close(handle)
            with suppress(OSError):  # another rank is there
                locks.rmdir()


def others_work(folder: Path) -> bool:
    """Return whether any process holds a lock in `folder`."""
    return bool(_held(folder))


def _acquire(path: Path) -> int | None:
    """Return the descriptor of a lock file that this process holds; None where the file system has no locks."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # the folder was removed in between
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                warnings.warn(
                    f"{path.parent.parent} has no file locks ({error.strerror}): do not start a job twice there",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return None
            if time.monotonic() > deadline:
                raise ValueError(f"output {path.parent.parent} is in use by {_holder(path)}, must be free") from None
            time.sleep(0.05)
            continue
        try:
            if os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)  # its holder removed it


def _held(folder: Path, own: Path | None = None) -> list[Path]:
    """Return the lock files of `folder` that other processes hold, and remove those of processes that are dead."""
    held = []
    try:
        entries = sorted((folder / LOCKS).iterdir())
    except OSError:
        return []
    for path in entries:
        if _LOCK.fullmatch(path.name) is None or path == own:
            continue
        try:
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except OSError:
            held.append(path)
        finally:
            os.close(handle)
    return held


def _holder(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        text = ""
    return f"{text or 'another process'} ({path.name})"
