"""Prove kernels on a device before "auto" uses them there.

A kernel that nobody has run on a device may not compile there, hang, crash the process, or be wrong. So at the first
use of a device a child process runs every op against its reference (`verify`), under a time limit. Each verdict is
kept in the user's cache, with the hardware and software that it is valid for. "auto" leaves out what did not pass, and
one log message says so. A backend that is named is not affected.

`FASTDDPM_VERIFY=0` trusts every kernel unproved.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastddpm_kernels import tuned
from fastddpm_kernels.native.build import cache_folder

SCHEMA = "fastddpm.proved/1"
SECONDS = 60.0  # the most that a suite may take, and
SECONDS_EACH = 20.0  # one of its proofs
RESTARTS = 4  # of the child, after a proof has crashed or hung it
PASSED = "passed"

log = logging.getLogger("fastddpm.kernels")


class Verdict(NamedTuple):
    """The result of one proof.

    Attributes:
        op: the op as `backend.resolve` names it, without a trailing underscore, or another subject, such as a kind of
            CUDA graph.
        variant: the case and its dtype.
        verdict: "passed", "wrong", "raised", "crashed", "hung" or "not tried".
        error, bound: the largest error over the largest magnitude, and how large it may be; None if there is no result.
        seconds: how long it took.
        message: what was raised, or the signal.
    """

    op: str
    variant: str
    verdict: str
    error: float | None = None
    bound: float | None = None
    seconds: float = 0.0
    message: str = ""


class Suite(NamedTuple):
    """Proofs that run together in one child process.

    Attributes:
        module: `python -m module DEVICE --pipe FD` runs them, by `proof.main`.
    """

    module: str


KERNELS = Suite("fastddpm_kernels.verify")
_lock = threading.RLock()
_known: dict[tuple[str, str], dict[str, str]] = {}  # by module and device: why an op is not used


def enabled() -> bool:
    """Return whether kernels are proved before they are used."""
    return os.environ.get("FASTDDPM_VERIFY", "1").lower() not in ("0", "false", "off")


def why_not(op: str, device: torch.device, suite: Suite = KERNELS) -> str | None:
    """Return why an op did not pass on a device, or None if it passed or has no proof. The first call proves.

    Args:
        op: as in `Verdict`.
        device: a GPU, or the CPU for native kernels.
        suite: that has the op's proofs.
    """
    if not enabled():
        return None
    key = suite.module, str(device)
    with _lock:
        if key not in _known:
            verdicts = read(device, suite)
            if verdicts is None:
                verdicts = prove(device, suite)
            _known[key] = failed(verdicts)
            for name, reason in _known[key].items():
                log.warning(
                    "%s is not used on %s: %s (to report it: fastddpm verify --json FILE)", name, device, reason
                )
        return _known[key].get(op, _known[key].get("all"))


def failed(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """Return why each op that did not pass must not be used: its first verdict."""
    found: dict[str, str] = {}
    for v in verdicts:
        if v.verdict != PASSED:
            said = f": {v.message}" if v.message else ""
            found.setdefault(v.op, f"its check {v.variant} {_PAST.get(v.verdict, v.verdict)}{said}")
    return found


_PAST = {"wrong": "gave a wrong result", "not tried": "was not tried, since others had failed"}


def forget() -> None:
    """Read the verdicts again at the next use."""
    with _lock:
        _known.clear()


def prove(device: torch.device, suite: Suite = KERNELS, *, seconds: float = SECONDS) -> list[Verdict]:
    """Run the proofs of a suite in child processes, keep the verdicts in the cache, and return them."""
    with _one_process(device, suite) as proved_meanwhile:
        if proved_meanwhile and (verdicts := read(device, suite)) is not None:
            return verdicts
        log.info("checking the kernels on %s, once", device)
        verdicts = list(run(suite, str(device), seconds=seconds))
        _write(device, suite, verdicts)
    return verdicts


def run(
    suite: Suite, device: str, *arguments: str, seconds: float = SECONDS, each: float = SECONDS_EACH,
    restarts: int = RESTARTS,
) -> Iterator[Verdict]:  # fmt: skip
    """Yield the verdict of every proof, each as soon as it is known.

    A proof that kills its process or takes longer than `each` seconds is given up, and a new process goes on with the
    next one.

    Args:
        suite: the proofs.
        device: as `torch.device` reads it.
        arguments: further arguments of the child.
        seconds: of all proofs together.
        each: of one proof.
        restarts: how many processes may follow the first.
    """
    deadline = time.monotonic() + seconds
    done: list[str] = []
    names: list[str] | None = None
    for _ in range(1 + restarts):
        child = _Child(suite, [device, *arguments, "--skip", json.dumps(done)])
        current: str | None = None
        begin = time.monotonic()
        for message in child.messages(lambda: deadline if current is None else min(deadline, begin + each)):  # noqa: B023
            if "names" in message:
                names = message["names"]
            elif "start" in message:
                current = message["start"]
            else:
                yield Verdict(*_split(message["name"]), **message["verdict"])
                done.append(message["name"])
                current = None
            begin = time.monotonic()
        took, ended = time.monotonic() - begin, child.end()
        if current is None and names is not None and len(done) >= len(names):
            return
        if current is None and names is None:  # the child failed before its first proof
            yield Verdict("all", "start", "hung" if ended is None else "crashed", seconds=took, message=child.words)
            return
        if current is not None:
            yield Verdict(*_split(current), "hung" if ended is None else "crashed", None, None, took, child.words)
            done.append(current)
        if time.monotonic() > deadline:
            break
    for name in names or []:
        if name not in done:
            yield Verdict(*_split(name), "not tried")


class _Child:
    """A process that reports on a pipe of its own: what a library prints does not disturb it."""

    def __init__(self, suite: Suite, arguments: list[str]) -> None:
        reading, writing = os.pipe()
        self._pipe = os.fdopen(reading, "rb", buffering=0)
        environment = os.environ | {"FASTDDPM_VERIFY": "0", "FASTDDPM_TUNED": "0"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", suite.module, *arguments, "--pipe", str(writing)], env=environment,
                pass_fds=(writing,), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(writing)
        self.words = ""
        self._said: list[bytes] = []
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    def _read(self, stream: Any) -> None:
        for line in stream:
            self._said = [*self._said[-20:], line]

    def messages(self, deadline: Callable[[], float]) -> Iterator[dict[str, Any]]:
        """Yield the messages until the process ends or is late."""
        import select

        rest = b""
        while True:
            ready, _, _ = select.select([self._pipe], [], [], max(deadline() - time.monotonic(), 0))
            data = self._pipe.read(65536) if ready else b""
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield json.loads(line)

    def end(self) -> int | None:
        """End the process and return its exit code; None if it had to be killed. Set `words` to what it said last."""
        code: int | None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        code = self._process.poll()
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait()
        self._reader.join(1)
        self._pipe.close()
        lines = [line.decode(errors="replace").strip() for line in self._said]
        last = next((line for line in reversed(lines) if line), "")
        how = "killed after its time" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        self.words = f"{how}, {last}" if last else how
        return code


def _split(name: str) -> tuple[str, str]:
    op, _, variant = name.partition(": ")
    return op, variant


# The record.


def path_of(device: torch.device, suite: Suite = KERNELS) -> Path:
    """Return the file of a device's verdicts.

    Raises:
        RuntimeError: there is no home folder to keep it in.
    """
    kind = suite.module.partition(".")[0]
    return cache_folder() / "proved" / f"{kind}-{tuned.slug(tuned.device_name(device))}.json"


def read(device: torch.device, suite: Suite = KERNELS) -> list[Verdict] | None:
    """Return the verdicts that were kept; None if there are none for this hardware and software."""
    try:
        content = json.loads(path_of(device, suite).read_text(encoding="utf-8"))
        if content["valid_for"] != _valid_for(device, suite):
            return None
        return [Verdict(**row) for row in content["verdicts"]]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _write(device: torch.device, suite: Suite, verdicts: Sequence[Verdict]) -> None:
    content = {"valid_for": _valid_for(device, suite), "verdicts": [v._asdict() for v in verdicts]}
    try:
        path = path_of(device, suite)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        log.info("the verdicts on %s cannot be kept: %s", device, error)


def _valid_for(device: torch.device, suite: Suite) -> dict[str, Any]:
    return tuned.header(device) | {"schema": SCHEMA, "suite": _digest(suite)}


@functools.cache
def _digest(suite: Suite) -> str:
    """Return a digest of the sources of a suite's package."""
    import hashlib
    import importlib.util

    found = importlib.util.find_spec(suite.module.partition(".")[0])
    digest = hashlib.sha256()
    for place in (found.submodule_search_locations or []) if found else []:
        for source in sorted(Path(place).rglob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:20]


@contextlib.contextmanager
def _one_process(device: torch.device, suite: Suite) -> Iterator[bool]:
    """Hold the lock of the device's verdicts; yield whether another process held it. Without locks, yield at once."""
    waited, handle = False, None
    with contextlib.suppress(OSError, RuntimeError, ImportError):
        import fcntl

        path = path_of(device, suite).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield waited
    finally:
        if handle is not None:
            os.close(handle)
