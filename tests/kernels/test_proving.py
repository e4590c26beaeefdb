"""Proofs before trust: the verdict of every way to fail, what "auto" does with it, and the record."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from fastddpm_kernels import native as _native
from fastddpm_kernels import proving
from fastddpm_kernels.backend import NATIVE_OPS, resolve, unproved
from fastddpm_kernels.proof import of_op
from fastddpm_kernels.proving import Suite, Verdict, failed, run
from fastddpm_kernels.verify import proofs
from torch import Tensor

CPU = torch.device("cpu")
FAILING = Suite("failing_proofs")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDPM_VERIFY", "1")
    monkeypatch.setattr(proving, "cache_folder", lambda: tmp_path)
    proving.forget()


def test_every_way_to_fail_has_its_verdict() -> None:
    """A proof that crashes or hangs its process costs no other proof its verdict."""
    found = {v.op: v for v in run(FAILING, "cpu", each=1.5)}
    verdicts = {op: v.verdict for op, v in found.items()}
    assert verdicts == {
        "first": "passed", "second": "wrong", "third": "wrong", "fourth": "raised", "fifth": "crashed",
        "sixth": "hung", "seventh": "passed",
    }  # fmt: skip
    assert found["fourth"].message == "RuntimeError: no kernel image is available"
    assert "signal 11" in found["fifth"].message
    assert (found["second"].error, found["second"].bound) == (2.0, 1.0)


def test_what_is_left_when_the_restarts_are_used_up_is_not_tried() -> None:
    verdicts = [v.verdict for v in run(FAILING, "cpu", each=1.5, restarts=0)]
    assert verdicts == ["passed", "wrong", "wrong", "raised", "crashed", "not tried", "not tried"]


def test_a_child_that_cannot_start() -> None:
    (only,) = run(Suite("no_such_module"), "cpu")
    assert (only.op, only.verdict) == ("all", "crashed")
    assert "no_such_module" in only.message


def test_auto_leaves_out_what_did_not_pass(
    native: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so once. A backend that is named stays."""
    verdicts = [Verdict("conv", "direct", "wrong", 1.0, 1e-6), Verdict("attention", "a", "passed", 0.0, 1.0)]
    calls = []
    monkeypatch.setattr(proving, "prove", lambda device, suite: calls.append(device) or verdicts)
    with caplog.at_level(logging.WARNING, "fastddpm.kernels"):
        assert [resolve(op, "auto", "cpu", torch.float32) for op in ("conv", "conv3x3", "attention")] == [
            "eager", "eager", "native",
        ]  # fmt: skip
    assert resolve("conv", "native", "cpu", torch.float32) == "native"
    assert resolve("group_norm_silu_", "auto", "cpu", torch.float32, others=("conv",)) == "eager"
    assert unproved(("philox", "conv"), "cpu") == "its check direct gave a wrong result"
    assert calls == [CPU]
    assert [r.message for r in caplog.records] == [
        "conv is not used on cpu: its check direct gave a wrong result (to report it: fastddpm verify --json FILE)"
    ]


def test_a_child_that_fails_before_its_first_proof_leaves_nothing_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "prove", lambda device, suite: [Verdict("all", "start", "hung")])
    assert "hung" in (unproved(("philox",), "cpu") or "")


def test_verify_0_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDDPM_VERIFY", "0")
    monkeypatch.setattr(proving, "prove", lambda device, suite: pytest.fail("it proves"))
    assert unproved(("conv",), "cpu") is None


def test_verdicts_are_kept_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [Verdict("conv", "direct float32", "passed", 1e-7, 1e-6, 0.5)]
    monkeypatch.setattr(proving, "run", lambda *_, **__: iter(seen))
    assert proving.read(CPU) is None
    assert proving.prove(CPU) == seen
    assert proving.read(CPU) == seen
    path = proving.path_of(CPU)
    assert [p.suffix for p in path.parent.iterdir() if p.suffix != ".lock"] == [".json"]
    content = json.loads(path.read_text())
    for damaged in ({**content, "valid_for": {}}, [], {"verdicts": 1}, {**content, "verdicts": [{"op": 1}]}):
        path.write_text(json.dumps(damaged))
        assert proving.read(CPU) is None
    path.write_text(json.dumps(content)[:-20])
    assert proving.read(CPU) is None


def test_a_wrong_kernel_does_not_pass() -> None:
    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        x = torch.linspace(-1, 1, 100, dtype=torch.float64).to(dtype)
        return {"y": x.exp() + (1e-4 if backend == "native" else 0)}

    error, bound = of_op("op", "all", "native", torch.float32, run).check()
    assert error > 10 * bound


def test_the_kernels_of_this_machine_pass(native: str) -> None:
    """They run in a child as a first use runs them; every native op that "auto" takes has a proof."""
    verdicts = proving.prove(CPU)
    assert not failed(verdicts), verdicts
    assert {v.op for v in verdicts} == {op.rstrip("_") for op in NATIVE_OPS} - {"conv3x3"}
    wide = _native.why_not_bfloat16(slower=True) is None
    assert any("bfloat16" in v.variant for v in verdicts) is wide


def test_the_proofs_of_a_gpu_pass_in_the_interpreter(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastddpm_kernels.backend import TRITON_OPS

    pytest.importorskip("triton")
    found = [p for p in proofs(device, None, "triton") if "float16" not in p.variant or device.type == "cuda"]
    assert {p.op for p in found} == set(TRITON_OPS)
    for proof in {p.op: p for p in found}.values():  # `test_<op>` has every variant
        error, bound = proof.check()
        assert error <= bound, proof.name
