"""Images and statistics in files, and sets of images read a few at a time."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from fastddpm import NoiseSchedule, Sampler
from fastddpm.common.images import save_folder, save_npz, to_uint8
from fastddpm.evaluation import image_sets
from fastddpm.evaluation.frechet import frechet_distance
from fastddpm.evaluation.image_sets import ImageSet, in_one_colour_space, of_array, of_sampler
from fastddpm.evaluation.reading import is_image_set, open_images, open_reference


def everything(images: ImageSet, size: int = 3) -> np.ndarray:
    """All images as uint8 [N, H, W, C]."""
    return torch.cat(list(images.batches(size))).permute(0, 2, 3, 1).numpy()


def pixels(count: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 5, 4, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_written_as_the_adm_evaluator_reads(tmp_path: Path, channels: int) -> None:
    path = tmp_path / "deep" / "a.npz"
    images = pixels(5, channels)
    save_npz(path, torch.from_numpy(images).permute(0, 3, 1, 2), [3, 1, 4, 1, 5], in_colour=True)
    # The evaluator streams the member arr_0.npy of the archive.
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        assert np.lib.format.read_array_header_1_0(member) == ((5, 5, 4, 3), False, np.dtype(np.uint8))
    assert np.array_equal(np.load(path)["arr_0"], np.broadcast_to(images, (5, 5, 4, 3)))
    again = open_images(path)
    assert (again.count, again.shape) == (5, (channels, 5, 4))  # grey is known by its equal channels
    assert again.labels is not None
    assert again.labels.tolist() == [3, 1, 4, 1, 5]
    assert np.array_equal(everything(again), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_and_folders_that_sample_writes(tmp_path: Path, channels: int) -> None:
    x = torch.rand(7, channels, 8, 8) * 2 - 1
    save_npz(tmp_path / "a.npz", x)
    save_folder(tmp_path / "a", x)
    for source in (tmp_path / "a.npz", str(tmp_path / "a"), x, to_uint8(x), torch.from_numpy(to_uint8(x))):
        images = open_images(source)
        assert (images.count, images.shape) == (7, (channels, 8, 8))
        assert np.array_equal(everything(images), to_uint8(x))


@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_batches_have_the_size_asked_for(size: int) -> None:
    x = torch.arange(11, dtype=torch.uint8).reshape(11, 1, 1, 1)
    images = ImageSet("x", 11, (1, 1, 1), lambda: iter(x.split([3, 1, 5, 2])))
    batches = list(images.batches(size))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert torch.equal(torch.cat(batches), x)


def test_folder_of_mixed_pictures_takes_the_shape_of_samples(tmp_path: Path) -> None:
    folder = tmp_path / "real"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(folder / "a.png")
    Image.new("L", (24, 8), 128).save(folder / "b" / "c" / "wide.JPEG")
    Image.new("RGB", (8, 8)).save(folder / ".hidden" / "x.png")
    (folder / "b" / "broken.png").write_bytes(b"\x89PNG no")
    (folder / "notes.txt").write_text("no picture")
    reference = open_reference(folder, (3, 8, 8))
    assert reference.images is not None
    assert reference.images.count == 3
    found = everything(reference.images)
    assert found.shape == (2, 8, 8, 3)
    assert (found[0] == [255, 0, 0]).all()
    assert abs(found[1].astype(int) - 128).max() <= 1
    broken, resized = reference.images.notes
    assert broken.endswith("1 files cannot be read and are left out: b/broken.png")
    assert "1 of 3 images were cut to the middle and resized to 8 x 8" in resized
    with pytest.raises(ValueError, match=r"wide.JPEG is not of 8 x 8 as the first is"):
        everything(open_images(folder))


def test_the_first_picture_says_the_shape_as_it_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # lies on its side
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 4), (1, 2, 3)).save(tmp_path / name, exif=exif)
    images = open_images(tmp_path)
    assert images.shape == (3, 9, 4)
    assert everything(images).shape == (2, 9, 4, 3)
    assert images.notes == []


def test_statistics_alone_and_beside_images(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((50, 4))
    statistics = {"mu": features.mean(0).astype(np.float32), "sigma": np.cov(features, rowvar=False)}
    np.savez(tmp_path / "ttur.npz", **statistics)
    alone = open_reference(tmp_path / "ttur.npz", (3, 5, 4))
    assert alone.images is None
    assert alone.statistics is not None
    assert frechet_distance(features, alone.statistics) == pytest.approx(0, abs=1e-9)
    # ADM's reference batches have both, and spatial statistics, which are not read.
    np.savez(tmp_path / "adm.npz", pixels(6), **statistics, mu_s=np.zeros(9), sigma_s=np.zeros((9, 9)))
    both = open_reference(tmp_path / "adm.npz", (3, 5, 4))
    assert both.statistics is not None
    assert both.images is not None
    assert np.array_equal(everything(both.images), pixels(6))


def test_grey_and_coloured() -> None:
    grey, colour = of_array(pixels(2, 1), "grey"), of_array(pixels(2, 3), "colour")
    a, b = in_one_colour_space(grey, colour)
    assert a.shape == b.shape == (3, 5, 4)
    assert np.array_equal(everything(a), pixels(2, 1).repeat(3, axis=3))
    assert in_one_colour_space(grey, grey)[0] is grey
    with pytest.raises(ValueError, match="rgba has 4 channels and grey 1, must have as many"):
        in_one_colour_space(of_array(pixels(2, 4), "rgba"), grey)


def test_a_sampler_in_pieces_draws_what_it_draws_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(lambda x, t: x * 0.5, NoiseSchedule.linear(20), num_inference_steps=4)
    monkeypatch.setattr(image_sets, "DRAWN_AT_ONCE", 4 * 4 * 4 * 3 * 3)  # three samples
    told: list[torch.Tensor] = []
    images = of_sampler(sampler, 8, seed=5, shape=(3, 4, 4), keep=told)
    expected = to_uint8(sampler.sample(8, seed=5, shape=(3, 4, 4)))
    assert np.array_equal(everything(images), expected)
    assert [len(piece) for piece in told] == [3, 3, 2]
    assert all(piece.dtype == torch.uint8 for piece in told)
    assert np.array_equal(everything(images), expected)  # again
    assert not np.array_equal(everything(of_sampler(sampler, 8, seed=6, shape=(3, 4, 4))), expected)


def test_latents_are_decoded() -> None:
    sampler = Sampler(lambda x, t: x * 0.5, NoiseSchedule.linear(20), num_inference_steps=2)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :3].repeat_interleave(2, dim=3)

    images = of_sampler(sampler, 3, shape=(4, 4, 4), decode=decode)
    assert images.shape == (3, 4, 8)
    assert np.array_equal(everything(images), to_uint8(decode(sampler.sample(3, shape=(4, 4, 4)))))


def test_what_is_no_image() -> None:
    sampler = Sampler(lambda x, t: x / 0, NoiseSchedule.linear(20), num_inference_steps=2, clip_sample=False)
    with pytest.raises(ValueError, match="samples draws images that are not finite"):
        everything(of_sampler(sampler, 3, shape=(1, 4, 4)))
    with pytest.raises(ValueError, match=r"samples have shape \[2, 16\], must be images"):
        of_sampler(sampler, 3, shape=(2, 16))
    with pytest.raises(ValueError, match=r"samples has float64 \[3, 4, 4, 1\], must be uint8"):
        open_images(np.zeros((3, 4, 4, 1)))
    with pytest.raises(ValueError, match="samples has values that are not finite"):
        open_images(torch.full((2, 1, 4, 4), float("nan")))
    with pytest.raises(TypeError, match="samples is a list, must be images"):
        open_images([1])
    with pytest.raises(ValueError, match="real has images of 5 x 4 but the samples are of 8 x 8"):
        open_reference(pixels(2), (3, 8, 8))


class Trap:
    """Unpickling it would make a folder."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (Path("trapped"),)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, r"has x, must have arr_0 \(images\), or mu and sigma"),
        ({"arr_0": np.zeros((2, 3, 4, 5), np.uint8)}, r"has uint8 \[2, 3, 4, 5\], must be uint8 \[N, H, W, C\]"),
        ({"arr_0": pixels(3), "arr_1": np.zeros(3)}, r": arr_1 is float64 \[3\], must be integer labels"),
        ({"arr_0": pixels(3), "arr_1": np.zeros(2, int)}, r": arr_1 is int64 \[2\]"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"has mu of shape \[3\] and sigma of \[4, 4\]"),
        ({"mu": np.zeros(2), "sigma": np.diag([1.0, -1.0])}, "has a sigma that is not a covariance"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, np.nan], [0, 1]])}, "has values that are not finite"),
        ({"arr_0": np.array([Trap()], dtype=object)}, "is not a .npz that can be read: Object arrays cannot be loaded"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", **arrays)
    with pytest.raises(ValueError, match=f"a.npz ?{message}"):
        open_reference("a.npz", (3, 5, 4))
    assert not Path("trapped").exists()


def test_files_that_are_something_else(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / "b.npy").write_bytes(b"no")
    (tmp_path / "empty").mkdir()
    for name in ("a.npz", "b.npy"):
        with pytest.raises(ValueError, match=f"{name} is not a {name[1:]} that can be read"):
            open_images(tmp_path / name)
    with pytest.raises(
        FileNotFoundError, match=r"c.npz is missing; it must be a .npz, a folder of pictures or 'digits'"
    ):
        open_images(tmp_path / "c.npz")
    with pytest.raises(ValueError, match="empty holds no picture"):
        open_images(tmp_path / "empty")


def test_models_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert is_image_set("a.npz")
    assert not is_image_set(tmp_path / "model")
    Image.new("L", (4, 4)).save(tmp_path / "model" / "samples.png")
    assert is_image_set(tmp_path / "model")
    (tmp_path / "model" / "model_index.json").write_text("{}")
    assert not is_image_set(tmp_path / "model")
    assert not is_image_set("google/ddpm-cifar10-32")


def test_real_digits() -> None:
    images = open_images("digits")
    assert (images.count, images.shape) == (1797, (1, 16, 16))
    assert images.labels is not None
    assert images.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
