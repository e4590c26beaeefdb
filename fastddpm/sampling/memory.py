"""Device memory: how much is free, how much a loop takes, and which errors mean that it ran out."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Messages of allocators in errors that are not `torch.OutOfMemoryError`.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OUT_OF_MEMORY)


def not_even_one(error: BaseException) -> torch.OutOfMemoryError:
    """Return the error to raise where memory ran out with one sample."""
    first_line = str(error).split("\n", 1)[0] or type(error).__name__
    return torch.OutOfMemoryError(f"not enough memory for a single sample at a time: {first_line}")


def release_memory() -> None:
    """Give back the unused memory that torch's allocators hold.

    Call it after an error has been handled, not during: its traceback holds the tensors of every frame.
    """
    gc.collect()  # frees frames and tensors in reference cycles
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


class Allocated(TorchDispatchMode):
    """Counts the memory of the tensors that operations return while it is entered, on any device.

    It misses memory that a kernel allocates for itself.

    Attributes:
        live, peak: bytes held now, and the most held at a time.
    """

    def __new__(cls) -> Allocated:
        """Return one that torch's compiler leaves alone, if that is loaded."""
        return super().__new__(_AmongCompiled if "torch._dynamo" in sys.modules else cls)

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True imports the compiler, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # else a view, or in place
                given.add(storage._cdata)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes()).atexit = False
        return out

    def _count(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


class _AmongCompiled(Allocated):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def free_memory(device: torch.device | str) -> int:
    """Return the bytes that can still be allocated on `device`.

    CUDA: the driver's free memory plus the unused memory of torch's allocator, within the fraction of the device that
    the process may use. CPU: the memory available without swapping, within the limits of the control groups.

    Raises:
        ValueError: the free memory of a device of this type is not known.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return max(0, min(free, allowed - reserved) + reserved - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    if device.type == "cpu":
        return _free_host_memory(Path("/"))
    raise ValueError(f"device is '{device}', must be cuda, mps or cpu for its free memory to be known")


def _free_host_memory(root: Path) -> int:
    """Return the bytes that the system can still give; `root` is where its file systems are mounted."""
    known = [value for value in (_meminfo(root), _cgroup(root)) if value is not None]
    if known:
        return min(known)
    pages = _sysconf("SC_AVPHYS_PAGES") or _sysconf("SC_PHYS_PAGES")
    size = _sysconf("SC_PAGE_SIZE")
    if pages is None or size is None:
        raise ValueError("device is 'cpu', and this system does not tell its free memory")
    return pages * size


def _sysconf(name: str) -> int | None:
    try:
        value = os.sysconf(name)
    except (AttributeError, ValueError, OSError):
        return None
    return value if value > 0 else None


def _meminfo(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup(root: Path) -> int | None:
    """Return the least memory left in this process's control groups, of version 2 or 1; None without a limit."""
    groups = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines() if line.count(":") >= 2]
    left = []
    for _, controllers, path in groups:
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's, and only its root is mounted.
        group = mount / path.strip("/")
        while True:
            if (free := _left_in(group, *names)) is not None:
                left.append(free)
            if group == mount:
                break
            group = group.parent
    return min(left) if left else None


def _left_in(group: Path, limit_name: str, usage_name: str, reclaimable: str) -> int | None:
    limit, usage = _read(group / limit_name).strip(), _read(group / usage_name).strip()
    if not limit.isdecimal() or not usage.isdecimal():  # "max", or no such group
        return None
    stat = dict(line.split(" ", 1) for line in _read(group / "memory.stat").splitlines() if " " in line)
    cached = int(stat.get(reclaimable, 0))  # file pages that the system drops when memory is needed
    return max(0, int(limit) - int(usage) + cached)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
