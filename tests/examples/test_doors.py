"""The short examples run as they stand, and say what they claim."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# name -> its arguments, and the largest difference from the original that it may print
BESIDE_THE_ORIGINAL = {
    "accelerate_diffusers": (["--steps", "5", "--batch-size", "1"], 1e-4),
    "accelerate_denoising_diffusion_pytorch": (["--steps", "5", "--batch-size", "1"], 1e-4),
    "guided_diffusion": (["--steps", "5"], 1e-4),
}


def run(monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", BESIDE_THE_ORIGINAL)
def test_images_are_the_original_s(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, limit = BESIDE_THE_ORIGINAL[name]
    run(monkeypatch, name, arguments)
    (difference,) = re.findall(r"largest difference, .*: (\S+)", capsys.readouterr().out)
    assert float(difference) < limit


def test_fusing_shows_what_was_fused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "fuse_any_model", [])
    shown = capsys.readouterr().out
    assert "conv_norm_out: GroupNorm + SiLU" in shown
    assert "[2, 4, 16, 16]" in shown


def test_a_cascade_enlarges_what_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cascade.png"
    run(monkeypatch, "cascade", ["--steps", "3", "--count", "2", "--output", str(output)])
    assert "[2, 3, 8, 8] and [2, 3, 32, 32] in " in capsys.readouterr().out
    assert output.read_bytes().startswith(b"\x89PNG")
    assert len((EXAMPLES / "cascade.py").read_text(encoding="utf-8").splitlines()) <= 60


def test_sampling_writes_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "digits.png"
    run(monkeypatch, "sample", ["--steps", "5", "-o", str(output)])
    assert "5 steps" in capsys.readouterr().out
    assert output.read_bytes().startswith(b"\x89PNG")
