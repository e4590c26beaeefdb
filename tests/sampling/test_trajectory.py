"""Trajectories of the loop, and what the loop does not do where nobody asks for it."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm.networks.network import Network
from fastddpm.process.multistep import dpmsolver_table
from fastddpm.process.repaint import repaint_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import StepTable
from fastddpm.sampling.batch import Batch
from fastddpm.sampling.guidance import Classifier, DynamicThreshold
from fastddpm.sampling.loop import Loop, buffer_shapes
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.settings import LoopSettings

LINEAR = NoiseSchedule.linear()


def toy(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x * (0.5 + t.view(-1, *[1] * (x.ndim - 1)).to(x) / 1000))


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmsolver++"])
@pytest.mark.parametrize(("every", "moments"), [(1, range(7)), (3, [2, 5, 6]), (7, [6]), (100, [6])])
def test_moments(method: str, every: int, moments: Any) -> None:
    sampler = Sampler(toy, LINEAR, method, 7)
    states: list[Tensor] = []
    images = sampler.sample(2, shape=(3, 4), seed=1, callback=lambda i, t, x: states.append(x.clone()))
    trajectory = sampler.sample(2, shape=(3, 4), seed=1, return_trajectory=every)
    assert trajectory.timesteps.tolist() == [int(sampler.timesteps[i]) for i in moments]
    assert torch.equal(trajectory.x, torch.stack([states[i] for i in moments]))
    assert torch.equal(trajectory.x[-1], images)
    torch.testing.assert_close(trajectory.x0[-1], images, rtol=0, atol=1e-6)  # the last step goes to x0


def test_x0_is_the_prediction_of_the_step() -> None:
    sampler = Sampler(toy, LINEAR, "ddpm", 5)
    x_T = torch.randn(2, 3, 4)
    trajectory = sampler.sample(2, x_T=x_T, return_trajectory=1)
    before = torch.cat([x_T[None], trajectory.x[:-1]])
    for index, t in enumerate(sampler.timesteps):
        bar = float(LINEAR.alphas_cumprod[t])
        x0 = (before[index] - (1 - bar) ** 0.5 * toy(before[index], t.expand(2))) / bar**0.5
        torch.testing.assert_close(trajectory.x0[index], x0.clamp(-1, 1), rtol=0, atol=2e-5)


def test_methods_that_store_no_x0_show_none() -> None:
    trajectory = Sampler(toy, LINEAR, "lms", 5).sample(2, shape=(3, 4), return_trajectory=2)
    assert trajectory.x0 is None
    assert trajectory.x.shape == (3, 2, 3, 4)
    with pytest.raises(ValueError, match="self_condition is True but method is 'plms', which stores no x0: must be"):
        Sampler(toy, LINEAR, "plms", 5, self_condition=True)


def test_chunks_are_one_trajectory() -> None:
    sampler = Sampler(toy, LINEAR, num_inference_steps=5)
    one, other = (sampler.sample(5, shape=(2, 3), batch_size=size, return_trajectory=2) for size in (None, 2))
    assert torch.equal(one.x, other.x)
    assert torch.equal(one.x0, other.x0)
    assert one.timesteps.tolist() == other.timesteps.tolist() == [600, 200, 0]


def test_a_stop_ends_the_trajectory() -> None:
    sampler = Sampler(toy, LINEAR, num_inference_steps=10)
    states: list[Tensor] = []

    def stop(index: int, timestep: int, x: Tensor) -> bool:
        states.append(x.clone())
        return index == 4

    trajectory = sampler.sample(1, shape=(2, 3), callback=stop, return_trajectory=3)
    assert trajectory.timesteps.tolist() == [700, 500]
    assert torch.equal(trajectory.x, torch.stack([states[2], states[4]]))
    # Stopped at a moment, and before the first one.
    for last, moments in ((5, [700, 400]), (1, [800])):
        trajectory = sampler.sample(1, shape=(2, 3), callback=lambda i, t, x, last=last: i == last, return_trajectory=3)
        assert trajectory.timesteps.tolist() == moments


@pytest.mark.parametrize(("stops", "which"), [(2, 0), (6, 1)])
def test_chunks_that_stop_at_different_steps(stops: int, which: int) -> None:
    """The callback's `stops`-th call, which is the second step of chunk `which`, stops that chunk alone."""
    sampler = Sampler(toy, LINEAR, num_inference_steps=4)
    calls: list[int] = []

    def stop(index: int, timestep: int, x: Tensor) -> bool:
        calls.append(index)
        return len(calls) == stops

    trajectory = sampler.sample(2, shape=(2, 3), batch_size=1, callback=stop, return_trajectory=1)
    assert len(calls) == 6
    assert trajectory.timesteps.tolist() == sampler.timesteps.tolist()
    assert torch.equal(trajectory.x[1, which], trajectory.x[3, which])  # the end of what stopped is repeated
    assert not torch.equal(trajectory.x[1, 1 - which], trajectory.x[3, 1 - which])


def test_from_a_later_row_and_along_another_table() -> None:
    sampler = Sampler(toy, LINEAR, num_inference_steps=6)
    whole = sampler.sample(2, shape=(2, 3), seed=1, return_trajectory=1)
    later = sampler.sample(2, x_T=whole.x[2], start=3, seed=1, return_trajectory=2)
    assert later.timesteps.tolist() == [166, 0]
    assert torch.equal(later.x, whole.x[[4, 5]])
    table = repaint_table(LINEAR, sampler.timesteps, jump_length=2, jump_n_sample=2)
    walked = sampler.sample(2, shape=(2, 3), table=table, return_trajectory=1)
    assert walked.timesteps.tolist() == table.timesteps.tolist()
    up = int((~table.needs_network).nonzero()[0])
    assert torch.equal(walked.x0[up], walked.x0[up - 1])  # a step without a prediction shows the one before
    assert not torch.equal(walked.x[up], walked.x[up - 1])


def loop_of(
    table: StepTable, settings: LoopSettings, network: Network | None = None, *, keep_x0: bool = False, **batch: Any
) -> Loop:
    given = Batch(torch.zeros(2, 2, dtype=torch.int64), **batch)
    network = network or Network(toy)
    loop = Loop(network, buffer_shapes(table, (2, 3, 4), given, settings, network, keep_x0=keep_x0), settings)
    loop.load(table, torch.zeros(2, 3, 4), given)
    return loop


def test_off_keeps_nothing() -> None:
    table = dpmsolver_table(LINEAR, [900, 500, 0], solver_order=1)
    assert not table.multistep
    assert "x0" not in loop_of(table, LoopSettings()).buffers
    assert "x0" in loop_of(table, LoopSettings(), keep_x0=True).buffers
    assert "x0" in loop_of(dpmsolver_table(LINEAR, [900, 500, 0]), LoopSettings()).buffers


class Ops(TorchDispatchMode):
    """Notes what torch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_off_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the network and the kernel a plain step is one look-up and one count."""
    monkeypatch.setattr("fastddpm.sampling.loop.reverse_step_", lambda *_, **__: None)
    table = repaint_table(LINEAR, [900, 500, 0], jump_n_sample=1)
    loop = loop_of(table, LoopSettings(), Network(lambda x, t: x))
    with Ops() as ops:
        loop.body(loop.bodies[0])
    assert ops.seen == ["aten.index_select.default", "aten.expand.default", "aten.add_.Tensor"]


@pytest.mark.parametrize("shifts", [None, "mean", "epsilon"])
def test_no_body_waits_for_the_device(shifts: Literal["mean", "epsilon"] | None) -> None:
    """Every body runs on tensors that have no values, plain and with all options: the host looks at none."""
    table = repaint_table(LINEAR, [900, 600, 300, 0], jump_length=1, jump_n_sample=2)

    def model(x: Tensor, t: Tensor, class_labels: Tensor | None = None, x_self_cond: Tensor | None = None) -> Tensor:
        return toy(x[:, :3], t)

    def ones(x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        return torch.ones_like(x)

    batch: dict[str, Any] = {}
    settings = LoopSettings(backend="eager", clip_range=1.0)
    if shifts is not None:
        batch = {
            "class_labels": torch.zeros(2, dtype=torch.int64),
            "guidance_scale": torch.full((2,), 3.0),
            "condition": torch.zeros(2, 1, 4),
            "known": torch.zeros(1, 3, 4),
            "known_mask": torch.zeros(2, 1, 4),
        }
        settings = LoopSettings(
            backend="eager",
            threshold=DynamicThreshold(0.9, 2.0),
            guidance_rescale=0.5,
            guidance_interval=(300, 600),
            null_class=1,
            classifier=Classifier(ones, 2.0, shifts),
            self_condition=True,
        )
    network = Network(model)
    network.device = torch.device("meta")  # where the loop makes its tensors: they have shapes alone
    loop = loop_of(table, settings, network, keep_x0=True, **batch)
    tensors = list(loop.buffers.values())
    assert len(tensors) > 5
    assert all(tensor.is_meta for tensor in tensors)
    assert len(set(loop.bodies)) == (2 if shifts is None else 3)
    for kind in loop.bodies:
        loop.body(kind)
    assert list(map(id, loop.buffers.values())) == list(map(id, tensors))
    with pytest.raises(RuntimeError, match="meta"):
        float(loop.x.sum())
