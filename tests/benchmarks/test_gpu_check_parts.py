"""Parts of `benchmarks/gpu_check.py`: arms and their time, what they measure, compiling ahead, tests in a process."""

from __future__ import annotations

import copy
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_check_parts import CPU, new_section, read

# Groups of arms.


def test_group_records_every_arm(gpu: SimpleNamespace, tmp_path: Path) -> None:
    Arm, section = gpu.arms.Arm, new_section(gpu, tmp_path)
    calls: list[str] = []

    def runs(name: str, fail_at: int = 0) -> Callable[[], Callable[[], None]]:
        def run() -> None:
            calls.append(name)
            if calls.count(name) == fail_at:
                raise RuntimeError("broke on the way")

        return lambda: run

    def raises(error: BaseException) -> Callable[[], Callable[[], None]]:
        def build() -> Callable[[], None]:
            raise error

        return build

    arms = [
        Arm("good", runs("good"), steps=4, batch=3),
        Arm("breaks", runs("breaks", fail_at=3)),
        Arm("bad", raises(ZeroDivisionError("why"))),
        Arm("missing", raises(gpu.arms.Missing("peer is not installed"))),
        Arm("unavailable", raises(gpu.arms.Unavailable("no such graph"))),
        Arm("wrong", runs("wrong"), unchecked="its images are wrong"),
        Arm("late", runs("late"), unchecked=gpu.arms.OUT_OF_TIME + " (its images were not compared)"),
        Arm("long", runs("long"), build_s=1e6),
        Arm("other", runs("other")),
    ]
    group = gpu.arms.Group(section, "group", CPU, 30, most=4, derive=lambda r, s: r.update(seconds=s))
    group.run(arms)
    records = {r["arm"]: r for r in read(tmp_path / "results.json")["sections"]["cifar10"]["records"]}
    assert {name: r["status"] for name, r in records.items()} == {
        "good": "ok",
        "breaks": "failed",
        "bad": "failed",
        "missing": "missing",
        "unavailable": "unavailable",
        "wrong": "failed",
        "late": "not run",
        "long": "not run",
        "other": "ok",
    }
    assert records["good"]["us_per_step"]["samples"] == 4
    assert records["good"]["seconds"] * 1e6 == pytest.approx(records["good"]["us_per_step"]["median"])
    assert records["bad"]["error"] == "ZeroDivisionError: why"
    assert records["breaks"]["error"] == "RuntimeError: broke on the way"
    assert records["long"]["reason"].startswith(gpu.arms.OUT_OF_TIME)
    assert not {"wrong", "late"} & set(calls)
    # Built one after the other, then in turn, each round beginning with the next.
    built, first, second = ["good", "breaks", "other"], ["good", "breaks", "other"], ["other", "good"]
    assert calls[:6] == built + first
    assert calls[6:8] == ["breaks", "other"]  # where it breaks
    assert calls[8:] == ["good", *second, "good", "other"]
    assert not section.has("group")  # it is partial
    section.close()
    assert section.data["status"] == "partial"


def test_a_long_build_is_stopped(gpu: SimpleNamespace, tmp_path: Path) -> None:
    def forever() -> Callable[[], None]:
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # what a library may do
                pytest.fail("the limit was swallowed")

    section = new_section(gpu, tmp_path)
    start = time.monotonic()
    arms = [gpu.arms.Arm("endless", forever, build_s=0.1), gpu.arms.Arm("later", lambda: lambda: None, build_s=0.0)]
    gpu.arms.Group(section, "group", CPU, 0.3).run(arms)
    assert time.monotonic() - start < 20
    assert section.records(arm="endless")[0]["status"] == "not run"
    assert "took more than" in section.records(arm="endless")[0]["reason"]


def test_time_limits_nest(gpu: SimpleNamespace) -> None:
    limit, OutOfTime = gpu.timing.time_limit, gpu.timing.OutOfTime

    def overrun() -> None:
        with limit(1.0):
            with limit(60):
                pass
            time.sleep(30)

    with pytest.raises(OutOfTime, match="1 s"):
        overrun()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_time_is_split(gpu: SimpleNamespace) -> None:
    assert gpu.timing.split_time(90, {"a": 1, "b": 2}) == {"a": 30, "b": 60}
    assert gpu.timing.split_time(-1, {"a": 1}) == {"a": 0}


# What is measured.


def test_operations_of_the_published_networks(gpu: SimpleNamespace) -> None:
    for name, expected in (("cifar10", 6.222e9), ("celeba256", 248.5e9)):
        config = gpu.networks.UNetConfig(**gpu.networks.CONFIGS[name])
        assert gpu.networks.count_flops(config) == pytest.approx(2 * expected, rel=1e-3)


@pytest.mark.parametrize("steps", [1000, 50])
def test_the_baseline_has_the_sampler_s_coefficients(gpu: SimpleNamespace, steps: int) -> None:
    from fastddpm import NoiseSchedule, Sampler

    schedule = NoiseSchedule.linear(1000)
    sampler = Sampler(lambda x, t: x, schedule, num_inference_steps=steps, variance_type="fixed_large")
    timesteps, rows = gpu.baselines.ancestral_rows(schedule, steps)
    assert timesteps == sampler.table.timesteps.tolist()
    ours = sampler.table.rows.double()
    torch.testing.assert_close(rows, ours[:, [0, 1, 2, 3, 6]], rtol=1e-6, atol=1e-9)
    assert bool((ours[:, 4:6] == 0).all())


def test_wrong_images_are_not_timed(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = gpu.loops.make_sampler

    def slightly_wrong(problem: Any, precision: str, steps: int, graph: str | bool) -> Any:
        sampler = make(problem, precision, steps, graph)
        off = 0.01 if precision == "fp32" else 0.0
        return SimpleNamespace(sample=lambda *args, **options: sampler.sample(*args, **options) + off)

    monkeypatch.setattr(gpu.loops, "make_sampler", slightly_wrong)
    section = new_section(gpu, tmp_path)
    problem, plan = gpu.networks.make_problem("small", CPU), gpu.loops.SMALL_PLAN
    wrong = gpu.loops.check_images(section, problem, plan)
    assert set(wrong) == {"fastddpm fp32"}
    assert section.records(arm="fastddpm fp32")[0]["status"] == "failed"
    arms = gpu.loops.loop_arms(problem, plan, 1, wrong)
    assert [arm.name for arm in arms if arm.unchecked] == ["fastddpm fp32"]


def test_cases_of_ops_are_right_and_errors_are_seen(gpu: SimpleNamespace) -> None:
    for make in gpu.op_cases.all_cases(CPU, small=True):
        case = make()
        assert gpu.ops.check(case, CPU) is None, case.name
        # What torch does in its own way is the same op: noise apart, the same shapes and dtypes.
        with torch.no_grad():
            ours, theirs = case.run(case.make(), "eager"), case.eager(case.make())
        assert [tuple(t.shape) for t in ours] == [tuple(t.shape) for t in theirs], case.name
        run = case.run

        def off(tensors: dict[str, Any], backend: str, run: Any = run) -> tuple[torch.Tensor, ...]:
            first, *rest = run(tensors, backend)
            return (first if backend == "reference" else first + 0.05 * first.abs().max(), *rest)

        broken = copy.copy(case)
        broken.run = off
        truth = case.truth
        broken.truth = lambda tensors, truth=truth: truth(tensors)
        eager_is_right = copy.copy(case)
        eager_is_right.run = run
        assert case.bytes > 0
        found = _check_against(gpu, broken, eager_is_right)
        assert found is not None
        assert found.startswith("wrong:"), case.name


def _check_against(gpu: SimpleNamespace, broken: Any, right: Any) -> str | None:
    """What `check` finds where only the op under test, the first one that runs, is off."""
    calls: list[str] = []

    def run(tensors: dict[str, Any], backend: str) -> tuple[torch.Tensor, ...]:
        calls.append(backend)
        return (broken if len(calls) == 1 else right).run(tensors, backend)

    case = copy.copy(broken)
    case.run = run
    return gpu.ops.check(case, CPU)


def test_bytes_of_a_case_are_those_of_its_tensors(gpu: SimpleNamespace) -> None:
    case = gpu.op_cases.group_norm_case(CPU, torch.float16, (2, 16, 8, 4), residual=True, compiled=False)
    tensors = case.make()
    images = [tensors[name] for name in ("x", "x2", "residual", "total", "y")]
    assert case.bytes == sum(t.numel() * t.element_size() for t in images)
    case = gpu.op_cases.reverse_step_case(CPU, torch.float16, "guided", 2, 8)
    tensors = case.make()
    assert case.bytes == sum(tensors[n].numel() * tensors[n].element_size() for n in ("x", "x", "out", "net_in"))
    case = gpu.op_cases.pointwise_case(CPU, torch.float16, (2, 16, 8, 24, 4), residual=True)
    tensors = case.make()
    assert case.bytes == sum(t.numel() * t.element_size() for name, t in tensors.items() if name != "bias")
    assert case.flops == 2 * 2 * 16 * 24 * 24


def test_pipeline_returns_images(gpu: SimpleNamespace) -> None:
    pytest.importorskip("diffusers")
    problem = gpu.networks.make_problem("small", CPU)
    images = gpu.peers.DiffusersPipeline(problem, 2, 2)()
    assert images.shape == (2, 8, 8, 3)


# Compiling ahead, and pytest in a process of its own.


def test_what_is_compiled_ahead(gpu: SimpleNamespace) -> None:
    jobs = gpu.precompile.jobs(gpu.loops.PLANS.values())
    assert jobs[0] == ["celeba256", "fp16", "1"]
    assert [job[1] for job in jobs[:8]] == ["fp16"] * 8, "the main precision first"
    assert ["cifar10", "bf16", "256"] in jobs
    assert ["cifar10", "bf16", "64"] not in jobs
    assert ["cifar10", "fp32", "1024"] in jobs, "the network alone is timed in it"
    for plan in gpu.loops.PLANS.values():
        for batch in plan.steps:
            problem = SimpleNamespace(device=torch.device("cuda"), shape=(3, 256, 256), name=plan.problem)
            arms = gpu.loops.loop_arms(problem, plan, batch, {}) + gpu.loops.network_arms(problem, plan, batch, {})
            wanted = {(arm.dtype, arm.batch) for arm in arms if arm.name.startswith("fastddpm")}
            assert all([plan.problem, dtype, str(size)] in jobs for dtype, size in wanted)


def test_jobs_side_by_side(gpu: SimpleNamespace) -> None:
    def start(job: Sequence[str]) -> Any:
        return subprocess.Popen(["sh", "-c", job[0]], start_new_session=True)

    begin = time.monotonic()
    missed = gpu.precompile.side_by_side([["sleep 0.2"], ["exit 3"], ["sleep 60"], ["true"]], start, 3, 3)
    assert missed == ["exit 3 (exit status 3)", "sleep 60 (out of time)"]
    assert time.monotonic() - begin < 30
    assert gpu.precompile.side_by_side([["true"]] * 5, start, 30, 2) == []
    assert gpu.precompile.side_by_side([["true"]], start, 0, 2) == ["true (out of time)"]


def test_outcomes_of_tests_are_read(gpu: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest, time\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 + 1 == 3, 'sums'\n"
        "@pytest.mark.skip(reason='no')\ndef test_skipped(): pass\n"
        "def test_long(): time.sleep(60)\n"
    )
    (tmp_path / "test_needs.py").write_text("import what_is_not_installed")
    options = ["-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path)]
    record = gpu.pytest_run.run_tests("some", [*options, "-k", "not long"], 120)
    assert (record["status"], record["exit"]) == ("failed", 1)
    assert (record["passed"], record["failed"], record["skipped"]) == (1, 2, 1)
    needs, bad = record["failures"]
    assert needs["test"].endswith("test_needs.py")
    assert bad["test"].endswith("test_bad")
    assert "sums" in bad["error"]
    start = time.monotonic()
    record = gpu.pytest_run.run_tests("some", options, 15)
    assert time.monotonic() - start < 40
    assert record["status"] == "not run"
    assert "out of time" in record["reason"]
    assert record["failures"][-1]["test"].endswith("test_bad")  # what was known when it was killed
    assert gpu.pytest_run.summarise("none", [], 5, 1, [], [])["error"] == "no tests were found"
