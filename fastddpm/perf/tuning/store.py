"""Write tables of choices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from fastddpm_kernels import tuned

from fastddpm.common.files import write_json
from fastddpm.perf.tuning.search import Outcome


def save(outcomes: Sequence[Outcome], device: torch.device, path: Path) -> int:
    """Add the results to the table at `path`, which ops use at once, and return the number of shapes.

    An entry replaces an older one of the same shape. A stale table is replaced as a whole.

    Raises:
        OSError: the file cannot be written.
    """
    records = {}
    if path.is_file() and (before := tuned.read(path, device)).ignored is None:
        records = dict(before.records)
    done = [outcome for outcome in outcomes if outcome.done]
    for outcome in done:
        best = outcome.heuristic_us if outcome.winner is None else outcome.winner_us
        times = {"heuristic_us": round(outcome.heuristic_us, 3), "tuned_us": round(best, 3)}
        records[outcome.key] = tuned.record(outcome.key, outcome.winner, **times)
    if done:
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        order = sorted(records, key=lambda key: (key.op, str(key.dtype), key.shape))
        write_json(path, {**tuned.header(device), "created": created, "entries": [records[key] for key in order]})
        tuned.forget()
    return len(done)
