"""What is random in a training step: the same numbers however a batch is split, and distributed as it should be."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastddpm_kernels.philox import (
    STREAM_OFFSET,
    STREAM_PERTURBATION,
    STREAM_Q_SAMPLE,
    STREAM_TRAINING,
    normal,
    random_words,
    sample_keys,
)
from torch import Tensor, nn
from training_runs import launch, share_history

from fastddpm import GaussianDiffusion, NoiseSchedule
from fastddpm.training.objective.noise import nearest_noise
from fastddpm.training.objective.timestep_sampling import TimestepSampler

SCHEDULE = NoiseSchedule.linear(100)


class Recorder(nn.Module):
    """Predicts a tenth of what it sees, and keeps that."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.1))
        self.seen: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []

    def keep(self, x: Tensor, t: Tensor, y: Tensor | None, told: Tensor | None) -> Tensor:
        self.seen.append((x.detach().clone(), t, y, told))
        return self.factor * x + (0 if told is None else 0.05 * told)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.keep(x, t, y, None)


class SelfConditioned(Recorder):
    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.keep(x, t, None, x_self_cond)


def make(**options: Any) -> tuple[GaussianDiffusion, Any]:
    net = Recorder()
    return GaussianDiffusion(net, SCHEDULE, seed=5, **options), net


X0 = torch.linspace(-1, 1, 12 * 2 * 9).view(12, 2, 3, 3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"offset_noise": 0.1, "input_perturbation": 0.2, "label_dropout": 0.4, "null_class": 9},
        {"timestep_sampling": "stratified", "prediction_type": "v_prediction", "weighting": "min_snr"},
    ],
)
def test_the_loss_of_a_step_does_not_depend_on_how_it_is_split(options: dict[str, Any]) -> None:
    diffusion, net = make(**options)
    labels = torch.arange(12) % 5
    whole = diffusion(X0, labels, step=7, global_batch=12)
    parts = [
        diffusion(X0[k : k + 4], labels[k : k + 4], step=7, first_sample=k, global_batch=12) for k in range(0, 12, 4)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-6, atol=0)
    for index in range(3):  # x_t, t and labels are the same to the bit
        assert torch.equal(torch.cat([seen[index] for seen in net.seen[1:]]), net.seen[0][index])


@pytest.mark.parametrize("step", [torch.tensor(7), torch.tensor([7])], ids=["scalar", "one"])
def test_step_may_be_a_tensor(step: Tensor) -> None:
    diffusion, _ = make()
    assert torch.equal(diffusion(X0, step=step), diffusion(X0, step=7))
    assert not torch.equal(diffusion(X0, step=step), diffusion(X0, step=8))


def test_timesteps_are_philox_words_scaled() -> None:
    diffusion, _ = make()
    words = random_words(sample_keys([5] * 4, range(3, 7)), 11, STREAM_TRAINING, 1, backend="reference")[:, 0]
    t, importance = diffusion.sample_timesteps(4, step=11, first_sample=3)
    assert t.tolist() == [int(word) * 100 // 2**32 for word in words]
    assert bool((importance == 1).all())


def test_uniform_timesteps_are_uniform() -> None:
    diffusion, _ = make()
    counts = torch.bincount(diffusion.sample_timesteps(100_000)[0], minlength=100).double()
    # chi squared of 99 degrees of freedom: beyond 160 in 1 of 10^4 draws (the seed is fixed)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 160


@pytest.mark.parametrize("count", [1, 7, 100, 130])
def test_stratified_timesteps_are_spread_evenly_and_turn(count: int) -> None:
    diffusion, _ = make(timestep_sampling="stratified")
    first = []
    for step in range(50):
        t = diffusion.sample_timesteps(count, step=step)[0]
        per_slice = torch.bincount(t * count // 100, minlength=count) if count <= 100 else torch.bincount(t)
        assert int(per_slice.max()) <= (2 if count <= 100 else 3)  # a slice of 100 / count steps, whatever the turn
        first.append(int(t[0]))
        halves = [diffusion.sample_timesteps(n, step=step, first_sample=k, global_batch=count)[0]
                  for k, n in ((0, count // 2), (count // 2, count - count // 2))]  # fmt: skip
        assert torch.equal(torch.cat(halves), t)
    assert np.std(first) > 20  # uniform: 28.9


def test_noise_is_philox_with_what_the_settings_add() -> None:
    keys = sample_keys([5] * 12, range(12))
    z = normal(keys, (2, 3, 3), step=4, stream=STREAM_Q_SAMPLE)
    offset = normal(keys, (2,), step=4, stream=STREAM_OFFSET)[:, :, None, None]
    more = normal(keys, (2, 3, 3), step=4, stream=STREAM_PERTURBATION)
    for options, target, seen in (
        ({}, z, z),
        ({"offset_noise": 0.3}, z + 0.3 * offset, z + 0.3 * offset),
        ({"input_perturbation": 0.2}, z, z + 0.2 * more),
    ):
        diffusion, net = make(**options)
        t = torch.arange(12) * 8
        losses = diffusion.losses(X0, t, step=4)
        bar = SCHEDULE.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        x_t = bar.sqrt() * X0 + (1 - bar).sqrt() * seen
        torch.testing.assert_close(net.seen[0][0], x_t)
        torch.testing.assert_close(losses, (0.1 * x_t - target).square().mean((1, 2, 3)), rtol=1e-5, atol=0)


def test_labels_are_dropped_by_their_share() -> None:
    diffusion, net = make(label_dropout=0.3, null_class=9)
    diffusion(torch.zeros(20_000, 1, 1), torch.zeros(20_000, dtype=torch.int64))
    given = net.seen[0][2]
    assert set(given.unique().tolist()) == {0, 9}
    assert float((given == 9).double().mean()) == pytest.approx(0.3, abs=4.5 * (0.21 / 20_000) ** 0.5)
    diffusion.losses(X0, torch.zeros(12, dtype=torch.int64), labels=torch.zeros(12, dtype=torch.int64))
    assert not net.seen[1][2].any()


def test_self_conditioning_comes_up_in_half_of_the_steps() -> None:
    net = SelfConditioned()
    diffusion = GaussianDiffusion(net, SCHEDULE)
    compiled = torch.compile(diffusion, backend="eager", fullgraph=True)
    conditioned: list[bool] = []
    for step in range(40):
        net.seen.clear()
        loss = diffusion(X0[:2], step=step)
        conditioned.append(len(net.seen) == 2)
        x_t, t, _, told = net.seen[-1]
        assert told is not None
        if conditioned[-1]:
            bar = SCHEDULE.alphas_cumprod[t].float().view(-1, 1, 1, 1)
            torch.testing.assert_close(told, (x_t - (1 - bar).sqrt() * 0.1 * x_t) / bar.sqrt(), rtol=1e-4, atol=1e-5)
        else:
            assert not told.any()
        if conditioned.count(conditioned[-1]) == 1:  # compiled as one that a graph captures, without a branch
            torch.testing.assert_close(compiled(X0[:2], step=torch.tensor(step)), loss)
        assert torch.equal(diffusion(X0[:1], step=step, first_sample=1), diffusion.losses(
            X0[:1], diffusion.sample_timesteps(1, step=step, first_sample=1)[0], step=step, first_sample=1,
            self_condition=conditioned[-1]).mean())  # fmt: skip  # the coin is the whole batch's
    assert 10 <= sum(conditioned) <= 30


def test_self_conditioning_by_concatenation() -> None:
    class Concatenated(Recorder):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            return self.keep(x[:, 2:], t, None, x[:, :2])

    net = Concatenated()
    diffusion = GaussianDiffusion(net, SCHEDULE, self_condition=True)
    t = torch.full((12,), 30)
    diffusion.losses(X0, t, self_condition=True)
    torch.testing.assert_close(net.seen[0][0], net.seen[1][0])
    assert net.seen[1][3] is not None
    assert bool(net.seen[1][3].any())


def test_immiscible_pairs_by_least_distance() -> None:
    x0, noise = torch.randn(6, 1, 2, 2), torch.randn(6, 1, 2, 2)
    cost = torch.cdist(x0.flatten(1), noise.flatten(1))
    best = min(itertools.permutations(range(6)), key=lambda order: float(cost[range(6), list(order)].sum()))
    assert nearest_noise(x0, noise).tolist() == list(best)
    plain, _ = make()
    paired, net = make(immiscible=True)
    t = torch.full((12,), 99)
    z = normal(sample_keys([5] * 12, range(12)), (2, 3, 3), step=2, stream=STREAM_Q_SAMPLE)
    z = z[nearest_noise(X0, z)]
    torch.testing.assert_close(paired.losses(X0, t, step=2), plain.losses(X0, t, noise=z))  # x_t and target alike
    assert len(net.seen) == 1


# -- importance --------------------------------------------------------------------------------------------------------


def test_importance_follows_the_history_of_nichol_and_dhariwal() -> None:
    sampler = TimestepSampler("importance", 4)
    history: list[list[float]] = [[] for _ in range(4)]
    assert bool((sampler.probabilities() == 0.25).all())
    for round in range(6):
        t = torch.randint(0, 4, (23,))
        losses = torch.rand(23) * (t + 1)
        sampler.update(t, losses)
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            history[step] = [*history[step], loss][-10:]
        if min(map(len, history)) < 10:
            assert bool((sampler.probabilities() == 0.25).all()), round
    roots = np.array([np.sqrt(np.mean(np.square(losses))) for losses in history])
    expected = 0.999 * roots / roots.sum() + 0.001 / 4
    np.testing.assert_allclose(sampler.probabilities().numpy(), expected, rtol=1e-6)

    words = torch.randint(0, 2**32, (40_000,))
    t, importance = sampler(words, words[0], torch.arange(40_000), 40_000)
    share = torch.bincount(t, minlength=4).double() / 40_000
    np.testing.assert_allclose(share.numpy(), expected, atol=4.5 * 0.5 / 200)
    np.testing.assert_allclose(importance.numpy(), 1 / (4 * expected[t.numpy()]), rtol=1e-6)


def test_processes_share_the_history(tmp_path: Path) -> None:
    batches = [(torch.randint(0, 3, (18,)), torch.rand(18)) for _ in range(3)]
    torch.save(batches, tmp_path / "batch")
    assert launch(share_history, tmp_path, processes=2) == [0, 0]
    alone = TimestepSampler("importance", 3)
    for t, losses in batches:
        alone.update(t, losses)
    for rank in (0, 1):
        state = torch.load(tmp_path / str(rank), weights_only=True)
        assert torch.equal(state["history"], alone.history)
        assert torch.equal(state["counts"], alone.counts)


def test_more_losses_at_once_than_are_kept() -> None:
    sampler = TimestepSampler("importance", 2)
    losses = torch.arange(25).float()
    sampler.update(torch.zeros(25, dtype=torch.int64), losses)
    assert sorted(sampler.history[0].tolist()) == list(range(15, 25))
    assert sampler.counts.tolist() == [25, 0]


def test_losses_that_are_not_finite_are_not_remembered() -> None:
    """One would make every probability NaN, for ever: nothing would be drawn any more by which it could be replaced."""
    sampler, twin = TimestepSampler("importance", 3), TimestepSampler("importance", 3)
    inf, nan = float("inf"), float("nan")
    for round in range(11):
        t, losses = torch.tensor([2, 0, 1, 2, 1, 0]), torch.tensor([inf, 1.0 + round, nan, 3.0, 2.0, -inf])
        sampler.update(t, losses)
        twin.update(t[losses.isfinite()], losses[losses.isfinite()])
    assert sampler.counts.tolist() == [11, 11, 11]
    assert torch.equal(sampler.history, twin.history)
    assert torch.equal(sampler.probabilities(), twin.probabilities())
    assert bool((sampler.probabilities() != 1 / 3).all())


def test_history_is_saved_and_grows_only_in_training() -> None:
    diffusion, _ = make(timestep_sampling="importance")
    diffusion(X0)
    state = diffusion.state_dict()
    assert int(state["timestep_sampler.counts"].sum()) == 12
    diffusion.eval()
    diffusion(X0)
    diffusion.train()
    with torch.no_grad():
        diffusion(X0)
    diffusion.losses(X0, torch.zeros(12, dtype=torch.int64))
    assert int(diffusion.timestep_sampler.counts.sum()) == 12
    other, _ = make(timestep_sampling="importance")
    other.load_state_dict(state)
    assert torch.equal(other.timestep_sampler.history, diffusion.timestep_sampler.history)
    assert list(make()[0].state_dict()) == ["unet.factor"]


def test_an_importance_weighted_loss_has_the_uniform_ones_mean() -> None:
    diffusion, _ = make(timestep_sampling="importance")
    sampler = diffusion.timestep_sampler
    sampler.history.copy_(torch.linspace(0.2, 3, 100)[:, None].expand(100, 10))
    sampler.counts.fill_(10)
    uniform, _ = make()
    x0 = X0[:1].expand(20_000, 2, 3, 3)
    weighted = diffusion.eval()(x0)
    assert weighted.item() == pytest.approx(uniform(x0).item(), rel=0.02)
