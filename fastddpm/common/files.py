"""Write files whole or not at all; read files without executing anything in them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def atomic_write(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write(temporary)` make a file beside `path`, then rename it to `path`.

    The file at `path` is the old one or the whole new one, never a part, also when `write` fails or the process is
    killed. The temporary name keeps `path`'s suffix, since libraries choose the format by it. Parent folders are
    created.

    Raises:
        OSError: the folder or file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:32]}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's are private; give what open() would have given
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` in UTF-8, atomically."""
    atomic_write(path, lambda temporary: temporary.write_bytes(text.encode()))


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write `content` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file is not a JSON object; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # also text that is not UTF-8, and numbers of too many digits
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, holds a {type(content).__name__}")
    return content


def read_tensors(path: str | os.PathLike[str]) -> Any:
    """Read a safetensors file (by its suffix) or one of torch's: tensors in plain containers, on the CPU.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: it cannot be read, or holds other objects; the message names it.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a broken pickle may end in any
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {reason}") from None


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a file that holds tensors by name and nothing else, as `read_tensors`.

    Raises:
        FileNotFoundError, ValueError: as there, or it holds other things.
    """
    state = read_tensors(path)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} does not hold a dictionary of tensors")
    return state
