"""Read tables of measured choices, written by `fastddpm tune`, in which ops look up how to run a shape.

A choice changes the speed of an op, and its result only by rounding: other tiles or splits sum in another order, and
the vendor's matrix product rounds after each source. Heuristics choose for a shape without an entry.

A device has two tables: `tuned_tables/<device>.json` of this package, and `tuned/<device>.json` in the user's cache
(`cache_folder`), which takes precedence. The header of a table records the software and hardware of the measurement.
If these have changed, the table is ignored and one log message says so. `FASTDDPM_TUNED=0` ignores all tables. Files
are read at the first look-up, and again after `forget`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastddpm_kernels.native.build import BuildError, cache_folder, library_name

# The ops that have choices, and the folder whose `tuning.py` describes them.
FOLDERS = {
    "group_norm_silu": "group_norm_silu",
    "group_norm_silu_": "group_norm_silu",
    "group_norm_silu_backward": "group_norm_silu",
    "rms_norm_silu": "group_norm_silu",
    "rms_norm_silu_backward": "group_norm_silu",
    "pointwise_conv": "pointwise_conv",
    "upsample_conv": "conv",
    "fused_conv": "conv",
    "attention_block": "attention_block",
    "layer_norm_linear": "layer_norm_linear",
    "reverse_step": "reverse_step",
    "q_sample": "q_sample",
    "residual_add": "residual_add",
    "conv": "conv",
}
OPS = tuple(FOLDERS)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCHEMA = "fastddpm.tuned/1"
PACKAGE = Path(__file__).with_name("tuned_tables")
# The fields of a header that must not have changed. The others record the origin of the table.
_MUST_BE = ("schema", "device", "triton", "driver", "cuda", "kernels", "native")

log = logging.getLogger("fastddpm.kernels")

Choice = Mapping[str, Any]


class Tunable(NamedTuple):
    """The tuning description of an op, from its `tuning.py`.

    Attributes:
        fields: the names of a shape's integers.
        alternatives: the parameters that a choice may have, each with its values. The op derives everything else, so
            any of these values gives a correct result.
        task: the `fastddpm_kernels.tuning.Task` that tries choices.
        kernels: the module of the folder whose `tuned_variants` are the kernels of a choice; None if nothing is
            compiled.
    """

    fields: tuple[str, ...]
    alternatives: tuple[Mapping[str, Sequence[Any]], ...]
    task: Callable[..., Any]
    kernels: str | None = "triton"


@functools.cache
def tunable(op: str) -> Tunable:
    """Return the description of one of `OPS`."""
    found: Tunable = importlib.import_module(f"fastddpm_kernels.{FOLDERS[op]}.tuning").OPS[op]
    return found


class Key(NamedTuple):
    """The case that a choice is for. `shape` has the fields of `op`."""

    op: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def named(self) -> dict[str, int]:
        """Return the shape by name."""
        return dict(zip(tunable(self.op).fields, self.shape, strict=True))


@dataclass(frozen=True)
class Table:
    """A table file.

    Attributes:
        path: of the file.
        ignored: why it is not used, or None.
        header: all but the entries.
        entries: a choice for each key, or None if the heuristic choice is the best.
        records: the entries as they were written.
    """

    path: Path
    ignored: str | None
    header: dict[str, Any]
    entries: dict[Key, Choice | None]
    records: dict[Key, dict[str, Any]]


_loaded: dict[torch.device, dict[Key, Choice | None]] = {}
_recorders: list[dict[Key, int]] = []


def choice(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> Choice | None:
    """Return the best measured choice for a shape on a device; None if heuristics choose.

    Args:
        op: one of `OPS`.
        device: where it runs. On meta, nothing is tuned.
        dtype: of the input.
        shape: the `tunable(op).fields`.
    """
    key = Key(op, dtype, shape)
    for seen in _recorders:
        seen[key] = seen.get(key, 0) + 1
    table = _loaded.get(device)
    if table is None:
        table = _loaded[device] = _load(device)
    return table.get(key) if table else None


@contextlib.contextmanager
def recording() -> Iterator[dict[Key, int]]:
    """Count the look-ups of every key within the `with` block, in any thread."""
    seen: dict[Key, int] = {}
    _recorders.append(seen)
    try:
        yield seen
    finally:
        _recorders[:] = [other for other in _recorders if other is not seen]


@contextlib.contextmanager
def using(device: torch.device, choices: Mapping[Key, Choice | None]) -> Iterator[None]:
    """Replace the tables of a device by `choices` within the `with` block, in any thread."""
    before = _loaded.get(device)
    _loaded[device] = dict(choices)
    try:
        yield
    finally:
        _loaded.pop(device, None)
        if before is not None:
            _loaded[device] = before


def known(device: torch.device) -> set[Key]:
    """Return the keys with an entry, including those for which the heuristic choice is best."""
    return set(_load(device))


def forget() -> None:
    """Read the files again at the next look-up."""
    _loaded.clear()


def user_path(device: torch.device) -> Path:
    """Return the path of the user's own table for a device.

    Raises:
        RuntimeError: there is no home folder to keep it in.
    """
    return cache_folder() / "tuned" / f"{slug(device_name(device))}.json"


def package_path(device: torch.device) -> Path:
    """Return the path of the package's table for a device."""
    return PACKAGE / f"{slug(device_name(device))}.json"


def tables(device: torch.device) -> list[Table]:
    """Return the existing tables for a device, the package's first."""
    paths = [package_path(device)]
    with contextlib.suppress(RuntimeError):
        paths.append(user_path(device))
    return [read(path, device) for path in paths if path.is_file()]


def describe(device: torch.device) -> list[str]:
    """Return one line about every table for a device, used or not."""
    if not _enabled():
        return ["tuned tables are ignored: FASTDDPM_TUNED is 0"]
    lines = []
    for table in tables(device):
        better = sum(choice is not None for choice in table.entries.values())
        what = f"{len(table.entries)} shapes, {better} with a choice of their own ({table.header.get('created')})"
        lines.append(f"{table.path}: " + (what if table.ignored is None else f"ignored, {table.ignored}"))
    return lines


def read(path: Path, device: torch.device | None) -> Table:
    """Return the table at `path`, of any device if `device` is None.

    A file that cannot be read is an ignored table without entries.
    """
    header: dict[str, Any] = {}
    records: dict[Key, dict[str, Any]] = {}
    entries: dict[Key, Choice | None] = {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"it is no table of schema {SCHEMA}")
        header = {name: value for name, value in content.items() if name != "entries"}
        for record in content["entries"]:
            key, found = entry(record)
            entries[key], records[key] = found, record
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        return Table(path, f"it cannot be used: {type(error).__name__}: {reason}", header, {}, {})
    return Table(path, None if device is None else _stale(header, device), header, entries, records)


def record(key: Key, found: Choice | None, **measured: Any) -> dict[str, Any]:
    """Return an entry of a table, as it is written."""
    dtype = next(name for name, dtype in DTYPES.items() if dtype == key.dtype)
    return {"op": key.op, "dtype": dtype, "shape": key.named(), "choice": found, **measured}


def header(device: torch.device) -> dict[str, Any]:
    """Return the header of a table, without the time: the software and hardware that it is valid for."""
    now: dict[str, Any] = {"schema": SCHEMA, "device": device_name(device), "torch": torch.__version__}
    if device.type == "cuda":
        now |= {"triton": _version("triton"), "driver": _driver(), "cuda": torch.version.cuda or torch.version.hip}
        return now | {"kernels": _kernels(), "target": target(device)}
    return now | {"native": _native()}


def target(device: torch.device) -> str:
    """Return the target of kernels on a GPU: "sm_90", "gfx942"."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def packaged(op: str) -> list[tuple[str, Key, Choice]]:
    """Return (target, key, choice) for every entry of an op in the package's tables that fit its kernels."""
    found = []
    for path in sorted(PACKAGE.glob("*.json")):
        table = read(path, None)
        if table.ignored is None and table.header.get("kernels") == _kernels():
            about = str(table.header["target"])
            found += [(about, key, best) for key, best in table.entries.items() if key.op == op and best is not None]
    return found


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's after the device's type."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return f"{device.type} {processor}"


def slug(name: str) -> str:
    """Return a device's name as a file name: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def _enabled() -> bool:
    return os.environ.get("FASTDDPM_TUNED", "1").lower() not in ("0", "false", "off")


def _load(device: torch.device) -> dict[Key, Choice | None]:
    if device.type not in ("cuda", "cpu") or not _enabled():
        return {}
    found: dict[Key, Choice | None] = {}
    for table in tables(device):
        if table.ignored is None:
            found |= table.entries
        else:
            log.warning("the tuned table %s is ignored: %s", table.path, table.ignored)
    return found


def entry(record: Mapping[str, Any]) -> tuple[Key, Choice | None]:
    """Return the key and choice of an entry as `record` writes it.

    Raises:
        ValueError, KeyError, TypeError: it is not an entry.
    """
    op, dtype = record["op"], record["dtype"]
    if op not in OPS or dtype not in DTYPES:
        raise ValueError(f"an entry is of {op!r}, {dtype!r}")
    shape = record["shape"]
    if set(shape) != set(tunable(op).fields) or not all(type(value) is int and value >= 0 for value in shape.values()):
        raise ValueError(f"an entry of {op} has the shape {shape}")
    key = Key(op, DTYPES[dtype], tuple(shape[name] for name in tunable(op).fields))
    found = record["choice"]
    if found is not None and not any(
        set(found) == set(allowed) and all(type(found[n]) in (int, bool, str) and found[n] in allowed[n] for n in found)
        for allowed in tunable(op).alternatives
    ):
        raise ValueError(f"an entry of {op} has the choice {found}")
    return key, found


def _stale(before: Mapping[str, Any], device: torch.device) -> str | None:
    now = header(device)
    for name in _MUST_BE:
        if before.get(name) != now.get(name):
            if name in ("kernels", "native"):
                return "it was measured with other kernels"
            return f"it was measured with {name} {before.get(name)}, this is {now.get(name)}"
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.lru_cache(maxsize=1)
def _kernels() -> str:
    """Return a digest of the sources that choose and run Triton kernels."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted([*root.glob("*/triton*.py"), *root.glob("device/*.py"), *root.glob("*/plan.py")]):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


@functools.lru_cache(maxsize=1)
def _driver() -> str | None:
    """Return the version of the GPU's driver, by its module, else the version of CUDA that it supports."""
    versions = (("/proc/driver/nvidia/version", r"\s(\d+\.\d+[.\d]*)\s"), ("/sys/module/amdgpu/version", r"(\S+)"))
    for path, pattern in versions:
        try:
            if match := re.search(pattern, Path(path).read_text(encoding="utf-8", errors="replace")):
                return match[1]
        except OSError:
            continue
    read = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if read is None else str(read())


def _native() -> str | None:
    """Return the name of the native library, which differs from build to build."""
    try:
        return library_name()
    except BuildError:
        return None
