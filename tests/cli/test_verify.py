"""`fastddpm verify`: its table, its report and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fastddpm_kernels import proving
from fastddpm_kernels.proof import Proof

from fastddpm.cli import main
from fastddpm.common.proofs import PROOFS
from fastddpm.interop.pretrained import BUNDLED
from fastddpm.sampling.verify import proofs


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "cache_folder", lambda: tmp_path / "cache")


def test_verify(native: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kernel, a small network and the bundled model pass on this machine; `info` shows it."""
    model = str(BUNDLED)
    assert main(["verify", model, "--device", "cpu", "--json", str(tmp_path / "verdicts.json")]) == 0
    out = capsys.readouterr().out
    assert "0 not passed" in out
    (device,) = json.loads((tmp_path / "verdicts.json").read_text())["devices"]
    verdicts = device["verdicts"]
    assert all(v["verdict"] == "passed" and v["error"] <= v["bound"] and v["seconds"] >= 0 for v in verdicts)
    assert sum(v["op"] == "network" for v in verdicts) == 2
    assert len(out.splitlines()) == len(verdicts) + 3


def test_a_kernel_that_fails_ends_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [proving.Verdict("conv", "direct float32", "wrong", 0.5, 1e-6, 0.1)]
    monkeypatch.setattr(proving, "prove", lambda device, suite=proving.KERNELS: bad if suite != PROOFS else [])
    assert main(["verify", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert "conv             direct float32" in out
    assert "wrong" in out
    assert err == "fastddpm verify: error: 1 checks did not pass; fastddpm does not use these kernels here\n"


def test_the_network_of_a_device_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen network whose kernel is wrong does not pass."""
    from fastddpm.networks.frozen import frozen_unet

    (proof,) = proofs(torch.device("cpu"))
    assert isinstance(proof, Proof)
    error, bound = proof.check()
    assert error <= bound
    own = frozen_unet.Program.__call__

    def wrong(self: frozen_unet.Program, step: torch.Tensor) -> torch.Tensor:
        result = own(self, step)
        return result * 1.001 if self._frozen.backend == "native" else result

    monkeypatch.setattr(frozen_unet.Program, "__call__", wrong)
    error, bound = proof.check()
    assert error > bound
