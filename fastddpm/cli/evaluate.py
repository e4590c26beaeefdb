"""`fastddpm evaluate`: measure the quality of a model's samples, and the cost of lower precision."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastddpm.cli.fidelity import DIGIT_SAMPLES, SAMPLES, check_fidelity, measure_fidelity
from fastddpm.cli.model import MODEL_HELP, add_model_options, check_count, open_model
from fastddpm.cli.options import (
    add_sampler_options,
    chosen_device,
    device_name,
    integer,
    labels_in_turn,
    make_sampler,
    plain,
    wide_console,
)
from fastddpm.cli.outputs import check_output

if TYPE_CHECKING:
    from rich.console import Console

    from fastddpm.evaluation.comparison import PrecisionReport
    from fastddpm.evaluation.frechet import Judge
    from fastddpm.interop.pretrained import Pretrained
    from fastddpm.networks.unet.model import UNet
    from fastddpm.sampling.sampler import Sampler

LOWER = "float16,bfloat16"
PRECISION_SAMPLES, PRECISION_STEPS = 64, 50
# Each of these options asks for a comparison of samples with real images.
_OF_FIDELITY = ("real", "metrics", "feature_network", "inception_weights", "save_samples")
# These options have no meaning for images that exist already.
_OF_SAMPLING = (
    *("num_samples", "steps", "timesteps", "spacing", "method", "eta", "guidance_scale", "thresholding", "dtype"),
    *("save_samples", "precision"),
)


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure how good a model's samples are",
        description="Compare a model's samples, or images that exist already, with real images: FID, KID, precision "
        "and recall, Inception score; or see, with --precision, what lower precision costs. Without MODEL it is the "
        "bundled model of handwritten digits, which is compared with scikit-learn's digits.",
    )
    add = evaluate.add_argument
    add("model", nargs="?", metavar="MODEL",
        help=f"{MODEL_HELP}; or images that are there: a .npz (arr_0 uint8 NHWC), a folder of pictures or of shards",
        )  # fmt: skip
    add("real", nargs="?", metavar="REAL",
        help="real images: a folder of pictures, cut and resized to the model's size; a .npz as the ADM evaluator "
             "reads it (arr_0, or mu and sigma, or both); or 'digits' (default for the bundled model)")  # fmt: skip
    add("-n", "--num-samples", type=integer(2), metavar="N",
        help=f"images to draw, of all classes in equal numbers (default: {SAMPLES}, {DIGIT_SAMPLES} for the bundled "
             f"model, {PRECISION_SAMPLES} for --precision)")  # fmt: skip
    add("--json", type=Path, metavar="PATH.json", help="also write all figures to a file")
    add("--save-samples", type=Path, metavar="PATH.npz",
        help="also write what was drawn, as the ADM evaluator reads it: arr_0 uint8 [N, H, W, 3], arr_1 labels",
        )  # fmt: skip
    add = evaluate.add_argument_group("what to measure").add_argument
    add("--metrics", metavar="M,M,...",
        help="of fid, kid, prc (precision and recall) and isc (Inception score); all but fid need torch-fidelity: "
             "pip install fastddpm[evaluate] (default: all that can be measured)")  # fmt: skip
    add("--precision", nargs="?", const=LOWER, metavar="P,P,...",
        help="compare the network in float16, bfloat16 or (CUDA only) tf32 with float32: its predictions for the same "
             "states, the images for the same noise, and what is left of float16's range; for the bundled model also "
             f"the Frechet distance to real digits (without names: {LOWER}; {PRECISION_STEPS} steps unless --steps is "
             "given)")  # fmt: skip
    add = evaluate.add_argument_group("the features that distances are measured in").add_argument
    add("--inception-weights", type=Path, metavar="PATH",
        help="weights of FID's Inception v3, torch-fidelity's file or safetensors, where they cannot be downloaded",
        )  # fmt: skip
    add("--feature-network", metavar="PATH",
        help="another network that gives features: TorchScript, which is a program (open only files you trust), or "
             "ONNX; or 'digits', principal components of digits (default: digits if REAL is that, else Inception v3)",
        )  # fmt: skip
    add("--feature-input", choices=("uint8", "unit", "signed"), default="uint8",
        help="what that network takes: integers from 0 to 255, floats from 0 to 1, or from -1 to 1 (default: uint8)",
        )  # fmt: skip
    add("--feature-channels", type=int, choices=(1, 3),
        help="channels that network takes; 3 gives grey images three equal ones")  # fmt: skip
    add_model_options(evaluate)
    add_sampler_options(evaluate, steps=None, method=None, seed=0)
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from fastddpm.evaluation.reading import is_image_set
    from fastddpm.interop.pretrained import run_of

    precision = options.precision is not None
    fidelity = not precision or any(getattr(options, name) is not None for name in _OF_FIDELITY)
    ready = options.model is not None and run_of(options.model) is None and is_image_set(options.model)
    given = [name for name in _OF_SAMPLING if not (getattr(options, name) is None or getattr(options, name) is False)]
    if ready and given:
        option = "--" + given[0].replace("_", "-")
        raise ValueError(f"{option} is given, but MODEL is {options.model}, images that exist already")
    for option, path, suffix in (
        ("--json", options.json, ".json"), ("--save-samples", options.save_samples, ".npz"),
    ):  # fmt: skip
        if path is not None:
            check_output(option, path, suffix)
    if fidelity:
        check_fidelity(options, is_bundled=_is_bundled(options))
    model = None if ready else open_model(options, latents=not precision)
    results: dict[str, Any] = {}
    show: list[Callable[[Console], None]] = []  # called after the figures are saved, because printing may fail
    if model is not None and precision:
        results["precision"], printed = _precision(options, model)
        show.append(printed)
    if fidelity:
        results["fidelity"], printed = measure_fidelity(options, model, is_bundled=_is_bundled(options))
        show.append(printed)
    if options.json is not None:
        import torch

        from fastddpm.common.files import write_json
        from fastddpm.common.version import __version__

        about = {"model": options.model or "bundled digits", "fastddpm": __version__, "torch": torch.__version__}
        write_json(options.json, {**about, **results})
    for printed in show:
        printed(wide_console())
    if options.json is not None:
        print(f"wrote {options.json}")


def _is_bundled(options: argparse.Namespace) -> bool:
    from fastddpm.interop.pretrained import BUNDLED

    return options.model is None or Path(options.model).resolve() == BUNDLED.resolve()


def _precision(options: argparse.Namespace, model: Pretrained) -> tuple[dict[str, Any], Callable[[Console], None]]:
    """Return the figures, and a function that prints them."""
    from fastddpm.evaluation.comparison import check_precisions, compare_samplers

    if options.dtype is not None:
        raise ValueError(f"--dtype is {options.dtype}, but --precision compares several; it must be left out")
    device = chosen_device(options)
    precisions = check_precisions([name.strip() for name in options.precision.split(",")], device, "--precision")
    judge, missing = _digit_judge(options)
    count = options.num_samples or PRECISION_SAMPLES
    check_count(model, count, "--num-samples")

    def make(network: Callable[..., Any], *, dtype: str, cuda_graph: str | bool) -> Sampler:
        of = argparse.Namespace(**{**vars(options), "dtype": dtype, "default_steps": PRECISION_STEPS})
        return make_sampler(of, replace(model, unet=cast("UNet", network)), cuda_graph=cuda_graph)

    report = compare_samplers(
        model.unet, make, precisions, device=device, backend=options.backend, num_samples=count, seed=options.seed,
        class_labels=labels_in_turn(model, count), batch_size=options.batch_size, judge=judge,
        progress=True,
    )  # fmt: skip

    def show(console: Console) -> None:
        _print_precision(report, console, missing)
        print(f"device {device_name(device)}")

    return {**report.to_dict(), "device_name": device_name(device), "no_distribution_because": missing}, show


def _digit_judge(options: argparse.Namespace) -> tuple[Judge | None, str | None]:
    """Return the judge of the bundled model's samples, or None and the reason."""
    from fastddpm.evaluation.frechet import DigitJudge

    if not _is_bundled(options):
        return None, "only the bundled model comes with real images to compare with"
    try:
        return DigitJudge(), None
    except ModuleNotFoundError as error:
        return None, str(error)


def _print_precision(report: PrecisionReport, console: Console, missing: str | None) -> None:
    from rich.table import Table

    from fastddpm.networks.overflow import OverflowReport

    columns = {
        "prediction error": ("worst_prediction_error", "{:.2e}"),
        "image rms": ("image_rms", "{:.2e}"),
        "image max": ("image_max", "{:.2e}"),
        "pixels differ": ("pixels_differ", "{:.2%}"),
        "by > 1": ("pixels_differ_by_more", "{:.2%}"),
    }
    if report.judge is not None:
        columns |= {
            "Frechet to float32": ("frechet_to_float32", "{:.4f}"),
            "to real": ("frechet_to_real", "{:.3f}"),
            "recognised": ("recognised", "{:.1%}"),
        }
    title = f"{report.num_samples} images, {report.steps} steps of {report.method}, against float32"
    table = Table("precision", title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for row in report.results:
        values = [(getattr(row, name), form) for name, form in columns.values()]
        cells = ["-" if value is None else form.format(value) for value, form in values]
        table.add_row(row.precision, *(cells if row.finite else ["not finite", *["-"] * (len(cells) - 1)]))
    console.print(table)
    when = "any step" if report.every == 1 else f"every {report.every} steps"
    plain(console, f"prediction error: rms relative to float32's for the same states, the worst of {when}; images: at "
                   "equal noise, pixels from -1 to 1, and as 8-bit values")  # fmt: skip
    largest = OverflowReport(report.largest_activation, report.module, report.timestep)
    plain(console, f"largest activation: {largest}")
    if report.judge is not None:
        plain(console, f"Frechet distance: {report.judge}; {report.num_samples} real ones are "
                       f"{report.frechet_of_real:.3f} from the others")  # fmt: skip
    else:
        plain(console, f"Frechet distance: not measured, {missing}")
