"""The results file: what was measured, written after every arm, and what of it a later run may keep."""

from __future__ import annotations

import hashlib
import subprocess
import time
from pathlib import Path
from typing import Any

from measuring import ROOT

from fastddpm.common.files import read_json, write_json
from fastddpm.perf.profiling.compare import GPU_SCHEMA

# What a measurement depends on: another digest of these, and nothing is kept.
SOURCES = ("fastddpm", "kernels", "benchmarks")
STATUSES = ("ok", "failed", "unavailable", "not run")
FINAL = ("ok", "unavailable")

Record = dict[str, Any]


def source_digest(root: Path = ROOT) -> str:
    """Return twelve hex digits of all sources that a measurement depends on."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted(p for p in (root / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def commit_here() -> tuple[str, bool | None]:
    """Return the commit, and whether its sources have changed since; ("unknown", None) outside a git checkout."""
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

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool, header: dict[str, Any]) -> None:
        self.path, self.dropped = path, None
        self.content: dict[str, Any] = {"schema": GPU_SCHEMA, **identity, **header, "sections": {}}
        if resume and path.exists():
            old = read_json(path)
            different = [name for name in ("schema", *identity) if old.get(name) != self.content[name]]
            if not different:
                self.content["sections"] = old.get("sections", {})
            else:
                self.dropped = "; ".join(f"{n} was {old.get(n)!r}, is {self.content[n]!r}" for n in different)

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """Section name -> what it holds."""
        return self.content["sections"]

    def finished(self, section: str) -> bool:
        """Return whether a section needs no further run."""
        return self.sections.get(section, {}).get("status") in ("done", "skipped")

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.content["written"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(self.path, self.content)


class Section:
    """One section while it runs: its time, its records, of which those of an earlier run that are final are kept.

    Args:
        results: where it is kept.
        name: of the section.
        seconds: how long it may take.
    """

    def __init__(self, results: Results, name: str, seconds: float) -> None:
        self.results, self.name, self.end = results, name, time.monotonic() + seconds
        old = results.sections.get(name, {})
        kept = [record for record in old.get("records", []) if record["status"] in FINAL]
        own = {key: value for key, value in old.items() if key not in ("error", "reason")}
        self.data: dict[str, Any] = {**own, "status": "running", "records": kept}
        results.sections[name] = self.data
        results.save()

    def left(self) -> float:
        """Return the seconds that remain of the section's share."""
        return self.end - time.monotonic()

    def add(self, record: Record) -> None:
        """Append a record, or replace the one of the same group and arm; and save."""
        assert record["status"] in STATUSES, record
        same = (record["group"], record["arm"])
        self.data["records"] = [r for r in self.data["records"] if (r["group"], r["arm"]) != same] + [record]
        self.results.save()

    def has(self, group: str) -> bool:
        """Return whether a group has a final record."""
        return any(r["group"] == group and r["status"] in FINAL for r in self.data["records"])

    def set(self, **fields: Any) -> None:
        """Set fields of the section itself, and save."""
        self.data.update(fields)
        self.results.save()

    def close(self, status: str | None = None, **fields: Any) -> None:
        """End the section: "done", or "partial" if anything was not run for want of time, or as given."""
        partial = any(r["status"] == "not run" for r in self.data["records"])
        self.set(status=status or ("partial" if partial else "done"), **fields)


def records(content: dict[str, Any], section: str, **fields: Any) -> list[Record]:
    """Return the records of a section whose fields have these values."""
    found = content.get("sections", {}).get(section, {}).get("records", [])
    return [r for r in found if all(r.get(name) == value for name, value in fields.items())]


def median(content: dict[str, Any], section: str, group: str, arm: str) -> float | None:
    """Return the median microseconds per step of an arm, None if it was not measured."""
    for record in records(content, section, group=group, arm=arm, status="ok"):
        return float(record["us_per_step"]["median"])
    return None
