"""The native reverse step, recorded programs, and the team of threads that all native ops run on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from fastddpm_kernels import native as _native
from fastddpm_kernels.backend import BackendError
from fastddpm_kernels.conv import conv_
from fastddpm_kernels.group_norm_silu import group_norm_silu_
from fastddpm_kernels.native.program import RecordError, record
from fastddpm_kernels.philox import sample_keys
from fastddpm_kernels.reverse_step import reverse_step_
from fastddpm_kernels.testing import assert_close
from torch import Tensor

pytestmark = pytest.mark.usefixtures("native")

# In the second row neither noise is added (S = 0) nor the x0 before read (F = 0).
TABLE = torch.tensor([[1.1, -0.4, 0.6, 0.3, 0.0, 0.0, 0.25], [0.9, -0.2, 1.0, 0.1, -0.1, 0.0, 0.0],
                      [1.2, -0.7, 0.8, 0.2, 0.15, -0.3, 0.5], [0.0, 1.0, 0.5, 0.4, 0.0, 0.2, 1.0]])  # fmt: skip
LOG_VARIANCE = torch.tensor([[-3.0, -2.5], [-46.0, -9.0], [-2.0, -1.0], [-1.5, -1.4]])
KNOWN_TABLE = torch.tensor([[0.7, 0.7], [1.0, 0.0], [0.9, 0.3], [0.2, 0.95]])
COMBINATIONS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "ancestral": ("keys", "clip_range"),
    "threshold": ("keys", "threshold"),
    "given": ("noise",),
    "multistep": ("multistep", "keys"),
    "learned": ("keys", "learned"),
    "guided": ("keys", "guided"),
    "known": ("keys", "known"),
    "everything": ("noise", "multistep", "clip_range", "learned", "guided", "per_sample", "known", "known_noise"),
}
SHAPES = {
    "one_pixel": (3, 2, 1, 1),
    "odd": (2, 3, 13, 17),  # ends within a vector, and a chunk begins within a channel
    "chunks": (1, 1, 40, 64),
    "sound": (2, 1, 100),
    "volume": (1, 2, 3, 5, 7),
}


def operands(shape: tuple[int, ...], options: tuple[str, ...], dtype: torch.dtype, last: bool) -> dict[str, Any]:
    n, channels, *size = shape
    learned, guided = 1 + ("learned" in options), 1 + ("guided" in options)

    def image(n: int, channels: int) -> Tensor:
        x = torch.randn(n, channels, *size).to(dtype)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x

    found: dict[str, Any] = {
        "x": torch.randn(shape), "out": image(guided * n, learned * channels), "table": TABLE,
        "x0": torch.randn(shape), "net_in": image(guided * n, channels + 2)[:, 1 : channels + 1],
        "multistep": "multistep" in options,
    }  # fmt: skip
    if "keys" in options:
        found["keys"] = sample_keys([2**63 + 1, 7, 2**40][:n], [0, 2**32 - 1, 5][:n])
    for name in ("noise", "known_noise"):
        if name in options:
            found[name] = torch.randn(shape)
    if "clip_range" in options:
        found["clip_range"] = 0.8
    if "threshold" in options:
        found["threshold"] = 0.5 + torch.rand(n)
    if "learned" in options:
        found["log_variance"] = LOG_VARIANCE
    if "guided" in options:
        found["guidance_scale"] = torch.tensor([3.0, 0.0, 7.5][:n] if "per_sample" in options else [3.0])
    if "known" in options:
        known = {"known": torch.rand(shape[1:]), "known_mask": torch.rand(n, 1, *size).round()}
        found |= known | {"known_table": KNOWN_TABLE}
    return found


def run(operands: dict[str, Any], row: int, backend: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    own = {name: v.clone() if isinstance(v, Tensor) else v for name, v in operands.items()}
    for name in ("x", "x0"):
        own[name] = own[name].to(dtype)
    x, out, table = own.pop("x"), own.pop("out"), own.pop("table")
    reverse_step_(x, out, table, torch.tensor([row]), backend=backend, **own)
    return {"x": x, "x0": own["x0"], "net_in": own["net_in"]}


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reverse_step_is_as_near_to_the_reference_as_torchs(shape: str, combination: str) -> None:
    for dtype, last in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True)):
        given = operands(SHAPES[shape], COMBINATIONS[combination], dtype, last)
        for row in (1, 2):
            ours, torchs = run(given, row, "native"), run(given, row, "eager")
            truth = run(given, row, "reference", torch.float64)
            for name in ours:
                assert_close(ours[name], truth[name], eager=torchs[name], name=name)


def test_noise_is_that_of_the_reference_bit_for_bit() -> None:
    table = torch.tensor([[0.0] * 6 + [1.0]] * 3)
    for shape in ((3, 1, 300, 300), (2, 5, 7)):
        results = []
        for backend in ("native", "reference"):
            x = torch.zeros(shape)
            keys = sample_keys([0, 2**64 - 1, 12345][: len(x)], [0, 2**32 - 1, 3][: len(x)])
            reverse_step_(x, torch.zeros(shape), table, torch.tensor([2]), keys=keys, backend=backend)
            results.append(x)
        assert torch.equal(*results)


def test_a_row_out_of_range_is_refused_and_recorded_gives_nan() -> None:
    x, step = torch.randn(1, 1, 4, 4), torch.tensor([3])
    with pytest.raises(ValueError, match="step is 4"):
        reverse_step_(x, x.clone(), TABLE, torch.tensor([4]), backend="native")
    out = x.clone()
    program = record(lambda: reverse_step_(x, out, TABLE, step, backend="native"))
    program.advance(1)
    assert bool(torch.isfinite(x).all())
    step += 1
    program.advance(1)
    assert bool(x.isnan().all())


def test_what_the_native_reverse_step_does_not_take() -> None:
    x = torch.randn(2, 3, 4, 4)
    for given, reason in (
        ({"x": x.double()}, "native kernels compute in torch.float32 or torch.bfloat16, not torch.float64"),
        ({"out": x.half()}, "out is torch.float16"),
        ({"noise": x.double()}, "noise is torch.float64"),
        ({"out": x.transpose(2, 3)}, "must have one between pixels"),
        ({"table": TABLE[::2]}, "table has strides"),
    ):
        arguments: dict[str, Any] = {"x": x.clone(), "out": x, "table": TABLE, "step": torch.tensor([0])} | given
        with pytest.raises(BackendError, match=reason):
            reverse_step_(**arguments, backend="native")
        reverse_step_(**arguments)


class Step:
    """A body like a loop's: a table looked up, a convolution, a norm, a sum, a reverse step, a counter."""

    def __init__(self, n: int = 2, size: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def image(channels: int) -> Tensor:
            return random(n, size, size, channels).permute(0, 3, 1, 2)

        self.x, self.net_in, self.h = random(n, 3, size, size), image(3), image(16)
        self.normed, self.out = image(16), image(3)
        self.step, self.table, self.row = torch.zeros(1, dtype=torch.int64), random(40, 16), torch.zeros(1, 16)
        self.first, self.last = random(16, 3, 3, 3) / 5, random(3, 16, 3, 3) / 12
        self.weight, self.bias = torch.ones(16), torch.zeros(16)
        self.rows = torch.tensor([[1.0, -0.3, 0.6, 0.4, 0.0, 0.0, 0.2]] * 40)
        self.keys = sample_keys(range(n), range(n))
        self.run_first = conv_.bind(self.h, self.net_in, self.first, backend="native")
        self.run_last = conv_.bind(self.out, self.normed, self.last, backend="native")

    def body(self) -> None:
        torch.index_select(self.table, 0, self.step, out=self.row)
        self.run_first()
        group_norm_silu_(
            self.normed, self.h, self.weight, self.bias, 4, time_bias=self.row.expand(len(self.x), -1), backend="native"
        )
        torch.add(self.h, self.normed, out=self.normed)
        self.normed.add_(self.bias.view(-1, 1, 1), alpha=2)
        self.run_last()
        reverse_step_(
            self.x, self.out, self.rows, self.step, net_in=self.net_in, keys=self.keys, clip_range=1.0, backend="native"
        )
        self.step += 1


def test_a_recorded_body_gives_the_same_bits_in_one_call() -> None:
    ours, plain = Step(), Step()
    program = record(ours.body)
    assert program.is_native
    assert torch.equal(ours.x, plain.x)
    assert int(ours.step) == 0
    for times in (1, 5, 0, 20):
        program.advance(times)
        for _ in range(times):
            plain.body()
        assert torch.equal(ours.x, plain.x)
        assert torch.equal(ours.step, plain.step)
    assert bool(torch.isfinite(ours.x).all())
    seconds = program.seconds(1)
    assert len(seconds) == len(program.names) == 8
    assert all(0 <= each < 1 for each in seconds)


def test_results_do_not_depend_on_threads() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            own = Step(n=3, size=20)
            program = record(own.body)
            program.advance(10)
            results.append(own.x)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, results[0]) for each in results)


def test_what_torch_does_in_between_is_done_again() -> None:
    """Operations in place, into given memory, into new memory, of several results; views of those."""

    def make() -> dict[str, Any]:
        own = {"step": Step(), "sum": torch.zeros(2, 3, 8, 8), "product": torch.zeros(2, 2)}

        def body() -> None:
            step = own["step"]
            step.body()
            rows = step.x.flatten(1)
            torch.mm(rows, rows.T, out=own["product"])
            values, _ = rows.softmax(dim=1).max(dim=1)
            own["sum"] += (rows * 0.5).view(2, 3, 8, 8) + values.view(-1, 1, 1, 1)
            step.net_in.mul_(0.9)

        return own | {"body": body}

    ours, plain = make(), make()
    program = record(ours["body"])
    assert not program.is_native
    ours["step"].net_in.copy_(plain["step"].net_in)  # torch's part was run once
    ours["sum"].zero_()
    for _ in range(2):
        program.advance(3)
        for _ in range(3):
            plain["body"]()
        for own in ("sum", "product"):
            assert torch.equal(ours[own], plain[own])
        assert torch.equal(ours["step"].x, plain["step"].x)
    assert len(program.seconds(1)) == len(program.names)


def test_what_cannot_be_repeated_is_refused() -> None:
    x, step = torch.randn(4), torch.zeros(1, dtype=torch.int64)

    def reads() -> None:
        if float(x[0]) > 0:
            x.add_(1)

    with pytest.raises(RecordError, match="_local_scalar_dense.default gives a float"):
        record(reads)
    with pytest.raises(RecordError, match="another body"):
        record(lambda: record(lambda: step.add_(1)))
    step.add_(1)  # nothing is recorded any more
    assert int(step) == 1


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (torch.zeros(2, 3, 4, 5), torch.randn(2, 3, 4, 5)),
        (torch.zeros(2, 4, 5, 3).permute(0, 3, 1, 2), torch.randn(2, 3, 4, 5)),
        (torch.zeros(2, 4, 5, 8).permute(0, 3, 1, 2)[:, 2:5], torch.randn(3, 1, 5)),
        (torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16), torch.randn(2, 3, 4, 5)),
        (torch.zeros(7), torch.randn(7).bfloat16()),
        (torch.zeros(6, dtype=torch.int64), torch.arange(6)),
        (torch.zeros(2, 2, 2, 2, 2), torch.randn(2, 2, 2, 2, 2).transpose(0, 4)),
        (torch.zeros(()), torch.randn(())),
        (torch.zeros(0, 3), torch.randn(0, 3)),
    ],
)  # fmt: skip
def test_copies_are_torchs(target: Tensor, source: Tensor) -> None:
    program = record(lambda: target.copy_(source))
    assert program.is_native
    assert not bool(target.any())
    program.advance(1)
    assert torch.equal(target, target.clone().copy_(source))


def test_threads_may_run_native_ops_at_the_same_time() -> None:
    alone, results = Step(size=16), []
    record(alone.body).advance(30)

    def work() -> None:
        own = Step(size=16)
        record(own.body).advance(30)
        results.append(own.x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(each, alone.x) for each in results)


# A program with work for many threads.
PROGRAM = """
import os, time, torch
from fastddpm_kernels.conv import conv_
from fastddpm_kernels.native.program import record
x = torch.randn(1, 32, 32, 16).permute(0, 3, 1, 2)  # so small that torch itself takes one thread
y = torch.empty_like(x)
program = record(conv_.bind(y, x, torch.randn(16, 16, 3, 3), backend="native"))
before = {int(task) for task in os.listdir("/proc/self/task")}
def helpers():
    return [int(task) for task in os.listdir("/proc/self/task") if int(task) not in before]
"""
# The child of a fork has no threads but one: programs make theirs anew. (torch's own pool does not.)
FORK = """
torch.set_num_threads(2)
program.advance(1)
expected = y.clone()
child = os.fork()
if child == 0:
    y.zero_()
    program.advance(1)
    os._exit(0 if torch.equal(y, expected) and len(os.listdir("/proc/self/task")) == 2 else 1)
assert os.waitpid(child, 0)[1] == 0
program.advance(1)
assert torch.equal(y, expected)
"""
# Helpers run where the caller may run, also if that changes, and there are no more of them than asked for.
AFFINITY = """
torch.set_num_threads(1)
program.advance(1)
assert len(helpers()) == 0
torch.set_num_threads(3)
program.advance(1)
assert len(helpers()) == 2, helpers()
whole = os.sched_getaffinity(0)
for allowed in ({min(whole)}, whole):
    os.sched_setaffinity(0, allowed)
    program.advance(1)
    assert all(os.sched_getaffinity(task) == allowed for task in helpers())
torch.set_num_threads(2)
program.advance(1)
assert len(helpers()) == 2
"""
# Two threads on one core: a join that spins until the other comes takes a time slice.
CROWDED = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
def seconds(threads):
    torch.set_num_threads(threads)
    program.advance(1)
    start = time.perf_counter()
    program.advance(1000)
    return time.perf_counter() - start
ratios = sorted(seconds(2) / seconds(1) for _ in range(5))
assert ratios[2] < 3, ratios
"""


@pytest.mark.parametrize("script", [FORK, AFFINITY, CROWDED], ids=["fork", "affinity", "crowded"])
def test_the_team_of_threads(script: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", PROGRAM + script], check=True, timeout=120, env=environment)


def test_programs_alone_run_on_threads_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between operations of torch they run on its own, which wait for the next one and would be in the way."""
    step, said = Step(), []
    advance = _native.get().functions.fastddpm_program_advance

    def listen(*arguments: Any) -> None:
        said.append(arguments[5])
        advance(*arguments)

    alone = record(step.body)
    mixed = record(lambda: (step.body(), step.x.mul_(0.9)))
    monkeypatch.setattr(_native.get().functions, "fastddpm_program_advance", listen)
    for program, expected in ((alone, True), (mixed, False)):
        program.advance(1)
        assert said == [expected]
        said.clear()
