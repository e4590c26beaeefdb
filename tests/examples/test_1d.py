"""`examples/train_1d.py`: its data, its report, that it learns, and the figures recorded from the full run."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastddpm.sampling.sampler import Sampler

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        return importlib.import_module("train_1d")


def settings(example: ModuleType, *options: str) -> argparse.Namespace:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_1d.py", "--device", "cpu", *options])
        return example.parse_args()


def test_curves_are_the_ink_of_rows_and_columns(example: ModuleType) -> None:
    image = torch.full((1, 1, 16, 16), -1.0)
    image[0, 0, 2, 5:9] = 1
    rows, columns = (example.profiles(image)[0] + 1) / 2
    assert rows[2] == 4 / 16
    assert columns[5:9].tolist() == [1 / 16] * 4
    assert rows.sum() == columns.sum() == 4 / 16


def test_real_curves(example: ModuleType) -> None:
    curves, labels = example.source()
    assert curves.shape == (1797, 2, 16)
    assert labels.shape == (1797,)
    assert curves.abs().max() <= 1
    assert example.ink_mismatch(curves) < 1e-6


def test_report_tells_good_from_bad(example: ModuleType) -> None:
    curves, labels = example.source()
    half = torch.randperm(len(curves))[:600]
    good = example.evaluate(curves[half], labels[half])
    assert good["recognised"] > 0.95
    assert good["variance_ratio"] == pytest.approx(1, abs=0.1)
    assert good["largest_error_of_a_mean_over_standard_deviation"] < 0.1
    assert good["ink_mismatch"]["samples"] < 1e-6

    mispaired = torch.stack([curves[half, 0], curves[half, 1].roll(1, 0)], dim=1)
    bad = example.evaluate(mispaired, labels[half].roll(5))
    assert bad["recognised"] < 0.5
    assert bad["ink_mismatch"]["samples"] > 0.1
    assert bad["telling_apart"]["samples_and_real"] > 0.7
    assert 0.4 < bad["telling_apart"]["real_and_real"] < 0.6
    assert bad["frechet"]["samples_to_real"] > 5 * bad["frechet"]["real_to_real"]


def test_short_training_learns_the_digits(example: ModuleType) -> None:
    short = "--steps 200 --width 32 --batch-size 64 --warmup-steps 20 --ema-decay 0.98 --learning-rate 0.003"
    args = settings(example, *short.split())
    model, schedule, record = example.train(args)
    assert record["settings"]["steps"] == 200
    assert "plot" not in record["settings"]
    sampler = Sampler(
        model, schedule, method="ddim", num_inference_steps=20, prediction_type=example.PREDICTION_TYPE, device="cpu"
    )
    labels = torch.arange(100) % 10
    samples = sampler.sample(100, shape=(2, 16), class_labels=labels)
    assert samples.shape == (100, 2, 16)
    assert samples.abs().max() <= 1
    figures = example.evaluate(samples, labels)
    assert figures["recognised"] > 0.5
    assert figures["ink_mismatch"]["samples"] < figures["ink_mismatch"]["rows_and_columns_of_different_digits"]


def test_plot_is_drawn(example: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves, labels = example.source()
    path = tmp_path / "new" / "plot.png"
    example.plot(path, curves[:100], labels[:100])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_recorded_figures_are_good() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "curves_1d.json").read_text())["report"]
    assert report["samples"] == 1000
    assert report["recognised"] > 0.9
    assert 0.9 < report["variance_ratio"] < 1.1
    assert report["largest_error_of_a_mean_over_standard_deviation"] < 0.1
    ink = report["ink_mismatch"]
    assert ink["samples"] < 0.2 * ink["rows_and_columns_of_different_digits"]
    assert report["frechet"]["samples_to_real"] < 5 * report["frechet"]["real_to_real"]
    assert report["telling_apart"]["samples_and_real"] < 0.6
