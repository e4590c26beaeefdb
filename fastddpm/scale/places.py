"""Write shards to a folder of this machine, or to any path of fsspec.

A file is there whole or not at all. On this machine it is written to a temporary name in `.unfinished/`, synced to the
disk, and renamed; object stores show an object only when all of it was sent.
"""

from __future__ import annotations

import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastddpm.scale.ranks import LOCKS, Rank

UNFINISHED = ".unfinished"


class Place(ABC):
    """A folder that shards are written to. Names in it are relative, with slashes."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of a file; raises FileNotFoundError where there is none."""

    @abstractmethod
    def write(self, files: Mapping[str, bytes]) -> None:
        """Write the files of one shard: one, or several of one sub-folder that the last one says are all there."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> None:
        """Write a file unless one of that name exists; of several processes that try, one succeeds."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file or sub-folder if it exists."""

    @abstractmethod
    def names(self) -> set[str]:
        """Return the names of shards and other entries in the folder and its parts, not the files of a shard."""

    def exists(self, name: str) -> bool:
        """Return whether there is a file of that name."""
        try:
            self.read(name)
        except FileNotFoundError:
            return False
        return True

    @abstractmethod
    def __str__(self) -> str: ...


def open_place(out: str | os.PathLike[str], rank: Rank = Rank()) -> Place:  # noqa: B008  # it is a tuple
    """Return the place that `out` names, a path or a URL that fsspec knows; nothing is made yet.

    Raises:
        ValueError: no such protocol is known.
        ModuleNotFoundError: the library for it is not installed; the message names it.
    """
    text = os.fspath(out)
    if "://" not in text:
        return LocalPlace(Path(text), rank)
    if text.startswith("file://"):
        return LocalPlace(Path(text.removeprefix("file://")), rank)
    return RemotePlace(text)


class LocalPlace(Place):
    """A folder of this machine, or of a file system that all machines share."""

    def __init__(self, folder: Path, rank: Rank) -> None:
        self.folder, self._rank = folder, rank

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def write(self, files: Mapping[str, bytes]) -> None:
        name = next(iter(files))
        if len(files) == 1 and "shard-" not in os.path.dirname(name):
            temporary = self._temporary(name)
            try:
                _write(temporary, files[name])
                self._rename(temporary, name)
            finally:
                temporary.unlink(missing_ok=True)
            return
        shard = os.path.dirname(name)
        temporary = self._temporary(shard)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for each, content in files.items():
                _write(temporary / os.path.basename(each), content)
            _sync(temporary)
            self.remove(shard)
            self._rename(temporary, shard)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def create(self, name: str, content: bytes) -> None:
        temporary = self._temporary(name)
        try:
            _write(temporary, content)
            with suppress(FileExistsError):
                os.link(temporary, self.folder / name)
            _sync(self.folder)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        path = self.folder / name
        if path.is_dir() and not path.is_symlink():
            gone = self._temporary(f"{name}.old")
            shutil.rmtree(gone, ignore_errors=True)
            path.replace(gone)  # at once: a folder must not be seen with some of its files
            shutil.rmtree(gone)
        else:
            path.unlink(missing_ok=True)

    def names(self) -> set[str]:
        found: set[str] = set()
        for entry in _entries(self.folder):
            if entry.is_dir() and re.fullmatch(r"part-\d{5,}", entry.name):
                found |= {f"{entry.name}/{each.name}" for each in _entries(Path(entry.path))}
            else:
                found.add(entry.name)
        return found - {UNFINISHED, LOCKS}

    def tidy(self) -> None:
        """Remove unfinished files of killed processes: this rank's, and those of other worlds.

        The caller holds this rank's lock, and no process of another world works in the folder.
        """
        siblings = re.compile(rf"\d+-of-{self._rank.world}~.*")
        for entry in _entries(self.folder / UNFINISHED):
            if entry.name.startswith(f"{self._rank}~") or siblings.fullmatch(entry.name) is None:
                if entry.is_dir():
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
        self.leave()

    def leave(self) -> None:
        """Remove the folder of unfinished files, if it is empty."""
        with suppress(OSError):
            (self.folder / UNFINISHED).rmdir()

    def _temporary(self, name: str) -> Path:
        folder = self.folder / UNFINISHED
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self._rank}~{os.getpid()}~{name.replace('/', '~')}"

    def _rename(self, temporary: Path, name: str) -> None:
        target = self.folder / name
        if not target.parent.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _sync(self.folder)
        temporary.replace(target)
        _sync(target.parent)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _write(path: Path, content: bytes) -> None:
    while True:
        try:
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            return
        except FileNotFoundError:  # another rank that ended removed the empty folder
            path.parent.mkdir(parents=True, exist_ok=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RemotePlace(Place):
    """A folder of any file system that fsspec knows, such as s3://bucket/samples."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._url = url.rstrip("/")
        protocol = url.partition("://")[0]
        try:
            self._files: Any
            self._files, self._root = fsspec.core.url_to_fs(self._url)
        except ImportError as error:
            raise ModuleNotFoundError(f"output {url} needs a library for {protocol}://: {error}") from None
        except ValueError as error:
            raise ValueError(f"output is {url}, must be a path or a URL of fsspec: {error}") from None
        self._root = self._root.rstrip("/")

    def __str__(self) -> str:
        return self._url

    def read(self, name: str) -> bytes:
        return self._files.cat_file(self._path(name))

    def exists(self, name: str) -> bool:
        self._files.invalidate_cache()
        return self._files.exists(self._path(name))

    def write(self, files: Mapping[str, bytes]) -> None:
        for name, content in files.items():  # in this order: the last says that all are there
            path = self._path(name)
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(path, content)

    def create(self, name: str, content: bytes) -> None:
        if not self.exists(name):  # whoever comes second writes the same
            self.write({name: content})

    def remove(self, name: str) -> None:
        path = self._path(name)
        if self._files.exists(path):
            self._files.rm(path, recursive=True)

    def names(self) -> set[str]:
        self._files.invalidate_cache()
        found: set[str] = set()
        for path in self._list(self._root):
            name = path.rpartition("/")[2]
            if re.fullmatch(r"part-\d{5,}", name):
                found |= {f"{name}/{each.rpartition('/')[2]}" for each in self._list(path)}
            else:
                found.add(name)
        return found

    def _list(self, path: str) -> list[str]:
        try:
            return [entry.rstrip("/") for entry in self._files.ls(path, detail=False)]
        except FileNotFoundError:
            return []

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"
