"""The loop over the table: how deep it is, where its segments end, whose steps it runs, and what it costs."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
import torch
from fastddpm_kernels import philox
from torch import Tensor

import fastddpm
from fastddpm import NoiseSchedule, Sampler, load_pretrained
from fastddpm.networks.frozen.instructions import Instruction
from fastddpm.process.repaint import repaint_table
from fastddpm.process.tables import ddim_table, ddpm_table, make_table
from fastddpm.sampling import loop
from fastddpm.sampling.loop import Body
from fastddpm.sampling.run import Segment, segments
from fastddpm.sampling.runner import Runner

LINEAR = NoiseSchedule.linear()
PLAIN, GUIDED, ALONE = Body(True, False), Body(True, True), Body(False, False)


def toy(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
    out = torch.tanh(x * (0.5 + t.view(-1, *[1] * (x.ndim - 1)).to(x) / 1000))
    return out if class_labels is None else out + 0.1 * class_labels.view(-1, *[1] * (x.ndim - 1)).to(x)


def sampler(**settings: Any) -> Sampler:
    return Sampler(toy, LINEAR, **{"num_inference_steps": 10, "null_class": 3, **settings})


# -- depth ------------------------------------------------------------------------------------------------------------


def our_frames() -> list[str]:
    """The functions of this package that are running, the outermost first."""
    ours = str(fastddpm.__path__[0])
    frame: FrameType | None = sys._getframe(1)
    found = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(ours):
            found.append(frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name)
        frame = frame.f_back
    return found[::-1]


@pytest.mark.parametrize("arguments", [{}, {"class_labels": 1, "guidance_scale": 3.0}, {"batch_size": "auto"}])
def test_a_foreign_model_is_called_from_few_frames(arguments: dict[str, Any]) -> None:
    seen: list[list[str]] = []

    def model(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        seen.append(our_frames())
        return toy(x, t, class_labels)

    draw = Sampler(model, LINEAR, num_inference_steps=3, null_class=3)
    draw.sample(2, shape=(2, 3), callback=lambda *_: None, **arguments)
    assert all(len(frames) <= 6 for frames in seen), seen[0]
    assert seen[0][0].endswith("sample")


def test_the_first_instruction_of_a_frozen_network_runs_from_few_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = load_pretrained().sampler(num_inference_steps=2, cuda_graph=False)
    draw.sample(1, class_labels=1)
    (bound,) = draw._pool.idle[0].loop._bound.values()
    first: Instruction = bound.instructions[0]  # type: ignore[attr-defined]
    seen: list[list[str]] = []
    run = first.run
    monkeypatch.setattr(first, "run", lambda: (seen.append(our_frames()), run())[1])
    draw.sample(1, class_labels=1)
    assert len(seen) == 2
    assert all(len(frames) <= 8 for frames in seen), seen[0]
    assert "Loop.body" in seen[0] or "body" in seen[0]


# -- segments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "periods", "expected"),
    [
        (0, [], [(GUIDED, 0, 2), (PLAIN, 2, 3), (ALONE, 5, 1), (PLAIN, 6, 1)]),
        (3, [], [(PLAIN, 3, 2), (ALONE, 5, 1), (PLAIN, 6, 1)]),
        (0, [4], [(GUIDED, 0, 2), (PLAIN, 2, 2), (PLAIN, 4, 1), (ALONE, 5, 1), (PLAIN, 6, 1)]),
        (1, [3], [(GUIDED, 1, 1), (PLAIN, 2, 2), (PLAIN, 4, 1), (ALONE, 5, 1), (PLAIN, 6, 1)]),
        (2, [100, 1], [(PLAIN, 2, 1), (PLAIN, 3, 1), (PLAIN, 4, 1), (ALONE, 5, 1), (PLAIN, 6, 1)]),
        (6, [], [(PLAIN, 6, 1)]),
    ],
)
def test_segments(start: int, periods: list[int], expected: list[tuple[Body, int, int]]) -> None:
    bodies = [GUIDED, GUIDED, PLAIN, PLAIN, PLAIN, ALONE, PLAIN]
    assert list(segments(bodies, start, periods)) == [Segment(*segment) for segment in expected]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Body, int]]:
    """What is asked of runners: the row that the loop is at, the kind of step, how many."""
    asked: list[tuple[int, Body, int]] = []
    advance = Runner.advance

    def noted(self: Runner, kind: Body, steps: int) -> None:
        asked.append((int(self.loop.step), kind, steps))
        advance(self, kind, steps)

    monkeypatch.setattr(Runner, "advance", noted)
    return asked


def test_bodies_run_in_the_order_of_the_table(asked: list[tuple[int, Body, int]]) -> None:
    draw = sampler(guidance_scale=2.0, guidance_interval=(300, 600))
    table = repaint_table(LINEAR, draw.timesteps, jump_length=2, jump_n_sample=2)
    draw.sample(2, shape=(2, 3), table=table, class_labels=1)
    expected = [
        Body(needed, needed and 300 <= t <= 600)
        for needed, t in zip(table.needs_network.tolist(), table.timesteps.tolist(), strict=True)
    ]
    assert len(set(expected)) == 3
    assert [kind for _, kind, count in asked for _ in range(count)] == expected
    firsts = [first for first, _, _ in asked]
    assert firsts == [sum(count for _, _, count in asked[:index]) for index in range(len(asked))]
    assert all(one[1] != other[1] for one, other in pairwise(asked))  # none is split in two
    asked.clear()
    draw.sample(2, x_T=torch.zeros(2, 2, 3), start=7, class_labels=1)
    assert asked == [(7, PLAIN, 3)]


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ({}, [10]),
        ({"callback": lambda i, t, x: False}, [1] * 10),
        ({"noise": torch.zeros(10, 2, 2, 3)}, [1] * 10),
        ({"return_trajectory": 4}, [4, 4, 2]),
        ({"progress": True}, [1] * 10),
        ({"batch_size": 1}, [10, 10]),
        ({"start": 3, "x_T": torch.zeros(2, 2, 3), "return_trajectory": 5}, [5, 2]),
        ({"callback": lambda i, t, x: i == 1}, [1, 1]),
    ],
)
def test_the_host_steps_in_only_where_it_must(
    asked: list[tuple[int, Body, int]], arguments: dict[str, Any], counts: list[int]
) -> None:
    sampler().sample(2, **{"shape": (2, 3), **arguments})
    assert [count for _, _, count in asked] == counts


# -- noise that is made ahead -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"method": "ddim", "eta": 0.7}, {"classifier_fn": lambda x, t, y: -x}],
    ids=["ddpm", "ddim", "classifier"],
)
def test_noise_made_ahead_is_the_noise_of_each_step(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of any length, from any row, and along steps back up: the same bits."""
    made: list[int] = []
    torch_normal = loop.torch_normal

    def noted(keys: Tensor, *arguments: Any) -> Tensor:
        made.append(len(keys))
        return torch_normal(keys, *arguments)

    monkeypatch.setattr(loop, "torch_normal", noted)
    table = repaint_table(LINEAR, range(900, -1, -100), jump_length=2, jump_n_sample=2)
    images = []
    for most in (0, 2 * 3 * 2 * 7, 2**16):
        monkeypatch.setattr(loop, "AHEAD_NUMBERS", most)
        made.clear()
        draw = sampler(**settings)
        whole = draw.sample(3, shape=(2, 7), seed=3, class_labels=1)
        later = draw.sample(3, x_T=whole, seed=3, start=4, class_labels=1)
        images.append([whole, later, draw.sample(2, shape=(2, 7), seed=5, table=table, class_labels=1)])
        assert [bool(made), max(made, default=0) > 6] == [most > 0, most == 2**16]
    for other in images[1:]:
        assert all(torch.equal(one, two) for one, two in zip(images[0], other, strict=True))


def test_noise_is_not_made_where_no_step_adds_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "torch_normal", lambda *_: pytest.fail("noise was made"))
    monkeypatch.setattr(philox, "torch_normal", lambda *_: pytest.fail("noise was made"))
    for settings in ({"method": "ddim"}, {"method": "dpmsolver++"}):
        assert sampler(**settings).sample(2, x_T=torch.ones(2, 3)).isfinite().all()


# -- a table in place of a method -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "build", "settings"),
    [("ddpm", ddpm_table, {"variance_type": "fixed_large"}), ("ddim", ddim_table, {"eta": 0.5})],
)
def test_a_table_stands_for_its_method(method: str, build: Any, settings: dict[str, Any]) -> None:
    by_name = Sampler(toy, LINEAR, method, 5, **settings)
    by_table = Sampler(toy, build(LINEAR, LINEAR.timesteps(5), **settings))
    assert torch.equal(by_table.sample(2, shape=(2, 3)), by_name.sample(2, shape=(2, 3)))
    assert (by_table.method, by_table.schedule, by_name.method) == ("table", None, method)
    assert by_table.timesteps.tolist() == by_name.timesteps.tolist()


def test_a_table_says_whether_the_variance_is_learned() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([toy(x, t), x], dim=1)

    table = ddpm_table(LINEAR, [900, 500, 0], variance_type="learned_range")
    by_name = Sampler(model, LINEAR, timesteps=[900, 500, 0], variance_type="learned_range")
    assert torch.equal(Sampler(model, table).sample(2, shape=(2, 3)), by_name.sample(2, shape=(2, 3)))


def test_a_table_says_what_a_classifier_moves() -> None:
    for table, moved in (
        (ddpm_table(LINEAR, [5, 0]), "mean"),
        (ddim_table(LINEAR, [5, 0]), "epsilon"),
        (ddim_table(LINEAR, [5, 0], use_clipped_model_output=True), "clipped epsilon"),
        (make_table(torch.tensor([5]), torch.zeros(7, 1), before=torch.ones(1) / 2, after=torch.ones(1)), "epsilon"),
    ):
        classifier = Sampler(toy, table, classifier_fn=lambda x, t, y: x).settings.classifier
        assert classifier is not None
        assert classifier.shifts == moved
