"""`examples/few_steps.py`: that it runs, and what its recorded figures say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from fastddpm import load_pretrained

ROOT = Path(__file__).parents[2]
METHODS = ("ddim", "ddpm", "dpmsolver++")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("few_steps")


@pytest.fixture(scope="module")
def recorded() -> dict[tuple[str, int], dict[str, Any]]:
    result = json.loads((ROOT / "benchmarks" / "results" / "digits_few_steps.json").read_text(encoding="utf-8"))
    assert result["samples"] >= 500
    return {(point["method"], point["evaluations"]): point for point in result["points"]}


def test_measures_draws_and_resumes(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, plot = tmp_path / "new" / "figures.json", tmp_path / "plot.png"
    command = ["few_steps.py", "--output", str(figures), "--plot", str(plot), "--samples", "40"]
    command += ["--methods", *METHODS, "--evaluations"]
    monkeypatch.setattr(sys, "argv", [*command, "1"])
    example.main()
    first = json.loads(figures.read_text(encoding="utf-8"))["points"]
    monkeypatch.setattr(sys, "argv", [*command, "6", "1"])
    example.main()
    both = json.loads(figures.read_text(encoding="utf-8"))["points"]
    assert [(point["method"], point["steps"]) for point in both] == [(m, s) for m in METHODS for s in (1, 6)]
    assert both[::2] == first
    for one, six in zip(both[::2], both[1::2], strict=True):
        assert six["recognised"] >= 0.9
        assert six["distance"] < one["distance"]
    assert Image.open(plot).size == (1200, 420)

    plot.unlink()
    monkeypatch.setattr(sys, "argv", command)
    example.main()
    assert plot.exists()
    assert json.loads(figures.read_text(encoding="utf-8"))["points"] == both

    monkeypatch.setattr(sys, "argv", [*command, "6", "--seed", "1"])
    with pytest.raises(SystemExit, match="figures.json was made with other settings"):
        example.main()


def test_samples_are_spread_over_the_digits(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["few_steps.py", "--output", "x", "--plot", "y", "--samples", "15"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="--samples is 15, must be a multiple of 10"):
        example.main()
    assert not list(tmp_path.iterdir())


def test_a_step_may_take_two_evaluations(example: ModuleType) -> None:
    model = load_pretrained()
    for method, most in (("plms", 10), ("heun", 10), ("heun", 5), ("edm", 5), ("unipc", 10)):
        arm = example.METHODS[method]
        table = model.sampler(method=method, num_inference_steps=arm.steps(most), **arm.settings).table
        assert most - 1 <= int(table.needs_network.sum()) <= most


def test_recorded_figures_are_complete(example: ModuleType, recorded: dict[tuple[str, int], dict[str, Any]]) -> None:
    assert {(method, count) for method in METHODS for count in (2, 3, 5, 10, 20, 50, 100, 1000)} <= set(recorded)
    for method in example.METHODS:
        measured = sorted(count for name, count in recorded if name == method and 5 <= count <= 100)
        assert measured[0] == 5
        assert measured[-1] >= 49
        assert len(measured) >= 4


def test_better_solvers_need_fewer_steps(recorded: dict[tuple[str, int], dict[str, Any]]) -> None:
    """In the distance to real digits at few steps; with enough steps all of them are equally good."""
    for steps in (5, 10):
        distances = [recorded[method, steps]["distance"] for method in ("ddpm", "ddim", "dpmsolver++", "unipc")]
        assert distances == sorted(distances, reverse=True)
    many = [point["distance"] for (_, count), point in recorded.items() if count in (49, 50)]
    assert max(many) < 1.25 * min(many)
    assert all(point["recognised"] > 0.9 for point in recorded.values())
