"""`fastddpm tune`: find the fastest kernels for a model's shapes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.cli.model import MODEL_HELP, add_model_options, check_count, open_model
from fastddpm.cli.options import (
    DTYPES,
    METHOD_HELP,
    chosen_device,
    integer,
    make_sampler,
    method_name,
    seconds,
    wide_console,
)
from fastddpm.cli.outputs import check_output

if TYPE_CHECKING:
    import torch
    from fastddpm_kernels.tuned import Choice, Key
    from rich.console import Console

    from fastddpm.interop.pretrained import Pretrained
    from fastddpm.perf.tuning.search import Outcome

BATCHES = {"cuda": (1, 8, 64), "cpu": (1, 4, 16)}
TRAINING_BATCHES = (16,)  # the Trainer's default
BUDGET_S = 300.0
STEPS = 3  # steps that show all shapes of the reverse step; the second step of a multistep method reads more


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "tune",
        help="find the fastest tiles, warps and algorithms for a model's shapes on this device",
        description="Measure, for every shape that a model's ops have at some batch sizes, which block sizes, warps, "
        "stages and algorithms are the fastest here; each is checked against float64 first. Winners are kept as JSON "
        "in the user's cache, where sampling and training find them. Without MODEL it is the bundled model of "
        "handwritten digits.",
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    add("--batch", type=integer(1), nargs="+", metavar="B",
        help="batch sizes as the network sees them, twice the samples with guidance; MODEL stands before them "
             "(default: 1 8 64 on cuda, 1 4 16 on cpu; 16 with --training)")  # fmt: skip
    add("--training", action="store_true",
        help="the shapes of a training step, forward and backward, in place of those of sampling")  # fmt: skip
    add("--method", type=method_name, metavar="NAME", help=f"whose step is tuned: {METHOD_HELP} (default: the model's)")
    add("--guidance-scale", type=float, metavar="W", help="tune for classifier-free guidance")
    add("--dtype", choices=DTYPES,
        help="of the network (default: auto, as for sample; with --training as for train: autocast to bfloat16 where "
             "the GPU has it)")  # fmt: skip
    add("--device", help="cuda, cuda:1, cpu (default: the first of these that this machine has)")
    add("--ops", nargs="+", metavar="OP", help="only these, such as group_norm_silu_ (default: all)")
    add("--budget", type=seconds, metavar="SECONDS", default=BUDGET_S,
        help=f"for the search; shapes that it does not reach keep their choices (default: {BUDGET_S:.0f})",
        )  # fmt: skip
    add("--into-package", action="store_true", help="write tuned/<gpu>.json of the package, to be committed, instead")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--dry-run", action="store_true", help="list the shapes and their choices, and measure nothing")
    add("--show", action="store_true", help="print the tables that exist for the device")
    add("--clear", action="store_true", help="delete the user's table for the device")
    # `make_sampler` reads these settings; this command has no options for them.
    parser.set_defaults(
        steps=None, default_steps=STEPS, timesteps=None, spacing=None, eta=None, thresholding=False, cuda_graph="off",
        backend="auto", weight_dtype=None,
    )  # fmt: skip
    add_model_options(parser)
    parser.set_defaults(run=_tune)


def _tune(options: argparse.Namespace) -> None:
    from fastddpm_kernels import tuned
    from fastddpm_kernels.tuning import tuned_ops

    device, console = chosen_device(options), wide_console()
    if options.show or options.clear:
        for given, name in ((options.model, "MODEL"), (options.batch, "--batch"), (options.ops, "--ops")):
            if given is not None:
                raise ValueError(f"{name} is given, but --{'show' if options.show else 'clear'} is of a whole table")
        return _show(device, console) if options.show else _clear(device)
    unknown = [op for op in options.ops or () if op not in tuned.OPS]
    if unknown:
        raise ValueError(f"--ops has {unknown[0]!r}, must be of {', '.join(tuned.OPS)}")
    if options.into_package and device.type == "cpu":
        raise ValueError("--into-package is given, but a CPU's table holds for one build of the native library alone")
    if options.training and (options.method or options.guidance_scale is not None):
        given = "--method" if options.method else "--guidance-scale"
        raise ValueError(f"{given} is given, but --training tunes no step of a sampler")
    ops = tuned_ops(device)
    if not ops:
        print(f"There is nothing to tune on {device}: {_why_nothing(device)}")
        return
    ops = tuple(op for op in ops if op in (options.ops or ops))
    if not ops:
        raise ValueError(f"--ops is {' '.join(options.ops)}; on {device} there is {', '.join(tuned_ops(device))}")
    path = tuned.package_path(device) if options.into_package else tuned.user_path(device)
    if not options.dry_run:
        check_output("--into-package" if options.into_package else "the table", path)
    keys = _keys(options, device, ops)
    if not keys:
        print("There is nothing to tune: the model runs none of the ops that have choices here.")
    elif options.dry_run:
        _list(keys, device, console)
    else:
        _search(keys, device, options.budget, path, console)


def _why_nothing(device: torch.device) -> str:
    from fastddpm_kernels.backend import why_not

    backend = "native" if device.type == "cpu" else "triton"
    return f"the {backend} backend cannot run, {why_not(backend, device.type)}"


def _keys(options: argparse.Namespace, device: torch.device, ops: tuple[str, ...]) -> dict[Key, int]:
    """Return the shapes of the model at all batch sizes, for sampling or training, and the number of calls of each."""
    from fastddpm.perf.tuning.shapes import sampler_keys

    model = open_model(options, latents=True)
    check_count(model, max(options.batch or [1]), "--batch")
    if options.training:
        return _training_keys(options, model, device, ops)
    options.device = str(device)
    sampler = make_sampler(options, model)
    precision = "tf32" if options.dtype == "tf32" else str(sampler.dtype).removeprefix("torch.")
    keys: dict[Key, int] = {}
    for batch in options.batch or BATCHES[device.type]:
        keys |= sampler_keys(sampler, batch, ops, precision)
    return keys


def _training_keys(
    options: argparse.Namespace, model: Pretrained, device: torch.device, ops: tuple[str, ...]
) -> dict[Key, int]:
    """Return the shapes of a training step of the model, and the number of calls of each."""
    import torch

    from fastddpm.networks.frozen import blueprint_of
    from fastddpm.networks.network import Network
    from fastddpm.perf.tuning.shapes import training_keys
    from fastddpm.training.objective import GaussianDiffusion

    learned = "learned" in model.settings.get("variance_type", "")
    diffusion = GaussianDiffusion(
        model.unet, model.schedule, prediction_type=model.settings.get("prediction_type", "epsilon"),
        variance_type="learned_range" if learned else "fixed_small", loss="hybrid" if learned else "mse",
    )  # fmt: skip
    wanted = options.dtype or "auto"
    if wanted == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        wanted = "bfloat16" if fast else "float32"
    dtype = torch.float32 if wanted == "tf32" else getattr(torch, wanted)
    shape = Network(model.unet).sample_shape(learned)
    kind = blueprint_of(model.unet)
    keys: dict[Key, int] = {}
    for batch in options.batch or TRAINING_BATCHES:
        labels = None if kind is None else kind(model.unet).some_labels(batch, device)
        keys |= training_keys(diffusion, (batch, *shape), labels, device, ops, dtype)
    return keys


def _search(keys: dict[Key, int], device: torch.device, budget: float, path: Path, console: Console) -> None:
    from fastddpm.common.progress import progress_bar
    from fastddpm.perf.tuning.search import summary, tune
    from fastddpm.perf.tuning.store import save

    with progress_bar(len(keys), "tune") as bar:
        outcomes = tune(keys, device, budget, done=lambda outcome: bar())
    saved = save(outcomes, device, path)  # before printing, because printing may fail
    _print(outcomes, console)
    print(summary(outcomes))
    if saved:
        print(f"wrote {path}")


def _print(outcomes: list[Outcome], console: Console) -> None:
    from rich.table import Table

    table = Table("shape", "calls", "heuristic us", "tuned us", "gain", "choice", title="Tuning", title_justify="left")
    for outcome in outcomes:
        own, choice, gain, best = "", outcome.status, "", ""
        if outcome.done:
            own, choice = f"{outcome.heuristic_us:.1f}", "the heuristics'"
        if outcome.winner is not None:
            best, choice = f"{outcome.winner_us:.1f}", _words(outcome.winner)
            gain = f"{outcome.heuristic_us / outcome.winner_us:.2f}x"
        table.add_row(outcome.title, str(outcome.calls), own, best, gain, choice)
    console.print(table)
    refused = sum(len(outcome.refused) for outcome in outcomes)
    timed = sum(outcome.tried for outcome in outcomes)
    console.print(f"{timed} choices timed, {refused} refused: they spill, do not run here or give wrong results")


def _list(keys: dict[Key, int], device: torch.device, console: Console) -> None:
    from fastddpm_kernels.tuning import make_task
    from rich.table import Table

    table = Table("shape", "calls", "choices", "the heuristics'", title="Shapes", title_justify="left")
    for key, calls in keys.items():
        task = make_task(key, device)
        candidates = task.candidates()
        table.add_row(task.title(), str(calls), str(len(candidates)), _words(candidates[0]))
    console.print(table)


def _words(choice: Choice) -> str:
    return " ".join(f"{name}={value}" for name, value in choice.items())


def _show(device: torch.device, console: Console) -> None:
    from fastddpm_kernels import tuned
    from rich.table import Table

    found = tuned.tables(device)
    none = f"There is no tuned table for {tuned.device_name(device)}; heuristics choose."
    for line in tuned.describe(device) or [none]:
        print(line)
    for each in found:
        table = Table("op", "dtype", "shape", "choice", "us", "heuristic us")
        for key, record in each.records.items():
            shape = " ".join(f"{name}={value}" for name, value in key.named().items())
            choice = "the heuristics'" if record["choice"] is None else _words(record["choice"])
            times = (str(record.get(name, "")) for name in ("tuned_us", "heuristic_us"))
            table.add_row(key.op, str(key.dtype).removeprefix("torch."), shape, choice, *times)
        console.print(table)


def _clear(device: torch.device) -> None:
    from fastddpm_kernels import tuned

    path = tuned.user_path(device)
    if not path.is_file():
        print(f"There is no {path}")
        return
    path.unlink()
    tuned.forget()
    print(f"deleted {path}")
