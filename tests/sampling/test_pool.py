"""Loops are kept for later, lent once at a time, and gone with the sampler."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm.networks.network import Network
from fastddpm.process.repaint import repaint_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import ddpm_table
from fastddpm.sampling.batch import Batch
from fastddpm.sampling.guidance import ClassifierFn
from fastddpm.sampling.loop import Shapes, buffer_shapes
from fastddpm.sampling.pool import LoopPool
from fastddpm.sampling.runner import GraphRecord
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.settings import LoopSettings

LINEAR = NoiseSchedule.linear()


def toy(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x * (0.5 + t.view(-1, *[1] * (x.ndim - 1)).to(x) / 1000))


def conditional(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
    return toy(x, t) + 0.2 * class_labels.view(-1, *[1] * (x.ndim - 1)).to(x)


def shapes(size: int) -> Shapes:
    batch, table = Batch(torch.zeros(1, 2, dtype=torch.int64)), ddpm_table(LINEAR, [3, 0])
    return buffer_shapes(table, (1, 2, size), batch, LoopSettings(), Network(toy))


def new_pool(**more: int) -> LoopPool:
    return LoopPool(Network(toy), LoopSettings(), GraphRecord("auto", "there is no GPU"), **more)


@pytest.fixture
def pool() -> LoopPool:
    return new_pool()


def test_the_same_shapes_gets_the_same_loop(pool: LoopPool) -> None:
    with pool.lease(shapes(3)) as first:
        assert first.loop.shapes == shapes(3)
        assert pool.idle == []
    with pool.lease(shapes(4)) as other:
        assert other is not first
    with pool.lease(shapes(3)) as again:
        assert again is first
    assert pool.built == 2


def test_a_busy_loop_is_not_lent_again(pool: LoopPool) -> None:
    with pool.lease(shapes(3)) as first, pool.lease(shapes(3)) as second:
        assert first.loop is not second.loop
    assert (pool.built, len(pool.idle)) == (2, 2)


def test_those_used_last_are_kept(pool: LoopPool) -> None:
    refs: dict[int, Any] = {}
    for size in (1, 2, 3, 4, 1, 5, 6):  # 2 and 3 have not been used for longest
        with pool.lease(shapes(size)) as runner:
            refs[size] = weakref.ref(runner.loop)
        del runner
    assert {size for size, ref in refs.items() if ref() is not None} == {4, 1, 5, 6}
    assert pool.built == 6
    assert pool.clear() == 4
    assert all(ref() is None for ref in refs.values())
    assert pool.clear() == 0


def test_a_loop_in_which_something_failed_is_not_used_again(pool: LoopPool) -> None:
    with pytest.raises(KeyError), pool.lease(shapes(3)):
        raise KeyError
    assert pool.idle == []
    with pool.lease(shapes(3)):
        pass
    assert pool.built == 2


def test_a_pool_that_keeps_none() -> None:
    pool = new_pool(idle=0)
    for _ in range(2):
        with pool.lease(shapes(1)):
            pass
    assert (pool.idle, pool.built) == ([], 2)


@pytest.fixture
def _no_collection() -> Iterator[None]:
    # Torch imports parts of itself inside the first dispatch mode, and keeps the frames that led there.
    Sampler(toy, LINEAR, num_inference_steps=30).sample(9, shape=(2, 3), batch_size="auto")
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize("batch_size", [None, "auto"])
def test_loops_are_gone_with_their_sampler(batch_size: str | None) -> None:
    """Without the help of the garbage collector: no cycle holds them, nor anything global."""
    sampler = Sampler(toy, LINEAR, num_inference_steps=30)
    sampler.sample(9, shape=(2, 3), batch_size=batch_size)
    pool = sampler._pool
    refs = [weakref.ref(runner.loop) for runner in pool.idle]
    assert refs
    del sampler, pool
    assert [ref() for ref in refs] == [None] * len(refs)


def test_a_copied_sampler_has_loops_of_its_own() -> None:
    sampler = Sampler(toy, LINEAR, num_inference_steps=3)
    images = sampler.sample(2, shape=(2, 3))
    other = copy.deepcopy(sampler)
    assert other._pool.idle == []
    assert torch.equal(other.sample(2, shape=(2, 3)), images)
    assert other.graph_report() == sampler.graph_report()


# -- through the sampler ----------------------------------------------------------------------------------------------


def classifier(scale: float) -> ClassifierFn:
    def gradient(x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        assert class_labels is not None
        return scale * torch.sin(x + class_labels.view(-1, 1, 1))

    return gradient


SETTINGS: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "dpmsolver++": {"method": "dpmsolver++", "self_condition": True},
    "ddim": {"method": "ddim", "eta": 1.0, "thresholding": True, "classifier_fn": classifier(0.3)},
    "interval": {"guidance_interval": (200, 600), "guidance_rescale": 0.3, "guidance_scale": 3.0},
}


def reads_all(x: Tensor, t: Tensor, class_labels: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
    out = conditional(x[:, :2], t, class_labels) + 0.1 * x[:, 2:3]
    return out if x_self_cond is None else out + 0.1 * x_self_cond


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_other_values_take_the_same_loop(settings: dict[str, Any]) -> None:
    """Seeds, labels, scales, x_T, conditions, known regions and the schedule's values: as from a new sampler."""

    def sampler() -> Sampler:
        return Sampler(reads_all, LINEAR, num_inference_steps=6, null_class=3, **settings)

    def arguments(seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        start = int(torch.randint(0, 3, (), generator=generator))
        return {
            "seed": seed,
            "class_labels": torch.randint(0, 3, (2,), generator=generator),
            "guidance_scale": [2.0 + seed, 0.5 * seed],
            "x_T": torch.randn(2, 2, 5, generator=generator),
            "condition": torch.randn(2, 1, 5, generator=generator),
            "known": torch.randn(2, 5, generator=generator).clamp(-1, 1),
            "known_mask": torch.rand(5, generator=generator).round(),
            "start": start,
        }

    used = sampler()
    for seed in (3, 5, 4, 3):
        assert torch.equal(used.sample(2, **arguments(seed)), sampler().sample(2, **arguments(seed)))
    assert used._pool.built == 1
    # Another table: a longer walk, with steps that ask the network nothing.
    table = repaint_table(LINEAR, used.timesteps, jump_length=2, jump_n_sample=2)
    if settings.get("method") != "dpmsolver++":  # which keeps more
        used.sample(2, **arguments(1), table=table)
        assert used._pool.built == 1
        assert torch.equal(used.sample(2, **arguments(3)), sampler().sample(2, **arguments(3)))


def test_chunks_share_a_loop() -> None:
    sampler = Sampler(toy, LINEAR, num_inference_steps=4)
    whole = sampler.sample(7, shape=(2, 3))
    assert torch.equal(sampler.sample(7, shape=(2, 3), batch_size=3), whole)
    assert sampler._pool.built == 3  # of 7, 3 and 1 samples


def test_given_noise_does_not_stay() -> None:
    sampler = Sampler(toy, LINEAR, num_inference_steps=4)
    drawn = sampler.sample(2, shape=(2, 3), seed=1)
    noise = torch.randn(4, 2, 2, 3)
    given = sampler.sample(2, shape=(2, 3), seed=1, noise=noise)
    assert torch.equal(sampler.sample(2, shape=(2, 3), seed=1), drawn)
    noise[2] = float("nan")
    assert bool(sampler.sample(2, shape=(2, 3), seed=1, noise=noise).isnan().any())
    # The last step adds none, and what was there before does not come in.
    assert bool(sampler.sample(2, x_T=given, start=3, noise=noise).isfinite().all())
    assert not torch.equal(given, drawn)
    assert sampler._pool.built == 3  # drawn and given noise, and one sample walked again to find where it became nan


def test_threads_do_not_disturb_each_other() -> None:
    """Each gets what it gets alone, while all are inside the loop at the same time."""
    meet = threading.Barrier(3)
    sampler = Sampler(conditional, LINEAR, num_inference_steps=12, null_class=3)

    def draw(seed: int, callback: Any = None) -> Tensor:
        options = {"class_labels": [seed % 3, 1], "guidance_scale": float(seed), "callback": callback}
        return sampler.sample(2, shape=(2, 5), seed=seed, **options)

    alone = {seed: draw(seed) for seed in (2, 3, 4)}
    together: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        together[seed] = draw(seed, lambda index, t, x: meet.wait(30) < 0)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[seed], images) for seed, images in alone.items())
    assert sampler._pool.built == 3


@pytest.mark.gpu
def test_streams_follow_each_other() -> None:
    """A loop that goes from stream to stream waits for what the one before still does with it."""
    sampler = Sampler(toy, LINEAR, num_inference_steps=200, device="cuda")
    expected = [sampler.sample(64, shape=(4, 64, 64), seed=seed) for seed in range(4)]
    torch.cuda.synchronize()
    images = []
    for seed in range(4):
        with torch.cuda.stream(torch.cuda.Stream()):
            images.append(sampler.sample(64, shape=(4, 64, 64), seed=seed))
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(images, expected, strict=True))
    assert sampler._pool.built == 1
