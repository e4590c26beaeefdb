"""Run diffusers' own tests of text-to-image pipelines, from a checkout, against accelerated objects, and count them.

    python tests/peers/text_to_image_suite.py PATH [FILE ...] --output benchmarks/results/text_to_image_suite.json

The tests are not edited. They run twice, with the diffusers that is installed: as they are, and with this file as a
plugin of pytest, which accelerates every pipeline once it is made, in place. Tokenizers come from a cache of the hub
that `local_hub` makes, so tests with stored pixels fail both times. A test that fails only when accelerated is named.
Counts are kept by file: those of other files stay in the output.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import local_hub
import pytest

ROOT = Path(__file__).parents[2]
REPORT, ACCELERATE = "FASTDDPM_SUITE_REPORT", "FASTDDPM_SUITE_ACCELERATE"
FILES = (
    *(f"tests/pipelines/stable_diffusion/test_stable_diffusion{name}.py" for name in ("", "_img2img", "_inpaint")),
    "tests/pipelines/stable_diffusion_2/test_stable_diffusion_upscale.py",
    *(
        f"tests/pipelines/stable_diffusion_xl/test_stable_diffusion_xl{name}.py"
        for name in ("", "_img2img", "_inpaint")
    ),
    *("tests/pipelines/controlnet/test_controlnet.py", "tests/pipelines/controlnet/test_controlnet_sdxl.py"),
    *("tests/pipelines/latent_diffusion/test_latent_diffusion.py", "tests/pipelines/unclip/test_unclip.py"),
    "tests/pipelines/stable_unclip/test_stable_unclip.py",
    *(f"tests/pipelines/deepfloyd_if/test_if{name}.py" for name in ("", "_img2img", "_superresolution")),
)
if os.environ.get(REPORT):
    from diffusers import DiffusionPipeline as _Installed  # noqa: F401  before the checkout's conftest finds its own

COUNTS: collections.Counter[str] = collections.Counter()
OUTCOMES: dict[str, str] = {}


def pytest_collection_finish() -> None:
    """Accelerate every pipeline once it is made. All classes are imported by now."""
    if not os.environ.get(ACCELERATE):
        return
    from diffusers import DiffusionPipeline

    from fastddpm.interop import conditional
    from fastddpm.interop.conditional import forward, loop

    def made(kind: type, init: Any) -> Any:
        @functools.wraps(init)
        def accelerated(self: Any, *arguments: Any, **named: Any) -> None:
            init(self, *arguments, **named)
            if type(self) is kind and conditional.takes(self):
                conditional.accelerate(self, inplace=True)
                COUNTS["pipelines"] += 1

        return accelerated

    def counting(owner: Any, name: str, key: str) -> None:
        method = getattr(owner, name)

        @functools.wraps(method)
        def counted(*arguments: Any, **named: Any) -> Any:
            COUNTS[key] += 1
            return method(*arguments, **named)

        setattr(owner, name, counted)

    counting(forward.Forward, "compute", "evaluations by the prepared U-Net")
    counting(forward.Forward, "general", "evaluations by diffusers")
    counting(loop.Loop, "_run", "loops")
    kinds = [DiffusionPipeline]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if "__init__" in vars(kind):
            kind.__init__ = made(kind, kind.__init__)  # type: ignore[method-assign, misc]


def pytest_runtest_logreport(report: Any) -> None:
    """Note the outcome of a test."""
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        OUTCOMES[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    """Write what was counted."""
    if path := os.environ.get(REPORT):
        Path(path).write_text(json.dumps({"outcomes": OUTCOMES, "counts": COUNTS}))


def run(checkout: Path, file: str, accelerate: bool, timeout: float) -> dict[str, Any]:
    """Return the outcomes of a file's tests by name, and what was counted."""
    with tempfile.TemporaryDirectory() as folder:
        local_hub.make(Path(folder) / "hub")
        report = Path(folder) / "report.json"
        path = [str(Path(__file__).parent), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        own = {REPORT: str(report), ACCELERATE: "1" if accelerate else "", "PYTHONPATH": os.pathsep.join(path)}
        words = ["-q", "-p", "text_to_image_suite", "-p", "no:cacheprovider", "--tb=line", file]
        subprocess.run(
            [sys.executable, "-m", "pytest", *words], cwd=checkout, timeout=timeout, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(Path(folder) / "hub"), **own},
        )  # fmt: skip
        found: dict[str, Any] = json.loads(report.read_text())
        return found


def main() -> int:
    """Run the tests both ways, and return how many fail only when accelerated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, metavar="PATH", help="a checkout of diffusers")
    parser.add_argument("files", nargs="*", help="test files in it; the default is those of supported pipelines")
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds of each of both runs")
    options = parser.parse_args()
    files = options.files or [file for file in FILES if (options.checkout / file).is_file()]
    import diffusers

    content: dict[str, Any] = {"diffusers": diffusers.__version__, "files": {}}
    if options.output and options.output.exists():
        content["files"] = json.loads(options.output.read_text())["files"]
    worse = 0
    for file in files:
        before, after = (run(options.checkout, file, flag, options.timeout) for flag in (False, True))
        only = [name for name, end in after["outcomes"].items() if before["outcomes"].get(name) == "passed" != end]
        worse += len(only)
        content["files"][file] = {
            "as they are": collections.Counter(before["outcomes"].values()),
            "accelerated": collections.Counter(after["outcomes"].values()),
            "counts": after["counts"],
            "fail only when accelerated": sorted(only),
        }
        print(file, json.dumps(content["files"][file], indent=1), flush=True)
        if options.output:
            options.output.write_text(json.dumps(content, indent=1) + "\n")
    return worse


if __name__ == "__main__":
    sys.exit(pytest.ExitCode.TESTS_FAILED if main() else 0)
