"""Shared by all tests: where they run, and what is skipped there."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fastddpm_kernels import native as _native
from fastddpm_kernels.backend import why_not
from fastddpm_kernels.native.build import compiler

# Without a GPU the real Triton kernels run through triton's interpreter, which must be chosen before triton is
# imported for the first time.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What this user has tuned must not change what is tested.
os.environ["FASTDDPM_TUNED"] = "0"
os.environ["FASTDDPM_VERIFY"] = "0"  # nor may what has been proved here

# Workers side by side share the cores; OpenMP threads that wait for each other would spin on them.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent / "shared"))  # objects that several files of tests share

HAS_TRITON = importlib.util.find_spec("triton") is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="run tests marked long too: every random case and compiled variant, other CPUs, whole benchmarks",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = {} if torch.cuda.is_available() else {"gpu": "needs a GPU"}
    missing |= {} if config.getoption("--long") else {"long": "takes long, runs with --long"}
    for item in items:
        for mark, reason in missing.items():
            if item.get_closest_marker(mark) is not None:  # not a keyword: folders have those, too
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Take what thousands of tests and a dozen libraries consist of out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one, else the CPU (through triton's interpreter)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def _interpreter_prepares_once() -> Iterator[None]:
    """Triton's interpreter replaces the functions of its language before a launch, and looks for what there is to
    replace at every call of one kernel function by another as well: a quarter of its time, to find nothing."""
    if not HAS_TRITON or torch.cuda.is_available():
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    is_builtin, prepare = language.core.is_builtin, getattr(interpreter, "_patch_lang", None)
    nothing = getattr(interpreter, "_LangPatchScope", None)
    if prepare is None or nothing is None:  # another version of triton
        yield
        return

    def prepare_once(fn: Any) -> Any:
        seen = [value for value in fn.__globals__.values() if value is language or value is language.core]
        todo = any(is_builtin(each.load) or is_builtin(each.tensor.__add__) for each in seen)
        return prepare(fn) if todo or not seen else nothing()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def _interpreter_fuses_multiply_adds() -> Iterator[None]:
    """Triton's interpreter rounds the product of an fma; no GPU does, and kernels count on that near zeros."""
    if not HAS_TRITON or torch.cuda.is_available():
        yield
        return
    import numpy as np
    from triton.runtime import interpreter

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # A product of two float32 is exact in float64; of two float64 it is rounded, as before.
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["eager", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backends that are compared with `reference`."""
    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("triton is not installed")
    return request.param


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


@pytest.fixture(scope="session")
def digits() -> ModuleType:
    """`examples/digits.py`: the real digits, the classifier trained on them, and the report."""
    return _module(Path(__file__).parents[1] / "examples" / "digits.py")


@pytest.fixture(scope="session")
def openai() -> ModuleType:
    """`openai_restated.py`: the networks and loops of guided-diffusion, and weights for them."""
    return _module(Path(__file__).parent / "shared" / "openai_restated.py")


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
