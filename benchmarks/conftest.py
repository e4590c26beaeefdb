"""What benchmarks share. `pytest --benchmark-only` times them; plain `pytest` builds, checks and runs each arm once.

A file of benchmarks has `EXAMPLES`, {"small": {name: ...}, "full": {name: ...}}, and tests that take `example`, the
value of one of them, `arm`, and one of the fixtures

    compare(build, ...)              `build(arm)` makes a `measuring.Candidate`; the arms of an example take turns
    measure(function, bytes_moved=)  times one function that has been checked

`--bench-size small` is for two cores of a CPU and takes less than six minutes, `full` for one large GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import get_commit_info

sys.path.insert(0, str(Path(__file__).parent))  # for what the benchmarks and gpu_check.py share

from gpu.arms import Missing, Unavailable
from measuring import CLOCK, Candidate, Outcome, Session

SESSION: pytest.StashKey[Session] = pytest.StashKey()
SHOWN: pytest.StashKey[list[tuple[str, str, dict[str, Any]]]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-size",
        choices=["small", "full"],
        help="what benchmarks measure: small (minutes on two cores) or full (minutes on a large GPU); "
        "default: full where there is a GPU and --benchmark-only is given",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Timings are wanted only when asked for: `pytest --benchmark-only`. Else a benchmark is a smoke test.
    timed = bool(config.getoption("benchmark_only", False)) and not config.getoption("numprocesses", None)
    if config.pluginmanager.hasplugin("benchmark") and not timed:
        config.option.benchmark_disable = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = config.getoption("bench_size") or ("full" if timed and device.type == "cuda" else "small")
    info = get_commit_info() if timed else {}
    commit = {name: info.get(name) for name in ("id", "dirty")}
    config.stash[SESSION] = Session(device, size, timed, commit)
    config.stash[SHOWN] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "example" in metafunc.fixturenames:
        examples = metafunc.module.EXAMPLES[metafunc.config.stash[SESSION].size]
        metafunc.parametrize("example", examples.values(), ids=examples.keys())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"compare", "measure"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    return pytestconfig.stash[SESSION]


@pytest.fixture(scope="session")
def device(session: Session) -> torch.device:
    return session.device


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, session: Session) -> Callable[..., None]:
    """`compare(build, seconds=0.5, least=5, most=25)`: the arm of this test, timed in turn with its group's others.

    `build(arm)` makes a `measuring.Candidate`, or raises `Missing` or `Unavailable`, which skips the test and says why.
    `seconds` is about how long each arm is timed, in `least` to `most` rounds. What was measured goes into
    `extra_info`: `times_as_fast_as` and, on a CPU, `times_less_cpu_than` hold the ratios to the others.
    """
    arm, group, arms = _group(request)
    benchmark.group = group

    def run(build: Callable[[str], Candidate], *, seconds: float = 0.5, least: int = 5, most: int = 25) -> None:
        if not session.timed:
            candidate = _or_skip(build, arm)
            if candidate.check is not None:
                candidate.check()
            benchmark.pedantic(candidate.calls[0])
            return
        outcome = session.outcome(group, arm, arms, build, seconds=seconds, least=least, most=most)
        if outcome.error is not None:
            _raise_or_skip(outcome.error)
        _show(request, benchmark, session, group, arm, outcome)

    return run


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any, session: Session) -> Callable[..., Any]:
    """`measure(function, bytes_moved=...)`: times one function, whose result has been checked; returns that.

    `bytes_moved` counts each input read once and each output written once, `flops` its products.
    """

    def run(function: Callable[[], Any], *, bytes_moved: int, flops: int = 0) -> Any:
        if not session.timed:
            return benchmark.pedantic(function)
        name = request.node.name
        candidate = Candidate([function], bytes=bytes_moved, flops=flops)
        outcome = session.outcome(name, name, [name], lambda _: candidate, seconds=0.5, least=5, most=25)
        if outcome.error is not None:
            raise outcome.error
        _show(request, benchmark, session, name.partition("[")[0], name.partition("[")[2].rstrip("]"), outcome)
        return function()

    return run


def _group(request: pytest.FixtureRequest) -> tuple[str, str, list[str]]:
    """The arm of this test, the name of its group, and the group's arms that are to run, in their order."""
    parts = dict(request.node.callspec.params)
    arm = str(parts.pop("arm"))

    def same(item: Any) -> bool:
        params = getattr(getattr(item, "callspec", None), "params", {})
        rest = {name: value for name, value in params.items() if name != "arm"}
        return getattr(item, "function", None) is request.node.function and rest == parts

    arms = [str(item.callspec.params["arm"]) for item in request.session.items if same(item)]
    label = "-".join(part for part in request.node.callspec.id.split("-") if part != arm)
    return arm, f"{request.node.originalname.removeprefix('test_')} {label}".strip(), arms


def _or_skip(build: Callable[[str], Candidate], arm: str) -> Candidate:
    torch.manual_seed(0)
    try:
        return build(arm)
    except (Missing, Unavailable) as error:
        pytest.skip(f"{arm}: {error}")


def _raise_or_skip(error: Exception) -> None:
    if isinstance(error, (Missing, Unavailable)):
        pytest.skip(str(error))
    raise error


def _show(
    request: pytest.FixtureRequest, benchmark: Any, session: Session, group: str, arm: str, outcome: Outcome
) -> None:
    """Plays the samples to pytest-benchmark, and keeps what else is to be said."""
    samples = iter(outcome.samples)
    benchmark.pedantic(lambda: CLOCK.play(next(samples)), rounds=len(outcome.samples))
    benchmark.extra_info.update(outcome.info | session.machine)
    request.config.stash[SHOWN].append((group, arm, outcome.info))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    shown = config.stash[SHOWN]
    if not shown:
        return
    session = config.stash[SESSION]
    terminalreporter.section(f"benchmarks, --bench-size {session.size}, {session.machine['device']}")
    line = "{:<30} {:>10} {:>17} {:>9} {:>9} {:>8} {:>11}  {}".format
    terminalreporter.line(
        line("arm", "us, median", "p20 - p80", "GB/s", "TFLOP/s", "% roof", "1st call s", "times as fast as (CPU s)")
    )
    before = ""
    for group, arm, info in shown:
        if group != before:
            terminalreporter.line(group)
            before = group
        us = {name: info["seconds"][name] * 1e6 for name in ("median", "p20", "p80")}
        cpu = info.get("times_less_cpu_than", {})
        ratios = ", ".join(
            f"{name} {value['median']:.2f}" + (f" ({cpu[name]['median']:.2f})" if name in cpu else "")
            for name, value in info["times_as_fast_as"].items()
        )
        rates = [_number(info.get(name)) for name in ("gb_per_s", "tflops", "percent_of_roof")]
        band = f"{us['p20']:.4g} - {us['p80']:.4g}"
        terminalreporter.line(
            line(f"  {arm}", f"{us['median']:.4g}", band, *rates, f"{info['first_call_s']:.2f}", ratios)
        )
        if info["settings"]:
            terminalreporter.line("      " + ", ".join(f"{name}={value}" for name, value in info["settings"].items()))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
