"""How every benchmark here measures: correct first, then timed; and plain `pytest` runs each once, untimed."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Timings are wanted only when asked for: `pytest --benchmark-only`. Else a benchmark is a smoke test.
    if config.pluginmanager.hasplugin("benchmark") and not config.getoption("benchmark_only", False):
        config.option.benchmark_disable = True


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def measure(benchmark: Any, device: torch.device) -> Callable[..., Any]:
    """`measure(function, bytes_moved=...)`: times one call, synchronised, after warm-up; returns its result.

    `bytes_moved` counts each input read once and each output written once; the throughput that follows from the
    median goes into `extra_info` as `gb_per_s`, with the device and the versions.
    """

    def run(function: Callable[[], Any], *, bytes_moved: int) -> Any:
        def call() -> Any:
            result = function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return result

        result = benchmark.pedantic(call, warmup_rounds=3, rounds=20, iterations=1)
        name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
        info = {"bytes": bytes_moved, "device": name, "torch": torch.__version__}
        if benchmark.stats is not None:  # None when run once, as a smoke test
            info["gb_per_s"] = bytes_moved / benchmark.stats.stats.median / 1e9
        benchmark.extra_info.update(info)
        return result

    return run
