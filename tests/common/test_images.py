"""Pictures: exact pixels, whole files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.common import images as writing
from fastddpm.common.files import atomic_write, read_json, write_json


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


def test_npz_of_grey_images_in_colour(tmp_path: Path) -> None:
    images = torch.tensor([[[[-1.0, 1.0]]]])
    writing.save_npz(tmp_path / "a.npz", images, in_colour=True)
    writing.save_npz(tmp_path / "b.npz", torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    assert writing.read_npz(tmp_path / "a.npz", ["arr_0"])["arr_0"].tolist() == [[[[0] * 3, [255] * 3]]]
    assert writing.read_npz(tmp_path / "b.npz", ["arr_0"])["arr_0"].tolist() == [[[[0], [255]]]]


def test_pictures_of_a_folder_are_found_once(tmp_path: Path) -> None:
    for name in ("b.png", "a/d.JPG", "a/c.png", "a/.hidden.png", ".trash/e.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in writing.picture_files(tmp_path)] == [
        "b.png",
        "a/c.png",
        "a/d.JPG",
    ]


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
    (tmp_path / "a.json").write_text('{"b": 1}', encoding="utf-16")
    assert read_json(tmp_path / "a.json") == {"b": 1}
    for content, message in (("{", "is not valid JSON"), ("[1]", "holds a list")):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / "a.json")
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(ValueError, match="a.json is not valid JSON: it has 3221 MB, may have at most 134 MB"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="is missing"):
        read_json(tmp_path / "c.json")


def test_strip_places_images_and_captions() -> None:
    large, small = torch.rand(1, 4, 6) * 2 - 1, torch.rand(1, 2, 2) * 2 - 1
    picture = writing.strip([[large, small], [None, large]], scale=3)
    pixels = np.asarray(picture)
    step_x, step_y = 6 * 3 + writing.GAP, 4 * 3 + writing.GAP
    assert pixels.shape == (2 * step_y + writing.GAP, 2 * step_x + writing.GAP, 3)
    gap = writing.GAP
    first = pixels[gap : gap + 12, gap : gap + 18]
    assert np.array_equal(first[::3, ::3, 0], writing.to_uint8(large[None])[0, :, :, 0])
    # The small one is scaled by whole pixels, as far as it fits, and centred: by 6 to 12 x 12, 3 from the left.
    second = pixels[gap : gap + 12, gap + step_x + 3 : gap + step_x + 15]
    assert np.array_equal(second[::6, ::6, 0], writing.to_uint8(small[None])[0, :, :, 0])
    assert (pixels[gap + step_y :, : gap + 18] == 255).all()  # None
    captioned = writing.strip([[large, small]], row_captions=["a"], column_captions=["left", "right"], scale=8)
    bare = writing.strip([[large, small]], scale=8)
    assert captioned.height - bare.height == writing.CAPTION_HEIGHT
    assert (np.asarray(captioned)[: writing.CAPTION_HEIGHT] < 128).any()  # ink
    assert (np.asarray(captioned)[:, : captioned.width - bare.width] < 128).any()


def test_trajectories_are_drawn_from_left_to_right() -> None:
    x = torch.linspace(-1, 1, 30).view(30, 1, 1, 1, 1).expand(30, 6, 1, 8, 8)
    picture = writing.trajectory_strip(x, -x, range(1000, 970, -1), columns=5, rows=2)
    plain = writing.strip([[x[0, 0]] * 5] * 4, row_captions=["x0"] * 4, column_captions=["t 1000"] * 5)
    assert picture.size == plain.size
    middle = np.asarray(picture)[writing.CAPTION_HEIGHT + 28, :, 0]
    cells = [int(middle[picture.width - 28 - k * (48 + writing.GAP)]) for k in range(5)]
    assert cells == sorted(cells, reverse=True)
    assert cells[0] == 255  # the last moment is drawn
    assert writing.evenly(30, 5) == [0, 7, 14, 22, 29]
    assert writing.evenly(3, 10) == [0, 1, 2]
    assert writing.evenly(30, 1) == [29]
    assert writing.trajectory_strip(x, None, range(30), rows=1).height < picture.height


def test_bad_strips_are_named() -> None:
    image = torch.zeros(1, 4, 4)
    for rows, options, message in (
        ([], {}, "rows holds no image"),
        ([[None]], {}, "rows holds no image"),
        ([[image], [image, image]], {}, r"rows have \[1, 2\] images"),
        ([[image]], {"row_captions": ["a", "b"]}, "row_captions has 2 entries, must have one per row, 1"),
        ([[image]], {"column_captions": []}, "column_captions has 0 entries"),
        ([[image]], {"scale": 0}, "scale is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            writing.strip(rows, **options)
    x = torch.zeros(2, 1, 1, 4, 4)
    with pytest.raises(ValueError, match="timesteps has 3 entries and x 2"):
        writing.trajectory_strip(x, None, [1, 2, 3])
    with pytest.raises(ValueError, match="columns is 0"):
        writing.trajectory_strip(x, None, [1, 2], columns=0)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_come_back_from_files(tmp_path: Path, channels: int) -> None:
    images = torch.rand(1, channels, 5, 7) * 2 - 1
    writing.save_folder(tmp_path, images)
    read = writing.load_image(tmp_path / "00000.png", (channels, 5, 7))
    assert read.shape == (channels, 5, 7)
    torch.testing.assert_close(read, images[0], atol=1.01 / 255, rtol=0)
    inverted = writing.load_image(tmp_path / "00000.png", (channels, 5, 7), invert=True)
    assert torch.equal(inverted[:3], -read[:3])
    assert torch.equal(inverted[3:], read[3:])


def test_pictures_of_any_size_and_kind_can_be_read(tmp_path: Path) -> None:
    # A wide picture whose middle is white: the middle square is what is read.
    wide = np.zeros((40, 120), np.uint8)
    wide[:, 36:84] = 255
    kinds = {
        "grey.png": Image.fromarray(wide),
        "colour.png": Image.fromarray(wide).convert("RGB"),
        "palette.png": Image.fromarray(wide).convert("P"),
        "sixteen.png": Image.fromarray(wide.astype(np.uint16) * 257),
        "photo.jpg": Image.fromarray(wide).convert("RGB"),
    }
    for name, picture in kinds.items():
        picture.save(tmp_path / name)
        assert float(writing.load_image(tmp_path / name, (1, 16, 16)).min()) > 0.9, name
        assert float(writing.load_image(tmp_path / name, (3, 16, 48)).mean()) == pytest.approx(-0.2, abs=0.05), name


def test_averaging_is_that_of_cells(tmp_path: Path) -> None:
    images = torch.rand(1, 1, 16, 16) * 2 - 1
    writing.save_folder(tmp_path, images)
    read = writing.load_image(tmp_path / "00000.png", (1, 4, 4), average=True)
    torch.testing.assert_close(read, torch.nn.functional.avg_pool2d(images[0], 4), atol=2 / 255, rtol=0)


def test_files_that_are_no_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(ValueError, match="a.png is not a picture that can be read"):
        writing.load_image(tmp_path / "a.png", (1, 4, 4))
    with pytest.raises(FileNotFoundError):
        writing.load_image(tmp_path / "b.png", (1, 4, 4))
    with pytest.raises(ValueError, match="shape has 2 channels"):
        writing.load_image(tmp_path / "a.png", (2, 4, 4))
