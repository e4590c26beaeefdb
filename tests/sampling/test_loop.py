"""A loop's buffers: which there are, and that loading leaves nothing of the batch before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm.networks.network import BoundNetwork, Network
from fastddpm.process.multistep import dpmsolver_table
from fastddpm.process.repaint import repaint_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.tables import StepTable, ddpm_table
from fastddpm.sampling.batch import Batch
from fastddpm.sampling.guidance import Classifier, DynamicThreshold
from fastddpm.sampling.loop import ROWS, Loop, Shapes, buffer_shapes
from fastddpm.sampling.settings import LoopSettings

LINEAR = NoiseSchedule.linear()
SHAPE = (3, 2, 5, 4)
TABLE = ddpm_table(LINEAR, [900, 600, 300, 0])


def model(x: Tensor, t: Tensor, class_labels: Tensor | None = None, x_self_cond: Tensor | None = None) -> Tensor:
    """Depends on all it is given, sample by sample."""
    shape = (-1, *[1] * (x.ndim - 1))
    out = torch.tanh(x[:, :2] + 0.3 * x[:, -1:]) + 0.2 * t.view(shape).to(x) / 1000
    if class_labels is not None:
        out = out + 0.1 * class_labels.view(shape).to(x)
    return out if x_self_cond is None else out + 0.1 * x_self_cond


def concatenated(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
    """As `model`, with what it predicted before as the first channels."""
    return model(x[:, 2:], t, class_labels) + 0.1 * x[:, :2]


def gradient(x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
    assert class_labels is not None
    return torch.sin(x) * class_labels.view(-1, 1, 1, 1)


def draw_batch(seed: int, *, scales: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Batch(
        keys=torch.randint(0, 1000, (3, 2), generator=generator),
        class_labels=torch.randint(0, 4, (3,), generator=generator),
        guidance_scale=draw(scales) + 2,
        condition=draw(3, 1, 5, 4),
        known=draw(1, 2, 5, 4),
        known_mask=draw(3, 1, 5, 4).round().clamp(0, 1),
    )


SETTINGS = {
    "plain": LoopSettings(backend="eager", clip_range=1.0, null_class=3),
    "interval": LoopSettings(backend="eager", clip_range=1.0, null_class=3, guidance_interval=(300, 600)),
    "everything": LoopSettings(
        backend="eager",
        threshold=DynamicThreshold(0.9, 2.0),
        null_class=3,
        guidance_rescale=0.5,
        guidance_interval=(300, 600),
        classifier=Classifier(gradient, 0.5, "epsilon"),
        self_condition=True,
    ),
    "ancestral classifier": LoopSettings(backend="eager", null_class=3, classifier=Classifier(gradient, 0.5, "mean")),
}


def shapes_of(
    table: StepTable, shape: tuple[int, ...], batch: Batch, settings: LoopSettings, network: Any = None, **more: bool
) -> Shapes:
    return buffer_shapes(table, shape, batch, settings, network or Network(model), **more)


def walked(loop: Loop, noise: Tensor | None = None, start: int = 0) -> Tensor:
    """What a loaded loop arrives at."""
    for row in range(start, len(loop.bodies)):
        if noise is not None:
            loop.buffers["noise"].copy_(noise[row])
            loop.buffers["known_noise"].copy_(noise[-1 - row])
        loop.body(loop.bodies[row])
    return loop.x.clone()


@pytest.mark.parametrize(
    ("network", "settings"),
    [*((model, settings) for settings in SETTINGS.values()), (concatenated, SETTINGS["everything"])],
    ids=[*SETTINGS, "concatenated"],
)
@pytest.mark.parametrize("given", [False, True], ids=["drawn noise", "given noise"])
@pytest.mark.parametrize(
    "tables",
    [
        (repaint_table(LINEAR, [900, 600, 300, 0], jump_length=1, jump_n_sample=2), TABLE),
        (dpmsolver_table(LINEAR, [950, 800, 600, 500, 300, 0]), dpmsolver_table(LINEAR, [900, 600, 300])),
    ],
    ids=["single-step", "multistep"],
)
def test_a_loaded_loop_is_as_good_as_new(
    network: Any, settings: LoopSettings, given: bool, tables: tuple[StepTable, StepTable]
) -> None:
    """After a longer walk with other values; nothing of it remains, and no tensor is made anew."""
    wrapped = Network(network)
    first, second = draw_batch(1), draw_batch(2)
    states, noise = torch.randn(2, *SHAPE), torch.randn(12, *SHAPE) if given else None
    layouts = [
        shapes_of(table, SHAPE, batch, settings, wrapped, keep_x0=True, noise=given, known_noise=given)
        for table, batch in zip(tables, (first, second), strict=True)
    ]
    assert layouts[0] == layouts[1]
    used, fresh = Loop(wrapped, layouts[0], settings), Loop(wrapped, layouts[1], settings)
    tensors = dict(used.buffers)
    used.load(tables[0], states[0], first)
    before = walked(used, noise)
    for start in (0, 1):
        used.load(tables[1], states[1], second, start)
        fresh.load(tables[1], states[1], second, start)
        assert not any(bool(used.buffers[name].any()) for name in ("noise", "known_noise") if given)
        after = walked(used, noise, start)
        assert torch.equal(after, walked(fresh, noise, start))
        assert torch.equal(used.buffers["x0"], fresh.buffers["x0"])
    assert not torch.equal(before, after)
    used.load(tables[0], states[0], first)
    assert torch.equal(walked(used, noise), before)
    assert all(used.buffers[name] is value for name, value in tensors.items())


def test_what_tells_loops_apart() -> None:
    settings, batch = SETTINGS["plain"], draw_batch(1)
    layout = shapes_of(TABLE, SHAPE, batch, settings)
    classified = SETTINGS["everything"]
    learned = ddpm_table(LINEAR, [900, 0], variance_type="learned_range")
    others = [
        shapes_of(TABLE, (3, 2, 4, 5), batch, settings),
        shapes_of(dpmsolver_table(LINEAR, [900, 500, 0]), SHAPE, draw_batch(1, scales=1), settings),
        shapes_of(learned, SHAPE, batch, settings),
        shapes_of(TABLE, SHAPE, batch, classified),
        *(shapes_of(TABLE, SHAPE, batch, settings, **{name: True}) for name in ("keep_x0", "noise", "known_noise")),
        *(
            shapes_of(TABLE, SHAPE, replace(batch, **{name: value}), settings)
            for name, value in {
                "class_labels": None,
                "guidance_scale": torch.ones(1),
                "condition": torch.zeros(3, 2, 5, 4),
                "known": torch.zeros(3, 2, 5, 4),
                "known_mask": torch.zeros(1, 1, 5, 4),
            }.items()
        ),
        shapes_of(TABLE, SHAPE, replace(batch, guidance_scale=None), settings),
        shapes_of(TABLE, SHAPE, replace(batch, known=None, known_mask=None), settings),
    ]
    assert len({tuple(each.items()) for each in (layout, *others)}) == len(others) + 1
    assert shapes_of(TABLE, SHAPE, draw_batch(2), settings) == layout


@pytest.mark.parametrize(("steps", "rows"), [(1, ROWS), (ROWS, ROWS), (ROWS + 1, 2 * ROWS), (1000, 1024)])
def test_tables_of_similar_lengths_share_a_loop(steps: int, rows: int) -> None:
    table = ddpm_table(LINEAR, range(steps - 1, -1, -1))
    assert shapes_of(table, SHAPE, draw_batch(1), SETTINGS["plain"])["rows"][0] == (rows, 7)


def test_the_last_row_of_a_full_table_runs() -> None:
    table, batch = ddpm_table(LINEAR, range(ROWS - 1, -1, -1)), Batch(torch.zeros(3, 2, dtype=torch.int64))
    loop = Loop(Network(model), shapes_of(table, SHAPE, batch, SETTINGS["plain"]), SETTINGS["plain"])
    loop.load(table, torch.randn(SHAPE), batch)
    walked(loop)
    assert int(loop.step) == ROWS
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        loop.body(loop.bodies[-1])


class Padded(Network):
    """Reads inputs as a prepared U-Net does: channels-last, of more channels than there are, which must stay zero."""

    def new_input(self, shape: Sequence[int]) -> Tensor:
        batch, channels, *size = shape
        self.whole = torch.zeros(batch, *size, 8).permute(0, 3, 1, 2)
        return self.whole[:, :channels]

    def bind(self, inputs: Tensor, *others: Any, **more: Any) -> Any:
        self.bound = [*getattr(self, "bound", []), inputs]
        self.loads: list[int] = []
        bound = super().bind(inputs, *others, **more)
        bound.load = lambda: self.loads.append(len(inputs))  # type: ignore[method-assign]
        return bound


def test_inputs_need_not_be_contiguous() -> None:
    settings, batch = SETTINGS["everything"], draw_batch(1)
    layout = shapes_of(TABLE, SHAPE, batch, settings, Network(concatenated))
    state = torch.randn(SHAPE)
    padded = Padded(concatenated)
    images = []
    for network in (padded, Network(concatenated)):
        loop = Loop(network, layout, settings)
        loop.load(TABLE, state, batch)
        images.append(walked(loop))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-6)
    assert float(padded.whole[:, 5:].abs().max()) == 0
    # The guided body reads both halves, the other one the last of them; both take in new timesteps and labels.
    assert [len(inputs) for inputs in padded.bound] == [6, 3]
    assert padded.bound[1].data_ptr() == padded.bound[0][3:].data_ptr()
    assert sorted(padded.loads) == [3, 6]


def test_a_network_is_bound_to_what_it_reads() -> None:
    calls: list[tuple[Any, ...]] = []

    class Watched(Network):
        def bind(self, *arguments: Any, **more: Any) -> BoundNetwork:
            calls.append((*arguments, *more.values()))
            return super().bind(*arguments, **more)  # type: ignore[return-value]

    batch, settings = draw_batch(1), replace(SETTINGS["everything"], guidance_interval=None)
    loop = Loop(Watched(model), shapes_of(TABLE, SHAPE, batch, settings), settings)
    ((inputs, timesteps, labels, self_condition, conditions),) = calls
    assert conditions == {}
    for given, name in (
        (inputs, "inputs"), (timesteps, "timesteps"), (labels, "labels"), (self_condition, "self_condition")
    ):  # fmt: skip
        assert given is loop.buffers[name]
    loop.load(TABLE, torch.zeros(SHAPE), batch)
    assert batch.class_labels is not None
    assert labels.tolist() == [3] * 3 + batch.class_labels.tolist()
    assert timesteps[: len(TABLE)].tolist() == TABLE.timesteps.tolist()
