"""What this machine gives native code: threads, held to the CPU time that the control group allows, and a cache."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from pathlib import Path

import torch

_DEFAULT = torch.get_num_threads()  # before anyone could ask for another number after this import


def threads() -> int:
    """Return how many threads native code uses.

    That is `torch.get_num_threads()`. A number that nobody chose, by `torch.set_num_threads` or a variable
    (OMP_NUM_THREADS, MKL_NUM_THREADS), is at most `cpu_quota`, rounded up: with 2.5 CPUs three threads. Two would never
    use the last half CPU. The kernel stops a group that has used up its share of a period (100 ms), so that more
    threads than that only stop earlier, and on 64 of them every step waits for those that were stopped.
    """
    asked = torch.get_num_threads()
    return asked if asked != _DEFAULT else min(asked, _most())


@functools.lru_cache(maxsize=1)
def _most() -> int:
    chosen = os.environ.get("OMP_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS")
    quota = None if chosen else cpu_quota()
    return _DEFAULT if quota is None else max(1, math.ceil(quota))


@functools.lru_cache(maxsize=1)
def last_cache() -> int:
    """Return the bytes of the last cache, which cores share; 0 if the system does not say."""
    found = [0]
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):  # such as 32768K
            found.append(1024 * int(size.read_text(encoding="ascii").strip().removesuffix("K")))
    return max(found)


def cpu_quota(process: Path = Path("/proc/self")) -> float | None:
    """Return how many CPUs' time this process may use, the least of its control group and those above; None for all.

    Reads version 2 (`cpu.max`) and version 1 (`cpu.cfs_quota_us`) of Linux's control groups.

    Args:
        process: its folder in /proc.
    """
    try:
        groups = (process / "cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (process / "mountinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    found: list[float] = []
    for group in groups:
        number, _, rest = group.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        for mount in mounts:
            place = _place(mount, path, "cgroup2" if number == "0" else "cgroup")
            if place is not None:
                found += _quotas(*place)
    return min(found, default=None)


def _place(mount: str, path: str, kind: str) -> tuple[Path, Path] | None:
    """Return the root of a mount and the folder of the group `path` in it; None if it is another kind of mount."""
    fields, _, last = mount.partition(" - ")
    if not last:
        return None
    root, point = fields.split()[3:5]
    of_kind, _, options = last.split()
    if of_kind != kind or (kind == "cgroup" and "cpu" not in options.split(",")):
        return None
    top = Path(point.encode().decode("unicode_escape"))  # spaces are \040
    # In a container the mount may begin below the hierarchy's root, while the path still begins at it.
    inside = path[len(root) :] if root != "/" and f"{path}/".startswith(f"{root}/") else path
    own = top / inside.strip("/")
    return top, own if own.is_dir() else top


def _quotas(top: Path, own: Path) -> list[float]:
    """Return the quotas from a group's folder up to the top of its mount."""
    found = []
    for folder in [own, *own.parents]:
        quota = _quota(folder)
        if quota is not None:
            found.append(quota)
        if folder == top:
            break
    return found


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii")
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii")
        allowed = float(quota) / float(period)  # "max" and -1 are none
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return allowed if allowed > 0 else None
