"""Folders of shards: what they hold, that a job can go on, what is refused, and who reads them."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastddpm import NoiseSchedule, Sampler
from fastddpm.cli import main
from fastddpm.common.images import to_uint8
from fastddpm.common.shards import Layout, ShardFolder
from fastddpm.evaluation.reading import is_image_set, open_images
from fastddpm.scale import Report, merge, sample_shards
from fastddpm.scale.progress import Watch
from fastddpm.scale.worker import FAILED, KEPT, WRITTEN, Outcome

Contents = Callable[[Path], dict[str, bytes]]
LABELS = [k % 3 for k in range(20)]


def draw(sampler: Sampler, out: Path | str, count: int = 20, **changed: Any) -> Report:
    settings: dict[str, Any] = {"shard_size": 8, "class_labels": LABELS, "batch_size": 4, "progress": False} | changed
    return sample_shards(sampler, out, count, **settings)


@pytest.mark.parametrize("format", ["npz", "wds", "png"])
def test_shards_hold_the_samples_that_the_sampler_draws(sampler: Sampler, tmp_path: Path, format: str) -> None:
    report = draw(sampler, tmp_path / "out", format=format)
    assert report == Report(written=3, kept=0, failed={}, damaged=(), missing=(), samples=20)
    want = to_uint8(sampler.sample(20, class_labels=LABELS, batch_size=4))
    got = list(ShardFolder(tmp_path / "out"))
    assert [len(each.values) for each in got] == [8, 8, 4]
    np.testing.assert_array_equal(np.concatenate([each.values for each in got]), want)
    assert [label for each in got if each.labels is not None for label in each.labels.tolist()] == LABELS


def test_others_can_read_the_files(sampler: Sampler, tmp_path: Path) -> None:
    for format in ("npz", "wds", "png"):
        draw(sampler, tmp_path / format, format=format)
    want = to_uint8(sampler.sample(20, class_labels=LABELS, batch_size=4))[8]
    with np.load(tmp_path / "npz/shard-00008-00015.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["arr_0"][0], want)
        assert file["arr_1"].tolist() == LABELS[8:16]
    with zipfile.ZipFile(tmp_path / "npz/shard-00008-00015.npz") as archive:
        assert archive.testzip() is None
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with tarfile.open(tmp_path / "wds/shard-00008-00015.tar") as tar:
        assert tar.getnames()[:2] == ["00008.png", "00008.cls"]
        member = tar.extractfile("00008.png")
        assert member is not None
        np.testing.assert_array_equal(np.asarray(Image.open(member))[:, :, None], want)
    with Image.open(tmp_path / "png/shard-00008-00015" / f"00008-class{LABELS[8]}.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture)[:, :, None], want)


@pytest.mark.parametrize("format", ["npz", "wds", "png"])
@pytest.mark.parametrize("damage", ["remove", "cut", "alter", "swap"])
def test_what_is_missing_or_damaged_is_drawn_again(
    sampler: Sampler, tmp_path: Path, contents: Contents, format: str, damage: str
) -> None:
    out = tmp_path / "out"
    draw(sampler, out, format=format)
    before = contents(out)
    name = next(name for name in before if name.startswith("shard-00008"))
    other = next(name for name in before if name.startswith("shard-00000"))
    if damage == "remove":
        (out / name).unlink()
    elif damage == "cut":
        (out / name).write_bytes(before[name][: len(before[name]) // 2])
    elif damage == "alter":
        place = len(before[name]) // 2
        (out / name).write_bytes(before[name][:place] + bytes([before[name][place] ^ 1]) + before[name][place + 1 :])
    else:
        (out / name).write_bytes(before[other])
    if not (format == "npz" and damage == "remove"):
        with pytest.raises(ValueError, match="lacks 1 of 3|is damaged"):
            list(ShardFolder(out))
    report = draw(sampler, out, format=format)
    assert (report.written, report.kept) == (1, 2)
    assert report.damaged == (() if damage == "remove" and format != "png" else ("00008-00015",))
    assert contents(out) == before


def test_samples_that_are_no_images_are_float32(tmp_path: Path, contents: Contents) -> None:
    class Curves(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0.1 * x

    sampler = Sampler(Curves(), NoiseSchedule.linear(), method="ddim", num_inference_steps=2)
    settings: dict[str, Any] = {"class_labels": None, "shape": (2, 5)}
    draw(sampler, tmp_path / "out", **settings)
    got = np.concatenate([each.values for each in ShardFolder(tmp_path / "out")])
    np.testing.assert_array_equal(got, sampler.sample(20, shape=(2, 5), batch_size=4).numpy())
    merge(tmp_path / "out", tmp_path / "all.npz", progress=False)
    with np.load(tmp_path / "all.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], got)
    with pytest.raises(ValueError, match=r"format is 'png' but samples have shape \[2, 5\], must be 'npz'"):
        draw(sampler, tmp_path / "png", format="png", **settings)


def test_another_model_or_setting_is_refused_by_name(sampler: Sampler, tmp_path: Path, contents: Contents) -> None:
    out = tmp_path / "out"
    draw(sampler, out)
    before = contents(out)
    for changed, message in (
        ({"seed": 1}, "seed was 0, is 1"),
        ({"shard_size": 4}, "shard_size was 8, is 4"),
        ({"format": "wds"}, 'format was "npz", is "wds"'),
        ({"class_labels": 1}, "class_labels.sha256 was"),
        ({"batch_size": 8}, "batch_size was 4, is 8"),
        ({"count": 19, "class_labels": LABELS[:19]}, "num_samples was 20, is 19"),
    ):
        with pytest.raises(ValueError, match=f"output is {out}, which holds another job: {message}"):
            draw(sampler, out, **changed)
    more = Sampler(sampler.model, NoiseSchedule.linear(), method="ddim", num_inference_steps=3)
    with pytest.raises(ValueError, match=r"sampler\.steps was 2, is 3"):
        draw(more, out)
    spaced = Sampler(
        sampler.model, NoiseSchedule.linear(), method="ddim", num_inference_steps=2, timestep_spacing="trailing"
    )
    with pytest.raises(ValueError, match=r"sampler\.timesteps_sha256 was"):
        draw(spaced, out)
    with torch.no_grad():
        next(iter(sampler.model.parameters())).add_(1e-3)
    with pytest.raises(ValueError, match=r"model\.weights_sha256 was"):
        draw(sampler, out)
    assert contents(out) == before


def test_other_versions_are_a_warning(sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(sampler, tmp_path / "out")
    monkeypatch.setattr("fastddpm.scale.recipe.versions", lambda: {"torch": "9.9"})
    with pytest.warns(RuntimeWarning, match="was begun by other versions.*torch was .*, is 9.9"):
        assert draw(sampler, tmp_path / "out").kept == 3


def test_bad_arguments(sampler: Sampler, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for changed, message in (
        ({"shard_size": 0}, "shard_size is 0, must be a positive integer"),
        ({"count": 0}, "num_samples is 0"),
        ({"format": "zip"}, "format is 'zip', must be one of npz, wds, png"),
        ({"engine": "spark"}, "engine is 'spark', must be one of local, ray"),
        ({"workers": 2}, "workers is given but engine is 'local'"),
        ({"rank": (0, 4)}, "4 ranks share 3 ranges"),
        ({"rank": (3, 3)}, r"rank is \(3, 3\)"),
        ({"seed": -1}, "seed is -1"),
        ({"class_labels": [0]}, r"class_labels has shape \[1\]"),
        ({"format": "png", "shard_size": 20000}, "shard_size is 20000, must be at most 10000"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(sampler, out, **changed)
    with pytest.raises(TypeError, match="model is a UNet, must be a Sampler"):
        draw(sampler.model, out)  # type: ignore[arg-type]
    assert not out.exists()


def test_a_folder_of_something_else_is_refused(sampler: Sampler, tmp_path: Path, contents: Contents) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="a folder that has 1 files and no manifest of shards"):
        draw(sampler, tmp_path / "a")
    (tmp_path / "a/manifest.json").write_text('{"kind": "other"}')
    with pytest.raises(ValueError, match="manifest.json is no manifest of shards"):
        draw(sampler, tmp_path / "a")
    with pytest.raises(ValueError, match="which is a file; it must be a folder"):
        draw(sampler, tmp_path / "a/thesis.txt")
    out = tmp_path / "out"
    draw(sampler, out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"schema": 2}))
    before = contents(out)
    with pytest.raises(ValueError, match="has schema 2, of a newer fastddpm; this one reads up to 1"):
        draw(sampler, out)
    assert contents(out) == before


def test_above_ten_thousand_ranges_there_are_sub_folders(sampler: Sampler, tmp_path: Path) -> None:
    few, many = Layout(10_000, 1, "npz"), Layout(10_001, 1, "npz")
    assert few.name(9_999) == "shard-09999-09999.npz"
    assert many.name(9_999) == "part-00009/shard-09999-09999.npz"
    assert max(sum(many.name(i).startswith(f"part-{part:05d}/") for i in range(10_001)) for part in range(11)) == 1000
    # The same by drawing, where sub-folders begin after two ranges.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastddpm.common.shards.MOST_FILES", 2)
        patch.setattr("fastddpm.common.shards.PART", 2)
        for format in ("npz", "png"):
            out = tmp_path / format
            draw(sampler, out, format=format)
            assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "part-00000", "part-00001"]
            assert draw(sampler, out, format=format).kept == 3
            assert sum(len(each.values) for each in ShardFolder(out)) == 20


def test_merge_streams_what_evaluators_read(
    sampler: Sampler, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = to_uint8(sampler.sample(20, class_labels=LABELS, batch_size=4)).repeat(3, axis=3)
    merged = set()
    for format in ("npz", "wds", "png"):
        draw(sampler, tmp_path / format, format=format)
        assert merge(tmp_path / format, tmp_path / f"{format}.npz", progress=False) == 20
        with np.load(tmp_path / f"{format}.npz", allow_pickle=False) as file:
            np.testing.assert_array_equal(file["arr_0"], want)
            assert file["arr_1"].tolist() == LABELS
        merged.add((tmp_path / f"{format}.npz").read_bytes())
    assert len(merged) == 1
    (tmp_path / "npz/shard-00008-00015.npz").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"npz lacks 1 of 3 ranges \(00008-00015\)"):
        merge("npz", "again.npz")
    with pytest.raises(FileNotFoundError, match="manifest.json is missing"):
        merge("nothing", "again.npz")
    assert not Path("again.npz").exists()


def test_merge_holds_one_shard(sampler: Sampler, tmp_path: Path) -> None:
    import tracemalloc

    def peak(count: int) -> int:
        out = tmp_path / str(count)
        sample_shards(sampler, out, count, shard_size=64, class_labels=0, batch_size=64, progress=False)
        tracemalloc.start()
        merge(out, tmp_path / f"{count}.npz", progress=False)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(64)
    small, large = peak(128), peak(64 * 24)
    assert large < 1.5 * small  # the labels alone grow: 8 bytes a sample


def test_evaluate_reads_shards(sampler: Sampler, tmp_path: Path) -> None:
    draw(sampler, tmp_path / "out")
    assert is_image_set(tmp_path / "out")
    images = open_images(str(tmp_path / "out"))
    assert (images.count, images.shape) == (20, (1, 8, 8))
    want = to_uint8(sampler.sample(20, class_labels=LABELS, batch_size=4))
    np.testing.assert_array_equal(torch.cat(list(images.batches(7))).permute(0, 2, 3, 1).numpy(), want)
    (tmp_path / "out/shard-00000-00007.npz").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 3 ranges"):
        open_images(str(tmp_path / "out"))


def test_any_file_system_of_fsspec(sampler: Sampler, tmp_path: Path, contents: Contents) -> None:
    import fsspec

    for format in ("npz", "png"):
        draw(sampler, tmp_path / format, format=format)
        url = f"memory://{tmp_path}/{format}"
        draw(sampler, url, format=format)
        files = fsspec.filesystem("memory")
        root = f"{tmp_path}/{format}"
        got = {path.removeprefix(f"{root}/"): files.cat_file(path) for path in files.find(root)}
        assert got == contents(tmp_path / format)
        name = next(name for name in got if name.startswith("shard-00008"))
        files.pipe_file(f"{root}/{name}", b"cut")
        report = draw(sampler, url, format=format)
        assert (report.kept, report.damaged) == (2, ("00008-00015",))
        assert files.cat_file(f"{root}/{name}") == got[name]
    with pytest.raises(ValueError, match="output is nosuch://x, must be a path or a URL of fsspec"):
        draw(sampler, "nosuch://x")


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_draws_resumes_and_merges(
    model: str, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["sample", model, "-n", "10", "--shard-size", "4", "--steps", "2", "--batch-size", "4"]
    assert main([*common, "-o", "out/"]) == 0
    assert "10 samples in 3 shards, 3 of them drawn now" in capsys.readouterr().out
    before = contents(Path("out"))
    Path("out/shard-00004-00007.npz").unlink()
    assert main([*common, "-o", "out/"]) == 0
    assert "10 samples in 3 shards, 1 of them drawn now" in capsys.readouterr().out
    assert contents(Path("out")) == before
    assert main(["merge", "out", "all.npz"]) == 0
    assert main(["sample", model, "-n", "10", "--steps", "2", "--batch-size", "4", "-o", "plain.npz"]) == 0
    with np.load("all.npz") as all_of_them, np.load("plain.npz") as plain:
        np.testing.assert_array_equal(all_of_them["arr_0"][..., :1], plain["arr_0"])
        np.testing.assert_array_equal(all_of_them["arr_1"], plain["arr_1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard-size", "0", "-o", "out"], "argument --shard-size: '0' must be an integer of at least 1"),
        (["--shard-size", "4"], "--output is samples.png, must be a folder with --shard-size"),
        (["--shard-size", "4", "-o", "full"], "--output is full, a folder that has 1 files and no manifest"),
        (["--shard-size", "4", "-o", "out", "--trajectory", "t.png"], "--trajectory is t.png, but shards have none"),
        (["--engine", "spark", "-o", "out"], "argument --engine: invalid choice"),
        (["--address", "auto"], "--address is given but --engine is not, must be ray"),
        (["-o", "s3://bucket/x.npz"], "--output is s3://bucket/x.npz, must be a path; only shards go to URLs"),
        (["--shard-size", "4", "-n", "4", "-o", "out", "--class-labels", "7"], "--class-labels has 7"),
    ],
)
def test_bad_input_ends_in_one_line(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/thesis.txt").touch()
    try:
        code: object = main(["sample", model, "--steps", "2", *arguments])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert len(error.splitlines()) == 1
    assert message in error
    assert not Path("out").exists()


def test_an_engine_that_is_not_installed_names_the_extra(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(["sample", model, "--steps", "2", "--engine", "ray", "-o", str(tmp_path / "out")]) == 2
    assert "engine 'ray' needs Ray Data: pip install 'fastddpm[ray]'" in capsys.readouterr().err


def test_more_ranks_than_ranges(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    arguments = ["sample", model, "--steps", "2", "-n", "8", "--shard-size", "4", "-o", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "3 ranks share 2 ranges, must be at most as many; lower shard_size" in capsys.readouterr().err


# -- progress ---------------------------------------------------------------------------------------------------------


def test_progress_is_a_line_a_minute_with_rate_time_and_ranges() -> None:
    now, lines = [0.0], []
    watch = Watch(Layout(100, 10, "npz"), 10, None, lines.append, clock=lambda: now[0])
    for index, (seconds, what) in enumerate([(5, KEPT), (30, WRITTEN), (61, WRITTEN), (90, FAILED), (125, WRITTEN)]):
        now[0] = seconds
        watch(Outcome(index, what))
    assert lines == [
        "3 of 10 ranges, 0.3279 samples/s, 3.6 minutes left, 0 failed, 7 ranges remain",
        "5 of 10 ranges, 0.32 samples/s, 2.6 minutes left, 1 failed, 5 ranges remain",
    ]
