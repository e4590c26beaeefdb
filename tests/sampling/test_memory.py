"""What is free, what is taken, and which errors say that memory ran out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fastddpm.sampling import memory
from fastddpm.sampling.memory import Allocated, free_memory, is_out_of_memory

MEMINFO = {"proc/meminfo": "MemTotal:       16000 kB\nMemFree:         100 kB\nMemAvailable:    8000 kB\n"}
V2 = {
    **MEMINFO,
    "proc/self/cgroup": "0::/outer/inner\n",
    "sys/fs/cgroup/outer/memory.max": "5000000\n",
    "sys/fs/cgroup/outer/memory.current": "3000000\n",
    "sys/fs/cgroup/outer/memory.stat": "anon 2000000\ninactive_file 500000\n",
    "sys/fs/cgroup/outer/inner/memory.max": "max\n",
    "sys/fs/cgroup/outer/inner/memory.current": "1000000\n",
}
V1 = {
    **MEMINFO,
    "proc/self/cgroup": "5:cpuset:/\n4:memory:/docker/abc\n0::/\n",
    # In a container the host's group is not mounted, only its own as the root.
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "3900000\n",
    "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 1000\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(MEMINFO, 8000 * 1024, id="what is available"),
        pytest.param(V2, 2_500_000, id="outer control group"),
        pytest.param({**V2, "sys/fs/cgroup/outer/inner/memory.max": "1200000\n"}, 200_000, id="inner group"),
        pytest.param({**V2, "sys/fs/cgroup/outer/inner/memory.max": "900000\n"}, 0, id="over the limit"),
        pytest.param({**V2, "sys/fs/cgroup/outer/memory.max": "max\n"}, 8000 * 1024, id="no limit"),
        pytest.param(V1, 101_000, id="version 1"),
    ],
)
def test_host_memory(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert memory._free_host_memory(tmp_path) == expected


def test_systems_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", values.__getitem__)
    assert memory._free_host_memory(tmp_path) == 4_096_000

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    with pytest.raises(ValueError, match="does not tell its free memory"):
        memory._free_host_memory(tmp_path)


def test_free_memory_of_this_machine() -> None:
    assert 0 < free_memory("cpu") <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(ValueError, match="device is 'meta', must be cuda, mps or cpu"):
        free_memory("meta")


def test_free_memory_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 bytes 30 are free, and the allocator holds 20, 15 of them in use."""
    figures = {"mem_get_info": (30, 100), "memory_reserved": 20, "memory_allocated": 15}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for fraction, expected in ((1.0, 35), (0.25, 10)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, value=fraction: value)
        assert free_memory("cuda") == expected


@pytest.mark.gpu
def test_free_memory_falls_by_what_is_allocated() -> None:
    """Within a share of the device so small that what other processes do there changes nothing."""
    allowed = torch.cuda.get_per_process_memory_fraction()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    try:
        before = free_memory("cuda")
        assert before <= 1.1 * 2**30 + torch.cuda.memory_reserved()
        held = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
        assert before - free_memory("cuda") == held.numel()
        del held
        assert free_memory("cuda") == before  # the allocator holds it, and can give it again
    finally:
        torch.cuda.set_per_process_memory_fraction(allowed)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("not enough values"), False),
        (RuntimeError("CUDA error: an illegal memory access"), False),
        (KeyError("can't allocate memory"), False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_that_say_memory_ran_out(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_the_cpu_allocator_says_what_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)


def test_memory_is_counted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))
    x = torch.randn(2, 3, 8, 8)
    wide = 2 * 16 * 8 * 8 * 4
    with torch.no_grad(), Allocated() as allocated:
        out = model(x)
        out.add_(1)
        part = out[:1]
        assert allocated.live == out.nbytes
    # SiLU's input and result at the same time; views, what is written in place and the weights do not count.
    assert allocated.peak == 2 * wide
    del out, part
    assert allocated.live == 0
