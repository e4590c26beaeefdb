"""Tuning: candidates are right or refused, what is not faster beyond noise stays, and tables are kept whole."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastddpm_kernels import tuned
from fastddpm_kernels.backend import why_not
from fastddpm_kernels.conv import choose_algorithm, likely_algorithm
from fastddpm_kernels.conv.tuning import ConvTask
from fastddpm_kernels.group_norm_silu.tuning import GroupNormTask
from fastddpm_kernels.tuned import Choice, Key
from fastddpm_kernels.tuning import OF_CUDA, make_task, nearest_first, tuned_ops

from fastddpm import UNet
from fastddpm.networks.network import Network
from fastddpm.perf.tuning.compiling import Compiling
from fastddpm.perf.tuning.search import LEAST_S, Outcome, cache_bytes, summary, tune, why_wrong
from fastddpm.perf.tuning.shapes import network_keys
from fastddpm.perf.tuning.store import save

CPU = torch.device("cpu")
CONV = Key("conv", torch.float32, (2, 9, 6, 5, 18, 0, 1))
KEYS = {
    "group norm": Key("group_norm_silu", torch.float32, (2, 35, 24, 0, 4, 1)),
    "group norm in place, two sources": Key("group_norm_silu_", torch.float16, (1, 30, 24, 24, 4, 1)),
    "group norm in place, contiguous": Key("group_norm_silu_", torch.float32, (1, 35, 12, 0, 3, 0)),
    "RMS norm": Key("rms_norm_silu", torch.float32, (2, 35, 20, 4, 1)),
    "gradient of group norm": Key("group_norm_silu_backward", torch.float32, (2, 35, 24, 0, 4, 1)),
    "gradient of group norm, two sources": Key("group_norm_silu_backward", torch.float16, (1, 30, 24, 24, 4, 1)),
    "gradient of group norm, contiguous": Key("group_norm_silu_backward", torch.float32, (2, 70, 12, 0, 3, 0)),
    "gradient of RMS norm, two sources": Key("rms_norm_silu_backward", torch.float32, (2, 35, 20, 4, 1)),
    "gradient of RMS norm, contiguous": Key("rms_norm_silu_backward", torch.float16, (2, 35, 20, 0, 0)),
    "reverse step": Key("reverse_step", torch.float16, (4, 3, 35, 1, 2, 0, 0, 0, 0, 1, 0)),
    "reverse step, guided, learned": Key("reverse_step", torch.float32, (2, 3, 35, 0, 1, 1, 1, 1, 1, 1, 2)),
    "reverse step, partly known": Key("reverse_step", torch.float16, (2, 3, 35, 1, 2, 0, 1, 0, 1, 0, 1)),
    "noised": Key("q_sample", torch.float32, (3, 3, 35, 0, 2, 1)),
    "noised, velocity": Key("q_sample", torch.float16, (3, 3, 35, 1, 1, 2)),
    "noised, target given": Key("q_sample", torch.float32, (2, 3, 35, 1, 1, 0)),
    "residual, padded": Key("residual_add", torch.float16, (2, 6, 5, 7, 1, 1, 1, 1, 1)),
    "residual, contiguous": Key("residual_add", torch.float32, (2, 6, 5, 7, 0, 0, 1, 0, 0)),
    "fused convolution": Key("fused_conv", torch.float16, (2, 5, 3, 20, 12, 24, 3, 1, 0, 8, 1, 32, 4, 0)),
    "attention block": Key("attention_block", torch.float16, (2, 20, 24, 4, 0)),
    "layer norm before a gate": Key("layer_norm_linear", torch.float16, (50, 24, 20, 1, 0)),
    "pointwise": Key("pointwise_conv", torch.float32, (50, 24, 20, 0, 1, 0)),
    "pointwise, two sources": Key("pointwise_conv", torch.float16, (50, 24, 20, 12, 0, 0)),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache for tables, which are used. The native library is loaded before, not built into it."""
    why_not("native", "cpu")
    monkeypatch.setenv("FASTDDPM_TUNED", "1")
    monkeypatch.setenv("FASTDDPM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuned, "PACKAGE", tmp_path / "package")
    tuned.forget()
    yield tmp_path
    tuned.forget()


def small_unet() -> UNet:
    torch.manual_seed(0)
    return UNet(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).eval()  # fmt: skip


# Candidates.


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_candidates_are_right_and_none_is_there_twice(key: Key, device: torch.device) -> None:
    pytest.importorskip("triton")
    task = make_task(key, device)
    candidates = task.candidates()
    assert len(candidates) >= 2
    for choice in candidates:
        assert candidates.count(choice) == 1
        assert tuned.entry(tuned.record(key, choice))[1] == choice  # a table may hold it
    operands = task.operands(0)
    truth = task.truth(operands, task.samples())
    for choice in {0: candidates[0], 1: candidates[1], -1: candidates[-1]}.values():
        assert why_wrong(task, choice, operands, truth) is None, choice
    written = task.results(operands)
    assert written.keys() == truth.keys()
    another = task.results(task.another(operands))
    assert {name: t.stride() for name, t in another.items()} == {name: t.stride() for name, t in written.items()}
    assert not {t.data_ptr() for t in another.values()} & {t.data_ptr() for t in written.values()}


def test_every_op_that_has_choices_can_be_tuned() -> None:
    for op in tuned.OPS:
        fields, alternatives = tuned.tunable(op)[:2]
        assert all(alternatives)
        task = make_task(Key(op, torch.float32, (1,) * len(fields)), CPU)
        assert task.named == dict.fromkeys(fields, 1)
    assert set(tuned_ops(CPU)) <= {"conv"}
    on_gpu = set(tuned_ops(torch.device("cuda")))
    assert on_gpu in (set(), set(tuned.OPS) - {"conv"}, set(tuned.OPS) - {"conv", *OF_CUDA})


@pytest.mark.parametrize("name", ["gradient of group norm", "reverse step", "noised, velocity", "residual, padded"])
def test_a_kernel_that_is_wrong_is_refused(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result on its own: a pixel of the last sample that is off."""
    pytest.importorskip("triton")
    task = make_task(KEYS[name], device)
    operands, choice = task.operands(0), task.candidates()[0]
    truth, call = task.truth(operands, task.samples()), task.call(choice, operands)
    for wrong, result in task.results(operands).items():

        def spoilt(last: torch.Tensor = result[(-1,) * result.ndim]) -> None:
            call()
            last.add_(1)

        with monkeypatch.context() as patch:
            patch.setattr(task, "call", lambda *_, spoilt=spoilt: spoilt)
            assert str(why_wrong(task, choice, operands, truth)).startswith(f"AssertionError: {wrong} [")
    assert why_wrong(task, choice, operands, truth) is None


def test_norms_are_tried_in_one_pass_and_two() -> None:
    task = GroupNormTask(Key("group_norm_silu_", torch.float16, (8, 1024, 128, 0, 32, 1)), CPU)
    plans = [task._plan(choice) for choice in task.candidates()]
    assert {plan.one_pass for plan in plans if plan} == {True, False}
    assert len({plan for plan in plans}) == len(plans) > 20


def test_pointwise_convolutions_are_tried_as_the_vendors_product_in_16_bits_alone() -> None:
    pytest.importorskip("triton")
    for dtype, tf32, expected in ((torch.float16, 0, True), (torch.float32, 0, False), (torch.float32, 1, False)):
        task = make_task(Key("pointwise_conv", dtype, (4096, 256, 256, 128, 1, tf32)), CPU)
        assert ({"implementation": "addmm"} in task.candidates()) is expected


@pytest.mark.parametrize("upsample", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("native")
def test_every_algorithm_of_the_cpu_is_a_candidate(
    dtype: torch.dtype, upsample: int, request: pytest.FixtureRequest
) -> None:
    if dtype == torch.bfloat16:
        request.getfixturevalue("native_bfloat16")
    task = make_task(Key("conv", dtype, (2, 9, 6, 6, 18, upsample, 1)), CPU)
    candidates = task.candidates()
    assert candidates[0] == {"algorithm": likely_algorithm(2, 9, 6, 6, 18, upsample, 1, dtype=dtype)}
    assert len(candidates) == (2 if upsample or dtype == torch.bfloat16 else 3)
    operands = task.operands(0)
    truth = task.truth(operands, task.samples())
    for choice in candidates:
        assert why_wrong(task, choice, operands, truth) is None
        assert why_wrong(task, choice, task.another(operands), truth) is None


def test_what_is_wrong_is_refused(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(CONV, CPU)
    operands = task.operands(0)
    truth = task.truth(operands, task.samples())
    y, right = operands["y"], task.call({"algorithm": "direct"}, operands)

    def after(change: Callable[[], object]) -> str | None:
        def call(self: Any, choice: Choice, operands: Any) -> Callable[[], object]:
            return lambda: (right(), change())

        monkeypatch.setattr(ConvTask, "call", call)
        return why_wrong(task, {"algorithm": "direct"}, operands, truth)

    assert after(lambda: None) is None
    assert "not finite everywhere" in str(after(lambda: y[1, 3, 2].fill_(float("nan"))))
    assert "rms error" in str(after(lambda: y[1, 3, 2].mul_(1.01)))
    assert "ZeroDivisionError" in str(after(lambda: 1 // 0))


def test_choices_like_the_heuristics_come_first() -> None:
    own = {"a": 8, "b": 4}
    others = [{"a": 64, "b": 4}, {"a": 8, "b": 2}, {"a": 8, "b": 4}, {"implementation": "addmm"}]
    assert nearest_first(others, own) == [own, others[1], others[0], others[3]]


# The search.


class Clock:
    """Seconds by algorithm, one a round, over and over. What it is given was made by a `ConvTask`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, Sequence[float]]) -> None:
        self.seconds, self.timed = seconds, 0
        made = ConvTask.call

        def call(task: ConvTask, choice: Choice, operands: Any) -> Callable[[], object]:
            run = made(task, choice, operands)

            def named() -> object:
                return run()

            named.algorithm = choice["algorithm"]  # type: ignore[attr-defined]
            return named

        monkeypatch.setattr(ConvTask, "call", call)

    def __call__(self, calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], float]:
        algorithm, rounds = calls[0].algorithm, iter(range(10**6))  # type: ignore[attr-defined]
        assert len({id(call) for call in calls}) == len(calls)
        self.timed += 1
        return lambda: self.seconds[algorithm][next(rounds) % len(self.seconds[algorithm])]


OWN, A, B = (lambda own: (own, *sorted({"direct", "winograd2", "winograd4"} - {own})))(likely_algorithm(*CONV.shape))


@pytest.mark.parametrize(
    ("seconds", "winner"),
    [
        ({OWN: [2.0], A: [1.0], B: [1.5]}, A),
        ({OWN: [2.0], A: [1.5], B: [1.0]}, B),
        ({OWN: [1.0], A: [2.0], B: [1.1]}, None),
        ({OWN: [1.0], A: [0.99], B: [0.995]}, None),  # a trifle
        ({OWN: [1.0, 3.0], A: [0.9, 2.7], B: [2.0]}, A),  # both see the same other work: faster in every round
        ({OWN: [1.0], A: [0.5, 1.5, 0.5, 0.5], B: [2.0]}, None),  # faster in the median, but not certainly
    ],
)
def test_only_what_is_faster_beyond_noise_wins(
    native: str, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, Sequence[float]], winner: str | None
) -> None:
    (outcome,) = tune({CONV: 3}, CPU, 60.0, clock=Clock(monkeypatch, seconds))
    assert outcome.done
    assert outcome.winner == (None if winner is None else {"algorithm": winner})
    assert (outcome.heuristic, outcome.calls, outcome.tried) == ({"algorithm": OWN}, 3, 3)
    if winner is not None:
        assert f"{3e6 * min(seconds[OWN]):.0f} us are now" in summary([outcome]) or len(seconds[OWN]) > 1
        assert outcome.winner_us < outcome.heuristic_us


def test_what_is_refused_is_not_timed(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fastddpm.perf.tuning.search.why_wrong",
        lambda task, choice, *rest: "it is wrong" if choice["algorithm"] == A else None,
    )
    clock = Clock(monkeypatch, {OWN: [2.0], A: [1.0], B: [1.5]})
    (outcome,) = tune({CONV: 1}, CPU, 60.0, clock=clock)
    assert (outcome.winner, outcome.refused) == ({"algorithm": B}, [({"algorithm": A}, "it is wrong")])
    assert clock.timed == 2 + 2


def test_a_shape_whose_own_choice_is_wrong_is_left_alone(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddpm.perf.tuning.search.why_wrong", lambda *_: "it is wrong")
    (outcome,) = tune({CONV: 1}, CPU, 60.0, clock=Clock(monkeypatch, {}))
    assert outcome.status == "the heuristics' choice is refused: it is wrong"


def test_the_budget_ends_the_search(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []
    big = Key("conv", torch.float32, (4, 16, 16, 64, 64, 0, 1))

    def slow(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], float]:
        reached.append(len(calls))
        time.sleep(0.05)
        return lambda: 1.0

    outcomes = tune({CONV: 1, big: 1}, CPU, 0.01, clock=slow)
    assert [outcome.key for outcome in outcomes] == [big, CONV]  # where there is most to gain comes first
    assert reached  # what has begun is ended,
    assert not outcomes[1].done  # and nothing more begins
    assert outcomes[1].status == "out of time"


def test_a_budget_that_is_short_is_spent_on_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where choices are compiled, little time for each would do for none: what is worth most has it."""
    now, given, reported = [0.0], [], []
    monkeypatch.setattr("fastddpm.perf.tuning.search.LEAST_S", {"cpu": 2.0})
    monkeypatch.setattr("fastddpm.perf.tuning.search.time", SimpleNamespace(monotonic=lambda: now[0]))

    def search(task: Any, outcome: Outcome, begin: float, seconds: float, *_: Any) -> None:
        given.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("fastddpm.perf.tuning.search._search", search)
    keys = {Key("conv", torch.float32, (batch, 9, 6, 5, 18, 0, 1)): 1 for batch in range(1, 9)}
    outcomes = tune(keys, CPU, 5.0, done=reported.append)
    assert given == [2.0, 2.0, 1.0]
    assert reported == outcomes
    assert [outcome.key.shape[0] for outcome in outcomes] == [8, 7, 6, 5, 4, 3, 2, 1]
    given.clear()
    tune(keys, CPU, 24.0)
    assert given == pytest.approx([3.0] * 8)
    monkeypatch.undo()
    assert LEAST_S.keys() == {"cuda"}


def test_the_heuristics_choice_is_not_waited_for(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiling, "why_not", lambda *_: "it was not compiled in time")
    (outcome,) = tune({CONV: 1}, CPU, 60.0, clock=Clock(monkeypatch, {OWN: [2.0]}))
    assert (outcome.done, outcome.winner, len(outcome.refused)) == (True, None, 2)


def test_an_error_ends_one_shape_alone(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Key("conv", torch.float32, (4, 9, 6, 5, 18, 0, 1))
    operands = ConvTask.operands

    def fail_first(task: ConvTask, seed: int) -> Any:
        if task.key == other:
            raise torch.OutOfMemoryError("no memory")
        return operands(task, seed)

    monkeypatch.setattr(ConvTask, "operands", fail_first)
    clock = Clock(monkeypatch, {OWN: [2.0], A: [1.0], B: [1.5]})
    first, second = tune({CONV: 1, other: 1}, CPU, 60.0, clock=clock)
    assert (first.status, second.status) == ("OutOfMemoryError: no memory", "done")


def test_operands_are_more_than_a_cache_holds() -> None:
    from fastddpm.perf.tuning.search import SETS, _sets

    assert 2**18 <= cache_bytes(CPU) < 2**33
    task = make_task(CONV, CPU)
    sets = _sets(task, task.operands(0))
    assert len(sets) == SETS  # so small a shape would need more
    assert len({one["x"].data_ptr() for one in sets} | {one["y"].data_ptr() for one in sets}) == 2 * SETS


# Shapes and tables.


def test_the_shapes_are_those_that_the_model_runs(device: torch.device) -> None:
    pytest.importorskip("triton")
    network = Network(small_unet().to(device), backend="triton", freeze=True)
    keys = network_keys(network, (3, 1, 8, 8), tuple(tuned.OPS))
    norms = {key.shape: count for key, count in keys.items() if key.op == "group_norm_silu_"}
    assert norms[3, 64, 8, 0, 4, 1] == 5  # two of the first block, two of the last, and that before conv_out
    assert norms[3, 64, 8, 8, 4, 1] == norms[3, 64, 16, 8, 4, 1] == 1  # the last block's over skip connections
    last = next(shape for key in keys if key.op == "pointwise_conv" and (shape := key.shape)[0] == 3 * 64)
    assert last[1] == 8
    assert sum(norms.values()) == sum(isinstance(m, torch.nn.GroupNorm) for m in network.model.modules())


def test_the_shapes_of_the_cpu_are_those_of_its_convolutions(native: str) -> None:
    network = Network(small_unet(), freeze=True)
    keys = network_keys(network, (3, 1, 8, 8), tuned_ops(CPU))
    threads = torch.get_num_threads()
    assert keys[Key("conv", torch.float32, (3, 8, 8, 1, 8, 0, threads))] == 1
    assert keys[Key("conv", torch.float32, (3, 4, 4, 16, 16, 1, threads))] == 1  # after upsampling
    assert {key.op for key in keys} == {"conv"}


def outcome(key: Key, winner: Choice | None, status: str = "done") -> Outcome:
    return Outcome(key, "", 1, {"algorithm": OWN}, winner, 2.0, 1.0, 3, [], status)


def test_tables_are_added_to_and_seen_at_once(cache: Path) -> None:
    other = Key("conv", torch.float32, (4, 9, 6, 5, 18, 0, 1))
    path = tuned.user_path(CPU)
    assert path.parent == cache / "tuned"
    assert choose_algorithm(2, 9, 6, 5, 18, threads=1) == OWN
    assert save([outcome(CONV, {"algorithm": A}), outcome(other, None, "out of time")], CPU, path) == 1
    assert choose_algorithm(2, 9, 6, 5, 18, threads=1) == A
    assert save([outcome(other, None)], CPU, path) == 1
    assert tuned.known(CPU) == {CONV, other}
    assert save([outcome(CONV, {"algorithm": B})], CPU, path) == 1
    assert tuned.read(path, CPU).entries == {CONV: {"algorithm": B}, other: None}
    content = json.loads(path.read_text())
    assert {name for name in content} >= {"schema", "device", "torch", "created", "native", "entries"}
    path.write_text(json.dumps({**content, "native": "of before"}))
    save([outcome(other, None)], CPU, path)
    assert set(tuned.read(path, CPU).entries) == {other}  # the rest was of another build


def test_nothing_measured_writes_nothing(cache: Path) -> None:
    assert save([outcome(CONV, None, "out of time")], CPU, tuned.user_path(CPU)) == 0
    assert not tuned.user_path(CPU).exists()


@pytest.mark.slow
def test_choices_are_compiled_in_other_processes_and_refused_where_they_spill() -> None:
    pytest.importorskip("triton")
    task = make_task(Key("group_norm_silu", torch.float16, (64, 512, 128, 0, 32, 1)), CPU)
    conv = make_task(Key("pointwise_conv", torch.float16, (4096, 128, 128, 0, 0, 0)), CPU)
    good, spills = ({"one_pass": True, "slab_groups": 4, "num_warps": warps} for warps in (4, 1))
    vendors = {"implementation": "addmm"}
    task.candidates = lambda: [good, spills]  # type: ignore[method-assign]
    conv.candidates = lambda: [vendors]  # type: ignore[method-assign]
    end = time.monotonic() + 200
    with Compiling([task, conv], "sm_90", 1) as compiling:
        assert compiling.why_not(task, good, end) is None
        assert str(compiling.why_not(task, spills, end)).endswith("bytes spilled")
        assert compiling.why_not(conv, vendors, end) is None
        processes = compiling._processes
        assert len(processes) == 1
        processes[0].kill()
        processes[0].wait()
        compiling._found.clear()
        assert compiling.why_not(conv, vendors, end) is None  # by another process
    assert all(process.poll() is not None for process in processes)


def test_what_is_not_compiled_in_time_is_not_used() -> None:
    task = make_task(Key("group_norm_silu", torch.float16, (64, 512, 128, 0, 32, 1)), CPU)
    with Compiling([task], "sm_90", 1) as compiling:
        reason = compiling.why_not(task, task.candidates()[0], time.monotonic())
    assert reason == "it was not compiled in time"
    with Compiling([task], None) as nothing:
        assert nothing.why_not(task, task.candidates()[0], 0.0) is None
