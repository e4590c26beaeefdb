"""List folders of pictures: their files, their classes, and the skipped files."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fastddpm.common.images.pictures import Look, look, open_picture, suffixes
from fastddpm.common.text import printable


@dataclass(frozen=True)
class Listing:
    """The picture files of a folder, sorted, and their classes.

    Attributes:
        root: the folder.
        paths: relative to it.
        labels: of each path, its place in `classes`; empty without classes.
        classes: names of the subfolders of `root` that hold pictures, in natural order ("2" before "10"); empty if
            pictures lie in `root` itself, unless these are few: one for more than two classes, or for 20 pictures.
        passed_over: other files, relative to `root`: of no picture's suffix, or few pictures beside class folders.
        fingerprint: changes when a picture is added, removed or written.
        remark: what was decided about pictures in `root` beside subfolders; None if there was nothing to decide.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    passed_over: tuple[str, ...]
    fingerprint: str
    remark: str | None = None

    def notes(self, broken: Sequence[str] = ()) -> list[str]:
        """Return what a reader should know about files that are not read; `broken`: those that cannot be."""
        notes = [] if self.remark is None else [self.remark]
        parts = []
        if self.passed_over:
            kinds = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in self.passed_over)
            told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
            parts.append(f"{len(self.passed_over)} files are passed over ({told})")
        if broken:
            parts.append(f"{len(broken)} files cannot be read and are left out: {few(broken)}")
        return [*notes, f"{self.root}: {'; '.join(parts)}"] if parts else notes


def list_pictures(folder: str | os.PathLike[str], *, classed: bool = True) -> Listing:
    """Find the pictures below a folder by their suffixes and, if they may be `classed`, the classes of subfolders.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no picture, or is the results folder of a `Trainer`.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    if (root / "config.toml").is_file() and (root / "checkpoints").is_dir():
        raise ValueError(f"{root} is a training run, whose pictures are sheets of samples; name the pictures")
    known = suffixes()
    files = sorted(str(path.relative_to(root)) for path in _files(root))
    found = [path for path in files if os.path.splitext(path)[1].lower() in known]
    if not found:
        raise ValueError(f"{root} holds no picture, must hold files such as .png or .jpg, also in subfolders")
    paths, remark = _without_strays(root, found) if classed else (found, None)
    names = {_class(path) for path in paths}
    classes = sorted(names, key=_natural) if classed and "" not in names else []
    place_of = {name: place for place, name in enumerate(classes)}
    digest = hashlib.sha256()
    for path in paths:
        stat = os.stat(root / path) if os.path.exists(root / path) else None  # reading finds a dangling link
        digest.update(os.fsencode(path))  # names need not be UTF-8
        digest.update(f"\0{stat.st_size if stat else -1}\0{stat.st_mtime_ns if stat else -1}\n".encode())
    read = set(paths)
    return Listing(
        root,
        tuple(paths),
        tuple(place_of[_class(path)] for path in paths) if classes else (),
        tuple(classes),
        tuple(path for path in files if path not in read),
        digest.hexdigest(),
        remark,
    )


def picture_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the picture files below a folder, by their suffixes, folder by folder in order; no hidden ones."""
    known = suffixes()
    return (path for path in _files(Path(folder)) if path.suffix.lower() in known)


def look_at_pictures(root: Path, paths: Sequence[str]) -> list[Look | None]:
    """Read the headers of all pictures, in threads; None for one that cannot be read."""

    def read(path: str) -> Look | None:
        try:
            with open_picture(root / path) as picture:
                return look(picture)
        except (ValueError, OSError):  # told when its pixels are read
            return None

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(read, paths))


def few(names: Sequence[str], most: int = 5) -> str:
    """Return the first names for a message."""
    return ", ".join(map(printable, names[:most])) + (", ..." if len(names) > most else "")


def _files(root: Path) -> Iterator[Path]:
    """Yield all files below a folder, folder by folder in order, without hidden ones and links to a folder around."""
    for place, folders, files in os.walk(root, followlinks=True):
        around = Path(place).resolve()
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not around.is_relative_to(Path(place, name).resolve())
        )
        yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))


def _class(path: str) -> str:
    """Return the subfolder that a path is in; "" if it is in none."""
    first, separator, _ = path.partition(os.sep)
    return first if separator else ""


def _without_strays(root: Path, found: list[str]) -> tuple[list[str], str | None]:
    """Return the pictures without those in `root` that are strays beside class folders, and what was decided."""
    inside = [path for path in found if _class(path)]
    beside = [path for path in found if not _class(path)]
    folders = {_class(path) for path in inside}
    if not inside or not beside:
        return found, None
    if len(folders) > 1 and (2 * len(beside) < len(folders) or 20 * len(beside) <= len(inside)):
        return inside, (
            f"{root}: {len(beside)} pictures beside the folders of {len(folders)} classes are passed over "
            f"({few(beside)}); put them into a class, or all pictures into one folder for no classes"
        )
    return found, (
        f"{root}: its subfolders are no classes, since {len(beside)} pictures are in none of them ({few(beside)})"
    )


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a key that sorts numbers within names by their value."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(int(part), "") if part[0].isdigit() else (-1, part) for part in parts], name
