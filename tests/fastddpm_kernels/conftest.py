"""Shared by the tests of the ops."""

from __future__ import annotations

import pytest
from fastddpm_kernels._backend import why_not
from fastddpm_kernels._native.build import compiler


@pytest.fixture(scope="session")
def native() -> str:
    """The native backend. Only a machine without a compiler is let off: one that has it must be able to build."""
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    assert why_not("native", "cpu") is None
    return "native"
