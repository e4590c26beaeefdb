"""Shared by the tests of the ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fastddpm_kernels import _native
from fastddpm_kernels._backend import why_not
from fastddpm_kernels._native.build import compiler


@pytest.fixture(scope="session")
def native() -> str:
    """The native backend. Only a machine without a compiler is let off: one that has it must be able to build."""
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    assert why_not("native", "cpu") is None
    return "native"


@pytest.fixture(scope="session")
def native_bfloat16(native: str) -> str:
    """The native backend where it multiplies bfloat16. Only a CPU without the instructions is let off."""
    if reason := _native.why_not_bfloat16(slower=True):
        with open("/proc/cpuinfo", encoding="utf-8") as cpu:
            assert "avx512_bf16" not in cpu.read(), reason
        pytest.skip(reason)
    return native


@pytest.fixture(params=[1, 3], ids=["one_thread", "three_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Native kernels on one thread, and on more than most shapes have work for."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
