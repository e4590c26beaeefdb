"""Section `tune` of `benchmarks/gpu_check.py`: what is recorded and written, kept by a later run, and left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastddpm_kernels import tuned as _tuned
from fastddpm_kernels.tuned import Key
from gpu_check_parts import CPU, SMALL, read

from fastddpm.perf.tuning.search import Outcome

TILES = {"block": 1024, "num_warps": 8}
ALONE = [*SMALL, "--section", "tune"]


def keys_of(problem: Any, plan: Any, ops: Any) -> dict[Key, int]:
    assert _tuned.choice("q_sample", CPU, torch.float32, (1, 3, 64, 1, 2, 1)) is None  # no table is followed
    return {Key("q_sample", torch.float32, (plan.batch, 3, 64 * size, 1, 2, 1)): size for size in (1, 2, 3, 4)}


@pytest.fixture
def searched(gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[set[Key]]:
    """The keys of every search. The first shape has a faster choice, the second none; the third fails, the last is not
    reached by the first two searches."""
    monkeypatch.setenv("FASTDDPM_TUNED", "1")
    monkeypatch.setenv("FASTDDPM_CACHE_DIR", str(tmp_path / "cache"))
    _tuned.forget()
    searches: list[set[Key]] = []

    def tune(keys: dict[Key, int], device: Any, seconds: float, *, done: Callable[[Outcome], object]) -> None:
        assert seconds > 0
        searches.append(set(keys))
        for key, calls in keys.items():
            title = gpu.tune.make_task(key, device).title()
            outcome = Outcome(key, title, calls, {"block": 512, "num_warps": 4}, tried=20)
            if calls < 3 or (calls == 4 and len(searches) > 2):
                outcome.status, outcome.heuristic_us = "done", 10.0
            if calls == 1:
                outcome.winner, outcome.winner_us = TILES, 8.0
            if calls == 3:
                outcome.status = "the heuristics' choice is refused: it is wrong"
            done(outcome)

    monkeypatch.setattr(gpu.tune, "tune", tune)
    monkeypatch.setattr(gpu.tune, "tuned_ops", lambda device: ("q_sample",))
    monkeypatch.setattr(gpu.tune, "shapes", keys_of)
    return searches


def test_what_is_found_is_recorded_and_written_as_a_table(
    gpu: SimpleNamespace, searched: list[set[Key]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sizes = [Key("q_sample", torch.float32, (2, 3, 64 * size, 1, 2, 1)) for size in (1, 2, 3, 4)]
    built: list[list[Any]] = []

    def alone(problem: Any, precision: str, batch: int, repeats: int) -> Callable[[], object]:
        built.append([_tuned.choice(key.op, CPU, key.dtype, key.shape) for key in sizes])
        return lambda: None

    monkeypatch.setattr(gpu.tune, "network_alone", alone)
    out = tmp_path / "results.json"
    table = tmp_path / "results.tuned.json"
    table.write_text("of before")
    assert gpu.gpu_check.main([*ALONE, "--out", str(out)]) == 0
    section = read(out)["sections"]["tune"]
    assert (section["status"], section["table"]) == ("partial", table.name)
    assert [len(keys) for keys in searched] == [4, 4]
    records = [r for r in section["records"] if r["what"] == "tune" and r["plan"] == "sampling batch 2"]
    assert [r["status"] for r in records] == ["ok", "ok", "failed", "not run"]
    first = records[0]
    assert (first["heuristic_us"], first["tuned_us"], first["choice"], first["calls"]) == (10.0, 8.0, TILES, 1)
    assert (first["op"], first["shape"]["pixels"], first["heuristic"]["block"]) == ("q_sample", 64, 512)
    assert (records[1]["choice"], records[1]["tuned_us"]) == (None, 10.0)
    assert "it is wrong" in records[2]["error"]
    assert all(r["status"] in gpu.results.STATUSES for r in section["records"])
    steps = [r for r in section["records"] if r["what"] == "tuned step"]
    assert [(r["arm"], r["status"], r["batch"]) for r in steps] == [("heuristics", "ok", 2), ("tuned", "ok", 2)]
    assert built == [[None] * 4, [TILES, None, None, None]]

    # The table is one that the package could hold, of this device and these kernels.
    found = _tuned.read(table, CPU)
    assert found.ignored is None
    assert {key.shape[2]: choice for key, choice in found.entries.items()} == {64: TILES, 128: None}
    assert {name for name in json.loads(table.read_text())} >= {*_tuned.header(CPU), "created", "entries"}
    assert not _tuned.user_path(CPU).exists()  # nobody's choices were changed
    assert not _tuned.package_path(CPU).exists()
    printed = capsys.readouterr().out
    assert "tune, sampling batch 2: 2 shapes, of which 1 have a faster choice than the heuristics'" in printed
    assert "of their 30.0 us a step 28.0 are left; the network timed as a whole:" in " ".join(printed.split())
    assert "block=1024 num_warps=8" in printed
    assert f"the table of all is {table.name}; for everyone it is tuned_tables/" in printed

    # A later run goes on with what was not reached, and adds to the table; its steps are timed anew.
    assert gpu.gpu_check.main([*ALONE, "--resume", "--out", str(out)]) == 0
    assert [len(keys) for keys in searched] == [4, 4, 1, 1]
    assert {key.shape[2] for key in searched[2]} == {256}
    section = read(out)["sections"]["tune"]
    assert section["status"] == "done"
    assert len(_tuned.read(table, CPU).entries) == 3
    assert len(built) == 4


def test_it_can_be_left_out_and_harms_nobody(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(gpu.gpu_check, "run_section", lambda results, name, *_: ran.append(name))
    out = ["--out", str(tmp_path / "results.json")]
    assert gpu.gpu_check.main([*SMALL, "--skip", "tune", "ops", *out]) == 0
    assert ran == ["machine", "tests", "cifar10", "celeba256", "profile"]
    assert gpu.gpu_check.main([*SMALL, *out]) == 0
    assert ran[-1] == "tune"  # after all others
    assert sum(gpu.gpu_check.SHARES.values()) == gpu.gpu_check.BUDGET_S
    monkeypatch.undo()

    def lost(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for name in ("sampler_keys", "release"):
        monkeypatch.setattr(gpu.tune, name, lost)
    monkeypatch.setattr(gpu.gpu_check, "release", lost)
    monkeypatch.setattr(gpu.gpu_check, "source_digest", lambda: "0" * 12)
    monkeypatch.setattr(gpu.tune, "tuned_ops", lambda device: ("conv",))
    assert gpu.gpu_check.main([*ALONE, *out]) == 0
    section = read(tmp_path / "results.json")["sections"]["tune"]
    assert section["status"] == "failed"
    assert "illegal memory access" in section["error"]
    assert "illegal memory access" in capsys.readouterr().out
    monkeypatch.setattr(gpu.tune, "tuned_ops", lambda device: ())
    assert gpu.gpu_check.main([*ALONE, *out]) == 0
    assert read(tmp_path / "results.json")["sections"]["tune"]["reason"] == "nothing has choices on cpu"


def test_the_shapes_are_those_of_a_step(gpu: SimpleNamespace) -> None:
    problem = gpu.networks.make_problem("small", CPU)
    seen: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.tune, "sampler_keys", lambda *given: seen.append(given) or {})
        patch.setattr(gpu.tune, "training_keys", lambda *given: seen.append(given) or {})
        for plan in gpu.tune.PLANS:
            patch.setattr(gpu.tune, "make_sampler", lambda problem, *given: given)
            gpu.tune.shapes(problem, plan, ("conv",))
    sampling, one, training = seen
    assert sampling == (("fp16", 3, False), 64, ("conv",), "float16")
    assert one[1] == 1
    assert training[1:] == ((64, 3, 8, 8), None, CPU, ("conv",), torch.bfloat16)
    # The networks that are measured want no gradients; a step of training asks for them all the same.
    gpu.tune.training_keys(training[0], (1, 3, 8, 8), None, CPU, ("conv",), torch.float32)
    assert not any(parameter.requires_grad for parameter in problem.unet.parameters())
