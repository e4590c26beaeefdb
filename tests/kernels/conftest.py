"""Shared by the tests of the ops: the backends."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["eager", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend to compare with `reference`. "native_bfloat16" is native where it multiplies in bfloat16."""
    name: str = request.param
    given = request.node.callspec.params
    dtype = getattr(given.get("case"), "dtype", given.get("dtype"))
    if name == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        if dtype == torch.bfloat16 and not torch.cuda.is_available():
            pytest.skip("triton's interpreter rounds bfloat16 wrongly")
    if name == "native" and getattr(given.get("case"), "dtype", None) == torch.bfloat16:
        name = "native_bfloat16"  # in place, norms follow the convolutions that they run between
    if name.startswith("native"):
        return str(request.getfixturevalue(name))
    return name


@pytest.fixture
def on_triton(device: torch.device) -> torch.device:
    """Where triton kernels run, for a test of theirs alone."""
    pytest.importorskip("triton", reason="triton is not installed")
    return device
