"""Two profiles side by side, and what is drawn of one: with figures made by hand."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastddpm.perf.profiling import causes, compare, plots


def spread(median: float, noise: float = 0.02, samples: int = 9) -> dict[str, float]:
    low, high = median * (1 - noise), median * (1 + noise)
    return {"median": median, "p20": low, "p80": high, "min": low, "samples": samples}


def rate(best: float) -> dict[str, float]:
    return {**spread(best), "best": best}


def record(batch: int, us: float) -> dict[str, Any]:
    names = {"conv": (1e9, 1e6, 0.6), "norm": (0, 4e6, 0.2), "pointwise": (1e8, 2e6, 0.1), "time": (0, 1e3, 0.01)}
    layers: list[dict[str, Any]] = [
        {"name": kind, "kind": kind, "size": [8, 8], "kernels": 1, "flops": flops * batch, "bytes": size * batch,
         "us": spread(share * us)}
        for kind, (flops, size, share) in names.items()
    ]  # fmt: skip
    roofs = causes.Ceilings(1e13, 1e12)
    causes.judge_layers(layers, roofs)
    return {
        "batch": batch, "status": "ok", "us_per_step": spread(us), "network_us": spread(0.95 * us),
        "kinds": {kind: spread(share * us) for kind, (_, _, share) in names.items()}, "peak_memory": {"bytes": 5e8},
        "layers": layers, "floor": causes.floors(layers, roofs, 1_000_000, us),
    }  # fmt: skip


def profiled() -> dict[str, Any]:
    return {
        "schema": "fastddpm.profile/1", "device": {"kind": "cuda", "name": "Some GPU"}, "precision": "float16",
        "steps": 1000, "written": "2026-01-02T03:04:05Z", "fastddpm": "0.1", "network": {"class": "UNet"},
        "ceilings": {"matmul_tflops": {"fp16": rate(10.0)}, "copy_gb_s": rate(1000.0), "copy_cached_gb_s": rate(3000.0),
                     "latency": {"graph_node_us": 1.2}},
        "batches": [record(1, 400.0), record(8, 900.0), {"batch": 64, "status": "failed", "error": "no memory"}],
    }  # fmt: skip


def test_a_change_is_one_beyond_the_noise() -> None:
    old, new = profiled(), profiled()
    new["batches"][0]["us_per_step"] = spread(200.0)
    new["batches"][1]["us_per_step"] = spread(930.0)  # 882 to 918 against 911 to 949
    new["batches"][1]["kinds"]["norm"] = spread(400.0)
    new["ceilings"]["copy_gb_s"] = rate(1100.0)
    new["batches"][0]["peak_memory"]["bytes"] = 2.5e8
    changes = {change.what: change for change in compare.compare(old, new)}
    first = changes["batch 1: step"]
    assert (first.ratio, first.verdict) == (2.0, "better")
    assert (first.low, first.high) == pytest.approx((2 * 0.98 / 1.02, 2 * 1.02 / 0.98))
    assert changes["batch 8: step"].verdict == "within noise"
    assert changes["batch 8: step"].ratio == pytest.approx(900 / 930)
    assert changes["batch 8: norm layers"].verdict == "worse"
    copied = changes["ceiling: copy"]  # of a rate more is better
    assert (copied.ratio, copied.verdict) == (pytest.approx(1.1), "better")
    memory = changes["batch 1: peak memory"]
    assert (memory.ratio, memory.low, memory.verdict) == (2.0, None, "noise not known")
    assert changes["batch 1: network"] == compare.Change(
        "batch 1: network", "us", 380.0, 380.0, 1.0, pytest.approx(0.98 / 1.02), pytest.approx(1.02 / 0.98),
        "within noise",
    )  # fmt: skip
    new["batches"][0]["us_per_step"] = spread(100.0, samples=2)  # too few to know the noise
    change = {change.what: change for change in compare.compare(old, new)}["batch 1: step"]
    assert (change.ratio, change.low, change.verdict) == (4.0, None, "noise not known")


def test_table_of_two_profiles() -> None:
    old, new = profiled(), copy.deepcopy(profiled())
    new["batches"][0]["us_per_step"] = spread(200.0)
    new["precision"] = "bfloat16"
    new["batches"].pop(1)
    lines = compare.markdown(old, new, ("before", "after")).splitlines()
    assert lines[0] == "before (Some GPU, 2026-01-02 03:04, fastddpm 0.1) against after (Some GPU, 2026-01-02 03:04, " \
                       "fastddpm 0.1):"  # fmt: skip
    assert "| batch 1: step | 400 us | 200 us | **2.00 (1.92 to 2.08)** | **better** |" in lines
    assert "| batch 8: step | 900 us | - | - | only old |" in lines
    assert "| ceiling: graph node | 1.2 us | 1.2 us | 1.00 | noise not known |" in lines
    assert "Of 9 figures whose noise is known 1 got better and 0 worse beyond it." in lines
    assert lines[-1] == "Not only the code differs: precision: float16, now bfloat16."
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {6}


def test_files_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="schema is None, must be one of 'fastddpm.profile/1'"):
        compare.figures({"loss": 1})
    with pytest.raises(ValueError, match="the old file's schema is 'fastddpm.gpu_check/1'"):
        compare.compare({"schema": "fastddpm.gpu_check/1", "sections": {}}, profiled())


@pytest.mark.parametrize("name", ["plot.png", "plot.svg"])
def test_plot(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    plots.check_plot(path)
    plots.save_profile(path, profiled())
    first = path.read_bytes()
    if name.endswith("png"):
        with Image.open(path) as image:
            image.load()
            assert image.width > 1200
            colours = {colour for _, colour in image.convert("RGB").getcolors(2**20) or []}
        for kind in ("conv", "norm"):  # drawn in its own colour, through which the grid does not show
            colour = tuple(int(plots.STYLES[kind][0][k : k + 2], 16) for k in (1, 3, 5))
            assert any(max(abs(a - b) for a, b in zip(colour, other, strict=True)) < 100 for other in colours)
    else:
        text = first.decode()
        assert text.count("<svg") == 1
        plots.save_profile(path, profiled())
        assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_plots_without_measurements_or_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = profiled()
    content["ceilings"]["copy_gb_s"] = {"error": "no"}
    plots.save_profile(tmp_path / "a.png", content)
    content["batches"] = content["batches"][2:]
    with pytest.raises(ValueError, match="no batch size was measured"):
        plots.save_profile(tmp_path / "b.png", content)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install .fastddpm\[profile\]"):
        plots.check_plot(Path("a.png"), "--plot")
