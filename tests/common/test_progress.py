"""Progress as it is told: to a function, to a bar, and where chunks are done again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastddpm import NoiseSchedule, Sampler
from fastddpm.common.progress import Bar, progress_bar
from fastddpm.sampling.run import BAR_STEPS, BAR_UPDATES, Run


def sampler(steps: int = 12) -> Sampler:
    return Sampler(lambda x, t: 0.1 * x, NoiseSchedule.linear(200), num_inference_steps=steps)


def test_a_function_is_told_of_every_step_of_every_chunk() -> None:
    told: list[tuple[int, int]] = []
    expected = sampler().sample(5, shape=(2,), batch_size=2)
    images = sampler().sample(5, shape=(2,), batch_size=2, progress=lambda *state: told.append(state))
    assert torch.equal(images, expected)
    assert told == [(done, 36) for done in range(1, 37)]


def test_what_was_lost_is_taken_back() -> None:
    """Memory runs out in the second half of the first chunk: its steps are done again, in more chunks."""
    calls = 0

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if len(x) > 4 and int(t[0]) < 100:
            raise torch.OutOfMemoryError("of 5 samples")
        return 0.1 * x

    told: list[tuple[int, int]] = []
    chosen = Sampler(model, NoiseSchedule.linear(200), num_inference_steps=10)
    images = chosen.sample(8, shape=(2,), batch_size="auto", progress=lambda *state: told.append(state))
    assert images.isfinite().all()
    assert told[-1] == (20, 20)  # two chunks of ten steps
    done = [state[0] for state in told]
    assert max(done[: done.index(0)]) == 5  # what the chunk that failed had done
    assert calls > 20


@pytest.mark.parametrize("progress", [1, "yes", None])
def test_other_things_are_refused(progress: object) -> None:
    with pytest.raises(TypeError, match=f"progress is a {type(progress).__name__}, must be True, False or a function"):
        sampler().sample(1, shape=(2,), progress=progress)  # type: ignore[call-overload]


def test_a_bar_is_drawn_or_not(capsys: pytest.CaptureFixture[str]) -> None:
    for drawn in (True, False):
        with progress_bar(4, "counting", enabled=drawn) as bar:
            bar(3)
            bar.extend(2)
            bar(3)
            assert (bar.done, bar.total) == (6, 6)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("counting" in captured.err and "6/6" in captured.err) == drawn


@pytest.mark.parametrize(("steps", "period"), [(1000, 20), (50, BAR_STEPS), (2, BAR_STEPS)])
def test_on_cuda_several_steps_are_one_launch(steps: int, period: int) -> None:
    """Progress alone asks for the host every few steps; a callback, or noise that the user gives, at every step."""
    run = Run.__new__(Run)
    table = (
        sampler(min(steps, 200)).table if steps <= 200 else Sampler(lambda x, t: x, NoiseSchedule.linear(steps)).table
    )
    run.table, run.start, run.callback, run.noise, run.known_noise, run.recorder = table, 0, None, None, None, None
    run.bar = Bar(steps)
    assert run.periods(torch.device("cuda")) == [period]
    assert -(-steps // period) <= BAR_UPDATES
    assert run.periods(torch.device("cpu")) == [1]
    run.callback = lambda *_: None
    assert run.periods(torch.device("cuda")) == [1, period]
