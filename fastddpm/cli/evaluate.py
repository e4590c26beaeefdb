"""`fastddpm evaluate`: what a model's samples are worth, and what lower precision costs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastddpm.cli.fidelity import DIGIT_SAMPLES, SAMPLES, check_fidelity, labels_in_turn, measure_fidelity
from fastddpm.cli.model import MODEL_HELP, add_model_options, open_model
from fastddpm.cli.options import add_sampler_options, best_device, check_output, device_name, integer, make_sampler

if TYPE_CHECKING:
    from rich.console import Console

    from fastddpm.evaluation.comparison import PrecisionReport
    from fastddpm.evaluation.frechet import Judge
    from fastddpm.interop.pretrained import Pretrained
    from fastddpm.networks.unet.model import UNet
    from fastddpm.sampling.sampler import Sampler

LOWER = "float16,bfloat16"
PRECISION_SAMPLES, PRECISION_STEPS = 64, 50
# What says that samples are to be compared with real images.
_OF_FIDELITY = ("real", "metrics", "feature_network", "inception_weights", "save_samples")
# What images that are there already have no use for.
_OF_SAMPLING = (
    *("num_samples", "steps", "timesteps", "spacing", "method", "eta", "guidance_scale", "thresholding", "dtype"),
    *("save_samples", "precision"),
)


def add_commands(commands: Any) -> None:
    """Adds the command to the parser."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure what a model's samples are worth",
        description="Compare a model's samples, or images that are there already, with real images: FID, KID, "
        "precision and recall, Inception score; or see, with --precision, what lower precision costs. Without MODEL it "
        "is the bundled model of handwritten digits, which is compared with scikit-learn's digits.",
    )
    evaluate.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"{MODEL_HELP}; or images that are there already: a .npz (arr_0 uint8 NHWC) or a folder of pictures",
    )
    evaluate.add_argument(
        "real",
        nargs="?",
        metavar="REAL",
        help="real images: a folder of pictures, cut and resized to the model's size; a .npz as the ADM evaluator "
        "reads it (arr_0, or mu and sigma, or both); or 'digits' (default for the bundled model)",
    )
    evaluate.add_argument(
        "-n",
        "--num-samples",
        type=integer(2),
        metavar="N",
        help=f"images to draw, of all classes in equal numbers (default: {SAMPLES}, {DIGIT_SAMPLES} for the bundled "
        f"model, {PRECISION_SAMPLES} for --precision)",
    )
    evaluate.add_argument("--json", type=Path, metavar="PATH.json", help="also write all figures to a file")
    group = evaluate.add_argument_group("what to measure")
    group.add_argument(
        "--metrics",
        metavar="M,M,...",
        help="of fid, kid, prc (precision and recall) and isc (Inception score); all but fid need torch-fidelity: "
        "pip install fastddpm[evaluate] (default: all that there can be)",
    )
    group.add_argument(
        "--precision",
        nargs="?",
        const=LOWER,
        metavar="P,P,...",
        help="compare the network in float16, bfloat16 or (CUDA only) tf32 with float32: its predictions for the same "
        "states, the images for the same noise, and what is left of float16's range; for the bundled model also the "
        f"Frechet distance to real digits (without names: {LOWER}; {PRECISION_STEPS} steps unless --steps is given)",
    )
    group = evaluate.add_argument_group("what distances are measured in")
    group.add_argument(
        "--inception-weights",
        type=Path,
        metavar="PATH",
        help="weights of FID's Inception v3, torch-fidelity's file or safetensors, where they cannot be downloaded",
    )
    group.add_argument(
        "--feature-network",
        metavar="PATH",
        help="another network that gives features: TorchScript, which is a program (open only what you trust), or "
        "ONNX; or 'digits', principal components of digits (default: digits if REAL is that, else Inception v3)",
    )
    group.add_argument(
        "--feature-input",
        choices=("uint8", "unit", "signed"),
        default="uint8",
        help="what that network takes: integers from 0 to 255, floats from 0 to 1, or from -1 to 1 (default: uint8)",
    )
    group.add_argument(
        "--feature-channels", type=int, choices=(1, 3), help="how many it takes; 3 gives grey images three equal ones"
    )
    evaluate.add_argument(
        "--save-samples",
        type=Path,
        metavar="PATH.npz",
        help="also write what was drawn, as the ADM evaluator reads it: arr_0 uint8 [N, H, W, 3], arr_1 labels",
    )
    add_model_options(evaluate)
    add_sampler_options(evaluate, steps=None, method=None, seed=0)
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from rich.console import Console

    from fastddpm.evaluation.reading import is_image_set

    wanted = [] if options.precision is None else ["precision"]
    if not wanted or any(getattr(options, name) is not None for name in _OF_FIDELITY):
        wanted.append("fidelity")
    ready = options.model is not None and is_image_set(options.model)
    given = [
        name for name in _OF_SAMPLING if getattr(options, name) is not None and getattr(options, name) is not False
    ]
    if ready and given:
        option = "--" + given[0].replace("_", "-")
        raise ValueError(f"{option} is given, but MODEL is {options.model}, images that are there already")
    for name, suffix in (("json", ".json"), ("save_samples", ".npz")):
        path = getattr(options, name)
        if path is not None:
            option = "--" + name.replace("_", "-")
            if path.suffix.lower() != suffix:
                raise ValueError(f"{option} is {path}, its suffix must be {suffix}")
            check_output(option, path)
    if "fidelity" in wanted:
        check_fidelity(options, is_bundled=_is_bundled(options))
    model = None if ready else open_model(options, latents="precision" not in wanted)
    console = Console(width=None if sys.stdout.isatty() else 140)
    results: dict[str, Any] = {}
    if model is not None and "precision" in wanted:
        results["precision"] = _precision(options, model, console)
    if "fidelity" in wanted:
        results["fidelity"] = measure_fidelity(options, model, console, is_bundled=_is_bundled(options))
    if options.json is not None:
        import torch

        from fastddpm.common.files import write_json
        from fastddpm.common.version import __version__

        about = {"model": options.model or "bundled digits", "fastddpm": __version__, "torch": torch.__version__}
        write_json(options.json, {**about, **results})
        print(f"wrote {options.json}")


def _is_bundled(options: argparse.Namespace) -> bool:
    from fastddpm.interop.pretrained import BUNDLED

    return options.model is None or Path(options.model).resolve() == BUNDLED.resolve()


def _precision(options: argparse.Namespace, model: Pretrained, console: Console) -> dict[str, Any]:
    from fastddpm.evaluation.comparison import check_precisions, compare_samplers
    from fastddpm.networks.network import usable_device

    if options.dtype is not None:
        raise ValueError(f"--dtype is {options.dtype}, but --precision compares several; it must be left out")
    device = usable_device(options.device or best_device())
    precisions = check_precisions([name.strip() for name in options.precision.split(",")], device, "--precision")
    judge, missing = _digit_judge(options)
    count = options.num_samples or PRECISION_SAMPLES

    def make(network: Callable[..., Any], *, dtype: str, cuda_graph: str | bool) -> Sampler:
        of = argparse.Namespace(**{**vars(options), "dtype": dtype, "default_steps": PRECISION_STEPS})
        return make_sampler(of, replace(model, unet=cast("UNet", network)), cuda_graph=cuda_graph)

    report = compare_samplers(
        model.unet,
        make,
        precisions,
        device=device,
        backend=options.backend,
        num_samples=count,
        seed=options.seed,
        class_labels=labels_in_turn(model, count),
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

    if not _is_bundled(options):
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
    from fastddpm.networks.overflow import OverflowReport

    return f"largest activation: {OverflowReport(report.largest_activation, report.module, report.timestep)}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
