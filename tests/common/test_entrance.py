"""What comes in: one rule for arrays, tensors, archives, picture files and folders, whichever way they take."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm.common import shards
from fastddpm.common.images import (
    MOST_LABELS,
    check_ids,
    check_memory,
    check_size,
    fit_pixels,
    list_pictures,
    load_image,
    look_at_pictures,
    pixels_of_array,
    pixels_of_tensor,
    read_npz,
    to_uint8,
)
from fastddpm.common.images import archives as archives_module
from fastddpm.common.images import pictures as pictures_module
from fastddpm.common.images import pixels as pixels_module
from fastddpm.evaluation.reading import open_images
from fastddpm.training.data import ArraySource, DatasetSource, open_data
from fastddpm.training.order import Pick

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0].copy()


def float_of(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def all_of(source: Any) -> np.ndarray:
    return torch.cat(list(open_images(source).pieces())).permute(0, 2, 3, 1).numpy()


# -- arrays and tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (RGB, RGB),
        (torch.from_numpy(RGB), RGB),
        (float_of(RGB), RGB),
        (float_of(RGB).double(), RGB),
        (float_of(RGB) * 1.5, to_uint8((float_of(RGB) * 1.5).clamp(-1, 1))),  # samples overshoot
        (RGB[..., ::-1], RGB[..., ::-1]),  # negative strides
        (RGB[::-2, :, ::-1], RGB[::-2, :, ::-1]),
        (np.asfortranarray(RGB), RGB),
        (GREY, GREY[..., None]),  # [N, H, W]
        (torch.from_numpy(GREY), GREY[..., None]),
        (list(RGB), RGB),
        (list(float_of(RGB)), RGB),
        ([Image.fromarray(image) for image in RGB], RGB),
        ([Image.fromarray(image) for image in GREY], GREY[..., None]),
        ([Image.fromarray(GREY[0]), Image.fromarray(RGB[1])],  # coloured if one is, not if the first is
         np.stack([GREY[0][..., None].repeat(3, 2), RGB[1]])),
    ],
)  # fmt: skip
def test_images_in_memory(given: Any, expected: np.ndarray) -> None:
    assert np.array_equal(all_of(given), expected)


@pytest.mark.parametrize("suffix", ["npz", "npy"])
@pytest.mark.parametrize("images", [RGB, GREY, np.asfortranarray(RGB)], ids=["colour", "grey", "fortran"])
def test_archives_are_read_alike_for_training_and_evaluation(tmp_path: Path, suffix: str, images: np.ndarray) -> None:
    path = tmp_path / f"a.{suffix}"
    np.savez_compressed(path, images) if suffix == "npz" else np.save(path, images)
    expected = images if images.ndim == 4 else images[..., None]
    assert np.array_equal(all_of(path), expected)
    trained, _ = ArraySource(path).read([Pick(i, 0) for i in range(6)])
    assert np.array_equal(trained.permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (RGB.transpose(0, 3, 1, 2), r"looks like \[N, C, H, W\], transpose it"),
        (torch.from_numpy(RGB).permute(0, 3, 1, 2), r"looks like \[N, C, H, W\]"),
        (RGB[0], r"uint8 \[8, 7, 3\], must be .*images\[None\]"),
        (RGB[..., :2], "1, 3 or 4 channels"),
        (RGB.astype(np.int64), "int64 .*must be uint8"),
        (RGB.astype(np.float32) / 255, "float32 .*must be uint8"),
        (RGB[:0], r"uint8 \[0, 8, 7, 3\]"),
        (float_of(RGB) / 2 + 0.5, "none below 0"),  # [0, 1]
        ((float_of(RGB) + 1) * 127.5, r"must be in \[-1, 1\]"),  # [0, 255]
        (float_of(RGB) * 127, r"must be in \[-1, 1\]"),
        (float_of(RGB).permute(0, 2, 3, 1), r"permute it by \(0, 3, 1, 2\)"),
        (float_of(RGB)[0], r"\[N, C, H, W\]"),
        (float_of(RGB) * float("nan"), "not finite"),
        ([RGB[0], RGB[1][:4]], "is a list"),
        ([], "is a list"),
        ([Image.new("L", (4, 4)), Image.new("L", (5, 4))], r"samples\[1\] is not of 4 x 4"),
        ([Image.new("F", (4, 4))], r"samples\[0\] has floating-point values"),
    ],
)
def test_images_that_are_refused(images: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as refused:
        open_images(images)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.0, 1.0], "must be integer labels"),
        ([[0], [1]], "must be integer labels"),
        ([0], r"integer labels \[2\]"),
        ([0, -1], "label -1"),
        ([0, MOST_LABELS], f"label {MOST_LABELS}"),
        ([0, 2**31], "label 2147483648"),
        (np.array([0, 2**64 - 1], np.uint64), "label 18446744073709551615"),
    ],
)
def test_labels_that_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_ids(np.asarray(labels), 2, "arr_1")


def test_views_and_files_that_expand_are_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.zeros(1, 1, 1, 1).expand(2000, 3, 512, 512)
    for expanded in (wide, torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(2000, 512, 512, 3)):
        with pytest.raises(ValueError, match="would take 1.57 GB, expanded from"):
            open_images(expanded)
    with pytest.raises(ValueError, match="expanded"):
        open_images(np.broadcast_to(np.zeros((1, 1, 1, 1), np.uint8), (2000, 512, 512, 3)))
    with pytest.raises(ValueError, match="of memory"):
        check_memory(10**18, "1000000000 samples")
    monkeypatch.setattr(pixels_module, "FREE_BYTES", 100)
    assert len(pixels_of_array(RGB, "small")) == 6
    assert len(pixels_of_tensor(float_of(RGB), "small")) == 6


# -- archives --------------------------------------------------------------------------------------------------------


def written(path: Path, **options: Any) -> bytes:
    np.savez_compressed(path, RGB, np.arange(6))
    return path.read_bytes()


def with_member(path: Path, content: bytes, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("arr_0.npy", content)


def header(text: str | None = None, *, descr: str = "|u1", shape: str = "(1,)") -> bytes:
    if text is None:
        text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    body = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(written(p)[:200]), "not a zip file"),
        (lambda p: p.write_bytes(b"PK\x03\x04"), "not a zip file"),
        (lambda p: p.write_bytes(b""), "not a zip file"),
        (lambda p: with_member(p, b"no array"), "magic string"),
        (lambda p: with_member(p, header(shape="(9, 9)")), r"\[9, 9\], but holds 0"),
        (lambda p: with_member(p, header(shape="(-1, 9)")), "holds 0 bytes"),
        (lambda p: with_member(p, header(descr="|O")), "Object arrays"),
        (lambda p: with_member(p, header("[" * 100)), "a.npz is not a .npz that can be read"),
        (lambda p: with_member(p, header("{}"), zipfile.ZIP_LZMA), "compressed by method 14"),
    ],
)  # fmt: skip
def test_damaged_archives_are_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "a.npz"
    damage(path)
    with pytest.raises(ValueError, match=message) as refused:
        read_npz(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_any_changed_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Checksums catch what is changed in the data; nothing else than a ValueError comes of the rest."""
    path = tmp_path / "a.npz"
    whole, rng = written(path), np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, len(whole), 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ int(rng.integers(1, 256))]) + whole[place + 1 :])
        try:
            arrays = read_npz(path)
        except ValueError:
            refused += 1
        else:
            assert "arr_0" not in arrays or np.array_equal(arrays["arr_0"], RGB)
    assert refused > 100


def test_encrypted_archives_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    content = bytearray(written(path))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(signature)
        content[place + offset] |= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="arr_0.npy is encrypted"):
        read_npz(path)


def test_a_zip_bomb_is_refused_by_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", np.zeros((64, 64, 64, 3), np.uint8))
    monkeypatch.setattr(archives_module, "check_size", lambda *given: check_size(*given))
    monkeypatch.setattr(pixels_module, "FREE_BYTES", 1000)
    with pytest.raises(ValueError, match="expanded"):
        read_npz(tmp_path / "a.npz")


# -- pictures --------------------------------------------------------------------------------------------------------


def turned(picture: Image.Image) -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.getexif().update(exif)
    picture.info["exif"] = exif.tobytes()
    return picture


ALPHA = np.concatenate([RGB[0], np.full((8, 7, 1), 255, np.uint8)], axis=2)
ALPHA[:4, :, 3] = 0
BLACKENED = RGB[0].copy()
BLACKENED[:4] = 0
SIXTEEN = (GREY[0].astype(np.uint16) * 257).astype(np.uint16)
# What a picture is, and what becomes of it: pixels [H, W, C].
PICTURES: dict[str, tuple[Any, np.ndarray]] = {
    "colour": (lambda: Image.fromarray(RGB[0]), RGB[0]),
    "grey": (lambda: Image.fromarray(GREY[0]), GREY[0][..., None]),
    "opacity": (lambda: Image.fromarray(ALPHA), BLACKENED),
    "palette": (lambda: Image.fromarray(RGB[0]).quantize(56, dither=Image.Dither.NONE),
                np.asarray(Image.fromarray(RGB[0]).quantize(56, dither=Image.Dither.NONE).convert("RGB"))),
    "grey opacity": (lambda: Image.fromarray(ALPHA[..., 2:]), BLACKENED[..., 2:]),
    "sixteen": (lambda: Image.fromarray(SIXTEEN), GREY[0][..., None]),
    "turned": (lambda: turned(Image.fromarray(np.rot90(RGB[0]).copy())), RGB[0]),
    "one bit": (lambda: Image.fromarray(GREY[0] > 99), ((GREY[0] > 99) * 255).astype(np.uint8)[..., None]),
}  # fmt: skip


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_is_the_same_on_every_way_in(tmp_path: Path, kind: str) -> None:
    make, expected = PICTURES[kind]
    shape = (expected.shape[2], 8, 7)
    exif = {"exif": make().info["exif"]} if kind == "turned" else {}
    make().save(tmp_path / "a.png", **exif)
    expected_chw = expected.transpose(2, 0, 1)
    from_file = load_image(tmp_path / "a.png", shape)
    assert np.array_equal(((from_file + 1) * 127.5).round().numpy(), expected_chw)
    assert np.array_equal(all_of(tmp_path), expected[None])  # a folder, to be evaluated
    assert np.array_equal(all_of([make()]), expected[None])  # a list
    (item,), _ = DatasetSource([make()], shape).read([Pick(0, 0)])
    assert np.array_equal(item.numpy(), expected_chw)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"


def cut() -> bytes:
    """The first half of a PNG."""
    return png(RGB[0])[: len(png(RGB[0])) // 2]


def animated(path: Path) -> None:
    Image.fromarray(RGB[0]).save(path, save_all=True, append_images=[Image.fromarray(RGB[1])])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("photo.png", lambda p: p.write_bytes(POSTSCRIPT), "none of PNG, JPEG"),
        ("float.tiff", lambda p: Image.fromarray(RGB[0, ..., 0].astype(np.float32)).save(p), "floating-point values"),
        ("wide.tiff", lambda p: Image.fromarray(RGB[0, ..., 0].astype(np.int32)).save(p), "32-bit values"),
        ("huge.png", lambda p: p.write_bytes(huge(13_000, 13_000)), "13000 x 13000 pixels, may have at most 67,108"),
        ("bomb.png", lambda p: p.write_bytes(huge(60_000, 60_000)), "pixels, may have at most"),
        ("large.png", lambda p: p.write_bytes(huge(10_000, 10_000)), "10000 x 10000 pixels, may have at most 67,108"),
        ("cut.png", lambda p: p.write_bytes(cut()), "can be read"),
    ],
)  # fmt: skip
def test_pictures_that_are_refused(tmp_path: Path, name: str, make: Any, message: str) -> None:
    """Pillow's own warning of many pixels (an error here) is not added to our limit."""
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as refused:
        load_image(tmp_path / name, (3, 8, 7))
    assert str(refused.value).startswith(str(tmp_path / name))
    assert "\n" not in str(refused.value)
    assert look_at_pictures(tmp_path, [name] * 20)[0] in (None, (((1, 8, 7)), False))
    if name == "large.png":
        with pytest.warns(Image.DecompressionBombWarning):  # whoever uses Pillow has it still
            Image.open(tmp_path / name).close()


def test_pictures_are_not_made_larger_than_any_may_be(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="shape has 9000 x 9000 pixels, may have at most 67,108,864"):
        load_image(tmp_path / "a.png", (1, 9000, 9000))
    with pytest.raises(ValueError, match="the model's data have 9000 x 9000 pixels"):
        open_data(tmp_path, (1, 9000, 9000), cache_bytes=0)


def test_large_pictures_are_decoded_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures_module, "MOST_PIXELS", 100)
    turns, most = pictures_module._Decoding(), []

    def decode(_: int) -> None:
        with turns.of(40):
            most.append(turns._pixels)
            time.sleep(0.001)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, range(20)))
    assert max(most) <= 80
    assert turns._pixels == 0


def huge(width: int, height: int) -> bytes:
    """A PNG whose header says so many pixels, with next to no data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def test_no_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "gs"
    stand_in.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "data").mkdir()
    for name in ("a.png", "b.eps"):
        (tmp_path / "data" / name).write_bytes(POSTSCRIPT)
    assert list_pictures(tmp_path / "data").paths == ("a.png",)
    assert look_at_pictures(tmp_path / "data", ["a.png", "b.eps"]) == [None, None]
    assert not (tmp_path / "started").exists()


# -- folders ---------------------------------------------------------------------------------------------------------


def put(path: Path | bytes) -> None:
    path = Path(os.fsdecode(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Image.new("RGB", (8, 8)).save(file, "PNG")


def test_classes_sort_as_numbers(tmp_path: Path) -> None:
    for name in range(12):
        put(tmp_path / str(name) / "a.png")
    listing = list_pictures(tmp_path)
    assert listing.classes == tuple(str(name) for name in range(12))
    assert [listing.classes[label] for label in listing.labels] == [path.split(os.sep)[0] for path in listing.paths]
    for name in ("n2", "n10", "n1"):
        put(tmp_path / "other" / name / "a.png")
    assert list_pictures(tmp_path / "other").classes == ("n1", "n2", "n10")


@pytest.mark.parametrize("stray", ["features.h5", "Thumbs.db", "notes.txt", "paper.pdf", "clip.mpg", "preview.png"])
def test_a_stray_file_does_not_undo_classes(tmp_path: Path, stray: str) -> None:
    for name in range(12):
        put(tmp_path / str(name) / "a.png")
    put(tmp_path / stray)
    listing = list_pictures(tmp_path)
    assert len(listing.classes) == 12
    assert listing.passed_over == (stray,)
    assert "1 files are passed over" in listing.notes()[-1]


def test_names_may_have_any_bytes(tmp_path: Path) -> None:
    put(os.fsencode(tmp_path) + b"/caf\xe9/caf\xe9.png")
    put(tmp_path / "other" / "a\x7f\n.png")
    listing = list_pictures(tmp_path)
    assert len(listing.paths) == 2
    assert all(look is not None for look in look_at_pictures(tmp_path, listing.paths))


def test_animations_and_files_passed_over_are_counted(tmp_path: Path) -> None:
    animated(tmp_path / "a.gif")
    Image.fromarray(RGB[0]).save(tmp_path / "b.png")
    (tmp_path / "c.txt").write_text("no picture")
    (tmp_path / "d.png").write_bytes(b"no picture")
    images = open_images(tmp_path)
    assert torch.cat(list(images.pieces())).shape == (2, 3, 8, 7)
    passed, moving = images.notes
    assert "1 files are passed over (1 .txt); 1 files cannot be read and are left out: d.png" in passed
    assert "1 files are animations, whose first frame is taken" in moving


def test_opacity_is_kept_where_four_channels_are_wanted() -> None:
    assert np.array_equal(fit_pixels(Image.fromarray(ALPHA), (4, 8, 7)), ALPHA.transpose(2, 0, 1))


# -- shards ----------------------------------------------------------------------------------------------------------


def shard_folder(folder: Path, content: dict[str, bytes] | None = None, **changed: Any) -> Path:
    """A folder of one shard of two pictures, or of `content`, whose manifest and checksums fit."""
    sample = {"shape": [8, 7, 3], "dtype": "uint8"}
    manifest: dict[str, Any] = {"kind": shards.KIND, "schema": 1, "num_samples": 2, "shard_size": 2, "format": "png"}
    text = json.dumps(manifest | {"sample": sample} | changed).encode()
    (folder / "shard-00000-00001").mkdir()
    (folder / shards.MANIFEST).write_bytes(text)
    stamp = shards.layout_of(json.loads(text), text).stamp(0).removesuffix(" sha256=")
    lines = [f"# {stamp}"]
    for name, data in (content or {f"{k}.png": png(RGB[k]) for k in range(2)}).items():
        (folder / "shard-00000-00001" / name).write_bytes(data)
        lines.append(f"{hashlib.sha256(data).hexdigest()}  {name}")
    (folder / "shard-00000-00001" / shards.SUMS).write_text("\n".join(lines) + "\n")
    return folder


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_shards_meet_the_same_rules(tmp_path: Path) -> None:
    """Whoever forges a shard can forge its checksum."""
    for name in ("good", "postscript", "size"):
        (tmp_path / name).mkdir()
    assert np.array_equal(all_of(shard_folder(tmp_path / "good")), RGB[:2])
    forged = shard_folder(tmp_path / "postscript", {"0.png": POSTSCRIPT, "1.png": png(RGB[1])})
    with pytest.raises(ValueError, match=r"0.png is not a picture that can be read: it is none of PNG"):
        all_of(forged)
    other = shard_folder(tmp_path / "size", {f"{k}.png": png(RGB[k, :4]) for k in range(2)})
    with pytest.raises(ValueError, match="shard-00000-00001 has other samples than the manifest states"):
        all_of(other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_samples": 2**60, "shard_size": 1}, r"lacks 115292150460684697\d of 1152921504606846976 ranges"),
        ({"num_samples": True}, "num_samples, shard_size or format is not what it can be"),
        ({"format": ["png"]}, "num_samples, shard_size or format is not what it can be"),
        ({"sample": None}, "sample is not a shape and dtype that it can have"),
        ({"sample": {"shape": [8, -7, 3], "dtype": "uint8"}}, "sample is not a shape"),
        ({"sample": {"shape": [8], "dtype": "uint8"}}, "sample is not a shape"),
        ({"sample": {"shape": [8, 7, 3], "dtype": "O"}}, "sample is not a shape"),
    ],
)
def test_manifests_that_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_images(shard_folder(tmp_path, **changed))
