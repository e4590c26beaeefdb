"""Which backend runs, and what is said when one cannot."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from fastddpm_kernels import backend as _backend
from fastddpm_kernels.backend import BackendError, resolve, why_not


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", request.param)


@pytest.fixture
def triton_installed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    reason = None if request.param else "triton cannot be imported (it is not installed)"
    monkeypatch.setattr(_backend, "_NO_TRITON", reason)
    monkeypatch.setattr(_backend, "_NO_LAUNCHER", None)


@pytest.mark.parametrize(
    ("interpreter", "triton_installed", "device", "expected"),
    [
        ("0", True, "cuda", "triton"),
        ("0", False, "cuda", "eager"),
        ("0", True, "cpu", "eager"),
        ("1", True, "cpu", "eager"),  # the interpreter is slow: only on request
        ("0", True, "mps", "eager"),
    ],
    indirect=["interpreter", "triton_installed"],
)
@pytest.mark.usefixtures("interpreter", "triton_installed")
def test_auto(device: str, expected: str) -> None:
    assert resolve("q_sample", "auto", device) == expected


@pytest.mark.parametrize(
    ("interpreter", "triton_installed", "device", "reason"),
    [
        ("0", True, "cuda", None),
        ("1", True, "cpu", None),
        ("0", True, "cpu", "triton kernels need a GPU"),
        ("1", False, "cpu", "triton cannot be imported"),
        ("0", False, "cuda", "triton cannot be imported"),
        ("0", True, "mps", "no triton kernels for device type 'mps'"),
    ],
    indirect=["interpreter", "triton_installed"],
)
@pytest.mark.usefixtures("interpreter", "triton_installed")
def test_a_named_backend_runs_or_says_why_not(device: str, reason: str | None) -> None:
    if reason is None:
        assert why_not("triton", device) is None
        assert resolve("q_sample", "triton", device) == "triton"
    else:
        with pytest.raises(BackendError, match=f"q_sample: backend 'triton' cannot run here: .*{reason}"):
            resolve("q_sample", "triton", device)


@pytest.mark.parametrize(("interpreter", "triton_installed"), [("0", True)], indirect=True)
@pytest.mark.usefixtures("interpreter", "triton_installed")
def test_auto_leaves_float64_to_torch() -> None:
    assert resolve("group_norm_silu", "auto", "cuda", torch.float64) == "eager"
    assert resolve("group_norm_silu", "auto", "cuda", torch.float16) == "triton"


@pytest.mark.parametrize(("interpreter", "triton_installed"), [("0", True)], indirect=True)
@pytest.mark.parametrize("missing", ["C compiler", "Python.h"])
@pytest.mark.usefixtures("interpreter", "triton_installed")
def test_what_triton_needs_to_launch_is_looked_for(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`cc` alone does not do: triton does not look for it."""
    monkeypatch.delenv("CC", raising=False)
    found = {"C compiler": ("cc",), "Python.h": ("cc", "gcc")}[missing]
    monkeypatch.setattr(_backend.shutil, "which", lambda name: f"/usr/bin/{name}" if name in found else None)
    monkeypatch.setattr(_backend.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setattr(_backend, "_NO_LAUNCHER", _backend._no_launcher())
    assert resolve("q_sample", "auto", "cuda") == "eager"
    with pytest.raises(BackendError, match=f"triton finds no {missing}"):
        resolve("q_sample", "triton", "cuda")


def test_torch_backends_run_anywhere() -> None:
    for backend in ("eager", "reference"):
        assert resolve("philox", backend, "cpu") == backend


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="'cudnn', must be 'auto' or one of triton, native, eager, reference"):
        resolve("philox", "cudnn", "cpu")


def test_choice_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "fastddpm.kernels"):
        resolve("philox", "auto", "cpu")
    assert "philox on cpu: eager" in caplog.text
