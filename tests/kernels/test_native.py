"""How the native library is built, kept and refused. The compilers here are scripts that write a file."""

from __future__ import annotations

import errno
import logging
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fastddpm_kernels import native as _native
from fastddpm_kernels.backend import BackendError, resolve
from fastddpm_kernels.group_norm_silu import group_norm_silu_
from fastddpm_kernels.native import build
from fastddpm_kernels.native.build import BuildError, cache_folder, library

# Object files say what they were made of, a library is all of its object files. What is included is noted as g++ does.
COMPILES = """
import sys, pathlib, re
arguments, out = sys.argv[1:], pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
inputs = [pathlib.Path(a) for a in arguments if a.endswith((".cpp", ".o")) and pathlib.Path(a) != out]
if "-c" in arguments:
    included = ["src/" + name for name in re.findall('#include "(.*)"', inputs[0].read_text())]
    pathlib.Path(arguments[arguments.index("-MF") + 1]).write_text(f"{{out}}: {{inputs[0]}} " + " ".join(included))
out.write_text("built\\n" + "".join(path.read_text() for path in inputs))
with open({log!r}, "a") as file: file.write(out.stem + "\\n")
"""
FAILS = "import sys; sys.exit('native.cpp:1: error: this compiler is broken')"
WRITES_NOTHING = """
import sys, pathlib
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).touch()
with open({log!r}, "a") as file: file.write("once\\n")
"""
FILES = {"op/one.cpp": '#include "op/shared.h"', "op/two.cpp": "", "op/shared.h": "// 1", "native/three.cpp": ""}
ALL = ["library", "one", "three", "two"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTDDPM_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small library's sources."""
    folder = tmp_path / "sources"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where private folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(build.tempfile, "tempdir", str(folder))
    return folder


def use_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, name: str = "compiler.py") -> Path:
    """Use a compiler that is a Python program; return where it says that it ran."""
    log = folder / "log"
    (folder / name).write_text(text.format(log=str(log)) if "{log" in text else text)
    monkeypatch.setenv("CXX", f"{sys.executable} -IS {folder / name}")
    return log


def path_of_library() -> Path:
    with library() as path:
        return path


def ran(log: Path) -> list[str]:
    """What the compiler wrote since this was last asked."""
    lines = sorted(log.read_text().split()) if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not tried to load the library."""
    monkeypatch.setattr(_native, "_load", lambda load=_native._load.__wrapped__: load())


@pytest.mark.usefixtures("sources")
def test_it_is_built_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = use_compiler(monkeypatch, tmp_path, COMPILES)
    first, second = path_of_library(), path_of_library()
    assert first == second == next(cache.glob("*/native-*.so"))
    assert first.read_text().startswith("built")
    assert ran(log) == ALL


def test_another_compiler_cpu_or_source_is_another_library(
    cache: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(monkeypatch, tmp_path, COMPILES)
    paths = {path_of_library()}
    use_compiler(monkeypatch, tmp_path, COMPILES, "another.py")
    paths.add(path_of_library())
    monkeypatch.setattr(build, "_cpu", lambda: "another CPU")
    paths.add(path_of_library())
    (sources / "op" / "two.cpp").write_text("int two;")
    paths.add(path_of_library())
    assert len(paths) == 4
    assert len({path.parent for path in paths}) == 3  # object files of another source are those of the same folder


def test_what_has_changed_is_compiled_and_nothing_else(
    cache: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = use_compiler(monkeypatch, tmp_path, COMPILES)
    paths = [path_of_library()]
    assert ran(log) == ALL
    for changed, expected in (
        ("op/two.cpp", ["library", "two"]),
        ("op/shared.h", ["library", "one"]),
        ("native/four.cpp", ["four", "library"]),
    ):
        (sources / changed).write_text("changed")
        os.utime(sources / changed, (1, 1))  # an installation may keep old times
        paths.append(path_of_library())
        assert ran(log) == expected, changed
    (sources / "native" / "three.cpp").unlink()
    paths.append(path_of_library())
    assert ran(log) == ["library"]
    assert "three" not in str(list(paths[-1].parent.glob("objects/src/*/*")))
    assert len(set(paths)) == 5
    assert all(path.is_file() for path in paths)  # other checkouts go on using theirs


def test_object_files_from_a_time_to_come_are_not_used(
    cache: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = use_compiler(monkeypatch, tmp_path, COMPILES)
    objects = path_of_library().parent / "objects"
    ran(log)
    os.utime(objects / "op" / "two.o", (time.time() + 1000,) * 2)
    (sources / "op" / "two.cpp").write_text("changed")
    assert "changed" in path_of_library().read_text()
    assert ran(log) == ALL


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_text(path: Path) -> None:
    path.write_text("# not a library\n")


def remove_sum(path: Path) -> None:
    path.with_suffix(".sha256").unlink()


def garble_sum(path: Path) -> None:
    path.with_suffix(".sha256").write_bytes(b"\xff\xfe")


@pytest.mark.parametrize("damage", [cut, alter, replace_by_text, Path.unlink, remove_sum, garble_sum])
def test_a_library_that_is_not_what_was_written_is_built_anew(
    damage: object, cache: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = use_compiler(monkeypatch, tmp_path, COMPILES)
    path = path_of_library()
    before = path.read_bytes()
    damage(path)  # type: ignore[operator]
    ran(log)
    assert path_of_library() == path
    assert path.read_bytes() == before
    assert ran(log) == ["library"]
    assert path_of_library() == path
    assert ran(log) == []


REAL = """
import torch
from fastddpm_kernels import native
assert native.why_not() is None, native.why_not()
assert native.checksums([torch.tensor([1, 0])]) == [1]
"""


@pytest.mark.usefixtures("native")
def test_a_damaged_library_ends_no_process(tmp_path: Path) -> None:
    """Truncated at a page, as a full disk or a crash leaves it, a library that is loaded ends a process by SIGBUS."""
    with library() as path:
        folder = shutil.copytree(path.parent, tmp_path / path.parent.name)
    copy, whole = folder / path.name, path.read_bytes()
    assert len(whole) > 20 * 4096
    copy.write_bytes(whole[: 10 * 4096])
    environment = os.environ | {"FASTDDPM_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", REAL], check=True, timeout=300, env=environment)
    assert copy.stat().st_size == len(whole)


@pytest.mark.usefixtures("sources", "cache")
def test_a_compiler_that_writes_nothing_runs_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = use_compiler(monkeypatch, tmp_path, WRITES_NOTHING)
    with pytest.raises(BuildError, match="writes an empty library"):
        path_of_library()
    assert len(ran(log)) == 2 * len(ALL)


def test_object_files_that_do_not_link_are_made_anew(
    cache: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejects = "import sys; any(open(a).read() == 'damaged' for a in sys.argv if a.endswith('.o') and a != sys.argv[-1])"
    log = use_compiler(monkeypatch, tmp_path, rejects + " and sys.exit('error: not an object')\n" + COMPILES)
    path = path_of_library()
    ran(log)
    damaged = path.parent / "objects" / "op" / "two.o"
    status = damaged.stat()
    damaged.write_text("damaged")
    os.utime(damaged, ns=(status.st_atime_ns, status.st_mtime_ns))
    path.unlink()
    assert "damaged" not in path_of_library().read_text()
    assert ran(log) == ALL


BUILDS = """
import sys, pathlib
from fastddpm_kernels.native import build
build.SOURCES = pathlib.Path(sys.argv[1])
with build.library() as path: print(path, path.is_file())
"""


def start_building(sources: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", BUILDS, str(sources)], stdout=subprocess.PIPE, text=True)


def test_several_may_build_at_the_same_time(
    cache: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = use_compiler(monkeypatch, tmp_path, "import time; time.sleep(0.3)\n" + COMPILES)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(path_of_library())) for _ in range(3)]
    processes = [start_building(sources) for _ in range(2)]
    for thread in threads:
        thread.start()
    said = [process.communicate(timeout=60)[0] for process in processes]
    for thread in threads:
        thread.join()
    path = next(cache.glob("*/native-*.so"))
    assert found == [path] * 3
    assert said == [f"{path} True\n"] * 2
    assert ran(log) == ALL  # all but one waited


def test_what_a_killed_build_leaves_is_used_or_removed(
    cache: Path, sources: Path, private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process is killed; its compilers, which go on for a moment, keep the lock; then another builds."""
    log = use_compiler(monkeypatch, tmp_path, "import time; time.sleep(0.3)\n" + COMPILES)
    process = start_building(sources)
    while not list(cache.glob("*/objects/build.ninja")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    path = path_of_library()
    assert path.read_text().count("built") == 4
    assert sorted(p.suffix or p.name for p in path.parent.iterdir()) == [".sha256", ".so", "lock", "objects"]
    assert set(ran(log)) == set(ALL)
    assert list(private.iterdir()) == []


def test_another_build_is_not_waited_for_for_ever(
    cache: Path, sources: Path, private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(monkeypatch, tmp_path, COMPILES)
    path = path_of_library()
    path.unlink()
    monkeypatch.setattr(build, "_PATIENCE", 0.5)
    with build._locked(path.parent), library() as own:
        assert own.parent.parent == private


@pytest.fixture(params=["no folder", "read-only", "full"])
def unusable(request: pytest.FixtureRequest, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that cannot be written."""
    if request.param == "no folder":
        cache.touch()
        monkeypatch.setenv("FASTDDPM_CACHE_DIR", str(cache / "inside"))
        return
    write = Path.write_bytes
    code = errno.EROFS if request.param == "read-only" else errno.ENOSPC

    def fail(path: Path, content: bytes) -> int:
        if cache in path.parents:
            raise OSError(code, os.strerror(code), str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail)


@pytest.mark.usefixtures("unusable", "sources")
def test_a_cache_that_cannot_be_written_is_done_without(
    private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(monkeypatch, tmp_path, COMPILES)
    with library() as path:
        assert path.parent.parent == private
        assert path.read_text().startswith("built")
        assert path.parent.stat().st_mode & 0o077 == 0  # nobody else can have put it there
        with library() as other:  # another process does not take it for a dead one's
            assert other.parent != path.parent
        assert path.is_file()
    assert list(private.iterdir()) == []


def test_a_disk_that_is_full_for_the_compiler_is_full(
    cache: Path, sources: Path, private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = f"import os, sys\nif {str(cache)!r} in os.getcwd(): sys.exit('error: one.o: No space left on device')\n"
    use_compiler(monkeypatch, tmp_path, full + COMPILES)
    with library() as path:
        assert path.parent.parent == private
    monkeypatch.setenv("FASTDDPM_CACHE_DIR", str(private / "cache"))
    full = "import sys; sys.exit('error: one.o: No space left on device')"
    use_compiler(monkeypatch, tmp_path, full)
    with pytest.raises(BuildError, match="it cannot be written: .*No space left on device"):
        path_of_library()


@pytest.mark.usefixtures("unusable", "sources")
def test_private_folders_of_dead_processes_are_removed(
    private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(monkeypatch, tmp_path, COMPILES)
    dead = private / f"{build._TEMPORARY}dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "library.so").touch()
    path_of_library()
    assert list(private.iterdir()) == []


@pytest.mark.usefixtures("sources")
def test_what_the_compiler_says_is_the_reason(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiler(monkeypatch, tmp_path, FAILS)
    with pytest.raises(BuildError, match="fails: native.cpp:1: error: this compiler is broken"):
        path_of_library()
    assert list(cache.glob("*/native-*")) == []


@pytest.mark.usefixtures("sources", "cache")
@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("no-such-compiler", r"the C\+\+ compiler no-such-compiler is not there"),
        ('g++ "-O3', r"""CXX is 'g\+\+ "-O3', must be a command: No closing quotation"""),
        ("''", r"the C\+\+ compiler  is not there"),
    ],
)
def test_what_is_wrong_with_cxx_is_said(named: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", named)
    with pytest.raises(BuildError, match=reason):
        path_of_library()


def test_a_compiler_may_have_quotes_blanks_and_dollars(
    cache: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "with blanks: and $dollars"
    folder.mkdir()
    use_compiler(monkeypatch, folder, COMPILES)
    monkeypatch.setenv("CXX", f"{sys.executable} -IS '{folder / 'compiler.py'}'")
    assert path_of_library().read_text().startswith("built")


@pytest.mark.usefixtures("sources", "cache")
def test_a_build_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = use_compiler(monkeypatch, tmp_path, "import time; time.sleep(5)\n" + COMPILES)
    monkeypatch.setattr(build, "_SECONDS", 0.5)
    with pytest.raises(BuildError, match=r"takes longer than 0\.5 s"):
        path_of_library()
    time.sleep(0.2)
    assert ran(log) == []


@pytest.mark.usefixtures("sources", "cache")
def test_ninja_is_the_packages_or_the_one_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = build._ninja()
    use_compiler(monkeypatch, tmp_path, COMPILES)
    monkeypatch.setitem(sys.modules, "ninja", None)  # as if it were not installed
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match="there is no ninja"):
        path_of_library()
    own = tmp_path / "bin"
    own.mkdir()
    shutil.copy(packaged, own / "ninja")
    monkeypatch.setenv("PATH", f"{own}:/usr/bin:/bin")
    assert build._ninja() == str(own / "ninja")
    assert path_of_library().read_text().startswith("built")


@pytest.mark.usefixtures("cache")
def test_a_terminal_shows_how_far_it_is(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "fastddpm.kernels")
    use_compiler(monkeypatch, tmp_path, COMPILES)
    path_of_library()
    assert capfd.readouterr() == ("", "")
    assert "building the native library, once" in caplog.text
    assert "built in" in caplog.text
    (sources / "op" / "two.cpp").write_text("changed")
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        path_of_library()
        monkeypatch.undo()
        seen = os.read(ours, 4096).decode()
    os.close(ours)
    assert "building the native library, once: 1 of 2 files" in seen
    assert seen.endswith("\r\x1b[K")


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


@pytest.mark.usefixtures("forgotten", "cache", "sources")
def test_a_library_that_does_not_load_is_built_anew_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = use_compiler(monkeypatch, tmp_path, COMPILES)
    assert "the library does not load" in str(_native.why_not())
    assert ran(log) == sorted(2 * ALL)
    use_compiler(monkeypatch, tmp_path, f"import os, sys; os.execv({shutil.which('g++')!r}, ['g++', *sys.argv[1:]])")
    assert "the library does not load: " in str(_native.why_not())  # a library, without what is wanted of it
    assert "fastddpm_conv3x3_winograd" in str(_native.why_not())


def test_the_cache_follows_the_usual_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASTDDPM_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fastddpm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fastddpm"


THREADS = """
import re, torch
from fastddpm_kernels import native as _native
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
    with pytest.raises(BackendError, match="there is no triton kernel of attention"):
        resolve("attention", "triton", "cuda")
