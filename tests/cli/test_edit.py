"""The commands that start from images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastddpm import NoiseSchedule, UNet, save_pretrained
from fastddpm.cli import main

FAST = ["--steps", "2"]


def save(name: str, values: np.ndarray) -> None:
    Image.fromarray(values).save(name)


@pytest.mark.parametrize(
    ("arguments", "rows", "columns"),
    [
        (["edit"], 10, 4),
        (["edit", "3", "8", "--strength", "0.5,1", "-n", "2"], 2, 5),
        (["edit", "3", "--method", "unipc", "--strength", "0.5"], 1, 2),
        (["inpaint"], 10, 6),
        (["inpaint", "3", "-n", "1", "--method", "ddim"], 1, 3),
        (["interpolate"], 5, 11),
        (["interpolate", "3", "8", "--frames", "4", "--via", "noise", "--method", "ddpm"], 1, 6),
        (["interpolate", "3", "8", "--method", "dpmsolver++", "--steps", "6"], 1, 11),
    ],
)
def test_tasks_draw_a_row_per_input(
    arguments: list[str], rows: int, columns: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([arguments[0], *FAST, *arguments[1:], "-o", "a.png"]) == 0
    assert capsys.readouterr().out.endswith("wrote a.png\n")
    with Image.open("a.png") as picture:
        assert picture.height == 16 + rows * 52 + 4
        assert columns * 52 < picture.width < columns * 56 + 60
    assert [path.name for path in Path().iterdir()] == ["a.png"]


def test_inputs_are_files_of_any_size_or_labels() -> None:
    assert main(["sample", "--class-labels", "3", "--steps", "25", "--method", "dpmsolver++", "-o", "three"]) == 0
    drawn = np.asarray(Image.open("three/00000-class3.png"))
    Image.fromarray(255 - drawn).resize((160, 160), Image.Resampling.BOX).save("paper.png")
    common = ["--steps", "1000", "--strength", "0.001"]  # one step from almost no noise: nearly the input
    for name, inputs in (("label", ["3"]), ("file", ["three/00000-class3.png"]), ("large", ["paper.png", "--invert"])):
        assert main(["edit", *inputs, *common, "-o", f"{name}.npz"]) == 0
        with np.load(f"{name}.npz") as arrays:
            assert np.abs(arrays["arr_0"][0, :, :, 0].astype(int) - drawn).mean() < 4
            assert arrays["arr_1"].tolist() == ([3] if name == "label" else [10])


def test_inpainting_keeps_what_is_not_filled() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    save("image.png", image)
    fill = np.zeros((16, 16), np.uint8)
    fill[2:5, 3:9] = 255
    save("fill.png", fill)
    regions = {"top": np.s_[:8], "right": np.s_[:, 8:], "center": np.s_[4:12, 4:12], "fill.png": np.s_[2:5, 3:9]}
    for region, where in regions.items():
        assert main(["inpaint", "image.png", "--fill", region, "-n", "2", *FAST, "-o", "a.npz"]) == 0
        same = np.load("a.npz")["arr_0"][:, :, :, 0] == image
        kept = np.ones((16, 16), bool)
        kept[where] = False
        assert same[:, kept].all()
        assert same[:, ~kept].mean() < 0.5


def test_a_class_can_be_taken_from_an_input_named_or_none() -> None:
    for option, label in (([], 3), (["--class-label", "8"], 8), (["--class-label", "none"], 10)):
        assert main(["edit", "3", *FAST, *option, "-o", "a.npz"]) == 0
        assert np.load("a.npz")["arr_1"].tolist() == [label] * 3
    assert main(["interpolate", "3", "8", *FAST, "--class-label", "none", "-o", "a.png"]) == 0


def test_animations_and_folders_of_tasks() -> None:
    assert main(["edit", "3", *FAST, "--strength", "1", "-o", "e.gif", "--trajectory", "t.png"]) == 0
    assert main(["inpaint", "3", "--steps", "20", "--jump-length", "5", "-o", "i.gif"]) == 0
    assert main(["interpolate", "3", "8", *FAST, "--frames", "5", "-o", "p.gif"]) == 0
    frames = {name: Image.open(f"{name}.gif").n_frames for name in "eip"}
    assert frames["e"] == 2
    assert frames["i"] > 30
    assert frames["p"] == 8  # 0 1 2 3 4 3 2 1
    assert main(["interpolate", "3", "8", *FAST, "--frames", "5", "-o", "path"]) == 0
    assert len(list(Path("path").iterdir())) == 5
    assert Path("t.png").exists()


def test_upscaling_draws_what_reduces_to_the_input() -> None:
    assert main(["upscale", "3", "8", "--input-seed", "2", "-n", "3", "--steps", "50", "-o", "a.npz"]) == 0
    assert main(["upscale", "3", "8", "--input-seed", "2", "-n", "3", "--steps", "50", "-o", "a.png"]) == 0
    drawn = np.load("a.npz")["arr_0"][..., 0].astype(float)
    small = drawn.reshape(2, 3, 4, 4, 4, 4).mean((3, 5))
    with Image.open("a.png") as picture:
        pixels = np.asarray(picture)[:, :, 0].astype(float)
    assert pixels.shape[0] == 16 + 2 * 52 + 4
    step = (pixels.shape[1] - 4) / 5  # label, original, given, drawn three times
    given = np.stack([pixels[20 + 52 * row : 68 + 52 * row, -52 * 4 : -52 * 4 + 48][6::12, 6::12] for row in (0, 1)])
    assert step > 52
    assert np.abs(small - given[:, None]).mean() < 15
    assert np.abs(small - given[::-1, None]).mean() > 30


def test_another_upscaler_reads_files(tiny: dict[str, Any], refused: Callable[..., str]) -> None:
    """Also one that reads an image of three channels beside the one it draws."""
    save_pretrained("model", UNet(**tiny | {"in_channels": 4}), NoiseSchedule.linear(10))
    save("large.png", np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    save("small.png", np.zeros((4, 4), np.uint8))
    command = ["upscale", "--model", "model", "--factor", "2", "--noise-level", "0.1", *FAST]
    assert main([*command, "large.png", "small.png", "-n", "2", "-o", "a.npz"]) == 0
    assert np.load("a.npz")["arr_0"].shape == (4, 8, 8, 1)
    assert "INPUT is 3, a label, but --model is not the bundled one" in refused(*command, "3")
    assert "name picture files" in refused(*command)


def test_a_file_comes_before_a_label_of_the_same_name() -> None:
    save("image.png", np.zeros((16, 16), np.uint8))
    assert main(["edit", "image.png", "--guidance-scale", "2", "--class-label", "3", *FAST]) == 0
    Path("image.png").rename("11")
    assert main(["edit", "11", *FAST]) == 0
