"""How many threads native code uses: quotas of control groups, from files as the kernel writes them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from fastddpm_kernels.native import machine as module
from fastddpm_kernels.native.machine import cpu_quota, threads

V2, V1 = "cgroup2 cgroup2 rw", "cgroup cgroup rw,cpu,cpuacct"


def make_process(folder: Path, groups: str, root: str, kind: str, files: dict[str, str]) -> Path:
    """Write a process's files in /proc, and those of its groups below a mount point with a space in its name."""
    mount = folder / "a mount"
    for name, text in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(text + "\n")
    process = folder / "self"
    process.mkdir()
    (process / "cgroup").write_text(groups + "\n")
    point = str(mount).replace(" ", "\\040")
    lines = ["22 1 0:20 / / rw - ext4 /dev/root rw", f"31 22 0:28 {root} {point} rw,relatime shared:9 - {kind}"]
    (process / "mountinfo").write_text("\n".join(lines) + "\n")
    return process


@pytest.mark.parametrize(
    ("groups", "root", "kind", "files", "expected"),
    [
        ("0::/", "/", V2, {"cpu.max": "250000 100000"}, 2.5),  # a container that sees only its own group
        ("0::/", "/", V2, {"cpu.max": "max 100000"}, None),
        ("0::/", "/", V2, {"cgroup.procs": "1"}, None),  # the root of all has no such file
        ("0::/a/b", "/", V2, {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),  # of the group above
        ("0::/a/b", "/", V2, {"a/cpu.max": "400000 100000", "a/b/cpu.max": "5000 10000"}, 0.5),
        ("4:memory:/x\n1:cpu:/x", "/", V1, {"x/cpu.cfs_quota_us": "250000", "x/cpu.cfs_period_us": "100000"}, 2.5),
        ("1:cpuacct,cpu:/x", "/", V1, {"x/cpu.cfs_quota_us": "-1", "x/cpu.cfs_period_us": "100000"}, None),
        # The mount begins at the container's group, the path at the host's root.
        ("1:cpu:/docker/7", "/docker/7", V1, {"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}, 3.0),
        ("0::/../other", "/", V2, {"cpu.max": "200000 100000"}, 2.0),  # a group outside of what is mounted
        ("1:cpu:/x", "/", V2, {"x/cpu.max": "100000 100000"}, None),  # mounted as the other version
        ("0::/", "/", V2, {"cpu.max": "nonsense"}, None),
    ],
)  # fmt: skip
def test_quotas(
    tmp_path: Path, groups: str, root: str, kind: str, files: dict[str, str], expected: float | None
) -> None:
    assert cpu_quota(make_process(tmp_path, groups, root, kind, files)) == expected


def test_a_process_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


def test_only_a_number_that_nobody_chose_is_held_to_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(module, "_DEFAULT", 6)
    try:
        torch.set_num_threads(6)
        for quota, allowed in ((2.5, 3), (0.2, 1), (64.0, 6), (None, 6)):
            monkeypatch.setattr(module, "cpu_quota", lambda quota=quota: quota)
            module._most.cache_clear()
            assert threads() == allowed
        monkeypatch.setattr(module, "cpu_quota", lambda: 2.5)
        module._most.cache_clear()
        torch.set_num_threads(5)
        assert threads() == 5
        torch.set_num_threads(6)
        monkeypatch.setenv("OMP_NUM_THREADS", "6")
        module._most.cache_clear()
        assert threads() == 6
    finally:
        torch.set_num_threads(before)
        module._most.cache_clear()


def test_this_machine_has_a_sensible_quota() -> None:
    found = cpu_quota()
    assert found is None or (found > 0 and math.isfinite(found))
