"""Write files whole or not at all; read files without executing anything in them."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import pickle
import pickletools
import re
import socket
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

MOST_PICKLE = 2**26  # bytes of the part of a checkpoint that is no tensor
MOST_TEXT = 2**27  # bytes of a JSON or TOML file
_MARKS = {  # the four bytes of UTF-32's begin with the two of UTF-16's
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
# Temporary files are named by machine and process, so that a later run can tell which are of dead ones.
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_TEMPORARY = re.compile(rf"\..*\.{_HOST}\.(\d+)\.fastddpm-.*", re.DOTALL)
_cleaned: set[Path] = set()  # folders
_STARTED = time.time()


def atomic_write(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write(temporary)` make a file beside `path`, then rename it to `path`.

    The file at `path` is the old one or the whole new one, never a part, also when `write` fails or the process is
    killed. The temporary name keeps `path`'s suffix, since libraries choose the format by it. Parent folders are
    created. Temporary files that killed processes left in the folder are removed.

    Raises:
        OSError: the folder or file cannot be written; it names `path`.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent.resolve())
        prefix = f".{os.fsdecode(os.fsencode(path.stem)[:64])}.{_HOST}.{os.getpid()}.fastddpm-"
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's are private; give what open() would have given
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
        raise OSError(number or errno.EIO, reason, str(path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes of this machine left in a folder, once per process."""
    if folder in _cleaned or os.name != "posix":
        return
    _cleaned.add(folder)
    for entry in folder.glob(f".*.{_HOST}.*.fastddpm-*"):
        match = _TEMPORARY.fullmatch(entry.name)
        if match is None:
            continue
        try:
            os.kill(int(match[1]), 0)
            # Containers give each of their processes the number of the one before.
            dead = int(match[1]) == os.getpid() and entry.stat().st_mtime < _STARTED
        except (ProcessLookupError, OverflowError):
            dead = True
        except OSError:  # a process of another user
            dead = False
        if dead:
            entry.unlink(missing_ok=True)


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


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text in UTF-8, or in UTF-16 or UTF-32 with its mark, as editors and shells of Windows write it.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: it is of another encoding, or too large to be a text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if (size := path.stat().st_size) > MOST_TEXT:
        raise ValueError(f"it has {size / 1e6:.0f} MB, may have at most {MOST_TEXT / 1e6:.0f} MB")
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    return content.decode(encoding)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file is not a JSON object; the message names it.
    """
    try:
        content = json.loads(read_text(path))
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
    with path.open("rb") as file:  # raises what names the file
        begin = file.read(8)
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        if not begin.startswith((b"PK", b"\x80")):  # a zip or a pickle
            raise ValueError(f"it begins with {begin!r}, must be a file that torch saved, or .safetensors")
        _check_pickles(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a broken file may end in any
        reason = str(error).partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):  # torch advises to execute it
            raise ValueError(f"{path} cannot be read: it is damaged, or holds more than tensors and values") from None
        if isinstance(error, OSError):  # torch says only "Invalid argument" of a file that is cut off
            reason = f"it is damaged or cut off ({reason})"
        name = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"{path} cannot be read: {name}{reason}") from None


def _check_pickles(path: Path) -> None:
    """Raise ValueError if reading a file of torch's would take far more memory than the file has.

    A zip may hold compressed records, which torch itself never writes, and a pickle may ask for a `bytearray` of any
    size.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return _check_pickle(file.read(MOST_PICKLE))
    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist())
        if size > path.stat().st_size:
            raise ValueError(f"its records would expand to {size / 1e6:.3g} MB, must be stored without compression")
        if not any(info.filename.endswith("data.pkl") for info in archive.infolist()):
            names = ", ".join(info.filename for info in archive.infolist()[:3])
            raise ValueError(f"it is a zip of {names[:80]}, must be a file that torch saved, or .safetensors")
        for info in archive.infolist():
            if info.filename.endswith(".pkl"):
                if info.file_size > MOST_PICKLE:
                    raise ValueError(f"{info.filename} has {info.file_size / 1e6:.3g} MB, must have less than 64 MB")
                _check_pickle(archive.read(info))


def _check_pickle(content: bytes) -> None:
    try:
        for opcode, value, _ in pickletools.genops(content):
            if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and "bytearray" in str(value):
                raise ValueError("it holds a bytearray, must hold tensors and plain values")
            if isinstance(value, str) and value == "bytearray":
                raise ValueError("it holds a bytearray, must hold tensors and plain values")
    except (IndexError, struct.error, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"its pickle is damaged: {error}") from None


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file of any name; the library itself takes only names in UTF-8."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return load(Path(path).read_bytes())
    return load_file(path)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a file that holds tensors by name and nothing else, as `read_tensors`.

    Raises:
        FileNotFoundError, ValueError: as there, or it holds other things.
    """
    state = read_tensors(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} does not hold a dictionary of tensors, but a {type(state).__name__}")
    check_weights(state, str(path))
    return state


def check_weights(state: Mapping[Any, Any], where: str) -> None:
    """Raise ValueError unless `state` has dense tensors by name, whose numbers are all in memory.

    A file may state a tensor of any size that repeats one number: a copy of it would take all memory.
    """
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{where} has a key {str(name)[:40]!r}, must have names of tensors")
        if not name.isprintable() or len(name) > 400:
            raise ValueError(f"{where} has a key {name[:40]!r}, must have names of tensors")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{where}: {name} is a {type(tensor).__name__}, must be a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError(f"{where}: {name} is sparse, quantized or without values, must be a dense tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{where}: {name} states {list(tensor.shape)}, more numbers than the file holds for it")
