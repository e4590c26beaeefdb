"""The results file: what has been measured, written after every arm, and what of it may be kept by a later run."""

from __future__ import annotations

import hashlib
import subprocess
import time
from pathlib import Path
from typing import Any

from fastddpm.common.files import read_json, write_json
from fastddpm.perf.profiling.compare import GPU_SCHEMA

SCHEMA = GPU_SCHEMA
ROOT = Path(__file__).parents[2]
# What a measurement depends on: another digest of these, and nothing is kept.
SOURCES = ("fastddpm", "kernels", "benchmarks/gpu")
STATUSES = ("ok", "failed", "missing", "unavailable", "not run")

Record = dict[str, Any]


def source_digest(root: Path = ROOT) -> str:
    """Twelve hex digits of all sources that a measurement depends on."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted(p for p in (root / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def commit_here() -> tuple[str, bool | None]:
    """The commit, and whether its sources have been changed since; ("unknown", None) outside a git checkout."""
    try:
        commit, status = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *SOURCES])
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown", None
    return commit.strip()[:12], bool(status.strip())


class Results:
    """One results file.

    Args:
        path: where it is.
        identity: what must be equal for a measurement to be kept: device, sources, versions, whether small.
        resume: keep what `path` holds of the same identity.
        header: what else is said of the run, such as the commit.

    Attributes:
        content: what is written: the schema, the identity and the sections.
        dropped: why nothing was kept although `resume` asked for it, or None.
    """

    def __init__(
        self, path: Path, identity: dict[str, Any], resume: bool = False, header: dict[str, Any] | None = None
    ) -> None:
        self.path, self.dropped = path, None
        self.content: dict[str, Any] = {"schema": SCHEMA, **identity, **(header or {}), "sections": {}}
        if resume and path.exists():
            old = read_json(path)
            different = [name for name in ("schema", *identity) if old.get(name) != self.content[name]]
            if different:
                self.dropped = "; ".join(
                    f"{name} was {old.get(name)!r}, is {self.content[name]!r}" for name in different
                )
            else:
                self.content["sections"] = old.get("sections", {})

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """Section name -> what it holds."""
        return self.content["sections"]

    def finished(self, section: str) -> bool:
        """Whether a section needs no further run."""
        return self.sections.get(section, {}).get("status") in ("done", "skipped")

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        self.content["written"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(self.path, self.content)


class Section:
    """One section while it runs: its records, its time, and the groups of arms that an earlier run finished.

    Args:
        results: where it is kept.
        name: of the section.
        seconds: how long it may take.
    """

    def __init__(self, results: Results, name: str, seconds: float) -> None:
        self.results, self.name, self.allotted = results, name, seconds
        self.started = time.monotonic()
        old = results.sections.get(name, {})
        self.before = float(old.get("seconds", 0.0))
        done = [group for group, state in old.get("groups", {}).items() if state == "done"]
        self.data: dict[str, Any] = {
            **{key: value for key, value in old.items() if key not in ("error", "reason")},
            "status": "running",
            "groups": {group: "done" for group in done},
            "records": [record for record in old.get("records", []) if record.get("group") in done],
        }
        results.sections[name] = self.data
        results.save()

    def left(self) -> float:
        """Seconds that remain of the section's share."""
        return self.allotted - (time.monotonic() - self.started)

    def records(self, **fields: Any) -> list[Record]:
        """The records whose fields have these values."""
        return [r for r in self.data["records"] if all(r.get(name) == value for name, value in fields.items())]

    def add(self, record: Record) -> Record:
        """Appends a record, or replaces the one of the same group, arm and what it measures; and saves."""
        assert record["status"] in STATUSES, record
        same = ("group", "arm", "batch", "what")
        records = self.data["records"]
        records[:] = [r for r in records if any(r.get(name) != record.get(name) for name in same)]
        records.append(record)
        self.save()
        return record

    def set(self, **fields: Any) -> None:
        """Sets fields of the section itself, and saves."""
        self.data.update(fields)
        self.save()

    def has(self, group: str) -> bool:
        """Whether an earlier run finished this group."""
        return self.data["groups"].get(group) == "done"

    def close_group(self, group: str) -> None:
        """Marks a group as done, or as partial if any of its arms was not run."""
        partial = any(r["status"] == "not run" for r in self.records(group=group))
        self.data["groups"][group] = "partial" if partial else "done"
        self.save()

    def close(self, status: str | None = None, **fields: Any) -> None:
        """Ends the section: "done", or "partial" if anything was not run for want of time, or as given."""
        if status is None:
            partial = any(r["status"] == "not run" for r in self.data["records"])
            status = "partial" if partial else "done"
        self.set(status=status, **fields)

    def save(self) -> None:
        self.data["seconds"] = round(self.before + time.monotonic() - self.started, 2)
        self.results.save()
