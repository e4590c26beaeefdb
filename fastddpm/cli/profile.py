"""`fastddpm profile`: measure a machine and a model on it."""

from __future__ import annotations

import argparse
import itertools
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.cli.model import MODEL_HELP, add_model_options, check_count, open_model
from fastddpm.cli.options import (
    BACKENDS,
    DEVICE_HELP,
    DTYPES,
    GRAPHS,
    METHOD_HELP,
    chosen_device,
    integer,
    labels_in_turn,
    make_sampler,
    method_name,
    seconds,
    wide_console,
)
from fastddpm.cli.outputs import check_output

if TYPE_CHECKING:
    from fastddpm.sampling.sampler import Sampler

# For each kind of device: batch sizes, and those of --quick.
BATCHES = {"cuda": ((1, 8, 64, 256), (1, 64)), "mps": ((1, 8, 32), (1, 8)), "cpu": ((1, 4, 16), (1, 8))}
GPUS = ("4090", "a100", "h100", "h200")  # of which a time can be predicted
BUDGET_S, QUICK_S = 240.0, 35.0


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "profile",
        help="measure this machine and a model on it, and what keeps it from the machine's limits",
        description="Measure this machine's ceilings (matrix products, copies, launches), then a model's layers and "
        "kernels against them: images/s, ms/step, the share of what is possible, and what costs most. Without MODEL "
        "it is the bundled model of handwritten digits. With --compare, hold it against an earlier profile.",
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    add("--batch", type=integer(1), nargs="+", metavar="B",
        help="batch sizes; MODEL stands before them (default: by device, such as 1 4 16)")  # fmt: skip
    add("--quick", action="store_true", help="fewer batch sizes and rounds; less than a minute")
    add("--budget", type=seconds, metavar="SECONDS",
        help=f"in all; what does not fit is recorded as not run (default: {BUDGET_S:.0f}, quick {QUICK_S:.0f})",
        )  # fmt: skip
    add = parser.add_argument_group("sampler").add_argument
    add("--steps", type=integer(1), metavar="S", help="of an image (default: all trained ones)")
    add("--method", type=method_name, metavar="NAME", help=f"{METHOD_HELP} (default: the model's)")
    add("--dtype", choices=DTYPES, help="of the network (default: auto, as for sample)")
    add("--device", help=DEVICE_HELP)
    add("--backend", choices=BACKENDS, default="auto", help="as for sample (default: auto)")
    add("--cuda-graph", choices=GRAPHS, default="auto", help="as for sample (default: auto)")
    # `make_sampler` reads these settings; this command has no options for them.
    parser.set_defaults(
        default_steps=None, timesteps=None, spacing=None, eta=None, guidance_scale=None, thresholding=False,
        weight_dtype=None,
    )  # fmt: skip
    add_model_options(parser)
    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="PATH.json",
        help="all figures (default: profile-DEVICE.json, with a number where that file exists)")  # fmt: skip
    add("--plot", type=Path, metavar="PATH", help="draw roofline and throughput as .png or .svg")
    add("--trace", type=Path, metavar="PATH.json",
        help="a Chrome trace of the largest batch size, for ui.perfetto.dev")  # fmt: skip
    add("--compare", type=Path, nargs="+", metavar="OLD.json",
        help="also hold it against an earlier profile, as a Markdown table with ratios and their noise; with a second "
             "file, hold that one against the first and measure nothing")  # fmt: skip
    add("--predict", choices=GPUS, metavar="GPU",
        help=f"measure nothing; predict a step in fp16 on {', '.join(GPUS)} from counts, at --batch (default: 1 256), "
             "beside the profile that --compare names")  # fmt: skip
    parser.set_defaults(run=_profile)


def _predict(options: argparse.Namespace, earlier: dict[str, Any] | None) -> None:
    from fastddpm.cli.profile_predict import prediction, show
    from fastddpm.common.files import write_json
    from fastddpm.networks.frozen import blueprint_of

    model = open_model(options, latents=True)
    if blueprint_of(model.unet) is None:
        raise ValueError(f"--predict needs a U-Net that can be frozen, and {type(model.unet).__name__} cannot")
    content = prediction(model, options.predict, sorted(set(options.batch or [1, 256])))
    if options.json is not None:
        write_json(options.json, content)
    show(content, wide_console(), earlier)


def _profile(options: argparse.Namespace) -> None:
    from fastddpm.cli.profile_report import show
    from fastddpm.common.files import read_json, write_json
    from fastddpm.perf.profiling import compare, plots
    from fastddpm.perf.profiling.model import SCHEMA

    if options.compare is not None and len(options.compare) > 2:
        raise ValueError(f"--compare has {len(options.compare)} files, must have one or two")
    earlier = [read_json(path) for path in options.compare or []]
    for path, content in zip(options.compare or [], earlier, strict=True):
        _readable(path, content)
    if len(earlier) == 2:
        _check_nothing_to_measure(options)
        print(compare.markdown(earlier[0], earlier[1], (options.compare[0].stem, options.compare[1].stem)))
        return
    if earlier and earlier[0]["schema"] != SCHEMA:
        raise ValueError(f"--compare is {options.compare[0]}, which `fastddpm profile` did not write")
    _check_outputs(options)
    if options.predict is not None:
        return _predict(options, earlier[0] if earlier else None)
    content = _measure(options)
    path = options.json or _free_name(f"profile-{content['device']['slug']}")
    write_json(path, content)  # before printing, because printing may fail
    show(content, wide_console())
    print(f"wrote {path}")
    if options.plot is not None:
        plots.save_profile(options.plot, content)
        print(f"wrote {options.plot}")
    measured = [record for record in content["batches"] if record["status"] == "ok"]
    if options.trace is not None and measured and "error" not in measured[-1]["kernels"]:
        print(f"wrote {options.trace}")
    if earlier:
        print("\n" + compare.markdown(earlier[0], content, (options.compare[0].stem, "now")))


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    from fastddpm.common.progress import progress_bar
    from fastddpm.common.version import __version__
    from fastddpm.perf.profiling.model import Plan, profile

    model = open_model(options, latents=True)
    check_count(model, max(options.batch or [1]), "--batch")
    options.device = str(chosen_device(options))
    first = make_sampler(options, model)
    if options.dtype != "tf32":  # choose once, because "auto" tries the network
        options.dtype = str(first.dtype).removeprefix("torch.")

    def make(graph: str | bool | None) -> Sampler:
        return make_sampler(options, model, **({} if graph is None else {"cuda_graph": graph}))

    batches = options.batch or BATCHES.get(first.device.type, BATCHES["cpu"])[bool(options.quick)]
    plan = Plan(
        make=make,
        shape=first.network.sample_shape(first.settings.learned_variance),
        precision=options.dtype,
        batches=sorted(set(batches)),
        labels=partial(labels_in_turn, model),
        seconds=options.budget or (QUICK_S if options.quick else BUDGET_S),
        quick=options.quick,
        trace=options.trace,
    )
    with progress_bar(plan.measurements(), "profile") as bar:
        plan.done = bar
        content = profile(plan)
    written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    about = {"model": str(options.model or "bundled digits"), "fastddpm": __version__, "written": written}
    return {**content, **about}


def _free_name(stem: str) -> Path:
    """Return a file name that does not exist yet, to keep earlier profiles."""
    names = (Path(f"{stem}{f'-{count}' if count > 1 else ''}.json") for count in itertools.count(1))
    return next(path for path in names if not path.exists())


def _check_outputs(options: argparse.Namespace) -> None:
    from fastddpm.perf.profiling.plots import check_plot

    for option, path in (("--json", options.json), ("--trace", options.trace)):
        if path is not None:
            check_output(option, path, ".json")
    if options.trace is not None and options.json is not None and options.trace.resolve() == options.json.resolve():
        raise ValueError(f"--trace is {options.trace}, as is --json; they must be different files")
    if options.plot is not None:
        check_plot(options.plot, "--plot")
        check_output("--plot", options.plot)


def _check_nothing_to_measure(options: argparse.Namespace) -> None:
    names = ("batch", "budget", "steps", "method", "dtype", "device", "json", "plot", "trace")
    given = [f"--{name}" for name in names if getattr(options, name) is not None]
    given += ["--quick"] * options.quick + ["MODEL"] * (options.model is not None)
    if given:
        raise ValueError(f"{given[0]} is given, but --compare names two files, which are compared without measuring")


def _readable(path: Path, content: dict[str, Any]) -> None:
    from fastddpm.perf.profiling.compare import figures

    try:
        figures(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--compare is {path}, which is not a whole profile: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"--compare is {path}, which is no profile: {error}") from None
