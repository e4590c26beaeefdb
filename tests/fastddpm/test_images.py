"""Pictures: exact pixels, whole files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm import images as writing
from fastddpm._files import atomic_write, read_json, write_json


def test_uint8_is_rounded_and_clipped() -> None:
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 7.0]).view(1, 1, 1, 7)
    assert writing.to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255]


def test_uint8_inverts_the_usual_scaling() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert np.array_equal(writing.to_uint8(pixels.float() / 127.5 - 1)[0, :, :, 0], pixels[0, 0].numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_holds_every_image_scaled_with_gaps(channels: int) -> None:
    images = torch.rand(7, channels, 4, 5) * 2 - 1
    picture = np.asarray(writing.grid(images, columns=3, scale=2))
    expected = writing.to_uint8(images)
    assert picture.shape == (3 * (8 + writing.GAP) + writing.GAP, 3 * (10 + writing.GAP) + writing.GAP, 3)
    for index in range(7):
        row, column = divmod(index, 3)
        y, x = writing.GAP + row * (8 + writing.GAP), writing.GAP + column * (10 + writing.GAP)
        assert np.array_equal(picture[y : y + 8 : 2, x : x + 10 : 2], np.broadcast_to(expected[index], (4, 5, 3)))
        assert (picture[y - 1, x : x + 10] == 255).all()
        assert (picture[y : y + 8, x - 1] == 255).all()


def test_labels_stand_at_rows_of_one_class_and_else_at_cells() -> None:
    images = torch.zeros(4, 1, 8, 8)
    by_row = writing.grid(images, [1, 1, 2, 2], columns=2)
    by_cell = writing.grid(images, [1, 2, 1, 2], columns=2)
    bare = writing.grid(images, columns=2)
    assert (by_row.width - bare.width, by_row.height) == (2 * writing.CAPTION_HEIGHT, bare.height)
    assert (by_cell.width, by_cell.height - bare.height) == (bare.width, 2 * writing.CAPTION_HEIGHT)
    assert (np.asarray(by_row)[:, : 2 * writing.CAPTION_HEIGHT] < 128).any()  # ink


def test_grid_of_a_hundred_digits_is_ten_by_ten_and_large_enough_to_see() -> None:
    picture = writing.grid(torch.zeros(100, 1, 16, 16), [k // 10 for k in range(100)])
    assert min(picture.size) >= 500


def test_bad_grids_are_named() -> None:
    with pytest.raises(ValueError, match="labels has 1 entries"):
        writing.grid(torch.zeros(2, 1, 4, 4), [1])
    with pytest.raises(ValueError, match="columns is 0"):
        writing.grid(torch.zeros(2, 1, 4, 4), columns=0)
    with pytest.raises(ValueError, match="2 channels"):
        writing.grid(torch.zeros(2, 2, 4, 4))


def test_npz_is_as_evaluators_read_it(tmp_path: Path) -> None:
    images = torch.rand(3, 3, 4, 4) * 2 - 1
    writing.save_npz(tmp_path / "a.npz", images, [3, 1, 4])
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_0"].shape == (3, 4, 4, 3)
        assert arrays["arr_1"].tolist() == [3, 1, 4]
    writing.save_npz(tmp_path / "b.npz", images)
    with np.load(tmp_path / "b.npz") as arrays:
        assert list(arrays) == ["arr_0"]


def test_folder_holds_exact_images(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    writing.save_folder(tmp_path / "out", images, [5, 6])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00000-class5.png", "00001-class6.png"]
    read = np.asarray(Image.open(tmp_path / "out" / "00001-class6.png"))
    assert np.array_equal(read, writing.to_uint8(images)[1])


def test_gif_moves_and_rests(tmp_path: Path) -> None:
    frames = [writing.grid(torch.full((1, 1, 4, 4), value)) for value in (-1.0, 0.0, 1.0)]
    writing.save_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as movie:
        assert movie.n_frames == 3
        assert movie.info["loop"] == 0
    with pytest.raises(ValueError, match="frames is empty"):
        writing.save_gif(tmp_path / "b.gif", [])


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"
    atomic_write(path, lambda temporary: temporary.write_text("new") and None)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644


def test_json_that_is_not_an_object_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1})
    assert read_json(tmp_path / "a.json") == {"b": 1}
    for content, message in (("{", "is not valid JSON"), ("[1]", "holds a list")):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="is missing"):
        read_json(tmp_path / "c.json")
