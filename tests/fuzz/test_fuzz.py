"""Odd inputs for every loader: none ends in a traceback, a crash or a hang, runs code, or takes a gigabyte.

200 inputs per loader; `FASTDDPM_FUZZ=10000` sets another number, and `FASTDDPM_FUZZ_JSON=PATH` keeps the counts.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from loaders import CPU, LOADERS, REFUSALS, files

from fastddpm.common.files import write_json
from fastddpm.perf.profiling.memory import peak_memory

INPUTS = int(os.environ.get("FASTDDPM_FUZZ", "200"))
SECONDS, BYTES = 2.0, 10**9  # that an input may take
# What a loader never does: start a program, open a connection, or run code from a file.
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
_ran: list[str] = []
_watching = False


def _hook(event: str, arguments: Any) -> None:
    if _watching and event in FORBIDDEN:
        _ran.append(event)


@pytest.mark.parametrize("name", LOADERS)
def test_odd_inputs_are_loaded_or_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    global _watching
    monkeypatch.chdir(tmp_path)
    strategy, run = LOADERS[name]
    files(tmp_path)
    counts = {"inputs": 0, "loaded": 0, "refused": 0, "slowest_s": 0.0}
    if _hook not in _hooked:
        sys.addaudithook(_hook)
        _hooked.append(_hook)

    @settings(
        max_examples=INPUTS, derandomize=True, database=None, deadline=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def one(change: Any) -> None:
        start = time.process_time()
        counts["inputs"] += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run(tmp_path, change)
            message = "loaded"
        except REFUSALS as error:
            message = str(error)
        counts["loaded" if message == "loaded" else "refused"] += 1
        spent = time.process_time() - start
        assert message.strip()
        assert "\n" not in message
        assert len(message) < 4000
        counts["slowest_s"] = max(counts["slowest_s"], round(spent, 3))
        assert spent < SECONDS

    _watching = True
    try:
        with peak_memory(CPU) as memory:
            one()
    finally:
        _watching = False
    assert _ran == []
    used = memory["bytes"] - memory["before_bytes"] if memory["bytes"] is not None else 0
    assert used < BYTES
    if place := os.environ.get("FASTDDPM_FUZZ_JSON"):
        path = Path(place)
        kept = json.loads(path.read_text()) if path.exists() else {}
        clean = {"tracebacks": 0, "crashes": 0, "hangs": 0, "code_run": 0, "peak_mb": round(used / 1e6)}
        kept.setdefault("fuzz", {})[name] = {**counts, **clean}
        write_json(path, kept)


_hooked: list[Any] = []
