"""`benchmarks/gpu_check.py` and `report.py`: what is recorded, kept and judged; tried on the CPU's tiny network."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--small", "--compile-batch", "--budget", "900", "--commit", "abc"]
SOURCE = "0123456789ab"
MODULES = (
    "arms baselines engine loops marks networks op_cases ops outcome_log peers precompile profiler pytest_run results "
    "timing"
)


@pytest.fixture(scope="module")
def gpu() -> Iterator[SimpleNamespace]:
    """The modules of the package, and the two scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        parts = {name: importlib.import_module(f"gpu.{name}") for name in MODULES.split()}
        scripts = {name: importlib.import_module(name) for name in ("gpu_check", "report")}
        # Other sources would be other measurements; here they may be edited while the tests run.
        patch.setattr(scripts["gpu_check"], "source_digest", lambda: SOURCE)
        yield SimpleNamespace(**parts, **scripts)


@pytest.fixture(scope="module")
def finished(gpu: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a small run in which one peer is not installed and one arm of each group fails."""
    path = tmp_path_factory.mktemp("gpu_check") / "cpu.json"

    def broken(*_: Any) -> None:
        raise ValueError("deliberate\nsecond line")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "denoising_diffusion_pytorch", None)  # importing it fails
        patch.setattr(gpu.loops, "network_alone", broken)
        assert gpu.gpu_check.main([*SMALL, "--out", str(path)]) == 0
    return path


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_schema(gpu: SimpleNamespace, finished: Path) -> None:
    content = read(finished)
    assert content["schema"] == gpu.results.SCHEMA
    assert content["device"]["kind"] == "cpu"
    assert content["small"] is True
    assert content["source"] == SOURCE
    assert content["commit"] == "abc"
    assert {name: section["status"] for name, section in content["sections"].items()} == {
        "machine": "done",
        "tests": "done",
        "ops": "done",
        "cifar10": "done",
        "celeba256": "done",
        "profile": "skipped",
    }
    assert "GPU only" in content["sections"]["profile"]["reason"]
    machine = content["sections"]["machine"]
    assert machine["copy_gb_s"] > 0
    assert all(value > 0 for value in machine["matmul_tflops"].values())
    assert torch.__version__.startswith(machine["versions"]["torch"].split("+")[0])
    for section in content["sections"].values():
        for record in section["records"]:
            assert record["status"] in gpu.results.STATUSES
            if record["status"] == "ok" and "us_per_step" in record:
                spread = record["us_per_step"]
                assert 0 < spread["min"] <= spread["p20"] <= spread["median"] <= spread["p80"]
                assert spread["samples"] >= 1
                assert record["steps"] >= 1
                if record["what"] in ("loop", "compiled"):
                    expected = record["batch"] / (1000 * spread["median"] / 1e6)
                    assert record["images_per_s_1000"] == pytest.approx(expected)
            elif record["status"] != "ok":
                assert record.get("error") or record.get("reason")


@pytest.mark.slow
def test_a_missing_peer_and_a_failing_arm_stop_nobody(finished: Path) -> None:
    records = read(finished)["sections"]["cifar10"]["records"]
    loop = {r["arm"]: r for r in records if r["group"] == "loop batch 1"}
    peer = loop.pop("denoising_diffusion_pytorch")
    assert peer["status"] == "missing"
    assert "not installed" in peer["reason"]
    assert {"fastddpm fp16", "fastddpm fp16 plain", "fastddpm fp32", "DDPMPipeline", "eager fp32"} <= loop.keys()
    assert {r["status"] for r in loop.values()} == {"ok"}
    network = {r["arm"]: r for r in records if r["group"] == "network batch 2"}
    for name in ("fastddpm fp16", "fastddpm fp32"):
        assert network[name]["status"] == "failed"
        assert network[name]["error"] == "ValueError: deliberate\nsecond line"
    assert network["eager fp32"]["status"] == "ok"


@pytest.mark.slow
def test_images_were_compared(finished: Path) -> None:
    images = [r for r in read(finished)["sections"]["cifar10"]["records"] if r["group"] == "images"]
    assert {r["arm"] for r in images} == {"fastddpm fp16", "fastddpm fp16 plain", "fastddpm fp32"}
    for record in images:
        assert record["errors"]["ok"], record
        assert 0 < record["errors"]["rms"] <= record["errors"]["bound_rms"] < 1e-2


@pytest.mark.slow
def test_resume_repeats_nothing(
    gpu: SimpleNamespace, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "again.json"
    path.write_text(finished.read_text(encoding="utf-8"), encoding="utf-8")
    arguments = [*SMALL, "--resume", "--out", str(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.gpu_check, "run_section", lambda *_: pytest.fail("a section was repeated"))
        assert gpu.gpu_check.main(arguments) == 0
    assert "none left to run" in capsys.readouterr().out
    before, after = read(finished), read(path)
    assert after.pop("written") >= before.pop("written")
    assert after == before

    # A section that ran out of time is finished, without what it had.
    changed = copy.deepcopy(before)
    section = changed["sections"]["cifar10"]
    section["status"], section["groups"]["network batch 1"] = "partial", "partial"
    path.write_text(json.dumps(changed), encoding="utf-8")
    assert gpu.gpu_check.main(arguments) == 0
    after = read(path)
    assert after["sections"]["ops"] == before["sections"]["ops"]
    assert after["sections"]["cifar10"]["status"] == "done"

    def of(content: dict[str, Any], group: str) -> list[dict[str, Any]]:
        return [r for r in content["sections"]["cifar10"]["records"] if r["group"] == group]

    assert of(after, "loop batch 1") == of(before, "loop batch 1")
    assert {r["status"] for r in of(before, "network batch 1")} == {"ok", "failed"}  # of the broken arms
    assert {r["status"] for r in of(after, "network batch 1")} == {"ok"}


def test_another_source_is_not_kept(gpu: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    identity = {"device": {"kind": "cpu"}, "source": "a"}
    first = gpu.results.Results(path, identity)
    gpu.results.Section(first, "machine", 10).close()
    assert gpu.results.Results(path, identity, resume=True).finished("machine")
    assert not gpu.results.Results(path, identity).finished("machine")
    other = gpu.results.Results(path, identity | {"source": "b"}, resume=True)
    assert other.sections == {}
    assert other.dropped == "source was 'a', is 'b'"
    again = gpu.results.Results(path, identity, resume=True, header={"commit": "later"})
    assert again.finished("machine")  # the sources are what counts
    assert again.content["commit"] == "later"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device is cpu without --small"),
        (["--device", "cpu", "--small", "--out", "x", "--budget", "0"], "--budget is 0.0, must be positive"),
        (["--device", "cpu", "--small"], "--out is missing"),
        (["--section", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_bad_arguments(
    gpu: SimpleNamespace, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as error:
        gpu.gpu_check.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_ops_on_a_gpu(gpu: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    arguments = ["--device", "cuda", "--small", "--section", "machine", "ops", "--out", str(path), "--commit", "abc"]
    assert gpu.gpu_check.main(arguments) == 0
    sections = read(path)["sections"]
    assert sections["machine"]["latency"]["graph_node_us"] > 0
    triton = [r for r in sections["ops"]["records"] if r["arm"] == "triton"]
    assert len(triton) == 8
    assert {r["status"] for r in triton} == {"ok"}, triton


# Groups of arms.


def new_section(gpu: SimpleNamespace, tmp_path: Path, seconds: float = 60) -> Any:
    return gpu.results.Section(gpu.results.Results(tmp_path / "results.json", {}), "cifar10", seconds)


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


def test_spread_and_split(gpu: SimpleNamespace) -> None:
    spread = gpu.timing.spread([5e-6, 1e-6, 3e-6, 2e-6, 4e-6], per=2)
    assert spread == pytest.approx({"median": 1.5, "p20": 0.9, "p80": 2.1, "min": 0.5, "samples": 5})
    assert gpu.timing.split_time(90, {"a": 1, "b": 2}) == {"a": 30, "b": 60}
    assert gpu.timing.split_time(-1, {"a": 1}) == {"a": 0}


def test_interleaving_ends_in_time(gpu: SimpleNamespace) -> None:
    seen = list(gpu.timing.interleave({"a": lambda: time.sleep(0.05) or 1.0}, seconds=0.12, least=1, most=1000))
    assert 1 <= len(seen) <= 4
    assert len(list(gpu.timing.interleave({"a": lambda: 1.0}, seconds=9, most=7))) == 7


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


# pytest in a process of its own.


class Recording:
    """A GPU whose streams and graphs note what is done, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []

        @contextlib.contextmanager
        def graph(target: Any, stream: Any) -> Iterator[None]:
            self.log.append("begin")
            yield
            self.log.append("end")

        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {
            "Stream": lambda device: stream, "current_stream": lambda device: stream,
            "stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda device: None, "graph": graph,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
        }  # fmt: skip
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: self.log.append("clear"), raising=False)


def test_a_captured_call_keeps_its_own_scratch_memory(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS' workspace is taken within the capture: one from before it would be freed under the graph."""
    seen = Recording(monkeypatch)
    replay = gpu.timing.capture([lambda: seen.log.append("call")] * 2, torch.device("cuda"))
    assert seen.log == ["call", "call", "clear", "begin", "call", "call", "end", "clear"]
    replay()
    assert seen.log[-1] == "replay"


# Compiling ahead.


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


# What is made of it.


def test_analysis_of_a_trace(gpu: SimpleNamespace) -> None:
    Event = gpu.profiler.Event
    step = [Event("conv", 0, 4), Event("norm", 3, 2), Event("_reverse_step_0", 6, 2)]  # 1 us of overlap, 1 us of gap
    events = [Event(name, 100 + 10 * i + start, us) for i in range(5) for name, start, us in step]
    found = gpu.profiler.analyse([Event("noise", 0, 50), *events], steps=5)
    assert found["kernels_per_step"] == 3
    assert found["traced_us_per_step"] == pytest.approx(10)
    assert found["busy_us_per_step"] == pytest.approx(7)
    assert found["idle_share"] == pytest.approx(0.3)
    assert [entry["kernel"] for entry in found["top"]] == ["conv", "norm", "_reverse_step_0"]
    assert found["top"][0]["us_per_step"] == pytest.approx(4)
    assert found["top"][0]["share"] == pytest.approx(0.5)
    whole = gpu.profiler.analyse(events, steps=4)  # one more than was asked for
    assert "whole run" in whole["counted"]
    with pytest.raises(ValueError, match="no event"):
        gpu.profiler.analyse([], steps=1)


def test_profile_of_a_loop(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, Event = gpu.networks.make_problem("small", CPU), gpu.profiler.Event
    step = [Event("conv", 0, 5), Event("_reverse_step", 8, 1)]
    one_round = [Event("memset", 0, 1), *step, Event("noise", 20, 1)]
    traces = [one_round, [Event(n, 9 * i + s, us) for i in range(4) for n, s, us in step]]
    monkeypatch.setattr(gpu.profiler, "trace", lambda run, device: traces.pop(0))
    make, graphs = gpu.profiler.SamplerLoop, []

    def plain_loop(problem: Any, precision: str, batch: int, steps: int, graph: str | bool) -> Any:
        graphs.append(graph)
        return make(problem, precision, batch, steps, False)

    monkeypatch.setattr(gpu.profiler, "SamplerLoop", plain_loop)
    record = {"steps": 4, **gpu.profiler.time_loop(problem, 2, 4)}
    record |= gpu.profiler.trace_loop(problem, 2, record, tflops=100.0, copy=4000.0)
    assert graphs == ["auto", "step", False]  # the first trace held too little
    assert record["settings"]["traced"] is False
    assert record["kernels_per_step"] == 2
    assert record["busy_us_per_step"] == pytest.approx(6)
    assert record["idle_share"] == pytest.approx(1 - 6 / record["us_per_step"]["median"])
    floor, us = record["floor"], record["us_per_step"]["median"]
    assert floor["compute_us"] == pytest.approx(2 * problem.flops / 100e6)
    assert floor["weights_us"] == pytest.approx(2 * problem.parameters / 4000e3)
    assert floor["share_of_floor"] == pytest.approx(max(floor["compute_us"], floor["weights_us"]) / us)
    program = floor["program"]
    assert 0 < program["flops"] < 2 * problem.flops  # frozen, it computes less
    assert program["kernels"] >= program["instructions"] > 20


def test_reading_a_trace(gpu: SimpleNamespace) -> None:
    content = {
        "traceEvents": [
            {"ph": "X", "cat": "kernel", "name": "b", "ts": 5.0, "dur": 1.0},
            {"ph": "X", "cat": "cpu_op", "name": "aten::add", "ts": 0.0, "dur": 9.0},
            {"ph": "X", "cat": "gpu_memset", "name": "a", "ts": 1.0, "dur": 2.0},
            {"ph": "M", "name": "process_name"},
        ]
    }
    assert [event.name for event in gpu.profiler.read_trace(content)] == ["a", "b"]


def measured(us: float, pipeline: float, compiled: float) -> dict[str, Any]:
    """What a file of a GPU holds where every mark can be judged."""

    def record(group: str, arm: str, value: float, what: str, batch: int) -> dict[str, Any]:
        times = {"median": value, "p20": value, "p80": value, "min": value, "samples": 9}
        base = {"group": group, "arm": arm, "what": what, "batch": batch, "status": "ok", "us_per_step": times}
        return base | {"steps": 10}

    loops = []
    for batch in (1, 8, 64, 256, 1024):
        scale = max(1.0, batch / 8)
        group = f"loop batch {batch}"
        loops.append(record(group, "fastddpm fp16", us * scale, "loop", batch))
        loops.append(record(group, "DDPMPipeline", pipeline * scale, "loop", batch))
    group = "compiled batch 8"
    loops += [record(group, "fastddpm fp16", us, "compiled", 8)]
    loops += [record(group, "torch.compile fp16", compiled, "compiled", 8)]
    profile = [
        {"batch": n, "status": "ok", "idle_share": 0.01, "counted": "all", "group": f"batch {n}"} for n in (1, 64, 256)
    ]
    ops = [
        {"what": op, "arm": "triton", "status": "ok", "large": large, "percent_of_copy": p, "case": "c", "group": op}
        for op in ("reverse_step", "q_sample", "group_norm_silu")
        for large, p in ((True, 90.0), (False, 3.0))
    ]
    machine = {"status": "done", "records": [], "matmul_tflops": {"fp16": 790.0}, "versions": {"torch": "2.11"}}
    problem = {"flops_per_image_and_step": 12.444e9}
    return {
        "schema": "fastddpm.gpu_check/1",
        "device": {"kind": "cuda", "name": "Some GPU", "slug": "some-gpu"},
        "commit": "abc",
        "dirty": False,
        "small": False,
        "written": "2026-01-02T03:04:05Z",
        "sections": {
            "machine": machine,
            "ops": {"status": "done", "records": ops},
            "cifar10": {"status": "done", "records": loops, "problem": problem},
            "profile": {"status": "done", "records": profile},
        },
    }


def test_marks(gpu: SimpleNamespace) -> None:
    good = {mark.what: mark for mark in gpu.marks.judge(measured(200, 2100, 300))}
    assert all(mark.passed for mark in good.values()), good
    assert good["CIFAR-10 batch 8, times as fast as DDPMPipeline"].found == pytest.approx(10.5)
    floor_us = 256 * 12.444e9 / 790e12 * 1e6
    share = good["CIFAR-10 batch 256, share of the compute floor, %"].found
    assert share == pytest.approx(100 * floor_us / 6400, rel=1e-4)
    slow = {mark.what: mark for mark in gpu.marks.judge(measured(450, 2100, 300))}
    assert slow["CIFAR-10 batch 1, us per step"].short == "50 over"
    assert slow["CIFAR-10 batch 1, times as fast as DDPMPipeline"].short == "5.33 short"
    assert slow["least times as fast as the best torch.compile"].passed is False
    content = measured(200, 2100, 300)
    content["sections"]["ops"]["records"][0] |= {"status": "failed", "error": "wrong: rms"}
    content["sections"]["profile"]["records"] = []
    marks = {mark.what: mark for mark in gpu.marks.judge(content)}
    assert marks["reverse_step, % of copy"].passed is False  # a wrong result has no speed
    assert marks["idle share at batch 1, %"].passed is None
    nothing = gpu.marks.judge({"sections": {}})
    assert len(nothing) == len(good)
    assert all(mark.passed is None and mark.where for mark in nothing)


def test_report_invents_nothing(gpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    readme.write_text("before\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nafter\n", encoding="utf-8")
    arguments = ["--readme", str(readme), "--results", str(results)]
    (results / "curves.json").write_text('{"loss": 1}')
    small = measured(200, 2100, 300) | {"small": True}
    (results / "small.json").write_text(json.dumps(small))
    cpu = measured(200, 2100, 300) | {"device": {"kind": "cpu", "name": "cpu", "slug": "cpu"}}
    (results / "cpu.json").write_text(json.dumps(cpu))
    assert gpu.report.main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text(encoding="utf-8")
    assert gpu.report.main(arguments) == 0
    text = readme.read_text(encoding="utf-8")
    assert text == f"before\n<!-- speed:begin -->\n{gpu.report.NOTHING}\n<!-- speed:end -->\nafter\n"
    assert gpu.report.main([*arguments, "--check"]) == 0

    content = measured(200, 2100, 300)
    # An arm that was not measured at one batch size is a dash there.
    content["sections"]["cifar10"]["records"] = [
        r for r in content["sections"]["cifar10"]["records"] if (r["batch"], r["arm"]) != (64, "DDPMPipeline")
    ]
    (results / "some-gpu.json").write_text(json.dumps(content))
    assert gpu.report.main(arguments) == 0
    lines = readme.read_text(encoding="utf-8").splitlines()
    assert "**Some GPU**, torch 2.11, commit abc, 2026-01-02:" in lines
    assert "| google/ddpm-cifar10-32 | 8 | 200 | 40 | 10.5 | 1.5 | 63 % |" in lines
    assert any(line.startswith("| google/ddpm-cifar10-32 | 64 |") and "| - | - |" in line for line in lines)
    assert any("`reverse_step` 90 %" in line for line in lines)

    readme.write_text("no markers", encoding="utf-8")
    assert gpu.report.main(arguments) == 2
    assert "must be there once each" in capsys.readouterr().err


def test_digest_of_the_sources(gpu: SimpleNamespace, tmp_path: Path) -> None:
    for name in gpu.results.SOURCES:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.py").write_text("1")
    first = gpu.results.source_digest(tmp_path)
    (tmp_path / "README.md").write_text("not measured")
    assert gpu.results.source_digest(tmp_path) == first
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert gpu.results.source_digest(tmp_path) != first
    assert len(first) == 12


def test_names(gpu: SimpleNamespace) -> None:
    assert gpu.results.slug("NVIDIA H200") == "nvidia-h200"
    assert gpu.results.slug("AMD Instinct MI300X / OAM") == "amd-instinct-mi300x-oam"


def test_modules_stand_alone(gpu: SimpleNamespace) -> None:
    assert all(isinstance(getattr(gpu, name), ModuleType) for name in MODULES.split())
    for path in sorted((ROOT / "benchmarks" / "gpu").glob("*.py")):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
