"""The native kernels on aarch64: cross-compiled, run by an emulator, held to float64 (speed is not looked at).

    apt-get install g++-aarch64-linux-gnu qemu-user
    pytest --long tests/kernels/test_native_aarch64.py

What an op would call is recorded here, its memory goes through a file, and `aarch64_run.cpp` calls it there.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels import native as _native
from fastddpm_kernels.attention import attention_
from fastddpm_kernels.conv import conv_, pack
from fastddpm_kernels.group_norm_silu import group_norm_silu_
from fastddpm_kernels.native import build
from fastddpm_kernels.native.binding import recording
from fastddpm_kernels.native.program import _word
from fastddpm_kernels.philox import sample_keys
from fastddpm_kernels.reverse_step import reverse_step_
from fastddpm_kernels.testing import assert_close
from torch import Tensor

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PANEL = 16  # of four vectors of four
CASES = {
    "direct": (2, 6, 35, 5, 7, "direct", False),
    "few_channels": (1, 64, 3, 6, 5, "direct", False),
    "winograd2": (2, 17, 33, 7, 9, "winograd2", False),
    "winograd4": (2, 17, 33, 7, 9, "winograd4", False),
    "upsampled_direct": (1, 5, 20, 4, 3, "direct", True),
    "upsampled": (1, 5, 20, 4, 3, "winograd4", True),
}

pytestmark = [
    pytest.mark.long,
    pytest.mark.usefixtures("native"),
    pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"no {COMPILER} or {EMULATOR}"),
]


@pytest.fixture(scope="module")
def run_there(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Does what a function would do to some tensors, on the other machine."""
    folder = tmp_path_factory.mktemp("aarch64")
    flags = [flag for flag in build._FLAGS if flag != "-fPIC"]
    sources = [str(path) for path in sorted(build.SOURCES.glob("*/*.cpp"))]
    library, program = folder / "library.so", folder / "run"
    common = [COMPILER, *flags, "-march=armv8.2-a"]
    subprocess.run([*common, "-fPIC", "-shared", f"-I{build.SOURCES}", "-o", str(library), *sources], check=True)
    subprocess.run([*common, "-o", str(program), str(Path(__file__).with_name("aarch64_run.cpp")), "-ldl"], check=True)

    def run(op: Callable[[], object], *tensors: Tensor) -> None:
        call = Call()
        recording.program = call  # type: ignore[assignment]
        try:
            op()
        finally:
            recording.program = None
        places, memory = {}, b""
        for tensor in {t.untyped_storage().data_ptr(): t for t in [*tensors, *call.kept]}.values():
            storage = tensor.untyped_storage()
            memory += b"\0" * (-len(memory) % 64)
            places[storage.data_ptr()] = (len(memory), storage.nbytes(), storage)
            memory += bytes(storage.tolist())
        file = folder / "memory"
        file.write_bytes(memory)
        words = []
        for index, argument in enumerate(call.arguments):
            value = 3 if index == call.threads_at else _word(argument)
            inside = [(a, p) for a, p in places.items() if a <= value < a + max(p[1], 1)]
            words.append(f"p{inside[0][1][0] + value - inside[0][0]}" if inside else str(value))
        command = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", str(program), str(library), f"{call.name}_words"]
        subprocess.run([*command, str(file), *words], check=True, timeout=120)
        result = file.read_bytes()
        for at, size, storage in places.values():
            own = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            own.copy_(torch.frombuffer(bytearray(result[at : at + size]), dtype=torch.uint8))

    return run


class Call:
    """Takes in what one op calls, as a program would."""

    name: str
    arguments: list[Any]
    threads_at: int
    kept: list[Tensor]

    def append(self, name: str, arguments: list[Any], threads_at: int, kept: list[Tensor]) -> None:
        assert not hasattr(self, "name")
        self.name, self.arguments, self.threads_at, self.kept = name, arguments, threads_at, kept


def image(n: int, channels: int, height: int, width: int) -> Tensor:
    return torch.randn(n, height, width, channels).permute(0, 3, 1, 2)


@pytest.mark.parametrize("case", CASES)
def test_convolutions(case: str, run_there: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    n, channels, outputs, height, width, algorithm, upsample = CASES[case]
    monkeypatch.setattr(_native.get(), "panel", PANEL)
    factor = 2 if upsample else 1
    x, residual = image(n, channels, height, width), image(n, outputs, factor * height, factor * width)
    y, weight, bias = torch.zeros_like(residual), torch.randn(outputs, channels, 3, 3), torch.randn(outputs)
    packed = pack(weight, algorithm, upsample)
    run_there(conv_.bind(y, x, packed, bias=bias, residual=residual, upsample=upsample, backend="native"), y)
    wide = F.interpolate(x.double(), scale_factor=factor)
    truth = F.conv2d(wide, weight.double(), bias.double(), padding=1) + residual
    torchs = F.conv2d(wide.float(), weight, bias, padding=1) + residual
    assert_close(y, truth, eager=torchs, factor=20)  # winograd4 loses ten times as much


def test_norms(run_there: Callable[..., None]) -> None:
    x, x2, weight, bias = image(2, 20, 5, 7), image(2, 12, 5, 7), torch.randn(32), torch.randn(32)
    y, truth, torchs = image(2, 32, 5, 7), image(2, 32, 5, 7).double(), image(2, 32, 5, 7)
    run_there(group_norm_silu_.bind(y, x, weight, bias, 4, x2=x2, backend="native"), y)
    for result in (truth, torchs):
        group_norm_silu_(result, x.to(result), weight.to(result), bias.to(result), 4, x2=x2.to(result), backend="eager")
    assert_close(y, truth, eager=torchs)


def test_attention(run_there: Callable[..., None]) -> None:
    qkv, y = image(2, 3 * 24, 5, 3), image(2, 24, 5, 3)
    truth, torchs = torch.zeros_like(y), torch.zeros_like(y)
    run_there(attention_.bind(y, qkv, 2, 12, backend="native"), y)
    attention_(truth, qkv, 2, 12, backend="reference")
    attention_(torchs, qkv, 2, 12, backend="eager")
    assert_close(y, truth, eager=torchs)


def test_the_reverse_step_and_its_noise(run_there: Callable[..., None]) -> None:
    x, out, keys, step = (
        torch.randn(2, 3, 9, 7),
        image(2, 3, 9, 7),
        sample_keys([2**63 + 1, 5], [0, 9]),
        torch.tensor([1]),
    )
    table = torch.tensor([[0.0] * 7, [1.1, -0.4, 0.6, 0.3, 0.1, 0.0, 0.5]])
    truth, torchs = x.double(), x.clone()
    for result, backend in ((truth, "reference"), (torchs, "eager")):
        reverse_step_(result, out, table, step, keys=keys, clip_range=0.8, backend=backend)
    run_there(lambda: reverse_step_(x, out, table, step, keys=keys, clip_range=0.8, backend="native"), x)
    assert_close(x, truth, eager=torchs)
