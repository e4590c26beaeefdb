"""How the native library is built, kept and refused. The compilers here are scripts that write a file."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from fastddpm_kernels import native as _native
from fastddpm_kernels.backend import BackendError, resolve
from fastddpm_kernels.group_norm_silu import group_norm_silu_
from fastddpm_kernels.native import build
from fastddpm_kernels.native.build import BuildError, cache_folder, library

COMPILES = """
import sys, pathlib
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text("built")
with open({log!r}, "a") as file: file.write("once\\n")
"""
FAILS = "import sys; sys.exit('native.cpp:1: error: this compiler is broken')"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTDDPM_CACHE_DIR", str(folder))
    return folder


def use_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, name: str = "compiler.py") -> Path:
    """A compiler that is a Python program; returns where it says that it ran."""
    log = folder / "log"
    (folder / name).write_text(text.format(log=str(log)) if "{log" in text else text)
    monkeypatch.setenv("CXX", f"{sys.executable} {folder / name}")
    return log


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not tried to load the library."""
    monkeypatch.setattr(_native, "_load", lambda load=_native._load.__wrapped__: load())


def test_it_is_built_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = use_compiler(monkeypatch, tmp_path, COMPILES)
    first, second = library(), library()
    assert first == second == (next(cache.iterdir()), False)
    assert first[0].read_text() == "built"
    assert log.read_text() == "once\n"
    assert len(list(cache.iterdir())) == 1  # no temporary file is left


def test_another_compiler_cpu_or_source_is_another_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(monkeypatch, tmp_path, COMPILES)
    paths = {library()[0]}
    use_compiler(monkeypatch, tmp_path, COMPILES, "another.py")
    paths.add(library()[0])
    monkeypatch.setattr(build, "_cpu", lambda: "another CPU")
    paths.add(library()[0])
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "one.cpp").write_text("int one;")
    monkeypatch.setattr(build, "SOURCES", sources)
    paths.add(library()[0])
    (sources / "one.cpp").write_text("int two;")
    paths.add(library()[0])
    assert len(paths) == 5


def test_several_may_build_at_the_same_time(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiler(monkeypatch, tmp_path, "import time; time.sleep(0.2)\n" + COMPILES)
    found: list[tuple[Path, bool]] = []
    threads = [threading.Thread(target=lambda: found.append(library())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(next(cache.iterdir()), False)] * 3


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiler(monkeypatch, tmp_path, COMPILES)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTDDPM_CACHE_DIR", str(tmp_path / "file" / "inside"))
    path, temporary = library()
    assert temporary
    assert path.read_text() == "built"
    assert path.parent.stat().st_mode & 0o077 == 0  # nobody else can have put it there
    path.unlink()
    path.parent.rmdir()


def test_what_the_compiler_says_is_the_reason(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiler(monkeypatch, tmp_path, FAILS)
    with pytest.raises(BuildError, match="fails: native.cpp:1: error: this compiler is broken"):
        library()
    assert list(cache.iterdir()) == []
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="the C\\+\\+ compiler no-such-compiler is not there"):
        library()


@pytest.mark.usefixtures("forgotten", "cache")
def test_without_a_compiler_torch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    reason = r"there is no C\+\+ compiler \(g\+\+, clang\+\+, c\+\+, or one named by the variable CXX\)"
    with pytest.raises(BackendError, match=f"conv: backend 'native' cannot run here: {reason}"):
        resolve("conv", "native", "cpu", torch.float32)
    assert resolve("conv", "auto", "cpu", torch.float32) == "eager"
    x = torch.randn(1, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    group_norm_silu_(x, x, torch.ones(4), torch.zeros(4), 2)
    assert bool(torch.isfinite(x).all())


@pytest.mark.usefixtures("forgotten")
def test_a_library_that_does_not_load_is_not_available(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(monkeypatch, tmp_path, COMPILES)
    assert "the library does not load" in str(_native.why_not())


def test_the_cache_follows_the_usual_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASTDDPM_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fastddpm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fastddpm"


THREADS = """
import re, torch
from fastddpm_kernels import _native
assert not _native._load.cache_info().currsize  # importing builds nothing
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
assert _native.why_not() is None
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if re.search(r"lib(gomp|iomp|omp)[^/]*$", line)}
assert len(runtimes) == 1, runtimes
"""


@pytest.mark.usefixtures("native")
def test_it_runs_on_torchs_own_threads() -> None:
    subprocess.run([sys.executable, "-c", THREADS], check=True, timeout=120)


def test_which_ops_and_devices_have_native_kernels(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("conv", "attention"):
        assert resolve(op, "auto", "cpu", torch.float32) == native
    assert resolve("group_norm_silu_", "auto", "cpu", torch.float32) == native
    assert resolve("group_norm_silu", "auto", "cpu", torch.float32) == "eager"  # a plain call builds nothing
    for op in ("conv", "attention", "group_norm_silu_"):  # what runs between convolutions follows them
        for kind, expected in ((0, "eager"), (1, native), (2, "eager")):  # no products, products, faster ones of torch
            monkeypatch.setattr(_native.get(), "bfloat16", kind)
            assert resolve(op, "auto", "cpu", torch.bfloat16) == expected
            if kind:
                assert resolve(op, native, "cpu", torch.bfloat16) == native
            else:
                with pytest.raises(BackendError, match="has no AVX512-BF16"):
                    resolve(op, native, "cpu", torch.bfloat16)
        assert resolve(op, "auto", "cpu", torch.float16) == "eager"
    assert resolve("group_norm_silu", native, "cpu", torch.bfloat16) == native  # which multiplies no matrices
    for op, device, reason in (
        ("q_sample", "cpu", "there is no native kernel of q_sample"),
        ("conv", "cuda", "native kernels run on the CPU, not on device type 'cuda'"),
    ):
        with pytest.raises(BackendError, match=reason):
            resolve(op, native, device)
    with pytest.raises(BackendError, match="there is no triton kernel of conv"):
        resolve("conv", "triton", "cuda")
