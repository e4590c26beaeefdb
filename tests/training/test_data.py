"""Where training images come from: their order, folders of pictures, `.npz` files, Datasets."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fastddpm.common.images import load_image, save_npz, to_uint8
from fastddpm.training import data
from fastddpm.training.data import ArraySource, DatasetSource, load, open_data
from fastddpm.training.folder import PictureFolder, list_pictures
from fastddpm.training.order import Batches, Pick, permutation

SHAPE = (3, 8, 8)


def picks(*images: int) -> list[Pick]:
    return [Pick(image, 1000 + image) for image in images]


@pytest.mark.parametrize("length", [2, 7, 1000])
def test_an_epoch_is_a_permutation(length: int) -> None:
    orders = [permutation(length, seed, epoch) for seed in (0, 2**62) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(length))
    if length > 2:
        assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    assert permutation(length, 5, 6).equal(permutation(length, 5, 6))


def test_permutations_are_uniform() -> None:
    counts = np.zeros((4, 4))
    for epoch in range(2000):
        counts[np.arange(4), permutation(4, 1, epoch).numpy()] += 1
    # 16 cells of 500 expected; chi-square with 9 degrees of freedom is below 27.9 in 999 of 1000 cases.
    assert ((counts - 500) ** 2 / 500).sum() < 27.9


@pytest.mark.parametrize(("passes", "processes"), [(1, 1), (1, 4), (3, 2), (6, 1)])
def test_a_step_has_the_same_images_however_it_is_split(passes: int, processes: int) -> None:
    whole = list(Batches(7, 3, 24).picks(0, 4))  # more images in a step than there are
    flips = [Batches(7, 3, 24).flips(step, 0) for step in range(4)]
    parts = [Batches(7, 3, 24 // passes, passes, process, processes) for process in range(processes)]
    for step in range(4):
        read = [list(part.picks(step, step + 1)) for part in parts]  # by process, by pass
        assert [pick for turn in range(passes) for mine in read for pick in mine[turn]] == whole[step]
        mirrored = [part.flips(step, turn) for turn in range(passes) for part in parts]
        assert torch.cat(mirrored).equal(flips[step])


def test_every_image_comes_once_an_epoch() -> None:
    numbers = [pick.image for batch in Batches(10, 0, 4).picks(0, 5) for pick in batch]
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]


def test_half_of_the_images_are_mirrored() -> None:
    share = torch.cat([Batches(10, 0, 100).flips(step, 0) for step in range(100)]).float().mean()
    assert abs(float(share) - 0.5) < 4 * 0.5 / 100


def draw(seed: int, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """A smooth picture uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(small.resize(size, Image.Resampling.BICUBIC))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of all sizes, formats and modes in two classes, four of which are broken."""
    root = tmp_path / "pictures"
    (root / "b" / "deeper").mkdir(parents=True)
    (root / "a").mkdir()
    (root / ".hidden").mkdir()
    Image.fromarray(draw(0)).save(root / "a" / "plain.png")
    Image.fromarray(draw(1, (9, 30))).save(root / "a" / "tall.JPG", quality=95)
    Image.fromarray(draw(2)).convert("CMYK").save(root / "b" / "cmyk.jpg", quality=95)
    Image.fromarray(draw(3)).convert("P").save(root / "b" / "palette.gif")
    Image.fromarray(draw(4)).convert("L").save(root / "b" / "deeper" / "grey.bmp")
    Image.fromarray(draw(5)[:, :, 0].astype(np.uint16) * 257).save(root / "b" / "sixteen.png")
    rgba = np.concatenate([draw(6), np.full((16, 16, 1), 128, np.uint8)], axis=2)
    Image.fromarray(rgba).save(root / "b" / "opacity.webp", lossless=True)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(draw(7, (20, 10))).save(root / "a" / "turned.jpg", exif=turned)
    Image.fromarray(draw(8)).save(root / ".hidden" / "unseen.png")
    (root / "a" / "notes.txt").write_text("no picture")
    whole = (root / "a" / "plain.png").read_bytes()
    (root / "a" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "empty.jpg").write_bytes(b"")
    (root / "b" / "text.png").write_bytes(b"this is no picture at all")
    (root / "b" / "dangling.png").symlink_to(root / "nowhere.png")
    return root


BROKEN = ["a/cut.png", "a/empty.jpg", "b/dangling.png", "b/text.png"]
GOOD = ["a/plain.png", "a/tall.JPG", "a/turned.jpg", "b/cmyk.jpg", "b/deeper/grey.bmp", "b/opacity.webp"]
GOOD += ["b/palette.gif", "b/sixteen.png"]


@pytest.mark.parametrize(("cache_bytes", "channels"), [(1 << 20, 1), (0, 3), (1 << 20, 4)])
def test_pictures_of_a_folder(folder: Path, cache_bytes: int, channels: int) -> None:
    shape = (channels, 8, 8)
    source = PictureFolder(list_pictures(folder), shape, cache_bytes=cache_bytes)
    assert source.in_memory == (cache_bytes > 0)
    assert source.classes == ("a", "b")
    assert [entry.path for entry in source.broken] == BROKEN
    assert "truncated" in source.broken[0].reason
    assert all("\n" not in entry.reason and entry.reason for entry in source.broken)
    images, labels = source.read(picks(*range(len(source))))
    assert labels is not None
    assert labels.tolist() == [int(path.startswith("b")) for path in GOOD]
    assert images.dtype == torch.uint8
    for image, path in zip(images, GOOD, strict=True):
        torch.testing.assert_close(image.float() / 127.5 - 1, load_image(folder / path, shape), rtol=0, atol=1e-6)


def test_what_was_found_is_kept_and_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "results" / "data.json"
    first = open_data(folder, SHAPE, cache_bytes=0, record=record)
    assert isinstance(first, PictureFolder)
    monkeypatch.setattr(PictureFolder, "_read_all", lambda *_: pytest.fail("all pictures are read again"))
    again = open_data(folder, SHAPE, cache_bytes=0, record=record)
    assert isinstance(again, PictureFolder)
    assert again.broken == first.broken
    assert again.read(picks(0, 7))[0].equal(first.read(picks(0, 7))[0])
    monkeypatch.undo()
    Image.fromarray(draw(9)).save(folder / "a" / "cut.png")  # mended
    mended = open_data(folder, SHAPE, cache_bytes=0, record=record)
    assert len(mended) == len(first) + 1


def test_a_picture_that_breaks_later_is_replaced_by_the_next(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = PictureFolder(list_pictures(folder), SHAPE, cache_bytes=0)
    expected = source.read(picks(1))[0]
    (folder / GOOD[0]).write_bytes(b"gone")
    with caplog.at_level(logging.WARNING):
        assert source.read(picks(0))[0].equal(expected)
        source.read(picks(0))
    assert [record.getMessage().split(" can ")[0] for record in caplog.records] == [GOOD[0]]  # said once


def test_pictures_beside_subfolders_have_no_classes(folder: Path) -> None:
    Image.fromarray(draw(0)).save(folder / "top.png")
    source = PictureFolder(list_pictures(folder), SHAPE, cache_bytes=1 << 20)
    assert source.classes == ()
    assert source.read(picks(0))[1] is None


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing is not a folder"):
        open_data(tmp_path / "missing", SHAPE, cache_bytes=0)
    with pytest.raises(ValueError, match="holds no picture, must hold files such as"):
        open_data(tmp_path, SHAPE, cache_bytes=0)
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no picture that can be read; x.png: "):
        open_data(tmp_path, SHAPE, cache_bytes=0)
    with pytest.raises(ValueError, match="the model's data have 2 channels, must have 1, 3 or 4"):
        open_data(tmp_path, (2, 8, 8), cache_bytes=0)
    with pytest.raises(ValueError, match="the network does not say what size"):
        open_data(tmp_path, None, cache_bytes=0)


def test_npz_files_that_sample_writes(tmp_path: Path) -> None:
    images = torch.rand(5, 3, 4, 6) * 2 - 1
    save_npz(tmp_path / "labelled.npz", images, [0, 1, 2, 1, 0])
    source = open_data(tmp_path / "labelled.npz", None, cache_bytes=0)
    read, labels = source.read(picks(4, 1))
    assert np.array_equal(read.permute(0, 2, 3, 1).numpy(), to_uint8(images)[[4, 1]])
    assert labels is not None
    assert labels.tolist() == [0, 1]
    assert len(source.classes) == 3

    (tmp_path / "cut.npz").write_bytes((tmp_path / "labelled.npz").read_bytes()[:100])
    with pytest.raises(ValueError, match="cut.npz is not a .npz that can be read"):
        ArraySource(tmp_path / "cut.npz")
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"arr_0 has float64 \[2, 4, 4, 3\], must be uint8"):
        ArraySource(tmp_path / "floats.npz")
    np.savez(tmp_path / "objects.npz", np.array([{}, {}], dtype=object))
    with pytest.raises(ValueError, match="objects.npz is not a .npz that can be read"):
        ArraySource(tmp_path / "objects.npz")
    np.savez(tmp_path / "labels.npz", np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"arr_1 is int64 \[3\], must be integer labels \[2\]"):
        ArraySource(tmp_path / "labels.npz")


class Items(Dataset[Any]):
    """A Dataset of given items."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def test_items_of_datasets() -> None:
    image = torch.rand(3, 8, 8)
    for item in (image, (image, 1), [image, torch.tensor(1)], {"image": image, "label": 1}, {"pixel_values": image}):
        images, labels = DatasetSource(Items(item, item), SHAPE).read(picks(0, 1))
        assert images.equal(torch.stack([image, image]))
        has_label = (isinstance(item, dict) and "label" in item) or isinstance(item, tuple | list)
        assert (labels is not None and labels.tolist() == [1, 1]) == has_label
    photo = Image.fromarray(draw(0, (30, 20)))
    images, _ = DatasetSource(Items((photo, 0)), SHAPE).read(picks(0))
    assert images.shape == (1, *SHAPE)
    assert images.dtype == torch.uint8
    for item, message in (
        ("x", "data has images of str, must be tensors"),
        ({"picture": image}, r"data has items with keys \['picture'\], must have one of image"),
        (image.long(), "data has images of torch.int64, must be uint8"),
        ((image, 1.7), "data has the label 1.7, must be an integer"),
        ((image, "cat"), "data has the label 'cat', must be an integer"),
        ((image, torch.eye(3)[0]), r"data has the label tensor\(\[1., 0., 0.\]\), must be an integer"),
    ):
        with pytest.raises(TypeError, match=message):
            DatasetSource(Items(item), SHAPE).read(picks(0))
    with pytest.raises(ValueError, match="items with a label and items without"):
        DatasetSource(Items((image, 1), image), SHAPE).read(picks(0, 1))
    with pytest.raises(
        ValueError, match=r"data has items of torch.float32 \[1, 8, 8\] and of torch.float32 \[3, 8, 8\]"
    ):
        DatasetSource(Items(image, image[:1]), SHAPE).read(picks(0, 1))

    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter([image])

    for wrong in (Stream(), 3):
        with pytest.raises(TypeError, match="must be a folder, an .npz, or a Dataset with a length"):
            open_data(wrong, SHAPE, cache_bytes=0)


class Noisy(Dataset[Tensor]):
    """What it returns is random."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()])  # noqa: NPY002


def test_workers_outlive_signals() -> None:
    """A batch system tells every process of a run to stop, and the step that the run is in needs its data."""
    loaded = load(DatasetSource(Noisy(), None), Batches(5, 0, 4), 0, 6, num_workers=1, pin_memory=False)
    next(loaded)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    assert len(list(loaded)) == 5


class Breaks(Noisy):
    """Its fourth item cannot be read."""

    def __getitem__(self, index: int) -> Tensor:
        if index == 3:
            raise KeyError("not here")
        return super().__getitem__(index)


def test_workers_end_with_the_run_whatever_holds_its_error() -> None:
    """Ignoring signals, they would keep the process from ending: python ends what is left of children by SIGTERM."""
    loaded = load(DatasetSource(Breaks(), None), Batches(5, 0, 4), 0, 6, num_workers=2, pin_memory=False)
    try:
        with pytest.raises(KeyError, match="not here") as held:
            list(loaded)
        assert held.tb is not None
        assert multiprocessing.active_children() == []
        loaded = load(DatasetSource(Noisy(), None), Batches(5, 0, 4), 0, 6, num_workers=2, pin_memory=False)
        next(loaded)
        assert len(multiprocessing.active_children()) == 2
        loaded.close()
        assert multiprocessing.active_children() == []
    finally:
        for child in multiprocessing.active_children():
            child.kill()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are lent to processes on Linux")
def test_workers_are_as_many_as_the_cores_that_are_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(6)))
    made = []
    monkeypatch.setattr(data, "DataLoader", lambda *_, num_workers, **__: made.append(num_workers) or [])
    for processes in (1, 2, 4):
        list(
            load(
                DatasetSource(Noisy(), None),
                Batches(5, 0, 4, 1, 0, processes),
                0,
                1,
                num_workers="auto",
                pin_memory=False,
            )
        )
    assert made == [6, 3, 1]


def batches_of(source: DatasetSource, start: int, *, num_workers: int) -> list[Tensor]:
    loaded = load(source, Batches(5, 0, 4), start, 6, num_workers=num_workers, pin_memory=False)
    return [images for images, _ in loaded]


def test_what_a_dataset_draws_depends_on_its_place_in_the_run_alone() -> None:
    source = DatasetSource(Noisy(), None)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    whole = batches_of(source, 0, num_workers=0)
    assert torch.get_rng_state().equal(before)
    values = torch.cat(whole)[:, 1:]
    assert len(values.unique()) == values.numel()
    torch.manual_seed(2)
    for part in (batches_of(source, 3, num_workers=0), batches_of(source, 3, num_workers=2)):
        assert torch.stack(part).equal(torch.stack(whole[3:]))
