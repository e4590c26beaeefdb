"""When a sampler's steps are captured as CUDA graphs, how often, and what runs where they cannot be.

Without a GPU a stand-in takes the place of `CapturedBody`. It disturbs the loop when it is made, as a capture does.
"""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastddpm.process.repaint import repaint_table
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampling.cuda_graph import MODES, CapturedBody, CaptureError, why_not
from fastddpm.sampling.loop import ROWS
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.trajectory import Trajectory

LINEAR = NoiseSchedule.linear()


class Model(nn.Module):
    """Depends on all it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 1))
        out = torch.tanh(x * (self.gain + t.view(shape).to(x) / 1000))
        return out if class_labels is None else out + 0.1 * class_labels.view(shape).to(x)


def sampler(device: torch.device | str = "cpu", **settings: Any) -> Sampler:
    return Sampler(Model(), LINEAR, **{"num_inference_steps": 10, "null_class": 3, "device": device, **settings})


# -- captured ---------------------------------------------------------------------------------------------------------


class Fake:
    """Stands in for `CapturedBody`."""

    made: list[Fake]
    mode, captures = "while", 2

    def __init__(self, body: Callable[[], None], step: Tensor, *, mode: str, reset: Callable[[], None]) -> None:
        self.body, self.step, self.wanted = body, step, mode
        self.measured = {"while": 1.5}
        self.calls: list[int] = []
        reset()
        for _ in range(24):
            body()
        reset()
        self.made.append(self)

    def advance(self, count: int) -> None:
        self.calls.append(count)
        for _ in range(count):
            self.body()


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    monkeypatch.setattr(Fake, "made", [], raising=False)
    monkeypatch.setattr("fastddpm.sampling.runner.CapturedBody", Fake)
    monkeypatch.setattr("fastddpm.sampling.runner.why_not", lambda mode, device, trusted=False: None)
    return Fake.made


def repaint(draw: Sampler) -> dict[str, Any]:
    table = repaint_table(LINEAR, draw.timesteps, jump_length=2, jump_n_sample=2)
    return {"table": table, "known": torch.full((2, 6), 0.5), "known_mask": torch.tensor([1.0, 1, 0, 0, 0, 1])}


def given(draw: Sampler) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(10, 3, 2, 6, generator=generator)
    return {"noise": noise, "known_noise": noise.flip(0), "known": torch.zeros(2, 6), "known_mask": torch.ones(6) / 2}


def inpainting(draw: Sampler) -> dict[str, Any]:
    return {"known": torch.zeros(3, 2, 6), "known_mask": torch.tensor([1.0, 0, 0, 1, 0, 0])}


CASES: dict[str, tuple[dict[str, Any], Callable[[Sampler], dict[str, Any]]]] = {
    "ddpm": ({}, lambda draw: {"class_labels": [0, 1, 2]}),
    "ddim": ({"method": "ddim", "eta": 0.5}, lambda draw: {}),
    "multistep": ({"method": "dpmsolver++"}, lambda draw: {"batch_size": 2}),
    "guided": ({"guidance_scale": 3.0}, lambda draw: {"class_labels": [0, 1, 2]}),
    "interval": ({"guidance_scale": 3.0, "guidance_interval": (300, 600)}, lambda draw: {"class_labels": [0, 1, 2]}),
    "inpainting": ({}, inpainting),
    "repaint": ({"guidance_scale": 3.0}, lambda draw: {**repaint(draw), "class_labels": 1}),
    "given noise": ({}, given),
    "callback": ({}, lambda draw: {"callback": lambda index, t, x: index == 6}),
    "trajectory": (
        {"guidance_rescale": 0.2, "guidance_scale": 2.0},
        lambda draw: {"class_labels": 1, "return_trajectory": 3},
    ),
    "thresholding": ({"thresholding": True, "sample_max_value": 2.0}, lambda draw: {"progress": True}),
    "auto batch size": ({"num_inference_steps": 50}, lambda draw: {"batch_size": "auto"}),
}


def drawn(draw: Sampler, arguments: dict[str, Any], seed: int = 0) -> list[Tensor]:
    images = draw.sample(3, **{"shape": (2, 6), "seed": seed, **arguments})
    return [images.x, images.x0, images.timesteps] if isinstance(images, Trajectory) else [images]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_captured_is_plain_bit_for_bit(case: str, fakes: list[Fake]) -> None:
    settings, arguments = CASES[case]
    plain, captured = sampler(cuda_graph=False, **settings), sampler(**settings)
    for seed in range(3):
        assert same(drawn(captured, arguments(captured), seed), drawn(plain, arguments(plain), seed))
    assert fakes
    assert {id(fake.step) for fake in fakes} == {
        id(runner.loop.step) for runner in captured._pool.idle
    } or case == "auto batch size"
    assert captured.graph_report()["captures"] == 2 * len(fakes)


def test_each_body_is_captured_once(fakes: list[Fake]) -> None:
    draw = sampler(guidance_scale=2.0, guidance_interval=(300, 600))
    assert draw.graph_report() == {"mode": None, "measured_us": {}, "captures": 0, "why_not": None}
    draw.sample(2, shape=(2, 3), class_labels=1, seed=3)
    assert [fake.calls for fake in fakes] == [[3, 3], [4]]  # not guided, guided
    assert draw.graph_report() == {"mode": "while", "measured_us": {"while": 1.5}, "captures": 4, "why_not": None}
    draw.sample(2, shape=(2, 3), class_labels=[0, 2], guidance_scale=5.0, seed=4)
    draw.sample(2, x_T=torch.randn(2, 2, 3), class_labels=0, start=2)
    assert len(fakes) == 2
    # What more is needed is captured when it is.
    table = repaint_table(LINEAR, draw.timesteps, jump_length=2, jump_n_sample=2)
    draw.sample(2, shape=(2, 3), table=table, class_labels=1)
    assert len(fakes) == 3
    draw.sample(3, shape=(2, 3), class_labels=1)
    assert len(fakes) == 5


def test_weights_may_change_in_place_and_may_move(fakes: list[Fake]) -> None:
    draw, plain = sampler(), sampler(cuda_graph=False)
    draw.sample(2, shape=(2, 3))
    for which in (draw, plain):
        which.model.gain.data.fill_(0.2)  # type: ignore[attr-defined]
    assert torch.equal(draw.sample(2, shape=(2, 3)), plain.sample(2, shape=(2, 3)))
    assert len(fakes) == 1
    draw.model.gain.data = torch.tensor([0.2])  # type: ignore[attr-defined]
    draw.sample(2, shape=(2, 3))
    assert len(fakes) == 2


def test_autocast_is_captured_apart(fakes: list[Fake]) -> None:
    draw = sampler()
    draw.sample(2, shape=(2, 3))
    for enabled, count in ((True, 2), (False, 2), (True, 2)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            draw.sample(2, shape=(2, 3))
            assert torch.is_autocast_cache_enabled()
        assert len(fakes) == count


def test_what_cannot_be_captured_is_run_plain(
    fakes: list[Fake], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = 0

    class Refuses(Fake):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            nonlocal made
            super().__init__(*arguments, **more)
            made += 1
            raise CaptureError("the model calls .item()")

    monkeypatch.setattr("fastddpm.sampling.runner.CapturedBody", Refuses)
    expected = sampler(cuda_graph=False).sample(2, shape=(2, 3))
    draw = sampler()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(draw.sample(2, shape=(2, 3)), expected)
            draw.sample(3, shape=(2, 3))
    assert made == 1
    assert [record.getMessage() for record in caplog.records] == [
        "the loop cannot be captured as a CUDA graph and runs step by step: the model calls .item()"
    ]
    report = draw.graph_report()
    assert report == {"mode": "plain", "measured_us": {}, "captures": 0, "why_not": "the model calls .item()"}
    for mode in MODES:
        forced = sampler(cuda_graph=mode)
        for _ in range(2):
            with pytest.raises(CaptureError, match="calls .item()"):
                forced.sample(2, shape=(2, 3))
    assert made == 1 + 2 * len(MODES)


@pytest.mark.parametrize(
    ("asked_for", "steps", "captured"),
    [("auto", 192, "step"), ("auto", 193, "auto"), *((mode, steps, mode) for mode in MODES for steps in (3, 300))],
)
def test_the_mode_asked_for_is_captured(asked_for: str, steps: int, captured: str, fakes: list[Fake]) -> None:
    draw = sampler(cuda_graph=asked_for, num_inference_steps=steps)
    draw.sample(1, x_T=torch.zeros(1, 2), start=steps - 1)
    assert [fake.wanted for fake in fakes] == [captured]


def test_memory_that_runs_out_in_a_capture_is_no_reason_to_give_up(
    fakes: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Large(Fake):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            if len(self.body.func.__self__.x) > 2:  # type: ignore[attr-defined]
                raise CaptureError("it ended") from torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("fastddpm.sampling.runner.CapturedBody", Large)
    draw = sampler(num_inference_steps=4)
    expected = sampler(num_inference_steps=4, cuda_graph=False).sample(4, shape=(2, 3))
    with pytest.raises(torch.OutOfMemoryError, match="no memory\nbatch_size='auto'"):
        draw.sample(4, shape=(2, 3))
    assert torch.equal(draw.sample(4, shape=(2, 3), batch_size="auto"), expected)
    assert draw.graph_report()["why_not"] is None


def test_modes_that_cannot_be_used_are_refused() -> None:
    for mode in MODES:
        with pytest.raises(ValueError, match=f"cuda_graph is '{mode}', which cannot be used here: .*not cpu"):
            sampler(cuda_graph=mode)
    for bad in ("sometimes", True, None, 3):
        with pytest.raises(ValueError, match=f"cuda_graph is {bad!r}, must be 'auto', 'while', 'unrolled', 'step' or"):
            sampler(cuda_graph=bad)
    draw = sampler()
    draw.sample(2, shape=(2, 3))
    report = draw.graph_report()
    assert (report["mode"], report["captures"]) == ("plain", 0)
    assert "not cpu" in report["why_not"]
    assert sampler(cuda_graph=False).graph_report()["why_not"] == "cuda_graph is False"


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def _clean() -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["auto", *MODES])
@pytest.mark.parametrize("case", CASES)
def test_graphs_are_plain_bit_for_bit(case: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddpm.sampling.runner.MEASURED_ROWS", 0)  # measured in short loops too
    settings, arguments = CASES[case]
    if mode != "auto" and (reason := why_not(mode, torch.device("cuda"))):
        pytest.skip(reason)
    plain, captured = (sampler("cuda", cuda_graph=each, **settings) for each in (False, mode))
    captures = 0
    for seed in range(3):
        assert same(drawn(captured, arguments(captured), seed), drawn(plain, arguments(plain), seed))
        captures = captures or captured.graph_report()["captures"]
    report = captured.graph_report()
    assert report["captures"] == captures > 0
    assert report["mode"] in MODES if mode == "auto" else report["mode"] == mode
    assert report["why_not"] is None


@pytest.mark.gpu
@pytest.mark.usefixtures("_clean")
def test_memory_comes_back_with_the_sampler() -> None:
    def reserved() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def use() -> None:
        draw = sampler("cuda")
        for count in (64, 32):
            draw.sample(count, shape=(16, 64, 64))
        assert draw.graph_report()["captures"] > 0

    use()  # what libraries keep from their first use on
    before = reserved()
    use()
    assert reserved() <= before


@pytest.mark.gpu
def test_a_model_that_waits_for_the_device_runs_plain(caplog: pytest.LogCaptureFixture) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) * (0.5 if int(t[0]) > 500 else 0.7)

    expected = Sampler(model, LINEAR, num_inference_steps=5, device="cuda", cuda_graph=False).sample(2, shape=(3, 4))
    draw = Sampler(model, LINEAR, num_inference_steps=5, device="cuda")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(draw.sample(2, shape=(3, 4)), expected)
    assert "cannot be captured" in caplog.text
    assert draw.graph_report()["mode"] == "plain"
    with pytest.raises(CaptureError):
        Sampler(model, LINEAR, num_inference_steps=5, device="cuda", cuda_graph="step").sample(2, shape=(3, 4))


@pytest.mark.gpu
def test_the_bar_follows_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    draw = sampler("cuda", num_inference_steps=500)
    draw.sample(2, shape=(3, 4), progress=True)
    assert "500/500" in capsys.readouterr().err
    assert draw.graph_report()["measured_us"]


def test_a_loop_has_room_for_what_a_capture_runs() -> None:
    """`CapturedBody` runs that many steps after a reset, however short the table is."""
    assert inspect.signature(CapturedBody.__init__).parameters["max_steps"].default <= ROWS
