"""A captured body gives what the plain one gives, whichever way it is run: on a GPU."""

from __future__ import annotations

import gc
import logging
import threading

import pytest
import torch
from torch import Tensor, nn

from fastddpm.sampling.cuda_graph import MODES, CapturedBody, CaptureError, captured, tuned, why_not

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


class Chain:
    """A state that a small network and a table of rows advance, with a convolution, a matrix product and a norm."""

    def __init__(self, seed: int = 0, rows: int = 1024) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.network = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU())
        self.network.append(nn.Conv2d(32, 8, 3, padding=1))
        self.network.requires_grad_(False).to(CUDA)
        self.mix = (torch.randn(64, 64, generator=generator) / 8).to(CUDA)
        self.table = torch.randn(rows, generator=generator).to(CUDA)
        self.first = torch.randn(4, 8, 8, 8, generator=generator).to(CUDA)
        self.x, self.step = self.first.clone(), torch.zeros(1, dtype=torch.int64, device=CUDA)
        self.highest = torch.zeros_like(self.step)

    def body(self) -> None:
        out = self.network(self.x) + (self.x.flatten(2) @ self.mix).view_as(self.x)
        self.x.mul_(0.9).add_(torch.tanh(out) * self.table.index_select(0, self.step))
        torch.maximum(self.highest, self.step, out=self.highest)
        self.step += 1

    def reset(self) -> None:
        self.x.copy_(self.first)
        self.step.zero_()

    def plain(self, count: int) -> Tensor:
        """The state after `count` steps that no graph runs, in the thread and with the algorithms of a capture."""
        self.reset()
        with tuned():
            for _ in range(count):
                self.body()
        return self.x.clone()


@pytest.fixture
def chain() -> Chain:
    return Chain()


def new_stream() -> torch.cuda.Stream:
    """A stream on which nothing is captured: torch has 32, which it hands out in turn."""
    return next(s for s in (torch.cuda.Stream() for _ in range(8)) if s not in captured._sides.values())


def usable(mode: str) -> str:
    reason = why_not(mode, CUDA)
    if reason is not None:
        pytest.skip(f"mode {mode!r}: {reason}")
    return mode


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_plain_bits(mode: str, chain: Chain) -> None:
    captured = CapturedBody(chain.body, chain.step, mode=usable(mode), unroll=8, reset=chain.reset)
    assert (captured.mode, captured.measured) == (mode, {})
    assert captured.captures == (2 if mode == "unrolled" else 1)
    assert torch.equal(chain.x, chain.first), "reset is called last"
    assert int(chain.step) == 0
    for count in (0, 1, 7, 8, 9, 24, 1000):
        expected = chain.plain(count)
        chain.reset()
        captured.advance(count)
        assert int(chain.step) == count
        assert torch.equal(chain.x, expected), f"{count} steps"


@pytest.mark.parametrize("mode", MODES)
def test_advances_follow_each_other(mode: str, chain: Chain) -> None:
    captured = CapturedBody(chain.body, chain.step, mode=usable(mode), unroll=4, reset=chain.reset)
    expected = chain.plain(17)
    chain.reset()
    for count in (3, 5, 0, 1, 8):
        captured.advance(count)
    assert torch.equal(chain.x, expected)


def test_auto_measures_and_chooses(chain: Chain, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastddpm"):
        captured = CapturedBody(chain.body, chain.step, reset=chain.reset)
    tried = {mode for mode in MODES if why_not(mode, CUDA) is None}
    assert set(captured.measured) == tried, caplog.text
    assert captured.mode == min(captured.measured, key=lambda mode: captured.measured[mode])
    assert all(0.1 < us < 1e5 for us in captured.measured.values())
    assert captured.captures == 2
    assert int(chain.highest) < 24, "no more than max_steps run after a reset"
    expected = chain.plain(30)
    chain.reset()
    captured.advance(30)
    assert torch.equal(chain.x, expected)


def test_few_rows(chain: Chain) -> None:
    captured = CapturedBody(chain.body, chain.step, reset=chain.reset, max_steps=5)
    assert "unrolled" not in captured.measured
    assert int(chain.highest) < 5


@pytest.mark.parametrize("mode", MODES)
def test_without_reset_the_step_is_put_back(mode: str, chain: Chain) -> None:
    chain.step.fill_(3)
    captured = CapturedBody(chain.body, chain.step, mode=usable(mode))
    assert int(chain.step) == 3
    captured.advance(2)
    assert int(chain.step) == 5


@pytest.mark.parametrize("mode", MODES)
def test_host_does_not_wait(mode: str, chain: Chain) -> None:
    captured = CapturedBody(chain.body, chain.step, mode=usable(mode), reset=chain.reset)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured.advance(11)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert int(chain.step) == 11


@pytest.mark.parametrize("mode", MODES)
def test_objects_take_turns(mode: str) -> None:
    chains = Chain(1), Chain(2)
    bodies = [CapturedBody(each.body, each.step, mode=usable(mode), unroll=4, reset=each.reset) for each in chains]
    expected = [each.plain(26) for each in chains]
    for each in chains:
        each.reset()
    for _ in range(2):
        for one in bodies:
            one.advance(6)
            one.advance(7)
    for each, plain in zip(chains, expected, strict=True):
        assert torch.equal(each.x, plain)


@pytest.mark.parametrize("mode", MODES)
def test_shared_pool(mode: str) -> None:
    pool = torch.cuda.graph_pool_handle()
    chains = Chain(1), Chain(2)
    bodies = [CapturedBody(e.body, e.step, mode=usable(mode), reset=e.reset, pool=pool) for e in chains]
    del bodies[0]
    gc.collect()
    expected = chains[1].plain(20)
    chains[1].reset()
    bodies[0].advance(20)
    assert torch.equal(chains[1].x, expected), "the memory stays as long as one of them needs it"


@pytest.mark.parametrize("mode", MODES)
def test_streams_in_the_order_of_calls(mode: str, chain: Chain) -> None:
    captured = CapturedBody(chain.body, chain.step, mode=usable(mode), reset=chain.reset)
    expected = chain.plain(120)
    chain.reset()
    streams = new_stream(), new_stream()
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for turn in range(6):
        with torch.cuda.stream(streams[turn % 2]):
            captured.advance(20)
    captured.advance(0)  # orders the current stream behind them
    assert torch.equal(chain.x, expected)


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_threads(mode: str) -> None:
    if mode != "auto":
        usable(mode)
    results: dict[int, tuple[Tensor, Tensor]] = {}
    errors: list[BaseException] = []
    start = threading.Barrier(2, timeout=60)

    def work(seed: int) -> None:
        try:
            with torch.cuda.stream(new_stream()):
                chain = Chain(seed)
                start.wait()
                captured = CapturedBody(chain.body, chain.step, mode=mode, reset=chain.reset)
                expected = chain.plain(100)
                chain.reset()
                for _ in range(10):
                    captured.advance(10)
                results[seed] = chain.x.cpu(), expected.cpu()
        except BaseException as error:
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors, errors
    assert set(results) == {1, 2}
    for state, expected in results.values():
        assert torch.equal(state, expected)
    assert not torch.equal(results[1][0], results[2][0])


def reserved() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_memory_returns(mode: str, chain: Chain) -> None:
    def once() -> None:
        captured = CapturedBody(chain.body, chain.step, mode=mode, reset=chain.reset)
        captured.advance(9)

    if mode != "auto":
        usable(mode)
    once()  # what libraries keep for good
    before = reserved()
    for _ in range(3):
        once()
    assert reserved() <= before


def test_memory_returns_without_the_collector(chain: Chain) -> None:
    """No cycle keeps a graph: it goes with the last reference."""
    gc.disable()
    try:
        captured = CapturedBody(chain.body, chain.step, mode="unrolled", reset=chain.reset)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        del captured
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() < before
    finally:
        gc.enable()


class Peeking(nn.Module):
    """Looks at a value on the host."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().max().clamp(min=1).item()


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_body_that_looks_at_a_value(mode: str, chain: Chain) -> None:
    if mode != "auto":
        usable(mode)
    good = CapturedBody(chain.body, chain.step, mode="step", reset=chain.reset)
    before = reserved()
    bad = Chain(3)
    bad.network.insert(1, Peeking())
    stream = torch.cuda.current_stream()
    with pytest.raises(CaptureError, match=r"Tensor.item\(\) at .*test_cuda_graph_gpu.py.*Peeking.*waits for the GPU"):
        CapturedBody(bad.body, bad.step, mode=mode, reset=bad.reset)
    assert torch.cuda.current_stream() == stream
    del bad
    assert reserved() <= before
    assert torch.rand(3, device=CUDA).shape == (3,), "torch can draw"
    expected = chain.plain(10)
    chain.reset()
    good.advance(10)
    assert torch.equal(chain.x, expected), "others go on"
    again = CapturedBody(chain.body, chain.step, mode="unrolled", reset=chain.reset)
    again.advance(10)
    assert torch.equal(chain.x, expected), "and can be captured"


@pytest.mark.parametrize("mode", MODES)
def test_body_that_draws_from_torch(mode: str, chain: Chain, caplog: pytest.LogCaptureFixture) -> None:
    usable(mode)

    def body() -> None:
        chain.x.copy_(torch.randn_like(chain.x))
        chain.step.add_(1)

    if mode == "while":
        with pytest.raises(CaptureError, match=r"randn_like.* draws from torch's generator.*philox"):
            CapturedBody(body, chain.step, mode=mode)
        with caplog.at_level(logging.INFO, "fastddpm"):
            assert CapturedBody(body, chain.step).mode != "while"
        assert "mode 'while' is left out: torch.ops.aten.randn_like" in caplog.text
        return
    captured = CapturedBody(body, chain.step, mode=mode)
    captured.advance(1)
    first = chain.x.clone()
    captured.advance(9)
    assert not torch.equal(chain.x, first)


def test_body_that_does_not_count(chain: Chain) -> None:
    def body() -> None:
        chain.x.mul_(2)

    with pytest.raises(ValueError, match="body added 0 to step, must add 1"):
        CapturedBody(body, chain.step)


@pytest.mark.parametrize("mode", MODES)
def test_inference_mode(mode: str, chain: Chain) -> None:
    with torch.inference_mode():
        captured = CapturedBody(chain.body, chain.step, mode=usable(mode), reset=chain.reset)
        captured.advance(3)
    captured.advance(4)
    assert int(chain.step) == 7


def test_count_and_close(chain: Chain) -> None:
    captured = CapturedBody(chain.body, chain.step, mode="step", reset=chain.reset)
    with pytest.raises(ValueError, match="count is -1, must be at least 0"):
        captured.advance(-1)
    with pytest.raises(TypeError, match="count is a float, must be an int"):
        captured.advance(1.0)  # type: ignore[arg-type]
    captured.advance(2)
    captured.close()
    captured.close()
    assert int(chain.step) == 2
    with pytest.raises(RuntimeError, match="closed"):
        captured.advance(1)


def test_tuned_sets_and_restores() -> None:
    before = torch.backends.cudnn.benchmark
    with tuned():
        assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark == before
