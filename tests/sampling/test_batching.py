"""How many samples go through the network at once, and what happens where they do not fit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling.batching import Allocated
from fastddpm.sampling.pool import Slot
from fastddpm.sampling.run import Run
from fastddpm.sampling.sampler import Sampler

LINEAR = NoiseSchedule.linear()


class Limited:
    """A model that runs out of memory above `most` samples, and notes how many it is given."""

    def __init__(self, most: int = 10**9) -> None:
        self.most = most
        self.seen: list[int] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"tried to allocate for {len(x)}")
        self.seen.append(len(x))
        return torch.tanh(x * (0.5 + t.view(-1, *[1] * (x.ndim - 1)).to(x) / 1000))


def sampler(model: Callable[..., Tensor], steps: int = 8, **settings: Any) -> Sampler:
    return Sampler(model, LINEAR, num_inference_steps=steps, **settings)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that are timed: up to 32 samples take as long as one, above they take longer in proportion."""
    sizes: list[int] = []

    def seconds_per_step(self: Run, slot: Slot, steps: int = 2) -> float:
        size = len(slot.loop.x)
        self.one_step(slot)
        sizes.append(size)
        return max(32, size) / 32

    monkeypatch.setattr(Run, "seconds_per_step", seconds_per_step)
    return sizes


# -- chosen -----------------------------------------------------------------------------------------------------------


def test_the_fastest_size_is_found_and_remembered(timed: list[int], caplog: pytest.LogCaptureFixture) -> None:
    model = Limited()
    draw = sampler(model)
    with caplog.at_level(logging.INFO):
        images = draw.sample(300, shape=(2, 3), batch_size="auto", seed=2)
    assert timed == [4, 4, 16, 32, 64, 128]
    assert "batch_size 'auto' is 30 for 300 samples" in caplog.text
    assert torch.equal(images, sampler(Limited()).sample(300, shape=(2, 3), seed=2))
    model.seen.clear()
    assert draw.sample(100, shape=(2, 3), batch_size="auto").shape == (100, 2, 3)
    assert model.seen == [25] * 4 * 8
    assert len(timed) == 6
    draw.sample(100, shape=(2, 4), batch_size="auto")  # something else: measured too
    assert len(timed) > 6


@pytest.mark.parametrize(
    ("count", "steps", "sizes"),
    [
        (1, 400, []),
        (4, 200, []),  # no more than the smallest size
        (5, 400, [4, 4, 5]),
        (60, 7, []),  # to time 4 samples twice takes 24 sample-steps, more than 5 % of 420
        (60, 8, [4, 4]),  # and not more than 5 % of 480, but 16 samples would
    ],
)
def test_sizes_are_timed_only_where_that_pays(
    count: int, steps: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []

    def seconds_per_step(self: Run, slot: Slot, steps: int = 2) -> float:
        size = len(slot.loop.x)
        timed.append(size)
        time.sleep(3 * size * 0.002)
        return size * 0.002

    monkeypatch.setattr(Run, "seconds_per_step", seconds_per_step)
    model = Limited()
    sampler(model, steps).sample(count, shape=(2, 3), batch_size="auto")
    assert timed == sizes
    assert sum(model.seen) <= count * steps + 4


@pytest.mark.parametrize(("count", "steps"), [(2, 40), (30, 6), (30, 20)], ids=["two", "not timed", "timed"])
def test_memory_limits_what_is_tried(
    count: int, steps: int, timed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample holds at least its state, its input and its prediction: 12 kB here."""
    monkeypatch.setattr("fastddpm.sampling.batching.free_memory", lambda device: 12_000 * 60)
    model = Limited()
    draw = sampler(model, steps)
    draw.sample(count, shape=(1000,), batch_size="auto")
    assert bool(timed) == (steps == 20)
    assert 2 <= max(model.seen) <= 20
    assert max(model.seen) > 4 or count == 2
    monkeypatch.setattr("fastddpm.sampling.batching.free_memory", lambda device: 1000)
    chunks = model.seen[-steps * draw._batching.pool.built :]
    model.seen.clear()
    draw.sample(count, shape=(1000,), batch_size="auto")
    assert set(model.seen) == set(chunks)  # what the first run holds for this one is not free, but there
    model.seen.clear()
    sampler(model, steps).sample(count, shape=(1000,), batch_size="auto")
    assert model.seen == [1, 1, 2] + [1] * count * steps  # one at least; two only to see what they take


def test_memory_is_counted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))
    x = torch.randn(2, 3, 8, 8)
    wide = 2 * 16 * 8 * 8 * 4
    with torch.no_grad(), Allocated() as allocated:
        out = model(x)
        out.add_(1)
        part = out[:1]
        assert allocated.live == out.nbytes
    # SiLU's input and result at the same time; views, what is written in place and the weights do not count.
    assert allocated.peak == 2 * wide
    del out, part
    assert allocated.live == 0


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("return_trajectory", [None, 3])
def test_halved_until_it_fits(return_trajectory: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured did fit; then memory runs out."""
    expected = sampler(Limited()).sample(13, shape=(2, 3), return_trajectory=return_trajectory or 1)
    model = Limited()
    draw = sampler(model)
    arguments: dict[str, Any] = {"shape": (2, 3), "batch_size": "auto", "return_trajectory": return_trajectory}
    draw.sample(13, **arguments)
    model.most = 5
    model.seen.clear()
    images = draw.sample(13, **arguments, progress=True)
    assert "32/32" in capsys.readouterr().err
    assert model.seen == [4] * 24 + [1] * 8
    if return_trajectory:
        assert torch.equal(images.x, expected.x)  # type: ignore[attr-defined]
        assert torch.equal(images.x0, expected.x0)  # type: ignore[attr-defined]
    else:
        assert torch.equal(images, expected.x[-1])  # type: ignore[arg-type]
    # It is not tried again.
    model.seen.clear()
    assert torch.equal(draw.sample(13, shape=(2, 3), batch_size="auto"), expected.x[-1])
    assert max(model.seen) == 4


def test_out_of_memory_in_the_middle_of_a_chunk() -> None:
    """The chunk is done again from its start, and what was recorded of it is not there twice."""
    expected = sampler(Limited()).sample(6, shape=(2, 3), return_trajectory=2)
    model = Limited()
    calls = 0

    def fails_once(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        if len(x) == 6:
            calls += 1
            if calls == 6:
                raise torch.OutOfMemoryError("no")
        return model(x, t)

    images = sampler(fails_once).sample(6, shape=(2, 3), batch_size="auto", return_trajectory=2)
    assert torch.equal(images.x, expected.x)
    assert torch.equal(images.x0, expected.x0)
    assert images.timesteps.tolist() == expected.timesteps.tolist()
    assert model.seen[-8:] == [3] * 8


def test_without_auto_the_error_says_what_helps() -> None:
    for batch_size in (None, 6):
        with pytest.raises(torch.OutOfMemoryError, match=r"allocate for [68]\nbatch_size='auto' takes as many"):
            sampler(Limited(5)).sample(8, shape=(2, 3), batch_size=batch_size)
    with pytest.raises(torch.OutOfMemoryError, match="not enough memory for a single sample at a time"):
        sampler(Limited(0)).sample(8, shape=(2, 3), batch_size="auto")
    with pytest.raises(RuntimeError, match="^something else$"):
        sampler(lambda x, t: (_ for _ in ()).throw(RuntimeError("something else"))).sample(8, shape=(2, 3))


def test_loops_kept_for_later_make_room() -> None:
    """Before anything is given up or halved, and once: then the same number is tried again."""
    model = Limited()
    draw = sampler(model)
    pool = draw._batching.pool

    def needs_room(x: Tensor, t: Tensor) -> Tensor:
        if len(x) == 6 and pool.idle:
            raise torch.OutOfMemoryError("no room")
        return model(x, t)

    draw.network.model = needs_room
    draw.sample(2, shape=(2, 3))
    assert pool.idle == 1
    expected = sampler(Limited()).sample(6, shape=(2, 3))
    assert torch.equal(draw.sample(6, shape=(2, 3)), expected)
    assert [slot.loop.layout.shape[0] for slot in pool._idle] == [6]


def test_noise_functions_need_all_at_once() -> None:
    noise = torch.randn(8, 40, 2, 3)
    model = Limited()
    draw = sampler(model)
    images = draw.sample(40, shape=(2, 3), noise=lambda row, shape: noise[row], batch_size="auto")
    assert set(model.seen) == {40}
    assert torch.equal(images, draw.sample(40, shape=(2, 3), noise=noise))
    model.most = 20
    with pytest.raises(torch.OutOfMemoryError, match="noise from a function is for all samples at once"):
        draw.sample(40, shape=(2, 3), noise=lambda row, shape: noise[row], batch_size="auto")
    assert torch.equal(draw.sample(40, shape=(2, 3), noise=noise, batch_size="auto"), images)


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, "all", "AUTO", [2]])
def test_bad_sizes_are_named(bad: Any) -> None:
    with pytest.raises(ValueError, match="batch_size is .*, must be a positive integer, 'auto' or None"):
        sampler(Limited()).sample(2, shape=(2, 3), batch_size=bad)


@pytest.mark.gpu
def test_auto_on_a_gpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 3, 3, padding=1)).cuda()
    draw = Sampler(lambda x, t: model(x), LINEAR, num_inference_steps=200, device="cuda")
    one, other = (draw.sample(100, shape=(3, 32, 32), batch_size=size) for size in ("auto", 7))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
    assert draw.graph_report()["why_not"] is None
