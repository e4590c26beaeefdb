"""Compiles the native library with the system's C++ compiler, once, into the user's cache.

The name of the file holds a hash of all that it depends on: the sources, the compiler, its flags and the CPU. It is
written under another name and renamed, so that processes may build at the same time, and none waits for another.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

log = logging.getLogger("fastddpm.kernels")

PACKAGE = Path(__file__).parents[1]
_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-Wall", "-Wextra",
    "-Wno-psabi",
)  # fmt: skip
_SECONDS = 300  # no compiler takes as long


class BuildError(RuntimeError):
    """The library could not be built; the message says why."""


def compiler() -> list[str] | None:
    """The command of the C++ compiler: the variable CXX, or the first that is found; None if there is none."""
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    return next(([path] for name in _COMPILERS if (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where libraries are kept: FASTDDPM_CACHE_DIR, else fastddpm in XDG_CACHE_HOME, else in ~/.cache."""
    if own := os.environ.get("FASTDDPM_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastddpm"


def library() -> tuple[Path, bool]:
    """The library's path, built if it was not there, and whether it is to be deleted once it is loaded.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    command, name = _command(), library_name()
    sources = sorted(PACKAGE.glob("*/*.cpp"))
    try:
        path = cache_folder() / name
        if path.is_file():
            return path, False
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{name}-", suffix=".so", dir=path.parent)
        os.close(handle)
    except (OSError, RuntimeError) as error:  # read-only, or no home: a private folder, for this process alone
        log.info("the native library cannot be kept: %s", error)
        path = Path(tempfile.mkdtemp(prefix="fastddpm-")) / name
        _compile([*command, f"-I{PACKAGE}", "-o", str(path), *map(str, sources)])
        return path, True
    try:
        _compile([*command, f"-I{PACKAGE}", "-o", temporary, *map(str, sources)])
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path, False


def library_name() -> str:
    """The library's file name, which holds a hash of all that it depends on.

    Raises:
        BuildError: there is no compiler.
    """
    return f"native-{_hash(_command())}.so"


def _command() -> list[str]:
    command = compiler()
    if command is None:
        raise BuildError(f"there is no C++ compiler ({', '.join(_COMPILERS)}, or one named by the variable CXX)")
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return [*command, *_FLAGS, native]


def _compile(command: list[str]) -> None:
    log.info("building the native library, once: %s", shlex.join(command))
    start = time.perf_counter()
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler cannot be run: {error}") from None
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        raise BuildError(f"{command[0]} fails: {lines[0] if lines else f'exit code {result.returncode}'}")
    log.info("built in %.1f s", time.perf_counter() - start)


def _hash(command: list[str]) -> str:
    parts = [shlex.join(command), _version(command[0]), sys.platform, platform.machine(), _cpu()]
    sources = sorted([*PACKAGE.glob("*/*.cpp"), *PACKAGE.glob("*/*.h")])
    parts += [path.name + "\n" + path.read_text(encoding="utf-8") for path in sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _version(program: str) -> str:
    """What tells an updated compiler from the one before, without running it."""
    path = shutil.which(program) or program
    try:
        status = os.stat(path)
    except OSError as error:
        raise BuildError(f"the C++ compiler {program} is not there: {error}") from None
    return f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}"


def _cpu() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
