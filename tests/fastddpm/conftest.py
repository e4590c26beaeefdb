"""Shared by the tests of fastddpm."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for what several files of tests share, which stands beside them


@pytest.fixture(scope="session")
def digits() -> ModuleType:
    """`examples/digits.py`: the real digits, the classifier trained on them, and the report."""
    return _module(Path(__file__).parents[2] / "examples" / "digits.py")


@pytest.fixture(scope="session")
def openai() -> ModuleType:
    """`openai_restated.py`: the networks and loops of guided-diffusion, and weights for them."""
    return _module(Path(__file__).with_name("openai_restated.py"))


@pytest.fixture(scope="module")
def gpu() -> Iterator[SimpleNamespace]:
    """The modules of `benchmarks/gpu`, and `gpu_check.py` and `report.py` beside it."""
    from gpu_check_parts import modules

    with pytest.MonkeyPatch.context() as patch:
        yield modules(patch)


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
