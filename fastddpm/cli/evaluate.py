"""`fastddpm evaluate`: what a model's samples are worth, one option per question."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastddpm.cli.options import (
    add_sampler_options,
    best_device,
    check_output,
    classes_of,
    device_name,
    integer,
    make_sampler,
)

if TYPE_CHECKING:
    from rich.console import Console

    from fastddpm.evaluation.comparison import PrecisionReport
    from fastddpm.evaluation.frechet import Judge
    from fastddpm.pretrained import Pretrained
    from fastddpm.sampler import Sampler
    from fastddpm.unet import UNet

LOWER = "float16,bfloat16"


def add_commands(commands: Any) -> None:
    """Adds the command to the parser."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure what a model's samples are worth",
        description="Measure what a model's samples are worth: --precision, what lower precision costs. Without "
        "MODEL_DIR it is the bundled model of handwritten digits.",
    )
    evaluate.add_argument("model", nargs="?", metavar="MODEL_DIR", help="a pipeline folder, as diffusers writes it")
    evaluate.add_argument(
        "-n",
        "--num-samples",
        type=integer(2),
        default=64,
        metavar="N",
        help="images to draw, of all classes in equal numbers (default: 64)",
    )
    evaluate.add_argument("--json", type=Path, metavar="PATH.json", help="also write all figures to a file")
    group = evaluate.add_argument_group("what to measure")
    group.add_argument(
        "--precision",
        nargs="?",
        const=LOWER,
        metavar="P,P,...",
        help="compare the network in float16, bfloat16 or (CUDA only) tf32 with float32: its predictions for the same "
        "states, the images for the same noise, and what is left of float16's range; for the bundled model also the "
        f"Frechet distance to real digits (without names: {LOWER})",
    )
    add_sampler_options(evaluate, steps=50, method=None, seed=0)
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from rich.console import Console

    from fastddpm.pretrained import BUNDLED, load_pretrained

    measures: dict[str, Callable[[argparse.Namespace, Pretrained, Console], dict[str, Any]]] = {
        "precision": _precision,
    }
    wanted = [name for name in measures if getattr(options, name) is not None]
    if not wanted:
        raise ValueError(f"nothing to measure is named, must be {' or '.join('--' + name for name in measures)}")
    if options.json is not None:
        if options.json.suffix.lower() != ".json":
            raise ValueError(f"--json is {options.json}, its suffix must be .json")
        check_output("--json", options.json)
    model = load_pretrained(options.model or BUNDLED)
    console = Console(width=None if sys.stdout.isatty() else 140)
    results = {name: measures[name](options, model, console) for name in wanted}
    if options.json is not None:
        import torch

        from fastddpm import __version__
        from fastddpm._files import write_json

        about = {"model": options.model or "bundled digits", "fastddpm": __version__, "torch": torch.__version__}
        write_json(options.json, {**about, **results})
        print(f"wrote {options.json}")


def _precision(options: argparse.Namespace, model: Pretrained, console: Console) -> dict[str, Any]:
    from fastddpm.evaluation.comparison import check_precisions, compare_samplers
    from fastddpm.network import usable_device

    if options.dtype is not None:
        raise ValueError(f"--dtype is {options.dtype}, but --precision compares several; it must be left out")
    options.device = options.device or best_device()
    device = usable_device(options.device)
    precisions = check_precisions([name.strip() for name in options.precision.split(",")], device, "--precision")
    judge, missing = _digit_judge(options)
    classes = classes_of(model.unet.config)

    def make(network: Callable[..., Any], *, dtype: str, cuda_graph: str | bool) -> Sampler:
        of = argparse.Namespace(**{**vars(options), "dtype": dtype})
        return make_sampler(of, replace(model, unet=cast("UNet", network)), cuda_graph=cuda_graph)

    report = compare_samplers(
        model.unet,
        make,
        precisions,
        device=device,
        backend=options.backend,
        num_samples=options.num_samples,
        seed=options.seed,
        class_labels=[classes[i % len(classes)] for i in range(options.num_samples)] if classes else None,
        batch_size=options.batch_size,
        judge=judge,
        progress=True,
    )
    _print_precision(report, console, missing)
    print(f"device {device_name(device)}")
    return {**report.to_dict(), "device_name": device_name(device), "no_distribution_because": missing}


def _digit_judge(options: argparse.Namespace) -> tuple[Judge | None, str | None]:
    """What judges the bundled model, or None and why there is nothing to judge by."""
    from fastddpm.evaluation.frechet import DigitJudge
    from fastddpm.pretrained import BUNDLED

    if options.model is not None and Path(options.model).resolve() != BUNDLED.resolve():
        return None, "only for the bundled model are there real images to compare with"
    try:
        return DigitJudge(), None
    except ModuleNotFoundError as error:
        return None, str(error)


def _print_precision(report: PrecisionReport, console: Console, missing: str | None) -> None:
    from rich.table import Table

    title = f"{report.num_samples} images, {report.steps} steps of {report.method}, against float32"
    table = Table(title=title, title_justify="left")
    columns = ["precision", "prediction error", "image rms", "image max", "pixels differ", "by > 1"]
    judged = ["Frechet to float32", "to real", "recognised"] if report.judge is not None else []
    for column in columns + judged:
        table.add_column(column, justify="left" if column == "precision" else "right")
    for row in report.results:
        if not row.finite:
            table.add_row(row.precision, "not finite", *["-"] * (len(columns + judged) - 2))
            continue
        cells = [
            _number(row.worst_prediction_error, "{:.2e}"),
            _number(row.image_rms, "{:.2e}"),
            _number(row.image_max, "{:.2e}"),
            _number(row.pixels_differ, "{:.2%}"),
            _number(row.pixels_differ_by_more, "{:.2%}"),
        ]
        if judged:
            cells += [
                _number(row.frechet_to_float32, "{:.4f}"),
                _number(row.frechet_to_real, "{:.3f}"),
                _number(row.recognised, "{:.1%}"),
            ]
        table.add_row(row.precision, *cells)
    console.print(table)
    when = "any step" if report.every == 1 else f"every {report.every} steps"
    console.print(
        f"prediction error: rms relative to float32's for the same states, the worst of {when}; images: at equal "
        "noise, pixels from -1 to 1, and as 8-bit values",
        highlight=False,
    )
    console.print(_range_text(report), highlight=False)
    if report.judge is not None:
        console.print(
            f"Frechet distance: {report.judge}; {report.num_samples} real ones are {report.frechet_of_real:.3f} from "
            "the others",
            highlight=False,
        )
    else:
        console.print(f"Frechet distance: not measured, {missing}", highlight=False, markup=False)


def _range_text(report: PrecisionReport) -> str:
    from fastddpm.overflow import OverflowReport

    return f"largest activation: {OverflowReport(report.largest_activation, report.module, report.timestep)}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
