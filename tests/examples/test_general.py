"""The examples of the general path: what they measure tells good from bad, their networks keep what they promise, and a
short training and drawing runs from data to picture."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]


def example(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        return importlib.import_module(name)


@pytest.mark.parametrize("name", ["molecules", "waveform", "video"])
def test_it_is_at_most_60_lines(name: str) -> None:
    assert len((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60


def test_bonds_and_valences_tell_molecules_from_noise() -> None:
    pytest.importorskip("ase")
    molecules = example("molecules")
    sets = [x for own in molecules.molecules() for x in own]
    real = [torch.cat(part) for part in zip(*map(molecules.measured, sets), strict=True)]
    assert 1.05 < real[0].mean() < 1.15, "C-H, angstrom"
    assert 1.2 < real[1].mean() < 1.6, "C-C"
    assert real[2].float().mean() > 0.95
    noise = [torch.cat([0.5 * torch.randn_like(x[..., :3]), x[..., 3:]], -1) for x in sets]
    right = torch.cat([molecules.measured(x)[2] for x in noise])
    assert right.float().mean() < 0.7


def test_the_molecules_network_is_equivariant() -> None:
    """To rotations, reflections and shifts of the points, and to their order."""
    pytest.importorskip("ase")
    molecules = example("molecules")
    torch.set_default_dtype(torch.float64)
    try:
        network, t = molecules.Network(), torch.tensor([300, 700])
        x = torch.randn(2, 6, 7)
        with torch.no_grad():
            out = network(x, t)
            turned, _ = torch.linalg.qr(torch.randn(3, 3))
            moved = network(torch.cat([x[..., :3] @ turned, x[..., 3:]], -1), t)
            torch.testing.assert_close(moved, torch.cat([out[..., :3] @ turned, out[..., 3:]], -1), rtol=0, atol=1e-6)
            order = torch.randperm(6)
            torch.testing.assert_close(network(x[:, order], t), out[:, order], rtol=0, atol=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


def test_spectra_tell_notes_from_noise() -> None:
    waveform = example("waveform")
    share, cents, spectrum = waveform.measured(waveform.notes(32))
    assert share.median() > 0.85
    assert cents.median() < 5
    assert spectrum.shape[1] == 2
    share, cents, _ = waveform.measured(torch.randn(32, 1, waveform.LENGTH))
    assert share.median() < 0.2
    assert cents.median() > 10


def test_motion_tells_videos_from_stills_and_shuffled_frames() -> None:
    pytest.importorskip("sklearn")
    video = example("video")
    x = video.videos(64)
    assert x.shape == (64, 1, video.FRAMES, video.SIZE, video.SIZE)
    speed, change, ink = video.measured(x)
    assert 0.5 < speed < 1.4, "moves of -1, 0 and 1 pixel in both directions"
    assert change < 0.2
    assert ink < 0.05
    assert video.measured(x[:, :, :1].expand_as(x))[0] < 1e-3
    assert video.measured(x[:, :, [3, 0, 5, 1, 4, 2]])[1] > 5 * change


@pytest.mark.parametrize("name", ["molecules", "waveform", "video"])
def test_a_short_training_and_drawing(name: str, tmp_path: Path) -> None:
    if name == "molecules":
        pytest.importorskip("ase")
    if name == "video":
        pytest.importorskip("sklearn")
    general, module = example("general"), example(name)
    if name == "molecules":
        sets = module.molecules()
        batch, shape = lambda: general.some_of(sets, 4), sets[0].shape[1:]
    elif name == "waveform":
        batch, shape = lambda: module.notes(2), (1, module.LENGTH)
    else:
        batch, shape = lambda: module.videos(2), (1, module.FRAMES, module.SIZE, module.SIZE)
    torch.manual_seed(0)
    before = module.Network()
    torch.manual_seed(0)
    model = general.train(module.Network(), batch, 3)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    x = general.draw(model, 2, tuple(shape), steps=2)
    assert x.shape == (2, *shape)
    assert x.abs().max() <= 1
    again = general.draw(model, 3, tuple(shape), steps=2)[:2]
    torch.testing.assert_close(again, x, rtol=0, atol=1e-4)  # whatever else is drawn with it
    general.plot(tmp_path / "plot.png", {"values": {"drawn": x.flatten()}})
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
