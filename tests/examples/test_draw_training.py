"""examples/draw_training.py: a picture of a run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
from PIL import Image

from fastddpm.common.images import save_grid

EXAMPLE = Path(__file__).parents[2] / "examples" / "draw_training.py"


def test_a_run_is_drawn(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("draw_training", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    (tmp_path / "samples").mkdir()
    records = []
    for step in (2, 4):
        records += [{"step": step, "loss": 1 / step}, {"step": step, "frechet": 3.0 - step / 4}]
        save_grid(tmp_path / "samples" / f"step-{step:07d}.png", torch.rand(20, 1, 16, 16) * 2 - 1)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    example.draw(tmp_path, tmp_path / "run.png", "frechet")
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.size == (880, 440)
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 100  # curves and grids, not an empty page
