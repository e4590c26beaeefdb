"""How many samples go at once: with cost models in place of devices, so that nothing here depends on time."""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastddpm.sampling import chunking
from fastddpm.sampling.chunking import choose_chunk, chunks, even_chunk, free_memory, is_out_of_memory, run_halving

CPU_ERROR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


class Device:
    """Seconds per step are a launch, plus so much per sample, more past a cache; memory ends at a size."""

    def __init__(self, *, launch: float = 1e-3, each: float = 1e-5, cache: int = 10**9, memory: int = 10**9) -> None:
        self.launch, self.each, self.cache, self.memory = launch, each, cache, memory
        self.tried: list[int] = []
        self.now = 0.0

    def __call__(self, n: int) -> float:
        self.tried.append(n)
        if n > self.memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory. {n}")
        seconds = self.launch + n * self.each * (1 if n <= self.cache else 2)
        self.now += 10 * seconds
        return seconds

    def clock(self) -> float:
        return self.now


def choose(device: Device, count: int, **options: float) -> chunking.ChunkChoice:
    arguments = {"budget_s": 1e9, **options}
    return choose_chunk(count, run=device, clock=device.clock, **arguments)  # type: ignore[arg-type]


def test_stops_where_the_cache_ends() -> None:
    device = Device(cache=128)
    choice = choose(device, 1024)
    assert choice.chunk == 128
    assert device.tried == [16, 32, 64, 128, 256]
    assert list(choice.seconds_per_step) == device.tried
    assert choice.seconds_per_step[256] == pytest.approx(1e-3 + 256 * 2e-5)
    assert "256 is slower per sample" in choice.reason


def test_stops_where_memory_ends() -> None:
    device = Device(launch=10, memory=1023)
    choice = choose(device, 10_000)
    assert choice.chunk == 500  # 20 passes of 500, not 19 of 512 and one of 272
    assert device.tried[-1] == 1024
    assert 1024 not in choice.seconds_per_step
    assert "1024 ran out of memory" in choice.reason
    assert "evened out to 500" in choice.reason


def test_does_not_grow_for_little() -> None:
    """Time in proportion to samples but for a launch that is soon nothing: as few samples as are nearly as fast."""
    device = Device(launch=1e-3, each=1e-3)
    choice = choose(device, 4096)
    # 32 samples bring 3.03 % more than 16, 64 bring 1.5 %, and 128 only 2.3 % over those of 32.
    assert choice.chunk == 32
    assert device.tried == [16, 32, 64, 128]
    assert "128 is hardly faster" in choice.reason


def test_looks_past_one_size_that_brings_little() -> None:
    seconds = {16: 1.0, 32: 1.98, 64: 2.0, 128: 2.5, 256: 9.0}
    choice = choose_chunk(256, run=seconds.__getitem__, budget_s=1e9)
    assert choice.chunk == 128
    assert choice.seconds_per_step == seconds


def test_all_at_once_where_that_is_best() -> None:
    device = Device(launch=10)
    choice = choose(device, 300)
    assert device.tried == [16, 32, 64, 128, 256, 300]
    assert choice.chunk == 300
    assert "300 is the most there may be" in choice.reason


def test_evens_out() -> None:
    assert choose(Device(launch=10, cache=256, each=1), 300).chunk == 150


def test_limit() -> None:
    device = Device(launch=10)
    assert choose(device, 300, max_chunk=100).chunk == 100
    assert device.tried == [16, 32, 64, 100]


def test_few_are_not_measured() -> None:
    device = Device()
    assert choose(device, 16).chunk == 16
    assert choose(device, 500, max_chunk=3).chunk == 3
    assert device.tried == []


def test_halves_when_not_even_the_first_fits() -> None:
    device = Device(memory=5)
    choice = choose(device, 100)
    assert device.tried == [16, 8, 4]
    assert choice.chunk == 4
    assert "8 ran out of memory" in choice.reason


def test_says_when_nothing_fits() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="for a single sample at a time: CUDA out of memory. 1"):
        choose(Device(memory=0), 100)


def test_budget() -> None:
    device = Device(launch=0.1, each=0)
    # A size takes 1 s and might take twice as long as the one before: 1, then 1 + 2, 2 + 2, then 3 + 2 > 4.9.
    choice = choose(device, 1000, budget_s=4.9)
    assert device.tried == [16, 32, 64]
    assert choice.chunk == even_chunk(1000, 64)
    assert "128 would not have been measured within 4.9 s" in choice.reason
    device = Device(launch=0.1, each=0)
    choose(device, 1000, budget_s=1e-3)
    assert device.tried == [16]


def test_other_errors_pass_through_choice() -> None:
    def broken(n: int) -> float:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        choose_chunk(100, run=broken, budget_s=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"max_chunk": 0}, "max_chunk is 0"),
        ({"budget_s": 0}, "budget_s is 0, must be a positive number"),
        ({"budget_s": float("nan")}, "budget_s is nan"),
        ({"candidates": (4, 2)}, r"candidates is \[4, 2\], must be rising"),
        ({"candidates": ()}, r"candidates is \[\], must be rising"),
        ({"candidates": (0, 2)}, "every size of candidates is 0"),
        ({"run": lambda n: 0.0}, r"run\(16\) returned 0.0, must be a positive number"),
        ({"run": lambda n: float("nan")}, r"run\(16\) returned nan"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_chunk(**{"count": 100, "run": Device(), "budget_s": 1.0, **arguments})


@given(st.integers(0, 500), st.integers(1, 64))
def test_chunks_are_the_range(count: int, chunk: int) -> None:
    parts = chunks(count, chunk)
    assert [i for rows in parts for i in range(rows.start, rows.stop)] == list(range(count))
    assert all(rows.stop - rows.start == chunk for rows in parts[:-1])


@given(st.integers(1, 100_000), st.integers(1, 5000))
def test_even_chunks_are_as_few_and_almost_equal(count: int, most: int) -> None:
    chunk = even_chunk(count, most)
    assert 1 <= chunk <= most
    passes = -(-count // chunk)
    assert passes == -(-count // most)
    assert (passes - 1) * chunk < count
    assert chunk - 1 < count / passes <= chunk  # no smaller one is enough


# -- halving ----------------------------------------------------------------------------------------------------------


def out_of_memory(error: BaseException, most: int, done: list[int], tried: list[int]) -> Callable[[slice], None]:
    def work(rows: slice) -> None:
        size = rows.stop - rows.start
        tried.append(size)
        if size > most:
            raise error
        done.extend(range(rows.start, rows.stop))

    return work


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(CPU_ERROR),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:30],
)
def test_halves_and_goes_on(error: BaseException) -> None:
    done: list[int] = []
    tried: list[int] = []
    halved: list[tuple[int, int]] = []
    chunk = run_halving(20, 16, out_of_memory(error, 5, done, tried), lambda *sizes: halved.append(sizes))
    assert done == list(range(20))
    assert tried == [16, 8, 4, 4, 4, 4, 4]
    assert halved == [(16, 8), (8, 4)]
    assert chunk == 4


def test_keeps_what_was_done() -> None:
    """Memory that ends half way: the slices before are not done again."""
    done: list[int] = []

    def work(rows: slice) -> None:
        if rows.start >= 8 and rows.stop - rows.start > 1:
            raise MemoryError
        done.extend(range(rows.start, rows.stop))

    assert run_halving(11, 4, work) == 1
    assert done == list(range(11))


def test_halves_what_was_tried_and_not_the_limit() -> None:
    tried: list[int] = []
    assert run_halving(3, 64, out_of_memory(MemoryError(), 1, [], tried)) == 1
    assert tried == [3, 2, 1, 1, 1]


def test_gives_up_at_one_sample() -> None:
    tried: list[int] = []
    with pytest.raises(torch.OutOfMemoryError, match="not enough memory for a single sample at a time: .enforce fail"):
        run_halving(4, 4, out_of_memory(RuntimeError(CPU_ERROR), 0, [], tried))
    assert tried == [4, 2, 1]


def test_passes_other_errors_on() -> None:
    tried: list[int] = []
    with pytest.raises(RuntimeError, match="CUDA error: an illegal memory access"):
        run_halving(4, 4, out_of_memory(RuntimeError("CUDA error: an illegal memory access"), 0, [], tried))
    with pytest.raises(KeyError):
        run_halving(4, 4, out_of_memory(KeyError("can't allocate memory"), 0, [], tried))
    assert tried == [4, 4]


def test_nothing_to_do() -> None:
    assert run_halving(0, 4, out_of_memory(MemoryError(), 0, [], [])) == 4
    with pytest.raises(ValueError, match="chunk is 0"):
        run_halving(1, 0, lambda rows: None)


def test_logs_by_default(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fastddpm"):
        run_halving(4, 4, out_of_memory(MemoryError(), 2, [], []))
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 4 samples at once; going on with 2"
    ]


def test_memory_of_the_failed_pass_is_free_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error's traceback holds the frame, which holds tensors: they must be gone when the cache is emptied."""
    alive: list[weakref.ref] = []
    seen: list[bool] = []

    def work(rows: slice) -> None:
        big = torch.empty(1)
        if rows.stop - rows.start > 2:
            alive.append(weakref.ref(big))
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(chunking, "release_memory", lambda: seen.append(alive[-1]() is None))
    gc.disable()  # so that it is the reference count that frees
    try:
        run_halving(8, 8, work)
    finally:
        gc.enable()
    assert seen == [True, True]


def test_the_cpu_allocator_says_what_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("not enough values"))


# -- free memory ------------------------------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


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


def test_host_memory_is_what_is_available(tmp_path: Path) -> None:
    assert chunking._free_host_memory(write(tmp_path, MEMINFO)) == 8000 * 1024


def test_control_groups_limit_it(tmp_path: Path) -> None:
    assert chunking._free_host_memory(write(tmp_path, V2)) == 2_500_000
    inner = {"sys/fs/cgroup/outer/inner/memory.max": "1200000\n"}
    assert chunking._free_host_memory(write(tmp_path, inner)) == 200_000
    over = {"sys/fs/cgroup/outer/inner/memory.max": "900000\n"}
    assert chunking._free_host_memory(write(tmp_path, over)) == 0


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    files = {
        **MEMINFO,
        "proc/self/cgroup": "5:cpuset:/\n4:memory:/docker/abc\n0::/\n",
        # Inside a container the group of the host is not mounted, only its own as the root.
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "3900000\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 1000\n",
    }
    assert chunking._free_host_memory(write(tmp_path, files)) == 101_000


def test_a_group_without_limit_is_none(tmp_path: Path) -> None:
    files = {**V2, "sys/fs/cgroup/outer/memory.max": "max\n"}
    assert chunking._free_host_memory(write(tmp_path, files)) == 8000 * 1024


def test_systems_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", values.__getitem__)
    assert chunking._free_host_memory(tmp_path) == 4_096_000

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    with pytest.raises(ValueError, match="does not tell its free memory"):
        chunking._free_host_memory(tmp_path)


def test_free_memory_of_this_machine() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory("cpu") <= total
    with pytest.raises(ValueError, match="device is 'meta', must be cuda, mps or cpu"):
        free_memory("meta")


def test_free_memory_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 bytes 30 are free, and the allocator holds 20 of which 15 are in use."""
    figures = {"mem_get_info": (30, 100), "memory_reserved": 20, "memory_allocated": 15}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    assert free_memory("cuda") == 35
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.25)
    assert free_memory("cuda") == 10


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
