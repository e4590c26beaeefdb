"""Run diffusers' own tests, from a checkout, against accelerated objects, and count what passes.

    python tests/peers/diffusers_suite.py PATH --output benchmarks/results/diffusers_suite.json

The tests are not edited. They run twice, with the checkout's own diffusers: as they are, and with this file as a plugin
of pytest. The plugin accelerates three kinds of objects as the tests make them:

    pipelines     `accelerate(pipeline, inplace=True)` changes each that the library can accelerate
    U-Nets        `UNet2DModel.forward` computes with fastddpm's U-Net of the same parameters, frozen where no gradients
                  are recorded
    schedulers    `step` returns what the row of the coefficient table gives, for the schedulers that `accelerate`
                  recognises. The original's step runs beside it, gives the noise, and must agree

A test counts as "uses" if it called at least one of them. Tests that load models from the hub fail both times without
a network.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
REPORT, ACCELERATE = "FASTDDPM_SUITE_REPORT", "FASTDDPM_SUITE_ACCELERATE"
_PIPELINES = ("ddpm", "ddim", "pndm", "latent_diffusion", "consistency_models")
_SCHEDULERS = (
    *("ddpm", "ddim", "ddim_inverse", "dpm_multi", "dpm_single", "deis", "unipc", "pndm", "lcm", "euler"),
    *("euler_ancestral", "heun", "kdpm2_discrete", "kdpm2_ancestral", "lms", "edm_euler"),
)
FILES = (
    *(f"tests/pipelines/{name}" for name in _PIPELINES),
    *("tests/pipelines/test_pipelines.py", "tests/others/test_training.py"),
    "tests/models/unets/test_models_unet_2d.py",
    *(f"tests/schedulers/test_scheduler_{name}.py" for name in _SCHEDULERS),
)
# Two ways to compute one step in float32, relative to the largest of the values that enter it.
CLOSE = 1e-4
# Methods whose rows solve for an earlier state: they hold only for the state that the row before gave.
_BACKWARD = ("heun", "dpm2", "dpm2_a", "unipc", "plms", "dpmsolver_singlestep", "dpmsolver++_singlestep")
# diffusers goes on there with the order of the step that it begins at, and fewer predictions; a table begins anew.
_RESTARTS = ("lms", "dpmsolver_singlestep", "dpmsolver++_singlestep")
LEARNED = ("learned", "learned_range")
USED: collections.Counter[str] = collections.Counter()
AS_IT_IS: collections.Counter[str] = collections.Counter()
_inside = False


@contextmanager
def originals() -> Iterator[None]:
    """Leave diffusers' methods as they are inside, where fastddpm compares itself with them."""
    global _inside
    before, _inside = _inside, True
    try:
        yield
    finally:
        _inside = before


def accelerate_pipelines() -> None:
    """Accelerate every pipeline once it is made."""
    from fastddpm.interop import accelerate, diffusers

    def counting(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def counted(*arguments: Any, **named: Any) -> Any:
            USED[name] += 1
            return method(*arguments, **named)

        return counted

    def made(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def accelerated(self: Any, *arguments: Any, **named: Any) -> None:
            init(self, *arguments, **named)
            if self.unet is None or self.scheduler is None:
                return
            try:
                accelerate(self, inplace=True, noise="torch")
            except (ValueError, TypeError) as error:
                AS_IT_IS[f"pipeline: {error}"] += 1

        return accelerated

    for cls in diffusers._CLASSES:
        cls.base.__init__ = made(cls.base.__init__)
    diffusers._Accelerated._denoise = counting(diffusers._Accelerated._denoise, "pipeline")
    for name in ("their_loop", "scaled_loop"):
        loop = counting(getattr(diffusers.Plan, name), "pipeline in its own loop")
        setattr(diffusers.Plan, name, loop)


def accelerate_unets() -> None:
    """Let `UNet2DModel.forward` compute with fastddpm's U-Net."""
    from diffusers import UNet2DModel
    from diffusers.models.unets.unet_2d import UNet2DOutput

    from fastddpm.interop.diffusers import engine as room
    from fastddpm.interop.diffusers.unet import AsUNet2D, managed

    theirs = UNet2DModel.forward
    engines: weakref.WeakKeyDictionary[Any, room.Engine] = weakref.WeakKeyDictionary()

    def compared(*arguments: Any) -> None:
        with originals():
            check_same(*arguments)

    check_same = room.check_same
    room.check_same = compared

    @functools.wraps(theirs)
    def forward(
        self: Any, sample: Tensor, timestep: Any, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        if _inside:
            return theirs(self, sample, timestep, class_labels, return_dict)
        reason = managed(self) or ("dropout" if self.training and self.config.dropout else None)
        if reason is None:
            model, why = engines.setdefault(self, room.Engine(room.Options()))._find_unet(self)
            reason = why or None
        if reason is not None:
            AS_IT_IS[f"U-Net: {reason}"] += 1
            return theirs(self, sample, timestep, class_labels, return_dict)
        if not torch.is_grad_enabled() and (out := frozen(model, sample, timestep, class_labels)) is not None:
            USED["U-Net, frozen"] += 1
            return UNet2DOutput(sample=out) if return_dict else (out,)
        USED["U-Net"] += 1
        getattr(model, f"{'en' if self.is_gradient_checkpointing else 'dis'}able_gradient_checkpointing")()
        return AsUNet2D(model, self)(sample, timestep, class_labels, return_dict)

    UNet2DModel.forward = forward


def frozen(model: Any, sample: Tensor, timestep: Any, labels: Tensor | None) -> Tensor | None:
    """Return what the U-Net gives when it is prepared for sampling; None if the samples have different timesteps."""
    from fastddpm.networks.frozen import FrozenUNet, why_not

    timesteps = torch.as_tensor(timestep).reshape(-1)
    if len(timesteps.unique()) > 1 or why_not(model) is not None or sample.dtype != model.dtype:
        return None
    if not isinstance(timestep, Tensor):
        timesteps = timesteps.long()
    with torch.inference_mode(False):
        network = FrozenUNet(model)
        inputs = network.new_input(sample.shape)
        inputs.copy_(sample)
        program = network.bind(inputs, timesteps[:1].to(sample.device), labels)
        return program(torch.zeros(1, dtype=torch.int64, device=sample.device)).clone()


class Walk:
    """The rows of a scheduler's table, run one by one through a loop of fastddpm's.

    Args:
        scheduler: with its timesteps set.
        options: of the call of `step`.
        like: the sample.
        first: the row to begin with.

    Raises:
        ValueError: the scheduler or what it is set to is not supported.
    """

    def __init__(self, scheduler: Any, options: dict[str, Any], like: Tensor, first: int) -> None:
        from fastddpm.interop.diffusers.scheduler import recognise
        from fastddpm.sampling.batch import make_batch
        from fastddpm.sampling.loop import Loop, buffer_shapes
        from fastddpm.sampling.sampler import Sampler

        if options.get("s_churn") or getattr(scheduler, "ets", None):
            raise ValueError("churn, or predictions that the test has put there")
        self.recognised = recognise(scheduler)
        self.eta = options.get("eta") or 0.0
        clipped = bool(options.get("use_clipped_model_output"))
        self.table = table = self.recognised.table(scheduler, eta=self.eta, use_clipped_model_output=clipped)
        if first and (first not in (table.begins or range(len(table))) or self.recognised.method in _RESTARTS):
            raise ValueError("the test begins at a later timestep, where the library's own restart has another order")
        self._out = like
        sampler = Sampler(
            lambda x, t: self._out, table, device="cpu", backend="eager", cuda_graph=False, **self.recognised.of_sampler
        )
        shape = tuple(like.shape)
        batch = make_batch(sampler.network, sampler.settings, shape)
        shapes = buffer_shapes(table, shape, batch, sampler.settings, sampler.network, noise=True)
        self._loop = Loop(sampler.network, shapes, sampler.settings)
        self._loop.load(table, like, batch, first)
        self.index, self.made = first, None

    def scale(self, scheduler: Any) -> float:
        """Return the factor from the scheduler's sample to what the network reads of it, before the present row."""
        if not self.recognised.scales:
            return 1.0
        if self.index == 0:
            return self.recognised.initial_scale(scheduler)
        return float(self.table.levels[self.index - 1, 0]) / scheduler.config.get("sigma_data", 1.0)

    def fits(self, sample: Tensor) -> bool:
        """Return whether a row may start from this sample."""
        own = self.made is None or torch.equal(sample, self.made)
        return self.index < len(self.table) and (own or self.recognised.method not in _BACKWARD)

    @torch.no_grad()
    def step(self, scheduler: Any, out: Tensor, sample: Tensor, noise: Tensor | None) -> Tensor:
        """Return the sample after the present row, and go on to the next."""
        self._out = out
        loop = self._loop
        loop.x.copy_(sample * self.scale(scheduler))
        loop.buffers["noise"].copy_(torch.zeros_like(sample) if noise is None else noise)
        loop.body(loop.bodies[self.index])
        self.index += 1
        last = self.index == len(self.table)
        self.made = loop.x.clone() if last else loop.x / self.scale(scheduler)
        return self.made


def accelerate_schedulers() -> None:
    """Let `step` of every scheduler that is recognised return what its row of the coefficient table gives."""
    import diffusers

    from fastddpm.interop.diffusers import scheduler as room

    walks: weakref.WeakKeyDictionary[Any, Walk | None] = weakref.WeakKeyDictionary()

    def compared(*arguments: Any) -> None:
        with originals():
            check_same(*arguments)

    check_same = room._check_same
    room._check_same = compared

    def set_timesteps(theirs: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(theirs)
        def anew(self: Any, *arguments: Any, **named: Any) -> None:
            walks.pop(self, None)
            theirs(self, *arguments, **named)

        return anew

    def walk_of(scheduler: Any, options: dict[str, Any]) -> Walk | None:
        """Return the walk whose present row is at this timestep, or None if the original has to do."""
        sample, timestep = options["sample"], options["timestep"]
        if scheduler not in walks:
            at = (scheduler.timesteps == timestep).nonzero().flatten().tolist()
            walks[scheduler] = None
            try:
                if not at or sample.dtype != torch.float32:
                    raise ValueError("the timestep is not among those that were set, or half precision")
                if scheduler.config.get("variance_type") in LEARNED and options["model_output"].shape == sample.shape:
                    raise ValueError("its prediction has no learned variance")
                with originals():
                    walks[scheduler] = Walk(scheduler, options, sample, at[0])
            except ValueError as error:
                AS_IT_IS[f"scheduler: {error}"] += 1
        walk = walks[scheduler]
        if walk is not None and not (
            walk.fits(sample)
            and float(scheduler.timesteps[walk.index]) == float(timestep)
            and (options.get("eta") or 0.0) == walk.eta
        ):
            AS_IT_IS["scheduler: the test goes on from another sample or timestep"] += 1
            walk = walks[scheduler] = None
        return walk

    def step(theirs: Callable[..., Any], module: Any) -> Callable[..., Any]:
        signature = inspect.signature(theirs)

        @functools.wraps(theirs)
        def by_row(self: Any, *arguments: Any, **named: Any) -> Any:
            if _inside:
                return theirs(self, *arguments, **named)
            bound = signature.bind(self, *arguments, **named)
            bound.apply_defaults()
            options, draws = bound.arguments, []
            before = options["sample"].clone()
            walk = walk_of(self, options)
            if walk is None:
                return theirs(self, *arguments, **named)
            row = walk.index

            def recorded(*of: Any, **others: Any) -> Tensor:
                draws.append(randn(*of, **others))
                return draws[-1]

            randn = getattr(module, "randn_tensor", None)
            with mock.patch.object(module, "randn_tensor", recorded) if randn else originals():
                result = theirs(self, *arguments, **named)
            noise = draws[-1] if draws else options.get("variance_noise")
            ours = walk.step(self, options["model_output"], before, noise)
            expected = result[0] if isinstance(result, tuple) else result.prev_sample
            check(f"{type(self).__name__}, row {row} of {len(walk.table)}", expected, ours, before)
            USED["scheduler"] += 1
            if isinstance(result, tuple):
                return (ours, *result[1:])
            result.prev_sample = ours
            return result

        return by_row

    for name in room.SCHEDULERS:
        cls = getattr(diffusers, name)
        cls.set_timesteps = set_timesteps(cls.set_timesteps)
        cls.step = step(cls.step, importlib.import_module(cls.__module__))


def check(what: str, expected: Tensor, ours: Tensor, sample: Tensor) -> None:
    """Raise AssertionError if a row gives something else than the original's step."""
    if not torch.equal(expected.isnan(), ours.isnan()):
        raise AssertionError(f"{what}: NaN where the original has none, or the reverse")
    apart = float((expected - ours).nan_to_num().abs().max())
    size = max(1.0, float(expected.nan_to_num().abs().max()), float(sample.nan_to_num().abs().max()))
    if apart > CLOSE * size:
        raise AssertionError(f"{what}: apart by {apart:.2e}, of at most {CLOSE * size:.1e}")


class Recorder:
    """The outcome of every test, and the accelerated objects that it used."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, str] = {}
        self._used: dict[str, int] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        """Count anew for every test."""
        USED.clear()
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome, of a failed setup too."""
        if report.when == "call" or report.outcome != "passed":
            found = self.tests.setdefault(report.nodeid, {"outcome": report.outcome, "used": {}, "why": ""})
            if report.failed:
                message = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr))
                found["outcome"], found["why"] = "failed", message.strip().partition("\n")[0][:200]
            found["used"] = dict(+USED)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note the files that cannot be imported."""
        if report.failed:
            self.errors[report.nodeid] = str(report.longrepr).strip().splitlines()[-1][:200]

    def pytest_sessionfinish(self) -> None:
        """Write the report for the process that counts."""
        Path(os.environ[REPORT]).write_text(
            json.dumps({"tests": self.tests, "errors": self.errors, "as it is": dict(AS_IT_IS.most_common())})
        )


def pytest_configure(config: pytest.Config) -> None:
    """Accelerate, if this process is to, before a test is imported."""
    config.pluginmanager.register(Recorder())
    if os.environ.get(ACCELERATE):
        accelerate_pipelines()
        accelerate_unets()
        accelerate_schedulers()


def outcomes(checkout: Path, files: list[str], *, accelerated: bool) -> dict[str, Any]:
    """Run the tests in a process of their own and return the report of `Recorder`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        paths = [Path(__file__).parent, ROOT, ROOT / "kernels", checkout / "src", os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path)),
            "HF_HUB_OFFLINE": "1",
            "DIFFUSERS_TEST_DEVICE": "cpu",
            REPORT: str(report),
            ACCELERATE: "1" if accelerated else "",
        }
        command = [
            *(sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "diffusers_suite", "-p", "no:cacheprovider"),
            *(
                "-W",
                "ignore",
                "-n",
                "0",
                "--continue-on-collection-errors",
                f"--rootdir={checkout}",
                "-c",
                os.devnull,
                *files,
            ),
        ]
        print(f"{'accelerated' if accelerated else 'as they are'}:", flush=True)
        subprocess.run(command, cwd=checkout, env=environment, check=False)
        if not report.exists():
            raise SystemExit(f"PATH is {checkout}: pytest wrote no report")
        return json.loads(report.read_text(encoding="utf-8"))


def summary(plain: dict[str, Any], fast: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of both runs, by file and in all, and the tests whose outcomes differ."""
    of = {"as they are": plain["tests"], "accelerated": fast["tests"]}
    files: dict[str, dict[str, Any]] = {}
    for run, tests in of.items():
        for name, test in tests.items():
            counts = files.setdefault(name.partition("::")[0], {}).setdefault(run, collections.Counter())
            counts[test["outcome"]] += 1
            counts["uses"] += bool(test["used"]) and test["outcome"] == "passed"
    totals = {
        run: {name: sum(each.get(run, {}).get(name, 0) for each in files.values()) for name in _COUNTS} for run in of
    }
    del totals["as they are"]["uses"]
    passed = {run: {name for name, test in tests.items() if test["outcome"] == "passed"} for run, tests in of.items()}
    used: collections.Counter[str] = collections.Counter()
    for test in fast["tests"].values():
        used.update(test["used"])
    both = [test["why"] for name, test in plain["tests"].items() if test["outcome"] == "failed"]
    return {
        "totals": totals,
        "passes only as it is": {
            name: of["accelerated"].get(name, {"why": "not run"})["why"]
            for name in sorted(passed["as they are"] - passed["accelerated"])
        },
        "passes only accelerated": sorted(passed["accelerated"] - passed["as they are"]),
        "calls": dict(sorted(used.items())),
        "files": {
            name: {
                "passed as they are": runs.get("as they are", {}).get("passed", 0),
                "passed accelerated": runs.get("accelerated", {}).get("passed", 0),
                "of which use accelerated objects": runs.get("accelerated", {}).get("uses", 0),
            }
            for name, runs in sorted(files.items())
        },
        "cannot be imported": plain["errors"],
        "why the original fails": dict(collections.Counter(both).most_common()),
        "called as it is": fast["as it is"],
    }


_COUNTS = ("passed", "failed", "skipped", "uses")


def main() -> int:
    """Run the tests twice and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, metavar="PATH", help="a checkout of diffusers")
    parser.add_argument("files", nargs="*", help="test files in it; the default is those of supported objects")
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    if not (checkout / "src" / "diffusers").is_dir() or not (checkout / "tests").is_dir():
        parser.error(f"PATH is {options.checkout}, must be a checkout of diffusers, with src/diffusers and tests")
    files = options.files or [name for name in FILES if (checkout / name).exists()]
    if missing := [name for name in files if not (checkout / name.partition("::")[0]).exists()]:
        parser.error(f"{missing[0]} is not in {options.checkout}")
    result = summary(*(outcomes(checkout, files, accelerated=fast) for fast in (False, True)))
    init = (checkout / "src" / "diffusers" / "__init__.py").read_text(encoding="utf-8")
    version = next(line.partition('"')[2].rstrip('"') for line in init.splitlines() if line.startswith("__version__"))
    result = {"versions": {"torch": torch.__version__, "diffusers": version}, **result}
    print(json.dumps({name: result[name] for name in ("totals", "passes only as it is", "calls")}, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(bool(result["passes only as it is"]))


if __name__ == "__main__":
    sys.exit(main())
