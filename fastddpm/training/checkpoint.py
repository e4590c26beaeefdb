"""Write checkpoints as folders, whole or not at all, and check them before use.

    checkpoints/step-0001000/
        diffusion.safetensors     the weights, and the history of importance-sampled timesteps
        ema-0.safetensors, ...    the averages
        training.pt               optimizer, learning rate, gradient scaler, random states (tensors and plain values)
        state.json                step, metrics, best so far
        manifest.json             size and SHA-256 of the others

A folder is written under a temporary name, flushed to the disk, and renamed. A broken checkpoint (such as one truncated
by a disk failure) is skipped with a warning, and the previous one is used. Nothing in a checkpoint is executed:
`training.pt` is read by `common.files.read_tensors`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastddpm.common.files import read_json, read_tensors, read_weights, sha256
from fastddpm.common.text import printable

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d+)")
MANIFEST, STATE, TRAINING = "manifest.json", "state.json", "training.pt"


def atomic_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write(temporary)` fill a folder beside `path`, flush it to the disk and rename it to `path`.

    An existing folder at `path` is replaced. The folder at `path` is always the old one or the whole new one. Only if
    the process dies between two renames is it missing; the old one is then beside it as `.NAME-old`. If `write` fails,
    the temporary folder is removed.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        write(temporary)
        for place, _, files in os.walk(temporary):
            for name in files:
                _flush(os.path.join(place, name))
            _flush(place)
        old = path.parent / f".{path.name}-old"
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)  # also that of a process that died
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove the remains of a killed `atomic_folder`, and restore the names of old folders.

    `names`: a regular expression for the names of the folders.
    """
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(rf"\.({names})-(\w+)", entry.name)
        if match is None or not entry.is_dir():
            continue
        if match[2] == "old" and not (folder / match[1]).exists():
            entry.rename(folder / match[1])  # killed between two renames
        else:
            shutil.rmtree(entry, ignore_errors=True)


def _flush(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot flush folders
            raise
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        weights: of `diffusion.safetensors` and so on: by name, flat dictionaries of tensors.
        training: nested dictionaries and lists of tensors and plain values.
        state: plain values, for JSON.
    """

    weights: dict[str, dict[str, Tensor]]
    training: dict[str, Any]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        folder: made when the first is saved.
        keep_last: the number of latest checkpoints to keep.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep_last: int = 3) -> None:
        self.folder, self.keep_last = Path(folder), keep_last

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step is."""
        return self.folder / f"step-{step:07d}"

    def steps(self) -> list[int]:
        """Return the steps that have a folder, rising, complete or not."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, checkpoint: Checkpoint, *, keep: Collection[int] = ()) -> Path:
        """Write a checkpoint, then remove those that are neither among the last nor in `keep`.

        Raises:
            OSError: it cannot be written, for example on a full disk. The existing ones are unchanged.
        """

        def write(folder: Path) -> None:
            for name, tensors in checkpoint.weights.items():
                # safetensors cannot store tied weights, two names of one tensor, so they are copied.
                flat = {
                    key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                    for key, tensor in tensors.items()
                }
                _no_error_but_oserror(save_file, flat, folder / f"{name}.safetensors")
            _no_error_but_oserror(torch.save, checkpoint.training, folder / TRAINING)
            (folder / STATE).write_text(json.dumps(checkpoint.state, indent=1) + "\n", encoding="utf-8")
            files = {entry.name: _fingerprint(entry) for entry in sorted(folder.iterdir())}
            (folder / MANIFEST).write_text(
                json.dumps({"step": step, "files": files}, indent=1) + "\n", encoding="utf-8"
            )

        path = self.path(step)
        atomic_folder(path, write)
        self._prune({step, *keep})
        return path

    def _prune(self, keep: Collection[int]) -> None:
        whole = self.steps()
        for step in set(whole[: -self.keep_last]) - set(keep):
            # Rename it first, so that a partial folder cannot pass for a checkpoint.
            away = self.folder / f".step-{step:07d}-removed"
            try:
                self.path(step).rename(away)
            except OSError:
                continue
            shutil.rmtree(away, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Remove the temporary and half-removed folders of a killed process."""
        remove_leftovers(self.folder, r"step-\d+")

    def problem(self, step: int) -> str | None:
        """Return the problem of a checkpoint in one line; None if it is complete."""
        folder = self.path(step)
        try:
            files = read_json(folder / MANIFEST).get("files")
            if not isinstance(files, dict) or not all(isinstance(file, dict) for file in files.values()):
                return f"{MANIFEST} names no files with their sizes and checksums"
            for name, expected in files.items():
                path = folder / name
                if not path.is_file():
                    return f"{printable(name)} is missing"
                if path.stat().st_size != expected.get("size"):
                    return f"{name} has {path.stat().st_size} bytes, should have {expected.get('size')}"
                if _fingerprint(path) != expected:
                    return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{MANIFEST} is missing"
        except (OSError, ValueError) as error:
            return f"{MANIFEST} cannot be read: {error}"
        return None

    def latest(self) -> int | None:
        """Return the last step with a complete checkpoint, None if there is none; warn of broken ones."""
        for step in reversed(self.steps()):
            problem = self.problem(step)
            if problem is None:
                return step
            _log.warning("%s is left out: %s", self.path(step), problem)
        return None

    def load(self, step: int) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not complete.
        """
        folder = self.path(step)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing")
        if problem := self.problem(step):
            raise ValueError(f"{folder} cannot be read: {problem}")
        weights = {path.stem: read_weights(path) for path in sorted(folder.glob("*.safetensors"))}
        return Checkpoint(weights, read_tensors(folder / TRAINING), read_json(folder / STATE))


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _no_error_but_oserror(write: Callable[[Any, Path], None], content: Any, path: Path) -> None:
    """Call `write(content, path)`; turn safetensors' and torch's own errors for a full disk into OSError."""
    try:
        write(content, path)
    except OSError:
        raise
    except Exception as error:
        free = shutil.disk_usage(path.parent).free
        reason = str(error).partition("\n")[0]
        raise OSError(f"{path.name} cannot be written ({free / 1e6:.0f} MB are free): {reason}") from error
