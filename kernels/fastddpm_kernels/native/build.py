"""Build the native library with ninja and the system's C++ compiler, once, in the user's cache.

    native-<compiler, flags, CPU>/          one folder for each way of compiling
        lock                                held while a process builds there
        objects/                            ninja's: copies of the sources, object files, what each of them includes
        native-<all that it depends on>.so  and beside it its size and SHA-256

Ninja sees copies of the sources, which are written only if the content differs. So the time stamps of an installation
or a checkout cannot hide a change, and several checkouts share their object files.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

log = logging.getLogger("fastddpm.kernels")

SOURCES = Path(__file__).parents[1]
_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi",
)  # fmt: skip
_SECONDS = 300  # the most that a build may take
_PATIENCE = 300  # seconds to wait for another process's build
_TEMPORARY = "fastddpm-native-"  # folders of processes that cannot use the cache
# A compiler reports a full or read-only disk only in its messages.
_NOT_THE_SOURCES = {os.strerror(code): code for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)}


class BuildError(RuntimeError):
    """The library could not be built; the message says why."""


def compiler() -> list[str] | None:
    """Return the command of the C++ compiler: the variable CXX, else the first one found, else None.

    Raises:
        BuildError: CXX is not a command.
    """
    if named := os.environ.get("CXX", "").strip():
        try:
            return shlex.split(named)
        except ValueError as error:
            raise BuildError(f"CXX is {named!r}, must be a command: {error}") from None
    return next(([path] for name in _COMPILERS if (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Return the folder of the libraries: FASTDDPM_CACHE_DIR, else fastddpm in XDG_CACHE_HOME, else in ~/.cache."""
    if own := os.environ.get("FASTDDPM_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastddpm"


def library_name() -> str:
    """Return the library's file name, which contains a hash of everything it depends on.

    Raises:
        BuildError: there is no compiler.
    """
    parts = _configuration(_command())
    for path in _sources():
        parts += [path.relative_to(SOURCES).as_posix(), path.read_text(encoding="utf-8")]
    return f"native-{_hash(parts)}.so"


@contextmanager
def library(*, anew: bool = False) -> Iterator[Path]:
    """Yield the path of the library; build it if it is missing or damaged.

    If the cache cannot be used, the library is in a private folder that is deleted at the end of the `with` block.

    Args:
        anew: build it from scratch, whatever the cache holds.

    Raises:
        BuildError: there is no compiler or no ninja, or the compiler fails.
    """
    command, name = _command(), library_name()
    with _private_folders() as private:
        try:
            folder = cache_folder() / f"native-{_hash(_configuration(command))}"
            path = folder / name
            if anew or not _is_whole(path):
                with _locked(folder) as lock:
                    if anew or not _is_whole(path):  # not built while this process waited
                        _build(command, path, lock, anew)
        except (OSError, RuntimeError) as error:  # read-only, full, without locks, or no home
            if isinstance(error, BuildError):
                raise
            log.info("the native library cannot be kept: %s", error)
            folder, lock = private()
            path = folder / name
            try:
                _build(command, path, lock)
            except OSError as second:
                raise BuildError(f"it cannot be written: {second}") from None
        yield path


def _command() -> list[str]:
    command = compiler()
    if not command:
        raise BuildError(f"there is no C++ compiler ({', '.join(_COMPILERS)}, or one named by the variable CXX)")
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return [*command, *_FLAGS, native]


def _configuration(command: list[str]) -> list[str]:
    """Return everything that an object file depends on besides its sources."""
    return [shlex.join(command), _version(command[0]), sys.platform, platform.machine(), _cpu()]


def _hash(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _sources() -> list[Path]:
    return sorted([*SOURCES.glob("*/*.cpp"), *SOURCES.glob("*/*.h")])


def _version(program: str) -> str:
    """Return values that change when the compiler is updated, without running it."""
    path = shutil.which(program) or program
    try:
        status = os.stat(path)
    except OSError as error:
        raise BuildError(f"the C++ compiler {program} is not there: {error}") from None
    return f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}"


def _cpu() -> str:
    """Return the CPU properties that `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _digest(path: Path) -> str:
    content = path.read_bytes()
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}\n"


def _sum_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    """Return whether the library exists with the content that was written."""
    try:
        return _sum_of(path).read_text(encoding="ascii") == _digest(path)
    except (OSError, UnicodeDecodeError):
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold the folder's lock; it is released when the last process with the descriptor ends, for any reason.

    Raises:
        OSError: the folder cannot be written, has no locks, or another process builds there and does not end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _try_lock(folder)
    try:
        deadline = time.monotonic() + _PATIENCE
        while lock is None:
            if time.monotonic() > deadline:
                raise OSError(f"another process has been building in {folder} for {_PATIENCE} s")
            time.sleep(0.05)
            lock = _try_lock(folder)
        yield lock
    finally:
        if lock is not None:
            os.close(lock)


def _try_lock(folder: Path) -> int | None:
    """Return a descriptor that holds the folder's lock, or None while another has it."""
    import fcntl  # not on every system that can import this package

    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return lock


@contextmanager
def _private_folders() -> Iterator[Any]:
    """Yield a function that makes a locked folder, deleted at the end, and removes those of dead processes.

    A folder whose lock is free belongs to a dead process. Process numbers would not show this where containers share
    the folder for temporary files.
    """
    made: list[tuple[Path, int]] = []

    def make() -> tuple[Path, int]:
        for old in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*"):
            try:
                lock = _try_lock(old) if (old / "lock").exists() else None
            except OSError:  # another user's
                continue
            if lock is not None:
                shutil.rmtree(old, ignore_errors=True)
                os.close(lock)
        try:
            folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
            lock = _try_lock(folder)
        except OSError as error:
            raise BuildError(f"there is no folder to build in: {error}") from None
        assert lock is not None
        made.append((folder, lock))
        return folder, lock

    try:
        yield make
    finally:
        for folder, lock in made:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _build(command: list[str], path: Path, lock: int, anew: bool = False) -> None:
    """Build the library at `path`; this process holds the lock of its folder.

    Remains of an interrupted build are used or replaced. If the kept object files do not produce a library, or it is
    empty, everything is rebuilt once.

    Raises:
        BuildError: the compiler fails.
        OSError: the folder cannot be written.
    """
    objects = path.parent / "objects"
    for _ in range(2):
        kept = objects.is_dir() and not anew and not _is_ahead(objects)
        if not kept:
            shutil.rmtree(objects, ignore_errors=True)
        _copy_sources(objects)
        try:
            _compile(command, objects, lock)
        except BuildError:
            if not kept:
                raise
        else:
            built = objects / "library.so"
            if built.stat().st_size:
                _publish(built, path)
                return
        anew = True
    raise BuildError(f"{command[0]} writes an empty library")


def _is_ahead(objects: Path) -> bool:
    """Return whether an object file has a time in the future, so that a change would not look newer."""
    return any(path.stat().st_mtime > time.time() for path in objects.glob("*/*.o"))


def _copy_sources(objects: Path) -> None:
    """Write the sources that differ from their copies, remove other copies, and write the rules."""
    wanted = {objects / "src" / path.relative_to(SOURCES): path.read_bytes() for path in _sources()}
    for stale in {*objects.glob("src/*/*")} - wanted.keys():
        stale.unlink()
    for copy, content in wanted.items():
        if not copy.is_file() or copy.read_bytes() != content:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)


def _compile(command: list[str], objects: Path, lock: int) -> None:
    """Run ninja and show its progress."""
    files = sorted(objects.glob("src/*/*.cpp"), key=lambda path: -path.stat().st_size)  # the longest first
    run = shlex.join(command).replace("$", "$$")
    rules = [
        "ninja_required_version = 1.3",
        f"rule compile\n  command = {run} -Isrc -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {run} -shared $in -o $out",
    ]
    results = []
    for file in files:
        source = file.relative_to(objects)
        results.append(source.relative_to("src").with_suffix(".o").as_posix())
        rules.append(f"build {results[-1]}: compile {source.as_posix()}")
    rules.append(f"build library.so: link {' '.join(results)}")
    (objects / "build.ninja").write_text("\n".join(rules) + "\n", encoding="utf-8")

    log.info("building the native library, once: %s", shlex.join(command))
    start = time.perf_counter()
    environment = os.environ | {"NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"}
    try:
        process = subprocess.Popen(
            [_ninja(), "library.so"], cwd=objects, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", pass_fds=(lock,), start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise BuildError(f"ninja cannot be run: {error}") from None
    late = threading.Event()

    def stop() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(_SECONDS, stop)
    timer.start()
    lines: list[str] = []
    try:
        with _Line() as line:
            assert process.stdout is not None
            for text in process.stdout:
                lines.append(text.rstrip())
                if found := re.match(r"\[(\d+)/(\d+)\] ", text):
                    line.show(f"building the native library, once: {found[1]} of {found[2]} files")
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            _kill(process)
            process.wait()
    if late.is_set():
        raise BuildError(f"{command[0]} takes longer than {_SECONDS} s")
    if code != 0:
        text = "\n".join(lines)
        for words, number in _NOT_THE_SOURCES.items():
            if words in text:
                raise OSError(number, words, str(objects))
        said = [text for text in lines if "error:" in text] or [text for text in lines if text] or [f"exit code {code}"]
        raise BuildError(f"{command[0]} fails: {said[0]}")
    log.info("built in %.1f s", time.perf_counter() - start)


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill ninja and its compilers, which form a process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _ninja() -> str:
    """Return the path of ninja: the Python package's, else the one on PATH.

    Raises:
        BuildError: there is none.
    """
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")
    if found is None:
        raise BuildError("there is no ninja (the Python package of this name, or a program on PATH)")
    return found


def _publish(built: Path, path: Path) -> None:
    """Give the library its name once it and its sum are on the disk."""
    sum_built = built.with_suffix(".sha256")
    sum_built.write_text(_digest(built), encoding="ascii")
    for file in (built, sum_built):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    # In this order a reader finds a sum that does not match, waits for the lock, and looks again.
    os.replace(sum_built, _sum_of(path))
    os.replace(built, path)


class _Line:
    """A line on a terminal that is overwritten and finally erased; nothing without a terminal."""

    def __enter__(self) -> _Line:
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        return self

    def show(self, text: str) -> None:
        if self._terminal:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        self.show("")
