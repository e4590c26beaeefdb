"""How many samples go through the network at once, and what happens where they do not fit.

Cost models stand in for devices, so that nothing here depends on time.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling import batch_size, run
from fastddpm.sampling.batch_size import CUDA_SIZES, choose_chunk, even_chunk
from fastddpm.sampling.loop import Loop
from fastddpm.sampling.run import Run
from fastddpm.sampling.runner import Runner
from fastddpm.sampling.sampler import Sampler

LINEAR = NoiseSchedule.linear()


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of a second each time."""
    for module in (batch_size, run):
        monkeypatch.setattr(module, "release_memory", lambda: None)


# -- the choice -------------------------------------------------------------------------------------------------------


class Device:
    """Seconds per step are a launch, plus so much per sample, more past a cache; memory ends at a size."""

    def __init__(self, launch: float = 1e-3, each: float = 1e-5, cache: int = 10**9, memory: int = 10**9) -> None:
        self.launch, self.each, self.cache, self.memory = launch, each, cache, memory
        self.tried: list[int] = []

    def __call__(self, n: int) -> float:
        self.tried.append(n)
        if n > self.memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory. {n}")
        return self.launch + n * self.each * (1 if n <= self.cache else 2)


UP = [4, 16, 32, 64, 128]
# device, samples, options, chunk, what is tried, a part of the reason
CHOICES: dict[str, tuple[Device, int, dict[str, Any], int, list[int], str]] = {
    "the cache ends": (Device(cache=128), 1024, {}, 128, [*UP, 256], "256 is slower"),
    "memory ends": (Device(10, memory=1023), 10_000, {}, 500, [*UP, 256, 512, 1024], "evened out to 500"),
    # 32 samples bring 3.03 % more than 16, 64 bring 1.5 %, and 128 only 2.3 % over those of 32
    "little is gained": (Device(1e-3, 1e-3), 4096, {}, 32, UP, "128 is hardly faster"),
    "all is best": (Device(10), 300, {}, 300, [*UP, 256, 300], "300 is the most there may be"),
    "evened out": (Device(10, 1, cache=256), 300, {}, 150, [*UP, 256, 300], "evened out to 150"),
    "limited": (Device(10), 300, {"max_chunk": 100}, 100, [4, 16, 32, 64, 100], "100 is the most"),
    "few": (Device(), 4, {}, 4, [], "too few to measure"),
    "few may be": (Device(), 500, {"max_chunk": 3}, 3, [], "too few to measure"),
    "the first does not fit": (Device(memory=1), 100, {}, 1, [4, 2, 1], "2 ran out of memory"),
    # A step of every size costs what 4 samples do, 12 sample-steps to measure.
    "the budget ends": (Device(0.1, 0), 1000, {"budget": 66}, 63, [4, 16, 32, 64], "128 would cost more"),
    "no budget": (Device(0.1, 0), 1000, {"budget": 1e-3}, 4, [4], "16 would cost more"),
    "hope on CUDA": (Device(0.1, 0), 1000, {"budget": 66, "hopeful": True}, 1000, [4, 16, 32, 64], "faster so far"),
    "from 64 on CUDA": (Device(10), 300, {"candidates": CUDA_SIZES}, 300, [64, 128, 256, 300], "300 is the most"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_choice(case: str) -> None:
    device, count, options, chunk, tried, reason = CHOICES[case]
    device.tried.clear()
    choice = choose_chunk(count, run=device, **options)
    assert (choice.chunk, device.tried) == (chunk, tried)
    assert reason in choice.reason
    assert list(choice.seconds_per_step) == [size for size in tried if size <= device.memory]


def test_looks_past_one_size_that_brings_little() -> None:
    seconds = {16: 1.0, 32: 1.98, 64: 2.0, 128: 2.5, 256: 9.0}
    choice = choose_chunk(256, run=seconds.__getitem__, candidates=sorted(seconds))
    assert choice.chunk == 128
    assert choice.seconds_per_step == seconds


def broken(n: int) -> float:
    raise RuntimeError("shapes do not match")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"count": 0}, ValueError, "count is 0"),
        ({"max_chunk": 0}, ValueError, "max_chunk is 0"),
        ({"budget": 0}, ValueError, "budget is 0, must be a positive number"),
        ({"budget": float("nan")}, ValueError, "budget is nan"),
        ({"candidates": (4, 2)}, ValueError, r"candidates is \[4, 2\], must be rising"),
        ({"candidates": ()}, ValueError, r"candidates is \[\], must be rising"),
        ({"candidates": (0, 2)}, ValueError, "every size of candidates is 0"),
        ({"run": lambda n: 0.0}, ValueError, r"run\(4\) returned 0.0, must be a positive number"),
        ({"run": lambda n: float("nan")}, ValueError, r"run\(4\) returned nan"),
        ({"run": broken}, RuntimeError, "shapes do not match"),
        ({"run": Device(memory=0)}, torch.OutOfMemoryError, "for a single sample at a time: CUDA out of memory. 1"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose_chunk(**{"count": 100, "run": Device(), **arguments})


@given(st.integers(1, 100_000), st.integers(1, 5000))
def test_even_chunks_are_as_few_and_almost_equal(count: int, most: int) -> None:
    chunk = even_chunk(count, most)
    assert 1 <= chunk <= most
    passes = -(-count // chunk)
    assert passes == -(-count // most)
    assert (passes - 1) * chunk < count
    assert chunk - 1 < count / passes <= chunk  # no smaller one is enough


# -- through the sampler ----------------------------------------------------------------------------------------------


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


def sampler(model: Callable[..., Tensor], steps: int = 8) -> Sampler:
    return Sampler(model, LINEAR, num_inference_steps=steps)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that are timed: up to 32 samples take as long as one, above they take longer in proportion."""
    sizes: list[int] = []

    def seconds_per_step(self: Run, runner: Runner, steps: int = 2) -> float:
        sizes.append(len(runner.loop.x))
        self.one_step(runner)
        return max(32, sizes[-1]) / 32

    monkeypatch.setattr(Run, "seconds_per_step", seconds_per_step)
    return sizes


def test_the_fastest_size_is_found_and_remembered(timed: list[int], caplog: pytest.LogCaptureFixture) -> None:
    model = Limited()
    draw = sampler(model, 80)
    with caplog.at_level(logging.INFO):
        images = draw.sample(300, shape=(2, 3), batch_size="auto", seed=2)
    assert timed == [4, 16, 32, 64, 128]
    assert "batch_size 'auto' is 30 for 300 samples" in caplog.text
    assert torch.equal(images, sampler(Limited(), 80).sample(300, shape=(2, 3), seed=2))
    model.seen.clear()
    assert draw.sample(100, shape=(2, 3), batch_size="auto").shape == (100, 2, 3)
    assert model.seen == [25] * 4 * 80
    assert len(timed) == 5
    draw.sample(100, shape=(2, 4), batch_size="auto")  # something else: measured too
    assert len(timed) > 5


@pytest.mark.parametrize(
    ("count", "steps", "sizes"),
    [
        (1, 400, []),
        (4, 200, []),  # no more than the smallest size
        (5, 400, [4, 5]),
        (60, 3, []),  # to time 4 samples takes 12 sample-steps, more than 5 % of 180
        (60, 4, [4]),  # and not more than 5 % of 240, but 16 samples would
    ],
)
def test_sizes_are_timed_only_where_that_pays(count: int, steps: int, sizes: list[int], timed: list[int]) -> None:
    model = Limited()
    sampler(model, steps).sample(count, shape=(2, 3), batch_size="auto")
    assert timed == sizes
    assert sum(model.seen) <= count * steps + 12 + 2 * sum(sizes)


@pytest.mark.parametrize(("count", "steps"), [(3, 40), (30, 3), (30, 20)], ids=["few", "not timed", "timed"])
def test_memory_limits_what_is_tried(count: int, steps: int, timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample holds at least its state, its input and its prediction: 240 kB here. One size tells what fits."""
    monkeypatch.setattr(batch_size, "free_memory", lambda device: 240_000 * 60)
    model = Limited()
    draw = sampler(model, steps)
    draw.sample(count, shape=(20_000,), batch_size="auto")
    assert bool(timed) == (steps == 20)
    assert 2 <= max(model.seen) <= 20
    assert max(model.seen) >= 4 or count == 3
    monkeypatch.setattr(batch_size, "free_memory", lambda device: 1000)
    chunks = model.seen[-steps * draw._pool.built :]
    model.seen.clear()
    draw.sample(count, shape=(20_000,), batch_size="auto")
    assert set(model.seen) == set(chunks)  # what the first run holds for this one is not free, but there
    model.seen.clear()
    sampler(model, steps).sample(count, shape=(20_000,), batch_size="auto")
    assert model.seen == [min(count, 4)] * 2 + [1] * count * steps  # one at least, after a look at what some take


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


def test_out_of_memory_in_the_middle_of_a_chunk(caplog: pytest.LogCaptureFixture) -> None:
    """The chunk is done again from its start, and what was recorded of it is not there twice."""
    expected = sampler(Limited()).sample(6, shape=(2, 3), return_trajectory=2)
    model = Limited()
    calls = 0

    def fails_once(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += len(x) == 6
        if calls == 6 and len(x) == 6:
            raise torch.OutOfMemoryError("no")
        return model(x, t)

    with caplog.at_level(logging.WARNING, "fastddpm"):
        images = sampler(fails_once).sample(6, shape=(2, 3), batch_size="auto", return_trajectory=2)
    assert torch.equal(images.x, expected.x)
    assert torch.equal(images.x0, expected.x0)
    assert images.timesteps.tolist() == expected.timesteps.tolist()
    assert model.seen[-8:] == [3] * 8
    assert caplog.messages == ["out of memory with 6 samples at once; going on with 3"]


def test_without_auto_the_error_says_what_helps() -> None:
    for size in (None, 6):
        with pytest.raises(torch.OutOfMemoryError, match=r"allocate for [68]\nbatch_size='auto' takes as many"):
            sampler(Limited(5)).sample(8, shape=(2, 3), batch_size=size)
    with pytest.raises(torch.OutOfMemoryError, match="not enough memory for a single sample at a time"):
        sampler(Limited(0)).sample(8, shape=(2, 3), batch_size="auto")
    with pytest.raises(RuntimeError, match="^shapes do not match$"):
        sampler(lambda x, t: torch.full_like(x, broken(1))).sample(8, shape=(2, 3), batch_size="auto")


def test_memory_of_the_failed_pass_is_free_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error's traceback holds frames, which hold tensors and the loop: gone when the cache is emptied."""
    alive: list[weakref.ref] = []
    seen: list[list[object]] = []

    class Noted(Loop):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            alive.append(weakref.ref(self))

    def model(x: Tensor, t: Tensor) -> Tensor:
        big = torch.zeros_like(x)
        if len(x) > 2:
            alive.append(weakref.ref(big))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return big

    monkeypatch.setattr("fastddpm.sampling.pool.Loop", Noted)
    monkeypatch.setattr(run, "release_memory", lambda: seen.append([ref() for ref in alive]))
    gc.disable()  # so that it is the reference count that frees
    try:
        sampler(model, 2).sample(8, shape=(2,), batch_size="auto")
    finally:
        gc.enable()
    assert seen == [[None] * 2, [None] * 4]


def test_loops_kept_for_later_make_room() -> None:
    """Before anything is given up or halved, and once: then the same number is tried again."""
    model = Limited()
    draw = sampler(model)

    def needs_room(x: Tensor, t: Tensor) -> Tensor:
        if len(x) == 6 and draw._pool.idle:
            raise torch.OutOfMemoryError("no room")
        return model(x, t)

    draw.network.model = needs_room
    draw.sample(2, shape=(2, 3))
    assert len(draw._pool.idle) == 1
    expected = sampler(Limited()).sample(6, shape=(2, 3))
    assert torch.equal(draw.sample(6, shape=(2, 3)), expected)
    assert [len(runner.loop.x) for runner in draw._pool.idle] == [6]


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


@pytest.mark.gpu
def test_auto_on_a_gpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 3, 3, padding=1)).cuda()
    draw = Sampler(lambda x, t: model(x), LINEAR, num_inference_steps=200, device="cuda")
    one, other = (draw.sample(100, shape=(3, 32, 32), batch_size=size) for size in ("auto", 7))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
    assert draw.graph_report()["why_not"] is None
