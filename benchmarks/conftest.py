"""What benchmarks share. `pytest --benchmark-only` times them; plain `pytest` builds, checks and runs each arm once.

A file of benchmarks has `EXAMPLES`, {"small": {name: ...}, "full": {name: ...}}, and tests that take `example`, the
value of one of them, `arm`, and the fixture

    compare(build, ...)              `build(arm)` makes a `measuring.Candidate`, which is checked, then timed

`--bench-size small` is for two cores of a CPU, `full` for one large GPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import get_commit_info

sys.path.insert(0, str(Path(__file__).parent))  # for what the benchmarks share

from measuring import Candidate, Missing, Session, Unavailable, device_seconds

from fastddpm.perf.profiling.timing import synchronize

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
    # The main arms first, compiling last, which takes minutes: whoever runs out of time has all else by then.
    def rank(item: pytest.Item) -> int:
        arm = str(getattr(getattr(item, "callspec", None), "params", {}).get("arm"))
        return 2 if arm == "compiled" else int(arm.startswith("fused "))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    return pytestconfig.stash[SESSION]


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, session: Session) -> Callable[..., None]:
    """`compare(build, seconds=0.5, least=5, most=25)`: check the arm of this test, then time it.

    `build(arm)` makes a `measuring.Candidate`, or raises `Missing` or `Unavailable`, which skips the test and says why.
    `seconds` is about how long it is timed, in `least` to `most` rounds. pytest-benchmark's own figures are of all
    calls; those of a step go into `extra_info`, with rates, settings and the machine.
    """
    parts = dict(request.node.callspec.params)
    arm = str(parts.pop("arm"))
    label = "-".join(part for part in request.node.callspec.id.split("-") if part != arm)
    benchmark.group = f"{request.node.originalname.removeprefix('test_')} {label}".strip()
    about: dict[str, Any] = {"group": benchmark.group, "arm": arm}
    request.node.user_properties.append(("benchmark", about))  # for gpu/outcome_log.py

    def run(build: Callable[[str], Candidate], *, seconds: float = 0.5, least: int = 5, most: int = 25) -> None:
        torch.manual_seed(0)
        begun = time.perf_counter()
        try:
            candidate = build(arm)
        except (Missing, Unavailable) as error:
            pytest.skip(f"{arm}: {error}")
        (candidate.calls[0] if candidate.check is None else candidate.check)()
        if not session.timed:
            benchmark.pedantic(candidate.calls[0])
            return
        once_through = session.ready(candidate)

        def sample() -> None:
            once_through()
            synchronize(candidate.device or session.device)

        sample()
        first = time.perf_counter()
        sample()
        once = time.perf_counter() - first
        rounds = max(least, min(most, round(seconds / max(once, 1e-9))))
        benchmark.pedantic(sample, rounds=rounds)
        samples, clock = list(benchmark.stats.stats.data), "wall"
        if candidate.graph and session.device.type == "cuda":
            samples, clock = device_seconds(once_through), "device"
        info = session.figures(candidate, samples)
        info |= {"clock": clock, "prepare_s": round(first - begun, 3), **session.machine}
        benchmark.extra_info.update(info)
        about.update(info)
        request.config.stash[SHOWN].append((benchmark.group, arm, info))

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not (shown := config.stash[SHOWN]):
        return
    session = config.stash[SESSION]
    terminalreporter.section(f"a step, --bench-size {session.size}, {session.machine['device']}")
    line = "{:<60} {:>10} {:>19} {:>8} {:>9} {:>7}  {}".format
    terminalreporter.line(line("arm", "us, median", "p20 - p80", "GB/s", "TFLOP/s", "% roof", "settings"))
    for group, arm, info in shown:
        us = {name: info["seconds"][name] * 1e6 for name in ("median", "p20", "p80")}
        rates = [f"{info[name]:.3g}" if name in info else "" for name in ("gb_per_s", "tflops", "percent_of_roof")]
        settings = ", ".join(f"{name}={value}" for name, value in info["settings"].items())
        band = f"{us['p20']:.4g} - {us['p80']:.4g}"
        terminalreporter.line(line(f"{group}: {arm}", f"{us['median']:.4g}", band, *rates, settings))
